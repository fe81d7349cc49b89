"""The algebra: row states, how they merge, and how a state becomes a KL divergence.

A row state summarizes a slice of the vocabulary. With p the reference's logits and q the circuit's,
over the slice::

    m_p = max p            z_p = Σ e^(p - m_p)        (m_q and z_q alike; near max p in kernels)
    d   = p - q - c        c   = a pivot: any finite number near log Σ e^p - log Σ e^q
    s   = Σ e^(p - m_p) d
    h   = Σ_near e^(p - m_p) φ(d) + Σ_far e^(p - m_p) (d - 1)
    g   = Σ_far e^(q - m_q)

where φ(x) = e^(-x) - 1 + x ≥ 0, *near* are the tokens with |d| < NEAR, and *far* are all others,
including tokens with p = -inf (their terms with weight e^(p - m_p) are 0, whatever d is). With
x = lse_p - lse_q - c over the whole vocabulary there are two exact expressions for the divergence::

    plain     KL = s / z_p - x                            error about 1e-7, absolute
    accurate  KL = h / z_p + e^(-x) g / z_q - φ(x)        error about 1e-6, relative

`accurate` follows from Σ (Q - P) = 0: it sums P φ(log P - log Q), in which no term is negative and
errors of the log-sum-exps cancel to first order. Summing the far tokens' P φ(d) as Q - P + P d
keeps their circuit mass in the scale of m_q, where it cannot overflow, and so also counts tokens
with P = 0. A token with q = -inf and finite p makes the divergence infinite. This shows as
s = +inf, or as s = NaN after an infinite s has been scaled by zero, while z_p and z_q are numbers.

Terms that the backends share, in every language:

near, far
    A token is near if |d| is below a bound, so that a polynomial gives its terms. Any other token
    is far, and its terms take an exponential.
base
    What is subtracted from a side's logits before exponentials are taken: the maximum, or a number
    near it that is known sooner.
pivot
    c above: the difference of the two bases, or a number close to it.
apart
    The sides are apart if their pivot is so large that p - q is rounded at its size. The rounding
    error is added back. Before exponentials are taken, the side with the larger logits is *moved*
    by an integer; the *rest* of the pivot is a small number.
kept
    The numbers that the forward pass saves of each row and circuit for the gradients.
masked
    A logit of -inf; in `kl_div`, a row that does not count.
look
    Another pass over logits, made because the first sums may not be accurate enough; in
    `kernels/cpu`, any pass over a block of a circuit.

References
----------
.. [1] S. Kullback and R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
   Statistics 22 (1951).
.. [2] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax",
   arXiv:1805.02867 (2018).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Below this |x|, φ is computed as a series; above it, exp(-x) - 1 + x loses less than 1e-6 of φ.
NEAR = 0.5
# A residual |x| below this is taken for the rounding error of a float32 pivot of up to 100.
PIVOT_ROUNDING = 1e-5
# A plain result below this is replaced by the accurate one: an error of 1e-7 is 1e-6 of 0.1.
ACCURATE_BELOW = 0.1
# Coefficients of φ(x) / x² for |x| < NEAR. float32: minimax, relative error 8e-7, the same numbers
# as in kernels/triton/algebra.py. float64: 1/2! - x/3! + x²/4! - ..., where the first omitted term
# is below half an ulp.
_SERIES = {
    torch.float32: (0.49999995973, -0.16666280113, 0.041667476858, -0.0083954112, 0.0013914653),
    torch.float64: tuple((-1) ** n / math.factorial(n) for n in range(2, 16)),
}


class RowState(NamedTuple):
    """The sums over a slice of the vocabulary, one element per row (see the module's docstring)."""

    m_p: Tensor
    z_p: Tensor
    m_q: Tensor
    z_q: Tensor
    s: Tensor
    h: Tensor
    g: Tensor
    c: Tensor


def phi_over_square(x: Tensor) -> Tensor:
    """Return φ(x) / x² for |x| < NEAR, by Horner's rule with one pass over x per coefficient."""
    # new_full() runs on the device; copying numbers there would make the host wait.
    *rest, second, first = (x.new_full((), coefficient) for coefficient in _SERIES[x.dtype])
    series = torch.addcmul(second, first, x)
    for coefficient in reversed(rest):
        torch.addcmul(coefficient, series, x, out=series)
    return series


def phi(x: Tensor) -> Tensor:
    """Return φ(x) = e^(-x) - 1 + x, without cancellation near 0."""
    near = torch.where(x.abs() < NEAR, x, 0.0)
    return torch.where(x.abs() < NEAR, near * near * phi_over_square(near), torch.expm1(-x) + x)


def merge(first: RowState, second: RowState) -> RowState:
    """Return the state of two disjoint slices of the vocabulary together.

    The merged pivot is the difference of the merged log-sum-exps, at which `accurate` is best.
    States should be float64: they are small, and precision lost here cannot be recovered.
    """
    m_p = torch.maximum(first.m_p, second.m_p)
    m_q = torch.maximum(first.m_q, second.m_q)
    scales = [(_scale(part.m_p, m_p), _scale(part.m_q, m_q)) for part in (first, second)]
    z_p = first.z_p * scales[0][0] + second.z_p * scales[1][0]
    z_q = first.z_q * scales[0][1] + second.z_q * scales[1][1]
    pivot = (m_p - m_q) + torch.log(z_p / z_q)
    pivot = torch.where(pivot.isfinite(), pivot, 0.0)

    s, h, g = (torch.zeros_like(m_p) for _ in range(3))
    for part, (scale_p, scale_q) in zip((first, second), scales, strict=True):
        # If a slice has no reference mass, its pivot means nothing, and e^shift must not overflow.
        shift = torch.where(part.z_p > 0, pivot - part.c, 0.0)
        s = s + scale_p * (part.s - shift * part.z_p)
        h = h + scale_p * (
            shift.exp() * part.h + part.z_p * phi(-shift) - part.s * torch.expm1(shift)
        )
        g = g + scale_q * part.g
    return RowState(m_p, z_p, m_q, z_q, s, h, g, pivot)


def finalize(state: RowState) -> Tensor:
    """Return the divergence KL(P ‖ Q), in nats, of states that cover the whole vocabulary."""
    m_p, z_p, m_q, z_q, s, h, g, c = state
    x = (m_p - m_q - c) + torch.log(z_p / z_q)
    plain = s / z_p - x
    # In a state at its own pivot, what is left of x is rounding error. Dropping it costs
    # x² / 2 < 1e-10 and leaves a sum without negative terms.
    x = torch.where(x.abs() < PIVOT_ROUNDING, 0.0, x)
    accurate = h / z_p + torch.exp(-x) * (g / z_q) - phi(x)
    use_accurate = accurate.isfinite() & (x.abs() < 1)
    divergence = torch.where(use_accurate, accurate, plain)
    # Written so that a NaN in a sum fails the comparison: then the row is NaN, not infinite.
    defined = (z_p > 0) & (z_q > 0) & (m_p < torch.inf) & (m_q < torch.inf)
    divergence = torch.where(defined & ~(s < torch.inf), torch.inf, divergence)
    return torch.where(defined, divergence, torch.nan)


def _scale(part: Tensor, whole: Tensor) -> Tensor:
    """Return e^(part - whole), or 0 for a slice without any mass."""
    return torch.where(part == -torch.inf, 0.0, torch.exp(part - whole))
