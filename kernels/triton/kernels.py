"""The kernels: a sweep over slices of the vocabulary, and what turns its states into divergences.

For a group of G circuits `partial_kernel` reads each logit of the circuits once and the reference's
once: (1 + 1/G) tensor reads a pair. `finish_kernel` reads a few dozen bytes a row, and a row's logits
once more only where its sums were not good enough for a small divergence.
"""

import triton
import triton.language as tl

from .algebra import (
    LOG2_E,
    absorb_circuit,
    absorb_reference,
    finalize,
    good_for_gradients,
    merge_lanes,
    pivot_growth,
)

# Arguments that are plain numbers at run time, whatever they are: a batch of one row, or of a multiple
# of 16, runs the code that was compiled for any other.
SIZES = (
    "p_row_stride",
    "n_rows",
    "n_cols",
    "n_circuits",
    "first_circuit",
    "n_groups",
    "n_slices",
    "slice_size",
    "lead",
    "aligned",
    "unit",
    "inverse",
)
TABLE_NUMBERS = ("first", "n", "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7")


@triton.jit
def temperature_of(unit, inverse, COOL: tl.constexpr):
    """Return log2(e) / T and 1 / T; if not COOL, T is known to be 1 and costs no register."""
    if COOL:
        return unit, inverse
    else:
        return LOG2_E, 1.0


@triton.jit
def load_tile(pointer, offsets):
    """Load logits as float32. They are cast at once: comparisons of raw half types are not IEEE's."""
    return tl.load(pointer + offsets).to(tl.float32)


@triton.jit
def absorb_tiles(m_p, z_p, states, p, qs, unit, inverse, G: tl.constexpr, ACCURATE: tl.constexpr):
    """Absorb a tile of the reference and the same tile of each circuit into the lanes' states."""
    new_m_p, z_p, weight, scale_p = absorb_reference(m_p, z_p, p, unit)
    new_states = ()
    for i in tl.static_range(G):
        new_states = new_states + (
            absorb_circuit(
                states[i], p, weight, m_p, new_m_p, scale_p, qs[i], unit, inverse, ACCURATE
            ),
        )
    return new_m_p, z_p, new_states


@triton.jit
def sweep(
    m_p,
    z_p,
    states,
    p_ptr,
    q_ptrs,
    begin,
    end,
    aligned,
    unit,
    inverse,
    G: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """Absorb tokens [begin, end) into the states of LANES lanes.

    All pointers point to a multiple of 16 bytes if `aligned`. The body starts at the first token that
    lies on such a multiple: tiles of VEC tokens a lane, in 128-bit loads without a mask. What is left,
    fewer than VEC tokens before the body and fewer than a tile after it, is taken one token a lane,
    with a mask; so is everything if not `aligned`.
    """
    TILE: tl.constexpr = LANES * VEC
    body_begin = tl.minimum(tl.cdiv(begin, VEC) * VEC, end)
    n_tiles = tl.where(aligned != 0, (end - body_begin) // TILE, 0)
    body_end = body_begin + n_tiles * TILE

    lane = tl.arange(0, LANES)
    offsets = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for tile in tl.range(0, n_tiles, loop_unroll_factor=UNROLL):
        start = tl.multiple_of(body_begin + tile * TILE, VEC)
        p = load_tile(p_ptr + start, offsets)
        qs = ()
        for i in tl.static_range(G):
            qs = qs + (load_tile(q_ptrs[i] + start, offsets),)
        m_p, z_p, states = absorb_tiles(m_p, z_p, states, p, qs, unit, inverse, G, ACCURATE)

    n_before = body_begin - begin
    n_rest = n_before + end - body_end
    for start in tl.range(0, n_rest, LANES):
        index = start + lane[:, None]
        token = index + tl.where(index < n_before, begin, body_end - n_before)
        inside = index < n_rest
        # Outside, a token that both sides mask: it counts 0. Put there after the cast to float32.
        p = tl.load(p_ptr + token, mask=inside, other=0.0).to(tl.float32)
        p = tl.where(inside, p, -float("inf"))
        qs = ()
        for i in tl.static_range(G):
            q = tl.load(q_ptrs[i] + token, mask=inside, other=0.0).to(tl.float32)
            qs = qs + (tl.where(inside, q, -float("inf")),)
        m_p, z_p, states = absorb_tiles(m_p, z_p, states, p, qs, unit, inverse, G, ACCURATE)
    return m_p, z_p, states


@triton.jit
def row_pointer(table_ptr, circuit, row, shift, DTYPE: tl.constexpr):
    """Return where a circuit's row starts, rounded down by `shift` tokens to 16 bytes.

    The table holds an address and a row stride a circuit. The hint stands on the pointer: on the
    integer it would be lost.
    """
    address = tl.load(table_ptr + 2 * circuit)
    stride = tl.load(table_ptr + 2 * circuit + 1)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + (row * stride - shift), 16)


@triton.jit(do_not_specialize=SIZES)
def partial_kernel(
    p_ptr,
    table_ptr,
    state_ptr,
    p_row_stride: tl.int64,
    n_rows: tl.int32,
    n_cols: tl.int32,
    n_circuits: tl.int32,
    first_circuit: tl.int32,
    n_groups: tl.int32,
    n_slices: tl.int32,
    slice_size: tl.int32,
    lead: tl.int32,
    aligned: tl.int32,
    unit: tl.float32,
    inverse: tl.float32,
    G: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    ACCURATE: tl.constexpr,
    COOL: tl.constexpr,
):
    """Write the state of one slice of one row for a group of G circuits.

    Program = (row, slice, group), group fastest: programs that share a slice of the reference run
    together. `lead` is how many tokens p_ptr lies behind a multiple of 16 bytes. Slices are cut at
    multiples of slice_size from there, so that their number depends on n_cols alone.

    states[field, circuit, row, slice], field in (m_p, z_p, m_q, z_q, s, h, g, c, doubt), float32.

    Reads n_cols·itemsize·(1 + 1/G) bytes a row and circuit; writes 36 bytes a slice. Two exponentials
    a pair for one circuit, 1 + 1/G in a group, and 2/VEC to scale older sums.
    """
    unit, inverse = temperature_of(unit, inverse, COOL)
    program = tl.program_id(0).to(tl.int64)
    group = (program % n_groups).to(tl.int32)
    part = ((program // n_groups) % n_slices).to(tl.int32)
    row = program // n_groups // n_slices
    circuit = first_circuit + group * G

    shift = ((lead + row * p_row_stride) % VEC).to(tl.int32) * aligned
    p_row = tl.multiple_of(p_ptr + (row * p_row_stride - shift), 16)
    begin = tl.maximum(part * slice_size, shift)
    end = tl.minimum((part + 1) * slice_size, shift + n_cols)

    zero = tl.zeros((LANES,), tl.float32)
    empty = zero - float("inf")
    q_rows = ()
    states = ()
    for i in tl.static_range(G):
        q_rows = q_rows + (row_pointer(table_ptr, circuit + i, row, shift, p_ptr.dtype.element_ty),)
        states = states + ((empty, zero, zero, zero, zero, zero),)
    m_p, z_p, states = sweep(
        empty,
        zero,
        states,
        p_row,
        q_rows,
        begin,
        end,
        aligned,
        unit,
        inverse,
        G,
        LANES,
        VEC,
        UNROLL,
        ACCURATE,
    )

    field_stride = n_circuits.to(tl.int64) * n_rows * n_slices
    # Without h and g nothing speaks for a small divergence: it is looked at again.
    doubt = zero if ACCURATE else zero + float("inf")
    for i in tl.static_range(G):
        m_q, z_q, s, h, g, c = states[i]
        merged = merge_lanes(m_p, z_p, m_q, z_q, s, h, g, c, doubt)
        out = state_ptr + ((circuit + i).to(tl.int64) * n_rows + row) * n_slices + part
        for field in tl.static_range(9):
            tl.store(out + field * field_stride, merged[field])


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    p_ptr,
    table_ptr,
    state_ptr,
    kl_ptr,
    p_row_stride: tl.int64,
    n_rows: tl.int32,
    n_cols: tl.int32,
    n_circuits: tl.int32,
    n_slices: tl.int32,
    lead: tl.int32,
    aligned: tl.int32,
    unit: tl.float32,
    inverse: tl.float32,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    COOL: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Merge the slices of one row and circuit into its divergence, looking twice if need be.

    kl[circuit, row]; to KEEP what gradients need, rows[field, circuit, row] with field in (KL, m_p, z_p,
    m_q, z_p / z_q, c, growth, mean): c is a pivot, growth = e^(lse_p - lse_q - c) - 1, mean = Σ P d; z_p
    is NaN where KL is. float32.

    Program = (circuit, row). Reads 36 bytes a slice and writes 4 or 32. Where the sums do not settle a
    small divergence, the row is swept again at the pivot that is now known: every term is then of
    second order and none is negative. That reads n_cols·itemsize·2 bytes more, and takes two
    exponentials a pair.
    """
    unit, inverse = temperature_of(unit, inverse, COOL)
    program = tl.program_id(0).to(tl.int64)
    circuit = (program // n_rows).to(tl.int32)
    row = program % n_rows

    lane = tl.arange(0, LANES)
    inside = lane < n_slices
    source = state_ptr + program * n_slices + lane
    field_stride = n_circuits.to(tl.int64) * n_rows * n_slices
    m_p = tl.load(source, mask=inside, other=-float("inf"))
    z_p = tl.load(source + field_stride, mask=inside, other=0.0)
    m_q = tl.load(source + 2 * field_stride, mask=inside, other=-float("inf"))
    z_q = tl.load(source + 3 * field_stride, mask=inside, other=0.0)
    s = tl.load(source + 4 * field_stride, mask=inside, other=0.0)
    h = tl.load(source + 5 * field_stride, mask=inside, other=0.0)
    g = tl.load(source + 6 * field_stride, mask=inside, other=0.0)
    c = tl.load(source + 7 * field_stride, mask=inside, other=0.0)
    doubt = tl.load(source + 8 * field_stride, mask=inside, other=0.0)
    m_p, z_p, m_q, z_q, s, h, g, c, doubt, x = merge_lanes(m_p, z_p, m_q, z_q, s, h, g, c, doubt)
    divergence, settled = finalize(m_p, z_p, m_q, z_q, s, h, g, doubt, x)
    ratio = z_p / z_q
    if KEEP:
        settled = settled & good_for_gradients(z_p, divergence, doubt)

    if settled == 0:
        shift = ((lead + row * p_row_stride) % VEC).to(tl.int32) * aligned
        p_row = tl.multiple_of(p_ptr + (row * p_row_stride - shift), 16)
        q_row = row_pointer(table_ptr, circuit, row, shift, p_ptr.dtype.element_ty)
        zero = tl.zeros((LANES,), tl.float32)
        state = (zero + m_q, zero, zero, zero, zero, zero + c)
        _, sums_p, states = sweep(
            zero + m_p,
            zero,
            (state,),
            p_row,
            (q_row,),
            shift,
            shift + n_cols,
            aligned,
            unit,
            inverse,
            1,
            LANES,
            VEC,
            1,
            True,
        )
        _, sums_q, sums, near_sums, far_sums, _ = states[0]
        z_p = tl.sum(sums_p, axis=0)
        s = tl.sum(sums, axis=0)
        h = tl.sum(near_sums, axis=0)
        g = tl.sum(far_sums, axis=0)
        divergence = h / z_p + g / tl.sum(sums_q, axis=0)
    tl.store(kl_ptr + program, divergence)
    if KEEP:
        growth = pivot_growth(z_p, s, h, ratio * tl.exp2(-x * LOG2_E) * g, divergence, x)
        mean = s / z_p
        z_p = tl.where(divergence == divergence, z_p, float("nan"))
        row_stride = n_circuits.to(tl.int64) * n_rows
        fields = (m_p, z_p, m_q, ratio, c, growth, mean)
        for field in tl.static_range(7):
            tl.store(kl_ptr + (1 + field) * row_stride + program, fields[field])


@triton.jit(do_not_specialize=TABLE_NUMBERS)
def table_kernel(
    table_ptr,
    first: tl.int32,
    n: tl.int32,
    a0: tl.int64,
    a1: tl.int64,
    a2: tl.int64,
    a3: tl.int64,
    a4: tl.int64,
    a5: tl.int64,
    a6: tl.int64,
    a7: tl.int64,
):
    """Write up to 8 numbers to the table, from `first` on.

    Numbers travel as arguments: a copy from the host would make it wait, or outlive a captured graph.
    """
    numbers = (a0, a1, a2, a3, a4, a5, a6, a7)
    for i in tl.static_range(8):
        tl.store(table_ptr + first + i, numbers[i], mask=i < n)
