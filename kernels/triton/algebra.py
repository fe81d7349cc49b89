"""The algebra of row states on the device: absorb a tile, merge lanes, finalize.

A lane (one element along axis 0 of every tile) keeps a row state of its own while it walks the
vocabulary; `fastkl.state` documents the fields. Two things differ here: m_p and m_q are in units of
log 2, since the hardware's exponential is 2^x, and they are the rounded products max·unit, used as
such everywhere, so that their rounding cancels.

A temperature T costs nothing: `unit` is log2(e) / T, and d is (p - q)·`inverse` - c, `inverse` 1 / T.

Which instruction decides an edge case, in the PTX (tests hold the compiler to it):

- both logits -inf, or p alone: d is NaN or -inf, and `setp.gt.f32` + `selp.f32` (or a `max.f32` without
  .NaN, which is the same) put FAR_BELOW in its place; its weight ex2(-inf) is +0 and takes it out of s.
- q alone -inf: d is +inf, and `fma.rn.f32` carries it into s as +inf, or as NaN where the weight is 0;
  either way s < inf fails (`setp.lt.f32`, false for NaN) and finalize says +inf.
- NaN or +inf in a row: `max.f32` drops a NaN, but ex2(NaN) and ex2(inf - inf) are NaN and z keeps it;
  z > 0 fails (`setp.gt.f32`) and finalize says NaN.
- a whole row -inf: z is 0, and z > 0 fails.
- leading tokens all -inf: m stays -inf; subtracted as 0 (`selp.f32`), so that no inf - inf arises.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# |d| from which φ(d) is e^(-d) - 1 + d instead of a polynomial, as in fastkl.state.
NEAR = tl.constexpr(0.5)
# A plain result below it is not good enough, as in fastkl.state.
ACCURATE_BELOW = tl.constexpr(0.1)
# Stands for the d of a token without reference mass: far, and finite so that 0 · d = 0.
FAR_BELOW = tl.constexpr(-1e30)
# Rounding in the change of pivots, as a multiple of what is added and subtracted: 16 half ulps.
PIVOT_ERROR = tl.constexpr(2.0**-20)


@triton.jit
def phi_over_square(d):
    """Return (e^(-d) - 1 + d) / d² for |d| < 0.5: minimax, relative error 8e-7."""
    series = 0.041667476858 + d * (-0.0083954112 + d * 0.0013914653)
    return 0.49999995973 + d * (-0.16666280113 + d * series)


@triton.jit
def phi(x):
    """Return e^(-x) - 1 + x without cancellation near 0."""
    return tl.where(tl.abs(x) < NEAR, x * x * phi_over_square(x), tl.exp2(-x * LOG2_E) - 1.0 + x)


@triton.jit
def finite_or_zero(m):
    """Return the maximum to subtract: 0 where there is no mass yet."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def absorb_reference(m, z, p, unit):
    """Absorb a tile p (LANES, VEC) into (m, z) of every lane.

    Returns the new (m, z), the tile's weights, and what the lane's older sums are to be scaled by.
    One exponential an element and one a lane.
    """
    new_m = tl.maximum(m, tl.max(p, axis=1) * unit)
    base = finite_or_zero(new_m)
    weight = tl.exp2(tl.fma(p, unit, -base[:, None]))
    scale = tl.exp2(m - base)
    return new_m, z * scale + tl.sum(weight, axis=1), weight, scale


@triton.jit
def absorb_circuit(
    state, p, weight, old_m_p, new_m_p, scale_p, q, unit, inverse, ACCURATE: tl.constexpr
):
    """Absorb a tile q (LANES, VEC) into (m_q, z_q, s, h, g, c) of every lane.

    A lane without reference mass so far takes this tile's difference of maxima as its pivot.
    """
    old_m, z, s, h, g, c = state
    m, z, circuit_weight, scale = absorb_reference(old_m, z, q, unit)
    pivot = (finite_or_zero(new_m_p) - finite_or_zero(m)) * LN_2
    c = tl.where(old_m_p == -float("inf"), pivot, c)
    # Subtracted first: a rounded product on one side only would make identical rows differ.
    d = (p - q) * inverse - c[:, None]
    d = tl.where(d > FAR_BELOW, d, FAR_BELOW)
    t = weight * d
    s = s * scale_p + tl.sum(t, axis=1)
    if ACCURATE:
        near = tl.abs(d) < NEAR
        h = h * scale_p + tl.sum(tl.where(near, t * (d * phi_over_square(d)), t - weight), axis=1)
        g = g * scale + tl.sum(tl.where(near, 0.0, circuit_weight), axis=1)
    return m, z, s, h, g, c


@triton.jit
def merge_lanes(m_p, z_p, m_q, z_q, s, h, g, c, doubt):
    """Merge the states along axis 0 into one, at the pivot lse_p - lse_q.

    `doubt` is how much was added to h and subtracted again to change pivots, so far: h lost
    PIVOT_ERROR of it, all of it where `doubt` is infinite. Returns the merged state and doubt, and
    the residual x of the new pivot.
    """
    max_p = tl.max(m_p, axis=0)
    max_q = tl.max(m_q, axis=0)
    base_p = finite_or_zero(max_p)
    base_q = finite_or_zero(max_q)
    scale_p = tl.exp2(m_p - base_p)
    scale_q = tl.exp2(m_q - base_q)
    sum_p = tl.sum(z_p * scale_p, axis=0)
    sum_q = tl.sum(z_q * scale_q, axis=0)

    apart = (base_p - base_q) * LN_2
    # Identical rows: x / x is not 1 in every quick division.
    ratio = tl.where(sum_p == sum_q, 0.0, tl.log2(sum_p / sum_q) * LN_2)
    pivot = apart + ratio
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    x = (apart - pivot) + ratio

    shift = tl.where(z_p > 0.0, pivot - c, 0.0)
    growth = phi(-shift)
    change = growth + shift
    moved = z_p * growth
    crossed = s * change
    total_s = tl.sum(scale_p * (s - shift * z_p), axis=0)
    total_h = tl.sum(scale_p * ((h + h * change) + (moved - crossed)), axis=0)
    total_g = tl.sum(scale_q * g, axis=0)
    total_doubt = tl.sum(scale_p * (doubt + (moved + tl.abs(crossed))), axis=0)
    return max_p, sum_p, max_q, sum_q, total_s, total_h, total_g, pivot, total_doubt, x


@triton.jit
def finalize(m_p, z_p, m_q, z_q, s, h, g, doubt, x):
    """Return the divergence in nats, and whether it needs no second look."""
    defined = (z_p > 0.0) & (z_q > 0.0) & (m_p < float("inf")) & (m_q < float("inf"))
    plain = s / z_p - x
    accurate = h / z_p + tl.exp2(-x * LOG2_E) * (g / z_q) - phi(x)
    lost = doubt / z_p * PIVOT_ERROR
    good = (lost <= accurate) & (lost <= 1e-5 * accurate + 1e-8) & (tl.abs(x) < 1.0)
    large = plain >= ACCURATE_BELOW
    divergence = tl.where(large, plain, accurate)
    settled = large | good
    divergence = tl.where(s < float("inf"), divergence, float("inf"))
    settled = settled | (s == float("inf")) | (s != s)
    return tl.where(defined, divergence, float("nan")), settled | (defined == 0)


@triton.jit
def good_for_gradients(z_p, divergence, doubt):
    """Return whether a row's gradients need no second look.

    Relative to a divergence, however small, since a gradient is wanted relative to itself. Where one
    token has nearly all mass, its lane's pivot is off by as much as any; then the change of pivots
    costs s a digit for each that the other tokens' mass is smaller, and h, which tells, twice as many.
    """
    lost = doubt / z_p * PIVOT_ERROR
    return (divergence >= ACCURATE_BELOW) | (divergence != divergence) | (lost <= 1e-5 * divergence)


@triton.jit
def pivot_growth(z_p, s, h, far, divergence, x):
    """Return e^x - 1, x = lse_p - lse_q - c of a row at its pivot c, as exactly as gradients need it.

    Two rounded log-sum-exps are off by 1e-7, however small d is. Σ (Q - P) = 0 says more of close rows:
    with t = Σ e^(p - m_p) (e^(-d) - 1) / z_p, e^(-x) = 1 + t, and the sums that the divergence is made
    of make t too: e^(-d) - 1 = φ(d) - d. `far` is the circuit's mass of the far tokens, in z_p's scale.
    """
    t = (h + far - s) / z_p
    close = (divergence < ACCURATE_BELOW) & (tl.abs(t) < 0.01)
    return tl.where(close, -t / (1.0 + t), phi(-x) + x)
