"""The gradients of the divergences, from logits and what `finish_kernel` kept of each row.

The algebra and the names are those of `fastkl.gradient`: Q - P = P expm1(-d) at a pivot c whose
error is known. Every token's gradient follows from its own two logits and a few numbers of its row,
so that each logit is read once.
"""

import triton
import triton.language as tl

from .algebra import N_KEPT, NEAR, moved_differences, phi_over_square, weights
from .arithmetic import fma, multiply
from .kernels import load_inside, place_of, row_address, row_pointer, temperature_of

# As in kernels.py: arguments on whose values the compiled code does not depend, and tensors that
# may start anywhere.
SIZES = (
    "p_row_stride",
    "grad_circuit_stride",
    "grad_row_stride",
    "n_rows",
    "n_cols",
    "n_circuits",
    "lead",
    "aligned",
    "unit",
    "inverse",
)
ANYWHERE = ("p_ptr", "grad_ptr")
# A row is summed with its likeliest token's d as pivot if the other tokens' mass is less than this
# fraction of |d|. If it is more, the rounding error of Σ P d is below 2e-6 of that mass anyway.
CONFIDENT = tl.constexpr(0.0625)
# A reference's logit at or below this counts as masked: its gradient is 0. Above it, d is finite at
# temperatures from 3e-4 on, unless the circuit's logit makes it overflow. It is a constant, since a
# limit that depends on the temperature would occupy registers and make others spill.
MASKED = tl.constexpr(-1e35)


@triton.jit
def load_tokens(pointer, offsets, inside):
    """Load logits as float32; those outside are undefined."""
    return tl.load(pointer + offsets, mask=inside).to(tl.float32)


@triton.jit
def nothing(scale):
    """Return a masked logit's gradient: 0, or NaN if the row's scale is NaN."""
    return tl.where(scale == scale, 0.0, scale)


@triton.jit
def kept_of(row_ptr):
    """Return what `kept` in algebra.py returned for a row, and the reference's part of its move."""
    numbers = ()
    for field in tl.static_range(1, N_KEPT):
        numbers = numbers + (tl.load(row_ptr + field),)
    base_p, z_p, base_q, rest, moved, s, growth, far, share = numbers
    # The reference's part is the whole move if its base is further from 0, else none.
    of_p = tl.where(tl.abs(base_p) > tl.abs(base_q), moved, 0.0)
    return base_p, z_p, base_q, rest, moved, of_p, s, growth, far, share


@triton.jit
def circuit_gradient(d, weight, q, base_q, growth, growth_far, scale, unit, PACKING: tl.constexpr):
    """Return the tokens' scale · (Q - P) z_p, as accurate for close P and Q as for distant ones."""
    # With the right pivot the weights e^(-d) are 1 + growth times as large.
    near = multiply(d, fma(d, phi_over_square(d, PACKING), -1.0, PACKING), PACKING)
    near = multiply(weight, fma(near, scale + scale * growth, scale * growth, PACKING), PACKING)
    # The same difference, of weights that cannot overflow.
    other = tl.exp2(fma(q, unit, -base_q, PACKING))
    far = tl.fma(other, scale + scale * growth_far, weight * -scale)
    value = tl.where(tl.abs(d) < NEAR, near, far)
    return tl.where(q == -float("inf"), nothing(scale), value)


@triton.jit
def reference_gradient(p, weight, q, d, mean, scale):
    """Return the tokens' scale · P (d - KL) z_p, given a NaN mean if the divergence is infinite."""
    # With the factors in this order, a weight of 0 gives 0, or NaN if the mean is NaN, however
    # large d and the scale are.
    value = (weight * (d - mean)) * scale
    # Here d may be infinite, and 0 · inf must be avoided. A weight of 0 does not identify these
    # tokens: finite logits' weights underflow too.
    masked = (p <= MASKED) | (q == -float("inf"))
    return tl.where(masked, nothing(scale), value)


@triton.jit
def differentiate(
    p_row,
    table_ptr,
    grad_ptr,
    rows_ptr,
    top_ptr,
    row,
    at,
    shift,
    offsets,
    inside,
    grad_circuit_stride,
    grad_row_stride,
    n_rows,
    n_circuits,
    unit,
    inverse,
    REFERENCE: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Write gradients of tokens: `offsets` from `at`, counted from `shift` before the row."""
    dtype: tl.constexpr = p_row.dtype.element_ty
    p = load_tokens(p_row + at, offsets, inside)
    # The first circuit's base of the reference.
    base_ptr = rows_ptr + (row * N_KEPT + 1)
    weight = weights(p, unit, tl.load(base_ptr))
    total = tl.zeros_like(p)
    for circuit in range(n_circuits):
        wanted = tl.load(table_ptr + 2 * (n_circuits + circuit)) != 0
        grad = tl.load(grad_ptr + circuit * grad_circuit_stride + row * grad_row_stride)
        index = circuit * n_rows.to(tl.int64) + row
        value = tl.zeros_like(p)
        # A row whose gradient is not wanted or has a factor 0 is skipped: 0 times NaN would be NaN.
        if (grad != 0.0) & (wanted | REFERENCE):
            q_row = row_pointer(table_ptr, circuit, row, shift, dtype)
            q = load_tokens(q_row + at, offsets, inside)
            # The weights use the first circuit's base. If this circuit has another base, its sums
            # are moved there. The first circuit's base is loaded again: if it stayed in a register,
            # the compiler would compute all weights again.
            kept = kept_of(rows_ptr + index * N_KEPT)
            base_p, z_p, base_q, rest, moved, of_p, _, growth, growth_far, _ = kept
            raised = tl.load(base_ptr) - base_p
            base_q += raised
            scale = grad * inverse / (z_p * tl.exp2(-raised))
            if REFERENCE:
                top_rest = tl.load(top_ptr + 2 * index)
                mean = tl.load(top_ptr + (2 * index + 1))
                d = moved_differences(p, q, moved, of_p, top_rest, inverse, dtype, PACKING)
                total += reference_gradient(p, weight, q, d, mean, scale)
            d = moved_differences(p, q, moved, of_p, rest, inverse, dtype, PACKING)
            value = circuit_gradient(d, weight, q, base_q, growth, growth_far, scale, unit, PACKING)
        if wanted:
            dq_row = row_pointer(table_ptr, n_circuits + circuit, row, shift, dtype)
            tl.store(dq_row + at + offsets, value.to(dtype), mask=inside)
    if REFERENCE:
        dp_row = row_pointer(table_ptr, 2 * n_circuits, row, shift, dtype)
        tl.store(dp_row + at + offsets, total.to(dtype), mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def gradient_kernel(
    p_ptr,
    table_ptr,
    grad_ptr,
    rows_ptr,
    top_ptr,
    p_row_stride: tl.int64,
    grad_circuit_stride: tl.int64,
    grad_row_stride: tl.int64,
    n_rows: tl.int32,
    n_cols: tl.int32,
    n_circuits: tl.int32,
    lead: tl.int32,
    aligned: tl.int32,
    unit: tl.float32,
    inverse: tl.float32,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    VEC: tl.constexpr,
    REFERENCE: tl.constexpr,
    DIVIDE: tl.constexpr,
    PACKING: tl.constexpr,
):
    """Write the gradients of a tile of one row: of all circuits, and the reference's if REFERENCE.

    Program = (row, tile), each a dimension of the grid. The table holds the addresses and row
    strides of the circuits, of their gradients, and of the reference's gradient; 0 for a gradient
    that is not wanted. As in `sweep`, whole tiles begin at the row's first multiple of 16 bytes and
    take loads and stores of 128 bits without a mask. The remaining programs take the tokens before
    and after the whole tiles, or all tokens if not `aligned`, one per lane, with a mask.

    finish_kernel kept rows[circuit, row, field]; top_kernel wrote top[circuit, row, rest or mean].

    Reads n_cols·itemsize·(1 + 1/K) bytes per row and circuit, and writes n_cols·itemsize bytes per
    row of a gradient. One exponential per pair and one per token of the reference.
    """
    unit, inverse = temperature_of(unit, inverse, DIVIDE)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)

    shift, _ = place_of(lead, row, p_row_stride, aligned, VEC)
    n_before = tl.minimum((VEC - shift) % VEC, n_cols) * aligned
    n_tiles = tl.where(aligned != 0, (n_cols - n_before) // TILE, 0)
    p_row = tl.multiple_of(p_ptr + (row * p_row_stride - shift), 16)
    if part < n_tiles:
        differentiate(
            p_row,
            table_ptr,
            grad_ptr,
            rows_ptr,
            top_ptr,
            row,
            tl.multiple_of(shift + n_before + part * TILE, VEC),
            shift,
            tl.arange(0, TILE),
            None,
            grad_circuit_stride,
            grad_row_stride,
            n_rows,
            n_circuits,
            unit,
            inverse,
            REFERENCE,
            PACKING,
        )
    else:
        first = (part - n_tiles) * TILE
        n_rest = tl.minimum(first + TILE, n_cols - n_tiles * TILE)
        for start in tl.range(first, n_rest, LANES):
            index = start + tl.arange(0, LANES)
            differentiate(
                p_row,
                table_ptr,
                grad_ptr,
                rows_ptr,
                top_ptr,
                row,
                shift,
                shift,
                index + tl.where(index < n_before, 0, n_tiles * TILE),
                index < n_rest,
                grad_circuit_stride,
                grad_row_stride,
                n_rows,
                n_circuits,
                unit,
                inverse,
                REFERENCE,
                PACKING,
            )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def top_kernel(
    p_ptr,
    table_ptr,
    rows_ptr,
    top_ptr,
    p_row_stride: tl.int64,
    n_rows: tl.int32,
    n_cols: tl.int32,
    unit: tl.float32,
    inverse: tl.float32,
    TILE: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """Write two numbers per row that dKL/dp needs: the rest of the pivot, and the mean of d at it.

    If one token has nearly all mass, its d - KL lies in the last digits of d. Then the token is
    found, and the row is summed again with that token's d as the pivot.

    Program = (circuit, row). Reads 24 bytes, or 28 in half precision, and writes 8. In rows of
    which one slice has nearly all mass, it reads n_cols·itemsize·3 bytes more, and takes one
    exponential per pair.
    """
    unit, inverse = temperature_of(unit, inverse, DIVIDE)
    program = tl.program_id(0)
    circuit = program // n_rows
    row = (program % n_rows).to(tl.int64)
    kept = kept_of(rows_ptr + program.to(tl.int64) * N_KEPT)
    base_p, z_p, _, rest, moved, of_p, s, _, _, share = kept
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    mean = s / z_p

    # Whether some token may have enough mass to be the pivot; false if there is no divergence.
    if share * (1.0 + (tl.abs(rest) + tl.abs(mean)) * CONFIDENT) >= 1.0:
        p_row = p_ptr + row * p_row_stride
        q_row = row_address(table_ptr, circuit, row, dtype)
        lane = tl.arange(0, TILE)
        best = tl.full((TILE,), -float("inf"), tl.float32)
        likeliest = tl.zeros((TILE,), tl.int32)
        for start in tl.range(0, n_cols, TILE):
            token = start + lane
            p = load_inside(p_row + token, token < n_cols)
            likeliest = tl.where(p > best, token, likeliest)
            best = tl.maximum(best, p)
        top = tl.max(best, axis=0)
        likeliest = tl.max(tl.where(best == top, likeliest, 0), axis=0)
        beside = tl.load(q_row + likeliest).to(tl.float32)
        own = moved_differences(top, beside, moved, of_p, 0.0, inverse, dtype, "none")
        if tl.abs(own) < float("inf"):
            rest = own
            total = tl.zeros((TILE,), tl.float32)
            for start in tl.range(0, n_cols, TILE):
                token = start + lane
                p = load_inside(p_row + token, token < n_cols)
                q = load_inside(q_row + token, token < n_cols)
                weight = weights(p, unit, base_p)
                # A masked token adds 0, whatever its d.
                d = moved_differences(p, q, moved, of_p, rest, inverse, dtype, "none")
                total += tl.where(p == -float("inf"), 0.0, weight * d)
            mean = tl.sum(total, axis=0) / z_p
    top_ptr += program.to(tl.int64) * 2
    tl.store(top_ptr, rest)
    tl.store(top_ptr + 1, tl.where(tl.abs(mean) < float("inf"), mean, float("nan")))
