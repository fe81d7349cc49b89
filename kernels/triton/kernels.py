"""The kernels: a sweep over slices of the vocabulary, and the step from its states to divergences.

For a group of G circuits, `partial_kernel` reads each logit of the circuits once and the
reference's once: (1 + 1/G) tensor reads per pair. `finish_kernel` reads 20 bytes per slice, and a
slice's logits again only if its sums were not accurate enough.
"""

import triton
import triton.language as tl

from .algebra import (
    GRID,
    LN_2,
    LOG2_E,
    N_KEPT,
    NEGLIGIBLE,
    SCALE,
    estimate,
    exact_differences,
    judge,
    kept,
    merge,
    quick_terms,
    stretch_of,
    terms,
    to_grid,
    weights,
)
from .arithmetic import add_products, add_up

# Arguments on whose values the compiled code does not depend: a batch of one row, or of a multiple
# of 16 rows, runs the code that was compiled for any other.
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
# Arguments whose tensors may start anywhere: `lead` and `aligned` tell the kernels all that they
# know of a row's alignment.
ANYWHERE = ("p_ptr",)
# `pointer_table` adds this to every number.
DISGUISE = tl.constexpr(2**32)
# The numbers of a slice's state: the bases b_p and b_q, and the sums z_p, s and h.
N_FIELDS = tl.constexpr(5)
# How often a row may be summed again. At most these looks are needed: the slices that matter, at
# the row's own pivot; all slices; all at the row's maxima, if a sum overflowed; all at the pivot
# found there.
LOOKS = tl.constexpr(4)
# Removes the scale of the weights from their sums.
UNSCALE = tl.constexpr(2.0**-SCALE.value)
# A base of 0 means that all of a slice's first tokens are masked. Such a slice is suspect if its
# mass is below this: some of its weights may have been too small for a float32.
FAINT = tl.constexpr(2.0**-60)
# The circuit's mass of a slice is a difference; if it is less than this fraction of the terms, it
# may be nothing but rounding error.
NOISE = tl.constexpr(2.0**-18)


@triton.jit
def temperature_of(unit, inverse, DIVIDE: tl.constexpr):
    """Return log2(e) / T and 1 / T; if not DIVIDE, T is known to be 1 and costs no registers."""
    if DIVIDE:
        return unit, inverse
    else:
        return LOG2_E, 1.0


@triton.jit
def load_vectors(pointer, start, lane, VEC: tl.constexpr):
    """Load VEC tokens per lane from `start` as float32: a tuple of tensors, (LANES, VEC) together.

    They are cast immediately: comparisons of raw half types do not follow IEEE 754. bfloat16 is
    loaded two at a time and split as integers, with one instruction each where the compiler's own
    conversion takes 1.5.
    """
    if pointer.dtype.element_ty == tl.bfloat16:
        offsets = lane[:, None] * (VEC // 2) + tl.arange(0, VEC // 2)[None, :]
        words = tl.load(pointer.to(tl.pointer_type(tl.uint32)) + (offsets + start // 2))
        return (
            (words << 16).to(tl.float32, bitcast=True),
            (words & 0xFFFF0000).to(tl.float32, bitcast=True),
        )
    else:
        offsets = lane[:, None] * VEC + tl.arange(0, VEC)[None, :]
        return (tl.load(pointer + (offsets + start)).to(tl.float32),)


@triton.jit
def load_inside(pointer, inside):
    """Load a token per lane as float32; outside, -inf: a token that both sides mask adds 0."""
    # The -inf is put there after the cast: in half precision it might become another number.
    return tl.where(inside, tl.load(pointer, mask=inside, other=0.0).to(tl.float32), -float("inf"))


@triton.jit
def base_of(row, begin, end, unit, LANES: tl.constexpr):
    """Return a base for tokens [begin, end): an estimate from the first LANES of them."""
    token = begin + tl.arange(0, LANES)
    return estimate(load_inside(row + token, token < end), unit)


@triton.jit
def absorb(
    z_p,
    sums,
    base_p,
    bases_q,
    ps,
    qs,
    unit,
    inverse,
    PARTS: tl.constexpr,
    G: tl.constexpr,
    AGAIN: tl.constexpr,
    DIVIDE: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Absorb a tile of the reference and the same tile of each circuit into the lanes' sums.

    A tile is summed by itself: if a lane's chain of multiply-adds ran through all tiles, and all
    weights were equal, its many rounding errors would have the same sign.
    """
    tile_z, tile_weights = None, ()
    for part in tl.static_range(PARTS):
        weight = weights(ps[part], unit, base_p if AGAIN else base_p - SCALE)
        tile_z = add_up(tile_z, weight, PACKING)
        tile_weights = tile_weights + (weight,)
    z_p += tile_z
    new_sums = ()
    for i in tl.static_range(G):
        s, h, mass = None, None, None
        for part in tl.static_range(PARTS):
            p, q, weight = ps[part], qs[i][part], tile_weights[part]
            if AGAIN:
                d = exact_differences(p, q, base_p, bases_q[i], unit, inverse)
                t, term, circuit_weight = terms(d, weight, q, bases_q[i], unit)
                s = add_up(s, t, PACKING)
                h = add_up(h, term, PACKING)
                mass = add_up(mass, circuit_weight, PACKING)
            else:
                x, rise = quick_terms(p, q, base_p - bases_q[i], unit, DIVIDE, PACKING)
                s = add_products(s, weight, x, PACKING)
                h = add_products(h, weight, rise, PACKING)
        all_s, all_h, all_mass = sums[i]
        new_sums = new_sums + ((all_s + s, all_h + h, all_mass + mass if AGAIN else all_mass),)
    return z_p, new_sums


@triton.jit
def sweep(
    base_p,
    bases_q,
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
    AGAIN: tl.constexpr,
    DIVIDE: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Return z_p and each circuit's (s, h, mass) over tokens [begin, end).

    If AGAIN, the differences are exact; only then is the circuit's mass summed.

    If `aligned`, all pointers point to a multiple of 16 bytes. The body starts at the first token
    on such a multiple: tiles of VEC tokens per lane, in 128-bit loads without a mask. The rest,
    fewer than VEC tokens before the body and fewer than a tile after it, is taken one token per
    lane, with a mask; so is everything if not `aligned`.
    """
    TILE: tl.constexpr = LANES * VEC
    PARTS: tl.constexpr = 2 if p_ptr.dtype.element_ty == tl.bfloat16 else 1
    body_begin = tl.minimum(tl.cdiv(begin, VEC) * VEC, end)
    n_tiles = tl.where(aligned != 0, (end - body_begin) // TILE, 0)
    body_end = body_begin + n_tiles * TILE

    lane = tl.arange(0, LANES)
    zero = tl.zeros((LANES,), tl.float32)
    z_p = zero
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + ((zero, zero, zero),)

    for tile in tl.range(0, n_tiles, loop_unroll_factor=UNROLL):
        start = tl.multiple_of(body_begin + tile * TILE, VEC)
        ps = load_vectors(p_ptr, start, lane, VEC)
        qs = ()
        for i in tl.static_range(G):
            qs = qs + (load_vectors(q_ptrs[i], start, lane, VEC),)
        z_p, sums = absorb(
            z_p, sums, base_p, bases_q, ps, qs, unit, inverse, PARTS, G, AGAIN, DIVIDE, PACKING
        )

    n_before = body_begin - begin
    n_rest = n_before + end - body_end
    for start in tl.range(0, n_rest, LANES):
        index = start + lane[:, None]
        token = index + tl.where(index < n_before, begin, body_end - n_before)
        inside = index < n_rest
        qs = ()
        for i in tl.static_range(G):
            qs = qs + ((load_inside(q_ptrs[i] + token, inside),),)
        ps = (load_inside(p_ptr + token, inside),)
        z_p, sums = absorb(
            z_p, sums, base_p, bases_q, ps, qs, unit, inverse, 1, G, AGAIN, DIVIDE, PACKING
        )

    total = ()
    for i in tl.static_range(G):
        s, h, mass = sums[i]
        s, h, mass = tl.sum(s, axis=0), tl.sum(h, axis=0), tl.sum(mass, axis=0)
        if not AGAIN:
            s, h = s * (-LN_2 * UNSCALE), h * UNSCALE
        total = total + ((s, h, mass),)
    z_p = tl.sum(z_p, axis=0)
    return z_p if AGAIN else z_p * UNSCALE, total


@triton.jit
def row_address(table_ptr, circuit, row, DTYPE: tl.constexpr):
    """Return where a circuit's row starts, from the table of addresses and row strides."""
    address = tl.load(table_ptr + 2 * circuit)
    stride = tl.load(table_ptr + 2 * circuit + 1)
    return address.to(tl.pointer_type(DTYPE)) + row * stride


@triton.jit
def row_pointer(table_ptr, circuit, row, shift, DTYPE: tl.constexpr):
    """Return where a circuit's row starts, rounded down by `shift` tokens to 16 bytes.

    The alignment hint is on the pointer: on the integer it would be lost. If rows are not aligned,
    the hint is false but has no effect, since tokens are then taken one per lane.
    """
    return tl.multiple_of(row_address(table_ptr, circuit, row, DTYPE) - shift, 16)


@triton.jit
def place_of(lead, row, p_row_stride, aligned, VEC: tl.constexpr):
    """Return (shift, first): where a row begins, and from where it is cut into slices.

    `shift` is how many tokens after a multiple of 16 bytes the row starts, 0 if not `aligned`; all
    tokens are counted from that multiple. `first` is the reference's first multiple of 16 bytes
    within its row, even if not `aligned`: so all circuits have the same slices, with bases from the
    same tokens.
    """
    # VEC is a power of two, so the mask gives the remainder, which is never negative.
    behind = ((lead + row * p_row_stride) & (VEC - 1)).to(tl.int32)
    shift = behind * aligned
    return shift, shift + ((VEC - behind) & (VEC - 1))


@triton.jit
def slice_of(part, slice_size, shift, first, n_cols):
    """Return where a slice begins and ends."""
    begin = tl.where(part == 0, shift, tl.minimum(first + part * slice_size, shift + n_cols))
    return begin, tl.minimum(first + (part + 1) * slice_size, shift + n_cols)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def partial_kernel(
    p_ptr,
    table_ptr,
    state_ptr,
    p_row_stride: tl.int64,
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
    DIVIDE: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Write the state of one slice of one row for a group of G circuits.

    Program = (slice, row, group), group fastest: programs that share a slice of the reference run
    together. A program is one warp, so no warp waits for another. `lead` is how many tokens after a
    multiple of 16 bytes p_ptr lies.

    states[row, slice, circuit, field], field in (b_p, z_p, b_q, s, h), float32: a program's numbers
    lie beside each other, so that all are stored from one address. The bases are those of the
    slice's first LANES tokens.

    Reads n_cols·itemsize·(1 + 1/G) bytes per row and circuit, and LANES tokens per slice and tensor
    once more, from a cache; writes 20 bytes per slice. 1 + 1/G exponentials per pair.
    """
    unit, inverse = temperature_of(unit, inverse, DIVIDE)
    program, part = tl.program_id(0), tl.program_id(1)
    row = (program // n_groups).to(tl.int64)
    circuit = first_circuit + (program % n_groups) * G

    shift, first = place_of(lead, row, p_row_stride, aligned, VEC)
    begin, end = slice_of(part, slice_size, shift, first, n_cols)
    p_row = tl.multiple_of(p_ptr + (row * p_row_stride - shift), 16)
    base_p = base_of(p_row, begin, end, unit, LANES)
    q_rows = ()
    bases_q = ()
    for i in tl.static_range(G):
        q_row = row_pointer(table_ptr, circuit + i, row, shift, p_ptr.dtype.element_ty)
        q_rows = q_rows + (q_row,)
        bases_q = bases_q + (base_of(q_row, begin, end, unit, LANES),)
    z_p, sums = sweep(
        base_p,
        bases_q,
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
        False,
        DIVIDE,
        PACKING,
    )

    out = state_ptr + (row * n_slices * n_circuits + (part * n_circuits + circuit)) * N_FIELDS
    for i in tl.static_range(G):
        s, h, _ = sums[i]
        state = (base_p, z_p, bases_q[i], s, h)
        for field in tl.static_range(N_FIELDS):
            tl.store(out + (i * N_FIELDS + field), state[field])


@triton.jit
def maxima(p_row, q_row, shift, n_cols, unit, LANES: tl.constexpr):
    """Return bases for a whole row, from its maxima, and whether it has a divergence at all.

    It has none if a logit is NaN or +inf, or if all of a side's logits are -inf.
    """
    lane = tl.arange(0, LANES)
    top_p = tl.full((LANES,), -float("inf"), tl.float32)
    top_q = top_p
    number = tl.full((LANES,), 1, tl.int32)
    for start in tl.range(0, n_cols, LANES):
        inside = start + lane < n_cols
        p = load_inside(p_row + shift + start + lane, inside)
        q = load_inside(q_row + shift + start + lane, inside)
        number = number & ((p == p) & (q == q)).to(tl.int32)
        top_p = tl.maximum(top_p, p)
        top_q = tl.maximum(top_q, q)
    top_p = tl.max(top_p, axis=0) * unit
    top_q = tl.max(top_q, axis=0) * unit
    defined = (tl.min(number, axis=0) == 1) & (tl.abs(top_p) < float("inf"))
    # The bases are not below the maxima: with weights above 1, a divergence of 1e38 would be
    # infinite.
    return to_grid(top_p) + GRID, to_grid(top_q) + GRID, defined & (tl.abs(top_q) < float("inf"))


@triton.jit
def sum_again(
    state,
    again,
    base_p,
    base_q,
    p_row,
    q_row,
    shift,
    first,
    n_cols,
    n_slices,
    slice_size,
    aligned,
    unit,
    inverse,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    SLICES: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Return the state of all slices (SLICES,) with those summed `again` at other bases."""
    b_p, z_p, b_q, mass, s, h, size = state
    index = tl.arange(0, SLICES)
    for part in tl.range(0, n_slices):
        this = index == part
        if tl.max((this & again).to(tl.int32), axis=0) > 0:
            begin, end = slice_of(part, slice_size, shift, first, n_cols)
            new_z_p, sums = sweep(
                base_p,
                (base_q,),
                p_row,
                (q_row,),
                begin,
                end,
                aligned,
                unit,
                inverse,
                1,
                LANES,
                VEC,
                1,
                True,
                # DIVIDE matters only in the first pass: differences are exact here, whatever T is.
                False,
                PACKING,
            )
            new_s, new_h, new_mass = sums[0]
            b_p = tl.where(this, base_p, b_p)
            z_p = tl.where(this, new_z_p, z_p)
            b_q = tl.where(this, base_q, b_q)
            mass = tl.where(this, new_mass, mass)
            s = tl.where(this, new_s, s)
            h = tl.where(this, new_h, h)
            size = tl.where(this, 0.0, size)
    return b_p, z_p, b_q, mass, s, h, size


@triton.jit
def look_at(state, unseen, stretch, n_slices, KEEP: tl.constexpr):
    """Merge slices; return (row, x, divergence, finite, settled, again): see `merge` and `judge`.

    `settled` is whether the divergence is finite and accurate enough. If it is not, `again` marks
    the slices to sum again: those with a large part of the doubt, and all that are `unseen`.
    """
    merged, x, finite, doubt, plain_doubt = merge(state, stretch, KEEP)
    if unseen is not None:
        doubt = tl.where(unseen, float("inf"), doubt)
        plain_doubt = tl.where(unseen, float("inf"), plain_doubt)
    divergence, good, room, plain_room = judge(merged, x, doubt, plain_doubt, KEEP)
    # The sum that is not accurate enough is the plain one for a large divergence, or the accurate
    # one for a small divergence.
    again = tl.where(
        plain_room > 0.0,
        plain_doubt * n_slices > plain_room,
        doubt * n_slices > (room if KEEP else tl.maximum(room, NEGLIGIBLE)),
    )
    return merged, x, divergence, finite, finite & good, again


@triton.jit
def first_look(state, some, stretch, n_slices, KEEP: tl.constexpr):
    """Return slices as partial_kernel left them, and what `look_at` returns for them.

    The base of a slice whose first tokens are all masked is 0. If its sum is then tiny, although it
    has `some` tokens, its weights may have been too small for a float32. If the reference's base is
    far too low, the circuit's mass may be lost in rounding. The mass of such a slice is left out
    for now, and the slice is summed again at the base of the others.
    """
    b_p, z_p, b_q, mass, s, h, size = state
    unseen_p = some & (b_p == 0.0) & (z_p < FAINT)
    unseen_q = some & (((b_q == 0.0) & (mass < FAINT)) | (mass < size * NOISE))
    z_p = tl.where(unseen_p, 0.0, z_p)
    mass = tl.where(unseen_q, 0.0, mass)
    state = (b_p, z_p, b_q, mass, s, h, size)
    return state, look_at(state, unseen_p | unseen_q, stretch, n_slices, KEEP)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
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
    slice_size: tl.int32,
    lead: tl.int32,
    aligned: tl.int32,
    unit: tl.float32,
    inverse: tl.float32,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    SLICES: tl.constexpr,
    DIVIDE: tl.constexpr,
    KEEP: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Merge the slices of one row and circuit into its divergence; look again where necessary.

    Writes kl[circuit, row], or, to KEEP what gradients need, rows[circuit, row, field] with KL and
    the fields of `kept`, in float32.

    Program = (circuit, row), of one warp. Reads 20 bytes per slice and writes 4 or 40. A slice
    whose pivot was not good enough is summed again at the row's pivot: that reads
    slice_size·itemsize·2 bytes more and takes two exponentials per pair. If a sum overflowed or
    underflowed, the row is scanned for its maxima and all of its slices are summed again.
    """
    unit, inverse = temperature_of(unit, inverse, DIVIDE)
    program = tl.program_id(0)
    circuit = program // n_rows
    row = (program % n_rows).to(tl.int64)
    shift, first = place_of(lead, row, p_row_stride, aligned, VEC)
    p_row = tl.multiple_of(p_ptr + (row * p_row_stride - shift), 16)

    index = tl.arange(0, SLICES)
    inside = index < n_slices
    source = state_ptr + ((row * n_slices + index) * n_circuits + circuit) * N_FIELDS
    b_p = tl.load(source, mask=inside, other=0.0)
    z_p = tl.load(source + 1, mask=inside, other=0.0)
    b_q = tl.load(source + 2, mask=inside, other=0.0)
    s = tl.load(source + 3, mask=inside, other=0.0)
    h = tl.load(source + 4, mask=inside, other=0.0)
    # Slices that have tokens. The last slice has none if the first slice, which also takes the
    # tokens before the first multiple of 16 bytes, leaves it none.
    some = inside & ((index == 0) | (index * slice_size < n_cols - (first - shift)))
    state = (b_p, z_p, b_q, z_p + (h - s), s, h, z_p + tl.abs(s) + tl.abs(h))
    stretch = stretch_of(unit, inverse)
    state, found = first_look(state, some, stretch, n_slices, KEEP)
    merged, x, divergence, finite, settled, again = found
    defined = finite
    look = 0
    while (look < LOOKS) & (settled == 0):
        q_row = row_pointer(table_ptr, circuit, row, shift, p_ptr.dtype.element_ty)
        base_p, sum_p, base_q, _, _ = merged
        # With the bases raised by this, no likely token's weight is above 1, where the rounding
        # error of its exponent would be larger.
        up = to_grid(tl.log2(sum_p))
        base_p += up
        base_q += up
        at_maxima = finite == 0
        if at_maxima:
            base_p, base_q, defined = maxima(p_row, q_row, shift, n_cols, unit, LANES)
            # A row without a divergence is not summed again.
            again = (index < n_slices) & defined
        state = sum_again(
            state,
            again,
            base_p,
            base_q,
            p_row,
            q_row,
            shift,
            first,
            n_cols,
            n_slices,
            slice_size,
            aligned,
            unit,
            inverse,
            LANES,
            VEC,
            SLICES,
            PACKING,
        )
        merged, x, divergence, finite, settled, _ = look_at(state, None, stretch, n_slices, KEEP)
        # A row that is not finite even at its maxima is settled: its divergence is inf or NaN.
        settled = settled | (at_maxima & (finite == 0))
        # The slices that mattered were summed at the row's pivot; next, all slices are.
        again = index < n_slices
        look += 1
    divergence = tl.where(finite, divergence, tl.where(defined, float("inf"), float("nan")))
    if KEEP:
        out = kl_ptr + program.to(tl.int64) * N_KEPT
        fields = (divergence,) + kept(state, merged, divergence, x, unit, inverse)
        for field in tl.static_range(N_KEPT):
            tl.store(out + field, fields[field])
    else:
        tl.store(kl_ptr + program, divergence)


@triton.jit(do_not_specialize=("first", "n"))
def table_kernel(table_ptr, numbers, first: tl.int32, n: tl.int32):
    """Write the first n of a chunk of `pointer_table`'s numbers to the table, from `first` on.

    Each number takes 8 bytes. The numbers are passed as arguments: the host would have to wait for
    a copy from its memory, and that memory would have to outlive a graph that captured the copy.
    """
    for i in tl.static_range(len(numbers)):
        tl.store(table_ptr + first + i, (numbers[i] >> 1) - DISGUISE, mask=i < n)
