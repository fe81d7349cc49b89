"""The algebra of row states on the device: what a token adds, how slices merge, what comes of it.

With p the reference's logits, q the circuit's and u = log2(e) / T, a slice of the vocabulary is summed
at two bases, b_p and b_q, each an estimate of log2 of what that side's 2^(u·logits) add up to:

    c = (b_p - b_q) log 2                  the pivot: what the sides are apart, by these estimates
    d = (p - q) / T - c
    w = 2^(p u - b_p)                      the reference's weight; z_p = Σ w
    s = Σ w d                              h = Σ w φ(d), φ(x) = e^(-x) - 1 + x ≥ 0

w e^(-d) = 2^(q u - b_q) is then the circuit's weight in the scale of the reference's, and its mass is
z_p + h - s: neither is summed. A token far from the pivot adds w (e^(-d) - 1 + d) to h. With both bases
at the pivot of the whole row,

    KL = s / z_p = h / z_p

the first good to 1e-7, absolute, the second to 1e-6 of itself: see `fastkl.state`.

A base is poor where a slice's first tokens do not represent the others. Then a sum overflows or
vanishes, or moving it to the row's pivot cancels most of it; and where the sides lie far apart, p - q
is rounded at that distance. `merge` estimates the error that each slice causes, so that the worst ones
can be summed again, with the rounding error of p - q added back.

Which instruction decides an edge case, in the PTX (tests hold the compiler to it):

- both logits -inf: `max.NaN.f32` puts the lowest float in the place of each. d is finite then, e^(-d) is
  too, and the weight ex2(-inf), +0, takes the token out of all sums.
- q alone -inf: d is +inf, and `fma.f32` carries it into s and h as +inf, or NaN where the weight is 0.
- p alone -inf, or so low that e^(-d) is +inf: NaN, by a weight of 0.
- NaN or +inf in a row: ex2(NaN) and ex2(+inf) are NaN and +inf, and `add.f32` keeps them in z_p, or by d
  in s and h.
- a whole row -inf: its sum is 0.

In every case but the first a sum is then not finite, or not positive, and the row's maxima are looked
for: `max.f32` shows a +inf, or a side of nothing but -inf, and `setp.nan.f32` a NaN. Such a row has no
divergence. Any other is summed again, from its maxima, with exponentials of both sides, and with
FAR_BELOW as the d of a token without reference mass. If a sum is still not finite, the divergence is
+inf.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# 1 / LOG2_E less LN_2, as float32 rounds both: without it pivots would be 1e-5 off where the two sides
# lie 1000 apart.
LN_2_REST = tl.constexpr(7.348693061389158e-09)
# |d| from which φ(d) is e^(-d) - 1 + d instead of a polynomial, as in fastkl.state.
NEAR = tl.constexpr(0.5)
# The same in units of log 2.
NEAR_2 = tl.constexpr(0.7213475204444817)
# The least float32.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Added to the exponents of weights in the first pass, so that weights vanish 30 powers of two later.
# Where one still does, the circuit's mass is negligible there too, or e^(-d) is infinite, which shows
# as NaN.
SCALE = tl.constexpr(30.0)
# A plain result below it is not good enough, as in fastkl.state.
ACCURATE_BELOW = tl.constexpr(0.1)
# What a row may be off by without being looked at again: the tolerance of the tests.
RELATIVE = tl.constexpr(1e-5)
ABSOLUTE = tl.constexpr(1e-8)
# An error as small as that is not worth another pass, whatever the divergence.
NEGLIGIBLE = tl.constexpr(1e-12)
# Stands for the d of a token without reference mass: far, and finite so that 0 · d = 0.
FAR_BELOW = tl.constexpr(-1e30)
# Relative error of what a change of pivots adds and subtracts: φ is a polynomial near the pivot, and
# made of three rounded numbers far from it. The same of far tokens' h, for each bit that a slice's
# weights are above 2^USUAL. By simulation: with 2^-20 some confident rows were off by 1.3 times the
# tolerance.
PIVOT_ERROR = tl.constexpr(2.0**-19)
# Rounding of z_p + h - s: two half ulps of the largest, and of a lane's sums.
MASS_ERROR = tl.constexpr(2.0**-22)
# A weight 2^E has a relative error of up to E · 2^-24, from the rounding of its exponent. A far token
# has two such weights, and what it adds to h, w (e^(-d) - 1 + d), may be a tenth of either. Up to 2^8
# the error is within the tolerance; slices of many tokens add up to that without any large weight.
EXPONENT_ERROR = tl.constexpr(2.0**-24)
USUAL = tl.constexpr(8)
# Rounding of a plain sum: two half ulps of what it is counted from, and of what that is moved by.
PLAIN_ERROR = tl.constexpr(2.0**-23)
# Sides less than this apart are subtracted as they are: exactly, where their logits are alike.
APART = tl.constexpr(4.0)
# Half an ulp of what they are apart.
APART_ERROR = tl.constexpr(2.0**-24)
# 1.5 · 2^23: adding and then subtracting it rounds to an integer; above 2^22, to one of about that
# size.
TO_INTEGER = tl.constexpr(12582912.0)
# A far token adds a part of at least 1 / FAR_WEIGHT of its larger weight to h.
FAR_WEIGHT = tl.constexpr(11.1)
# Slices whose weights add up to more than this are summed again before gradients, which are
# proportional to the weights, are taken: the exponents of such large weights are rounded too much.
LARGEST = tl.constexpr(2.0**16)
# 1.5 · 2^13: added and subtracted, it leaves multiples of 2^-10.
TO_GRID = tl.constexpr(12288.0)
GRID = tl.constexpr(2.0**-10)
# The numbers kept of a row: its divergence, and what `kept` returns.
N_KEPT = tl.constexpr(10)


@triton.jit
def phi_over_square(d):
    """Return (e^(-d) - 1 + d) / d² for |d| < 0.5: minimax, relative error 8e-7."""
    series = 0.041667476858 + d * (-0.0083954112 + d * 0.0013914653)
    return 0.49999995973 + d * (-0.16666280113 + d * series)


@triton.jit
def rise_over_square(x):
    """Return (e^y - 1 - y) / x² for y = x log 2 and |y| < 0.5: the same polynomial."""
    series = 0.009618316128 + x * (0.00134328844 + x * 0.000154321042)
    return 0.24022648761 + x * (0.05550282135 + x * series)


@triton.jit
def phi(x):
    """Return e^(-x) - 1 + x without cancellation near 0."""
    return tl.where(tl.abs(x) < NEAR, x * x * phi_over_square(x), tl.exp2(-x * LOG2_E) - 1.0 + x)


@triton.jit
def to_grid(base):
    """Return a base near it, on a grid so coarse that differences of bases are exact."""
    return (base + TO_GRID) - TO_GRID


@triton.jit
def estimate(logits, unit):
    """Return a base for logits like these (LANES,): about log2 of what their weights add up to.

    0 if all are -inf.
    """
    top = tl.max(logits, axis=0) * unit
    top = tl.where(top == -float("inf"), 0.0, top)
    # Of up to 64 weights the largest is 1, so that log2 of their sum lies between 0 and 6. Enforced,
    # since the rounding of `top` is itself large for logits beyond 1e7, and no other weight may be lost
    # to it.
    log2_sum = about_log2(tl.sum(weights(logits, unit, top), axis=0))
    # It is base - SCALE that is subtracted from exponents, so it is that number that is put on the
    # grid.
    return to_grid(top + tl.minimum(tl.maximum(log2_sum, 0.0), 6.0) - SCALE) + SCALE


@triton.jit
def weights(logits, unit, base):
    """Return 2^(logits·unit - base)."""
    return tl.exp2(tl.fma(logits, unit, -base))


@triton.jit
def product_of(a, b):
    """Return a · b, rounded: a bare product is not, where the compiler fuses what is done to it."""
    return tl.fma(a, b, 0.0)


@triton.jit
def stretch_of(unit, inverse):
    """Return log2(e) · inverse / unit - 1: what rounding unit and inverse leaves of that, about 0."""
    return tl.fma(tl.full((), LOG2_E, tl.float32), inverse, -unit) / unit


@triton.jit
def pivot_of(base_p, base_q, stretch):
    """Return the pivot, and what rounding took from it."""
    apart = base_p - base_q
    pivot = product_of(apart, LN_2)
    # What the product was rounded by, exactly: a fused multiply-add rounds once.
    lost = tl.fma(apart, LN_2, -pivot) + apart * LN_2_REST
    return pivot, lost + pivot * stretch


@triton.jit
def rounded_off(a, b):
    """Return a - b less what float32 rounds it to."""
    difference = a - b
    taken = difference - a
    return (a - (difference - taken)) - (b + taken)


@triton.jit
def exact_pivot(base_p, base_q, unit, inverse):
    """Return the pivot, and what rounding took from it, of bases that are off the grid too."""
    pivot, lost = pivot_of(base_p, base_q, stretch_of(unit, inverse))
    return pivot, lost + rounded_off(base_p, base_q) * LN_2


@triton.jit
def move_of(pivot, inverse):
    """Return a pivot as the nearest integer difference of undivided logits, and the rest, in nats."""
    moved = (pivot / inverse + TO_INTEGER) - TO_INTEGER
    # Of a temperature's inverse the product is rounded: what that took is added again.
    product = product_of(moved, inverse)
    return moved, (pivot - product) - tl.fma(moved, inverse, -product)


@triton.jit
def moved_differences(p, q, moved, of_p, rest, inverse, dtype: tl.constexpr):
    """Return d of tokens, given how far their sides are moved and how much of that is the reference's.

    The rounding error of the difference of two float32 logits is added back. Half-precision logits have
    digits to spare in float32, so that moving one leaves their difference exact.
    """
    # Multiply-adds only: a product rounded by itself would be off by as much as all of d in confident
    # rows.
    if dtype == tl.float32:
        difference = p - q
        # Of an infinite difference nothing is rounded off.
        off = tl.where(tl.abs(difference) < float("inf"), rounded_off(p, q), 0.0)
        # In this order: what is left of the difference is on a finer grid than what is left of the move.
        return tl.fma(off, inverse, tl.fma(difference - moved, inverse, -rest))
    return tl.fma((p - of_p) - (q + (moved - of_p)), inverse, -rest)


@triton.jit
def exact_differences(p, q, base_p, base_q, unit, inverse):
    """Return d of tokens at the pivot that two bases have, of differences that are not rounded."""
    pivot, lost = exact_pivot(base_p, base_q, unit, inverse)
    difference = p - q
    # Of an infinite difference nothing is rounded off.
    off = tl.where(tl.abs(difference) < float("inf"), rounded_off(p, q), 0.0)
    return tl.fma(difference, inverse, -pivot) + tl.fma(off, inverse, -lost)


@triton.jit
def apart_by(b_p, b_q):
    """Return how far apart the sides are, in nats, where that makes p - q inexact; else 0.

    p - q is exact where neither logit is more than twice the other, and the likely tokens' logits are
    about as large as the bases.
    """
    apart = tl.abs(b_p - b_q) * LN_2
    exact_below = tl.minimum(tl.abs(b_p), tl.abs(b_q)) * (0.5 * LN_2)
    return tl.where(apart > tl.maximum(exact_below, APART), apart, 0.0)


@triton.jit
def terms(d, weight, q, base_q, unit):
    """Return what tokens add to s and to h, and the circuit's weights."""
    circuit_weight = weights(q, unit, base_q)
    d = tl.where(d > FAR_BELOW, d, FAR_BELOW)
    t = weight * d
    near = tl.abs(d) < NEAR
    return (
        t,
        tl.where(near, t * (d * phi_over_square(d)), (circuit_weight - weight) + t),
        circuit_weight,
    )


@triton.jit
def quick_terms(p, q, weight, apart, unit, COOL: tl.constexpr):
    """Return what tokens add to -s / log 2 and to h, given how far apart the bases are.

    They use x = -d / log 2, so that 2^x is the ratio of the circuit's weight to the reference's.
    """
    # Subtracted first: a rounded product on one side only would make identical rows differ. A token that
    # both sides mask is 0 apart, one that a single side does infinitely far.
    difference = unmasked(q) - unmasked(p)
    if COOL:
        # Doubled, exactly, so that a single side's mask overflows to inf even where unit is less than
        # 1.
        difference, unit = difference + difference, unit * 0.5
    x = tl.fma(difference, unit, apart)
    rise = tl.where(
        tl.abs(x) < NEAR_2, x * (x * rise_over_square(x)), (tl.exp2(x) - 1.0) - x * LN_2
    )
    return weight * x, weight * rise


@triton.jit
def unmasked(logits):
    """Return logits with the least that is not -inf in its place."""
    return tl.maximum(logits, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def about_log2(value):
    """Return log2 of a positive number to within 0.1, growing where it does; -127 of 0."""
    # The bits of a float32 are its logarithm, but for the mantissa. tl.log2 takes 30 instructions.
    return (value.to(tl.int32, bitcast=True) - 127 * 2**23).to(tl.float32) * 2.0**-23


@triton.jit
def bits_above(value, exponent: tl.constexpr):
    """Return log2(value / 2^exponent) to within 0.1, 0 if that is negative."""
    return tl.maximum(about_log2(value) - exponent, 0.0)


@triton.jit
def scaled(value, scale, mass):
    """Return value · scale²; 0 where there is no mass, whatever the scale.

    Of a large value and a small scale the product may be a number where the scale's square is none.
    """
    return tl.where(mass == 0.0, 0.0, (value * scale) * scale)


@triton.jit
def merge(state, stretch, KEEP: tl.constexpr):
    """Merge the states of slices along axis 0 to one at the pivot of the row.

    A slice's is (b_p, z_p, b_q, mass, s, h, size). `mass` is the circuit's, in the scale of the
    reference's weights. `size` is z_p + |s| + |h|, which bounds the rounding error of a mass that was
    computed as z_p + h - s; it is 0 where the mass was summed directly.

    Returns (row, x, finite, doubt, plain_doubt): the row's (b_p, z_p, b_q, s, h); x, what rounding left
    of its pivot, at which the circuit's mass is z_p e^(-x); whether all of it is finite; and, of every
    slice, how much the accurate divergence may be off because of it, and the plain one.
    """
    b_p, z_p, b_q, mass, s, h, size = state
    top_p = tl.max(tl.where(z_p > 0.0, b_p, -float("inf")), axis=0)
    top_q = tl.max(tl.where(mass > 0.0, b_q, -float("inf")), axis=0)
    # The circuit's mass alone is counted from any base of the reference's.
    b_p = tl.where(z_p == 0.0, top_p, b_p)
    scale_p = tl.exp2((b_p - top_p) * 0.5)
    scale_q = tl.exp2((b_q - top_q) * 0.5)
    sum_p = tl.sum(scaled(z_p, scale_p, z_p), axis=0)
    sum_q = tl.sum(scaled(mass, scale_q, mass), axis=0)
    # Identical rows: x / x is not 1 in every quick division.
    ratio = tl.where(sum_p == sum_q, 0.0, tl.log2(sum_p / sum_q))

    new_b_q = top_q - ratio
    _, lost = pivot_of(top_p, new_b_q, stretch)
    # A slice's pivot is exactly (b_p - b_q) log 2; one that was summed again (its size is 0) has that
    # pivot without the rounding of b_p - b_q to float32.
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
    # Of far tokens alone: near ones' errors are a part of what they add.
    largest = tl.maximum(z_p, mass)
    above = bits_above(tl.minimum(largest, tl.abs(h) * FAR_WEIGHT), USUAL)
    error = moved + tl.abs(crossed) + tl.abs(h) * above
    # e^moved_by is off by what its exponent is rounded, too.
    error *= PIVOT_ERROR + tl.abs(moved_by) * (2.0 * EXPONENT_ERROR)
    doubt = scaled(error, scale_p, any_mass) / sum_p
    mass_error = size * (MASS_ERROR + above * EXPONENT_ERROR)
    plain_doubt = scaled(mass_error, scale_q, any_mass) / sum_q
    # Rounding of p - q may shift all d of a slice alike, by r at most. That shifts the plain sum by r
    # z_p, the circuit's mass by r of itself, and the accurate sum by r Σ w |1 - e^(-d)|. Of this last
    # sum only a bound is known: its square is below (2 z_p + 4 mass) h / 3. The term in r² is for an h
    # that is too small because its d were rounded to 0.
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
        # Where one token has nearly all mass, the gradients, and what a change of pivot leaves of s,
        # are as small as the mass of the others. So a slice that may hold such a token is summed at the
        # row's pivot, with exact p - q.
        share = scaled(z_p, scale_p, z_p) / sum_p
        off = (tl.abs(moved_by) > 1e-6) | (rounding > 0.0)
        doubt = tl.where((share > 0.5) & off, 1.0, doubt)
        # So is one whose weights are rounded too much, if the row has any part of its mass there.
        high = (share > 0.01) & (largest > LARGEST)
        doubt = tl.where(high, 1.0, doubt)
        plain_doubt = tl.where(high, 1.0, plain_doubt)

    finite = (sum_p > 0.0) & (sum_q > 0.0) & (sum_p < float("inf")) & (sum_q < float("inf"))
    finite = finite & (tl.abs(total_s) < float("inf")) & (tl.abs(total_h) < float("inf"))
    return (top_p, sum_p, new_b_q, total_s, total_h), x, finite, doubt, plain_doubt


@triton.jit
def judge(row, x, doubt, plain_doubt, KEEP: tl.constexpr):
    """Return a row's divergence in nats, whether it is good enough, and two tolerances.

    The tolerances are how much the accurate and the plain divergence may be off; the plain one's is -1
    where the plain divergence is never taken. With KEEP, for gradients, whose errors count relative to
    themselves, a small divergence is allowed no absolute error, and a large one no more than 1e-6.
    """
    _, z_p, _, s, h = row
    plain = s / z_p - x
    # Sides 1e4 apart leave so much of x that its square counts.
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
    """Return e^x - 1, x = lse_p - lse_q - c of a row at its pivot c, as exactly as gradients need it.

    Two rounded log-sum-exps are off by 1e-7, however small d is. The circuit's mass z_p + h - s says
    more of close rows: what it differs by from z_p is a sum of small numbers.
    """
    t = (h - s) / z_p
    close = (divergence < ACCURATE_BELOW) & (tl.abs(t) < 0.01)
    return tl.where(close, -t / (1.0 + t), phi(-x) + x)


@triton.jit
def kept(state, row, divergence, x, unit, inverse):
    """Return what gradients need of a row: (b_p, z_p, b_q, rest, moved, s, e^x - 1, far, share).

    z_p is NaN where the divergence is. `far` is the e^x - 1 to use with weights 2^(q u - b_q), in which
    the pivot's rounding has no part. `share` is the largest slice's share of the reference's mass, and
    so no token has more.
    """
    b_p, z_p, b_q, s, h = row
    pivot, lost = exact_pivot(b_p, b_q, unit, inverse)
    moved, rest = move_of(pivot, inverse)
    most = tl.max(scaled(state[1], tl.exp2((state[0] - b_p) * 0.5), state[1]), axis=0)
    growth = pivot_growth(z_p, s, h, divergence, x)
    far = growth - (1.0 + growth) * (lost - 0.5 * lost * lost)
    defined = tl.where(divergence == divergence, z_p, float("nan"))
    return b_p, defined, b_q, rest, moved, s, growth, far, most / z_p
