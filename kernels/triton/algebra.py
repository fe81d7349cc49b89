"""The algebra of row states on the device: a token's terms, the merging of slices, the results.

With p the reference's logits, q the circuit's and u = log2(e) / T, a slice of the vocabulary is
summed at two bases, b_p and b_q, each an estimate of log2 Σ 2^(u·logits) of its side:

    c = (b_p - b_q) log 2                  the pivot: the distance of the sides, by these estimates
    d = (p - q) / T - c
    w = 2^(p u - b_p)                      the reference's weight; z_p = Σ w
    s = Σ w d                              h = Σ w φ(d), φ(x) = e^(-x) - 1 + x ≥ 0

w e^(-d) = 2^(q u - b_q) is then the circuit's weight in the scale of the reference's, and the
circuit's mass is z_p + h - s: neither is summed. A token far from the pivot adds w (e^(-d) - 1 + d)
to h. With both bases at the pivot of the whole row,

    KL = s / z_p = h / z_p

the first with an absolute error of 1e-7, the second with a relative error of 1e-6: see
`fastkl.state`.

A base is poor if a slice's first tokens do not represent the others. Then a sum overflows or
underflows, or most of it cancels when it is moved to the row's pivot. If the sides lie far apart,
p - q is rounded at that distance. `merge` estimates the error that each slice causes, so that the
worst slices can be summed again, with the rounding error of p - q added back.

These PTX instructions decide the edge cases (tests check that the compiler emits them, or
`fma.rn.f32x2` for `fma.f32`, which treats each of its two floats alike):

- both logits -inf: `max.NaN.f32` replaces each by the lowest float. So d and e^(-d) are finite, and
  the weight ex2(-inf) = +0 takes the token out of all sums.
- q alone -inf: d is +inf, and `fma.f32` carries it into s and h as +inf, or as NaN if the weight
  is 0.
- p alone -inf, or so low that e^(-d) is +inf: s and h become NaN, by a weight of 0.
- NaN or +inf in a row: ex2(NaN) and ex2(+inf) are NaN and +inf, and `add.f32` propagates them to
  z_p, or d carries them to s and h.
- a whole row -inf: its sum is 0.

In every case but the first, a sum is then not finite, or not positive, and the row is scanned for
its maxima: `max.f32` reveals a +inf or a side of nothing but -inf, and `setp.nan.f32` a NaN. Such a
row has no divergence. Any other row is summed again with bases at its maxima, with exponentials of
both sides, and with FAR_BELOW as the d of a token without reference mass. If a sum is still not
finite, the divergence is +inf.
"""

import triton
import triton.language as tl

from .arithmetic import fma, multiply, multiply_add

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# 1 / LOG2_E - LN_2, both rounded to float32. Without it, pivots would be off by 1e-5 if the sides
# lie 1000 apart.
LN_2_REST = tl.constexpr(7.348693061389158e-09)
# From this |d| on, φ(d) is e^(-d) - 1 + d instead of a polynomial, as in fastkl.state.
NEAR = tl.constexpr(0.5)
# The same in units of log 2.
NEAR_2 = tl.constexpr(0.7213475204444817)
# The least float32.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Added to the exponents of weights in the first pass, so that weights underflow 30 powers of two
# later. If a weight still underflows, the circuit's mass there is negligible too, or e^(-d) is
# infinite, which shows as NaN.
SCALE = tl.constexpr(30.0)
# A plain result below this is not accurate enough, as in fastkl.state.
ACCURATE_BELOW = tl.constexpr(0.1)
# The errors that a row may have without being looked at again: the tests' tolerance.
RELATIVE = tl.constexpr(1e-5)
ABSOLUTE = tl.constexpr(1e-8)
# An error this small is not worth another pass, whatever the divergence.
NEGLIGIBLE = tl.constexpr(1e-12)
# Stands for the d of a token without reference mass: far, and finite so that 0 · d = 0.
FAR_BELOW = tl.constexpr(-1e30)
# The relative error of the terms that a change of pivot adds and subtracts: φ is a polynomial near
# the pivot, and a sum of three rounded numbers far from it. Also the relative error of far tokens'
# h, for each bit by which a slice's weights exceed 2^USUAL. By simulation: with 2^-20, some
# confident rows were off by 1.3 times the tolerance.
PIVOT_ERROR = tl.constexpr(2.0**-19)
# The rounding error of z_p + h - s: two half ulps of the largest term, and that of a lane's sums.
MASS_ERROR = tl.constexpr(2.0**-22)
# A weight 2^E has a relative error of up to E · 2^-24, from the rounding of its exponent. A far
# token has two such weights, and its term of h, w (e^(-d) - 1 + d), may be a tenth of either. Up to
# 2^8 the error is within the tolerance; slices of many tokens reach that sum without any large
# weight.
EXPONENT_ERROR = tl.constexpr(2.0**-24)
USUAL = tl.constexpr(8)
# The rounding error of a plain sum: two half ulps of s, and of the change when s is moved to the
# row's pivot.
PLAIN_ERROR = tl.constexpr(2.0**-23)
# Logits of sides less than this far apart are subtracted directly: exactly, if they are similar.
APART = tl.constexpr(4.0)
# Half an ulp of the distance between the sides, relative to it.
APART_ERROR = tl.constexpr(2.0**-24)
# 1.5 · 2^23: adding and then subtracting it rounds to the nearest integer, or above 2^22 to one of
# about that size.
TO_INTEGER = tl.constexpr(12582912.0)
# A far token adds at least 1 / FAR_WEIGHT of its larger weight to h.
FAR_WEIGHT = tl.constexpr(11.1)
# For gradients, slices whose weights add up to more than this are summed again: gradients are
# proportional to the weights, and the exponents of such large weights are rounded too much.
LARGEST = tl.constexpr(2.0**16)
# 1.5 · 2^13: adding and then subtracting it rounds to a multiple of 2^-10.
TO_GRID = tl.constexpr(12288.0)
GRID = tl.constexpr(2.0**-10)
# How many numbers are kept of a row: its divergence, and those that `kept` returns.
N_KEPT = tl.constexpr(10)


@triton.jit
def phi_over_square(d, PACKING: tl.constexpr):
    """Return (e^(-d) - 1 + d) / d² for |d| < 0.5: minimax, relative error 8e-7."""
    series = multiply_add(d, 0.0013914653, -0.0083954112, PACKING)
    series = multiply_add(d, series, 0.041667476858, PACKING)
    series = multiply_add(d, series, -0.16666280113, PACKING)
    return multiply_add(d, series, 0.49999995973, PACKING)


@triton.jit
def rise_over_square(x, PACKING: tl.constexpr):
    """Return (e^y - 1 - y) / x² for y = x log 2 and |y| < 0.5: the same polynomial."""
    series = multiply_add(x, 0.000154321042, 0.00134328844, PACKING)
    series = multiply_add(x, series, 0.009618316128, PACKING)
    series = multiply_add(x, series, 0.05550282135, PACKING)
    return multiply_add(x, series, 0.24022648761, PACKING)


@triton.jit
def phi(x):
    """Return e^(-x) - 1 + x without cancellation near 0."""
    return tl.where(
        tl.abs(x) < NEAR, x * x * phi_over_square(x, "none"), tl.exp2(-x * LOG2_E) - 1.0 + x
    )


@triton.jit
def to_grid(base):
    """Return the base rounded to a grid so coarse that differences of bases are exact."""
    return (base + TO_GRID) - TO_GRID


@triton.jit
def estimate(logits, unit):
    """Return a base for logits like these (LANES,): about log2 Σ 2^(logits·unit).

    0 if all are -inf.
    """
    top = tl.max(logits, axis=0) * unit
    top = tl.where(top == -float("inf"), 0.0, top)
    # The largest of up to 64 weights is 1, so log2 of their sum lies between 0 and 6. This is
    # enforced, since the rounding error of `top` is itself large for logits beyond 1e7, and must
    # not make other weights underflow.
    log2_sum = about_log2(tl.sum(weights(logits, unit, top), axis=0))
    # The number put on the grid is base - SCALE, since that is what is subtracted from exponents.
    return to_grid(top + tl.minimum(tl.maximum(log2_sum, 0.0), 6.0) - SCALE) + SCALE


@triton.jit
def weights(logits, unit, base):
    """Return 2^(logits·unit - base)."""
    return tl.exp2(tl.fma(logits, unit, -base))


@triton.jit
def product_of(a, b):
    """Return a · b, rounded: a bare product is not, if the compiler fuses it with an addition."""
    return tl.fma(a, b, 0.0)


@triton.jit
def stretch_of(unit, inverse):
    """Return log2(e) · inverse / unit - 1: about 0, the effect of rounding unit and inverse."""
    return tl.fma(tl.full((), LOG2_E, tl.float32), inverse, -unit) / unit


@triton.jit
def pivot_of(base_p, base_q, stretch):
    """Return the pivot, and the exact pivot minus it: its rounding error."""
    apart = base_p - base_q
    pivot = product_of(apart, LN_2)
    # The first term is the product's exact rounding error: a fused multiply-add rounds once.
    lost = tl.fma(apart, LN_2, -pivot) + apart * LN_2_REST
    return pivot, lost + pivot * stretch


@triton.jit
def rounded_off(a, b):
    """Return the exact a - b minus its float32 value."""
    difference = a - b
    taken = difference - a
    return (a - (difference - taken)) - (b + taken)


@triton.jit
def exact_pivot(base_p, base_q, unit, inverse):
    """Return the pivot and its rounding error, for bases that need not be on the grid."""
    pivot, lost = pivot_of(base_p, base_q, stretch_of(unit, inverse))
    return pivot, lost + rounded_off(base_p, base_q) * LN_2


@triton.jit
def move_of(pivot, inverse):
    """Split a pivot into an integer difference of undivided logits and the rest, in nats."""
    moved = (pivot / inverse + TO_INTEGER) - TO_INTEGER
    # The product with a temperature's inverse is rounded; the last term corrects the rest for it.
    product = product_of(moved, inverse)
    return moved, (pivot - product) - tl.fma(moved, inverse, -product)


@triton.jit
def moved_differences(p, q, moved, of_p, rest, inverse, dtype: tl.constexpr, PACKING: tl.constexpr):
    """Return the tokens' d, given the move of their sides and the reference's part of it.

    The rounding error of the difference of two float32 logits is added back. Half-precision logits
    have digits to spare in float32, so that their difference stays exact when a logit is moved.
    """
    # Multiply-adds only: a separately rounded product would be off by as much as all of d in
    # confident rows.
    if dtype == tl.float32:
        difference = p - q
        # An infinite difference has no rounding error to add back.
        off = tl.where(tl.abs(difference) < float("inf"), rounded_off(p, q), 0.0)
        # Keep this order: what is left of the difference is on a finer grid than what is left of
        # the move.
        return tl.fma(off, inverse, tl.fma(difference - moved, inverse, -rest))
    # A product with 1 is exact: this is (p - of_p) - (q + (moved - of_p)).
    rest_of_p, q = fma(p, 1.0, -of_p, PACKING), fma(q, 1.0, moved - of_p, PACKING)
    difference = fma(q, -1.0, rest_of_p, PACKING)
    return fma(difference, inverse, -rest, PACKING)


@triton.jit
def exact_differences(p, q, base_p, base_q, unit, inverse):
    """Return the tokens' d at two bases' pivot, with the rounding error of p - q added back."""
    pivot, lost = exact_pivot(base_p, base_q, unit, inverse)
    difference = p - q
    # An infinite difference has no rounding error to add back.
    off = tl.where(tl.abs(difference) < float("inf"), rounded_off(p, q), 0.0)
    return tl.fma(difference, inverse, -pivot) + tl.fma(off, inverse, -lost)


@triton.jit
def apart_by(b_p, b_q):
    """Return the distance between the sides, in nats, if it makes p - q inexact; else 0.

    p - q is exact if neither logit is more than twice the other, and the likely tokens' logits are
    about as large as the bases.
    """
    apart = tl.abs(b_p - b_q) * LN_2
    exact_below = tl.minimum(tl.abs(b_p), tl.abs(b_q)) * (0.5 * LN_2)
    return tl.where(apart > tl.maximum(exact_below, APART), apart, 0.0)


@triton.jit
def terms(d, weight, q, base_q, unit):
    """Return the tokens' terms of s and of h, and the circuit's weights."""
    circuit_weight = weights(q, unit, base_q)
    d = tl.where(d > FAR_BELOW, d, FAR_BELOW)
    t = weight * d
    near = tl.abs(d) < NEAR
    return (
        t,
        tl.where(near, t * (d * phi_over_square(d, "none")), (circuit_weight - weight) + t),
        circuit_weight,
    )


@triton.jit
def quick_terms(p, q, apart, unit, DIVIDE: tl.constexpr, PACKING: tl.constexpr):
    """Return the tokens' -d / log 2 and φ(d), given the difference of the bases.

    With x = -d / log 2, 2^x is the ratio of the circuit's weight to the reference's.
    """
    # Subtract before multiplying: a rounded product on one side only would make identical rows
    # differ. If both sides mask a token, the difference is 0; if a single side does, x is infinite.
    difference = multiply_add(unmasked(p), -1.0, unmasked(q), PACKING)
    if DIVIDE:
        # The difference is doubled, exactly, so that a single side's mask overflows to inf even if
        # unit is less than 1.
        difference, unit = multiply(difference, 2.0, PACKING), unit * 0.5
    x = multiply_add(difference, unit, apart, PACKING)
    near = multiply(x, multiply(x, rise_over_square(x, PACKING), PACKING), PACKING)
    far = (tl.exp2(x) - 1.0) - x * LN_2
    return x, tl.where(tl.abs(x) < NEAR_2, near, far)


@triton.jit
def unmasked(logits):
    """Return logits with -inf replaced by the lowest finite float32."""
    return tl.maximum(logits, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def about_log2(value):
    """Return log2 of a positive number to within 0.1, monotonically; -127 for 0."""
    # The bits of a float32 are its logarithm, except for the mantissa. tl.log2 takes 30
    # instructions.
    return (value.to(tl.int32, bitcast=True) - 127 * 2**23).to(tl.float32) * 2.0**-23


@triton.jit
def bits_above(value, exponent: tl.constexpr):
    """Return log2(value / 2^exponent) to within 0.1, 0 if that is negative."""
    return tl.maximum(about_log2(value) - exponent, 0.0)


@triton.jit
def scaled(value, scale, mass):
    """Return value · scale²; 0 if there is no mass, whatever the scale.

    The product of a large value and a small scale may be a normal number even if scale² underflows.
    """
    return tl.where(mass == 0.0, 0.0, (value * scale) * scale)


@triton.jit
def merge(state, stretch, KEEP: tl.constexpr):
    """Merge the states of slices along axis 0 into one at the row's pivot.

    A slice's state is (b_p, z_p, b_q, mass, s, h, size). `mass` is the circuit's mass, in the scale
    of the reference's weights. `size` is z_p + |s| + |h|, which bounds the rounding error of a mass
    that was computed as z_p + h - s; it is 0 if the mass was summed directly.

    Returns (row, x, finite, doubt, plain_doubt): the row's (b_p, z_p, b_q, s, h); x, the rounding
    error of its pivot, at which the circuit's mass is z_p e^(-x); whether the sums are finite and
    the masses positive; and the errors that each slice may cause in the accurate divergence, and in
    the plain one.
    """
    b_p, z_p, b_q, mass, s, h, size = state
    top_p = tl.max(tl.where(z_p > 0.0, b_p, -float("inf")), axis=0)
    top_q = tl.max(tl.where(mass > 0.0, b_q, -float("inf")), axis=0)
    # A slice without reference mass has only the circuit's, for which any reference base will do.
    b_p = tl.where(z_p == 0.0, top_p, b_p)
    scale_p = tl.exp2((b_p - top_p) * 0.5)
    scale_q = tl.exp2((b_q - top_q) * 0.5)
    sum_p = tl.sum(scaled(z_p, scale_p, z_p), axis=0)
    sum_q = tl.sum(scaled(mass, scale_q, mass), axis=0)
    # Identical rows need a ratio of exactly 0, but a fast division may not give x / x = 1.
    ratio = tl.where(sum_p == sum_q, 0.0, tl.log2(sum_p / sum_q))

    new_b_q = top_q - ratio
    _, lost = pivot_of(top_p, new_b_q, stretch)
    # A slice's pivot is exactly (b_p - b_q) log 2. In a slice that was summed again (its size is
    # 0), b_p - b_q is not rounded to float32.
    lost_before = tl.where(size > 0.0, 0.0, -rounded_off(b_p, b_q) * LN_2)
    # The parts of the pivots' difference, the exact ones first.
    moved_by = ((top_p - new_b_q) - (b_p - b_q)) * LN_2 + (lost_before - lost)
    x = (ratio - (top_q - new_b_q) + rounded_off(top_p, new_b_q)) * LN_2 + lost

    growth = phi(-moved_by)
    change = growth + moved_by
    moved = z_p * growth
    crossed = s * change
    any_mass = z_p + tl.abs(mass)
    total_s = tl.sum(scaled(s - moved_by * z_p, scale_p, any_mass), axis=0)
    moved_h = (h + h * change) + (moved - crossed)
    total_h = tl.sum(scaled(moved_h, scale_p, any_mass), axis=0)
    # This is for far tokens alone: near tokens' errors are a part of their own terms.
    largest = tl.maximum(z_p, mass)
    above = bits_above(tl.minimum(largest, tl.abs(h) * FAR_WEIGHT), USUAL)
    error = moved + tl.abs(crossed) + tl.abs(h) * above
    # e^moved_by also has the error from the rounding of its exponent.
    error *= PIVOT_ERROR + tl.abs(moved_by) * (2.0 * EXPONENT_ERROR)
    doubt = scaled(error, scale_p, any_mass) / sum_p
    mass_error = size * (MASS_ERROR + above * EXPONENT_ERROR)
    plain_doubt = scaled(mass_error, scale_q, any_mass) / sum_q
    # Rounding of p - q may shift all d of a slice alike, by r at most. That shifts the plain sum by
    # r z_p, the circuit's mass by r times itself, and the accurate sum by r Σ w |1 - e^(-d)|. Only
    # a bound is known for this last sum: its square is below (2 z_p + 4 mass) h / 3. The term in r²
    # is for an h that is too small because its d were rounded to 0.
    rounding = tl.where(size > 0.0, apart_by(b_p, b_q), 0.0) * APART_ERROR
    part_p = scaled(z_p, scale_p, z_p) / sum_p
    part_q = scaled(mass, scale_q, mass) / sum_q
    part_h = tl.maximum(scaled(moved_h, scale_p, any_mass) / sum_p, 0.0)
    both = part_p * 0.66666667 + tl.maximum(part_q, 0.0) * 1.3333334
    accurate_error = rounding * (tl.sqrt(both * part_h) + both * rounding)
    doubt += tl.where(rounding > 0.0, accurate_error, 0.0)
    plain_doubt += tl.where(rounding > 0.0, rounding * part_q, 0.0)
    plain_error = rounding * z_p + (tl.abs(s) + tl.abs(moved_by) * z_p) * PLAIN_ERROR
    plain_doubt += scaled(plain_error, scale_p, z_p) / sum_p
    if KEEP:
        # If one token has nearly all mass, the gradients, and what a change of pivot leaves of s,
        # are as small as the mass of the others. So a slice that may hold such a token is summed
        # again at the row's pivot, with exact p - q.
        share = scaled(z_p, scale_p, z_p) / sum_p
        off = (tl.abs(moved_by) > 1e-6) | (rounding > 0.0)
        doubt = tl.where((share > 0.5) & off, 1.0, doubt)
        # So is a slice whose weights are rounded too much, if it holds more than 1 % of the row's
        # mass.
        high = (share > 0.01) & (largest > LARGEST)
        doubt = tl.where(high, 1.0, doubt)
        plain_doubt = tl.where(high, 1.0, plain_doubt)

    finite = (sum_p > 0.0) & (sum_q > 0.0) & (sum_p < float("inf")) & (sum_q < float("inf"))
    finite = finite & (tl.abs(total_s) < float("inf")) & (tl.abs(total_h) < float("inf"))
    return (top_p, sum_p, new_b_q, total_s, total_h), x, finite, doubt, plain_doubt


@triton.jit
def judge(row, x, doubt, plain_doubt, KEEP: tl.constexpr):
    """Return a row's divergence in nats, whether it is good enough, and two tolerances.

    The tolerances are the errors that the accurate and the plain divergence may have; the plain
    one's is -1 if the plain divergence is never used. KEEP is for gradients, whose errors count
    relative to themselves: a small divergence is then allowed no absolute error, and a large one no
    more than 1e-6.
    """
    _, z_p, _, s, h = row
    plain = s / z_p - x
    # If the sides lie 1e4 apart, x is so large that its square matters.
    accurate = tl.maximum(h / z_p - phi(x), 0.0)
    if KEEP:
        room = tl.minimum(accurate * RELATIVE, 1e-6)
    else:
        room = tl.minimum(accurate, accurate * RELATIVE + ABSOLUTE)
    plain_room = tl.minimum(plain * RELATIVE, 1e-6) if KEEP else plain * RELATIVE
    plain_room = tl.where(plain >= ACCURATE_BELOW, plain_room, -1.0)
    plain_is_good = tl.sum(plain_doubt, axis=0) <= plain_room
    good = plain_is_good | (tl.sum(doubt, axis=0) <= room)
    return tl.where(plain_is_good, plain, accurate), good, room, plain_room


@triton.jit
def pivot_growth(z_p, s, h, divergence, x):
    """Return e^x - 1, x = lse_p - lse_q - c at a row's pivot c, accurately enough for gradients.

    Two rounded log-sum-exps are off by 1e-7, however small d is. For close rows, the circuit's mass
    z_p + h - s is more accurate: its difference from z_p is a sum of small numbers.
    """
    t = (h - s) / z_p
    close = (divergence < ACCURATE_BELOW) & (tl.abs(t) < 0.01)
    return tl.where(close, -t / (1.0 + t), phi(-x) + x)


@triton.jit
def kept(state, row, divergence, x, unit, inverse):
    """Return what gradients need of a row: (b_p, z_p, b_q, rest, moved, s, e^x - 1, far, share).

    z_p is NaN if the divergence is. `far` is the e^x - 1 to use with weights 2^(q u - b_q), which
    do not contain the pivot's rounding error. `share` is the largest slice's share of the
    reference's mass; no token has more.
    """
    b_p, z_p, b_q, s, h = row
    pivot, lost = exact_pivot(b_p, b_q, unit, inverse)
    moved, rest = move_of(pivot, inverse)
    most = tl.max(scaled(state[1], tl.exp2((state[0] - b_p) * 0.5), state[1]), axis=0)
    growth = pivot_growth(z_p, s, h, divergence, x)
    far = growth - (1.0 + growth) * (lost - 0.5 * lost * lost)
    defined = tl.where(divergence == divergence, z_p, float("nan"))
    return b_p, defined, b_q, rest, moved, s, growth, far, most / z_p
