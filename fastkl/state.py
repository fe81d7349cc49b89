"""The algebra: row states, how they merge, and how a state becomes a KL divergence.

A slice of the vocabulary is summed up by a row state. With p the reference's logits and q the
circuit's, over the slice::

    m_p = max p            z_p = Σ e^(p - m_p)        (m_q and z_q alike; near max p in kernels)
    d   = p - q - c        c   = a pivot: any finite number near log Σ e^p - log Σ e^q
    s   = Σ e^(p - m_p) d
    h   = Σ_near e^(p - m_p) φ(d) + Σ_far e^(p - m_p) (d - 1)
    g   = Σ_far e^(q - m_q)

where φ(x) = e^(-x) - 1 + x ≥ 0, *near* are the tokens with |d| < NEAR, and *far* all others, tokens
with p = -inf among them (their d counts as 0 times anything). With x = lse_p - lse_q - c over the
whole vocabulary there are two exact expressions for the divergence::

    plain     KL = s / z_p - x                            error about 1e-7, absolute
    accurate  KL = h / z_p + e^(-x) g / z_q - φ(x)        error about 1e-6, relative

`accurate` follows from Σ (Q - P) = 0: it sums P φ(log P - log Q), in which no term is negative and
errors of the log-sum-exps cancel to first order. Summing the far tokens' P φ(d) as Q - P + P d keeps
their circuit mass in the scale of m_q, where it cannot overflow, and so also counts tokens with
P = 0. A divergence to a token with q = -inf and finite p is infinite; it shows as s = +inf, or as
s = NaN after an infinite s has been scaled by zero, while z_p and z_q are numbers.

Words that the backends share, in every language:

near, far
    A token with |d| below a bound, whose terms are a polynomial's, and any other, whose terms take an
    exponential.
base
    What a side's exponentials are counted from: the maximum, or a number near it that is known sooner.
pivot
    c above, the difference of two bases or close to it.
apart
    Said of sides whose pivot is so large that p - q is rounded at its size. What was rounded off is
    added back, and for exponentials the side of the larger logits is *moved* by an integer; the *rest*
    of the pivot is a small number.
kept
    What the forward pass keeps of each row and circuit for the gradients.
masked
    A logit of -inf; in `kl_div`, a row that does not count.
look
    A pass over logits that have been read before, because the first sums left too much in doubt; in
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

# Below it φ is summed as a series; above it exp(-x) - 1 + x loses less than 1e-6 of φ.
NEAR = 0.5
# A residual x below it is taken for the rounding of a pivot: float32's of numbers up to 100.
PIVOT_ROUNDING = 1e-5
# A plain result below it is replaced by the accurate one: 1e-7 of error is 1e-6 of 0.1.
ACCURATE_BELOW = 0.1
# Coefficients of φ(x) / x² for |x| < NEAR. float32: minimax, relative error 8e-7, the same numbers as
# in kernels/triton/algebra.py. float64: 1/2! - x/3! + x²/4! - ..., the first one left out is below
# half an ulp.
_SERIES = {
    torch.float32: (0.49999995973, -0.16666280113, 0.041667476858, -0.0083954112, 0.0013914653),
    torch.float64: tuple((-1) ** n / math.factorial(n) for n in range(2, 16)),
}


class RowState(NamedTuple):
    """The sums over one slice of the vocabulary, one element a row (see the module's docstring)."""

    m_p: Tensor
    z_p: Tensor
    m_q: Tensor
    z_q: Tensor
    s: Tensor
    h: Tensor
    g: Tensor
    c: Tensor


def phi_over_square(x: Tensor) -> Tensor:
    """φ(x) / x² for |x| < NEAR, by Horner's rule in one pass over x a coefficient."""
    # Filled in on the device: copied there, a number makes the host wait.
    *rest, second, first = (x.new_full((), coefficient) for coefficient in _SERIES[x.dtype])
    series = torch.addcmul(second, first, x)
    for coefficient in reversed(rest):
        torch.addcmul(coefficient, series, x, out=series)
    return series


def phi(x: Tensor) -> Tensor:
    """φ(x) = e^(-x) - 1 + x, without cancellation near 0."""
    near = torch.where(x.abs() < NEAR, x, 0.0)
    return torch.where(x.abs() < NEAR, near * near * phi_over_square(near), torch.expm1(-x) + x)


def merge(first: RowState, second: RowState) -> RowState:
    """Return the state of two disjoint slices of the vocabulary together.

    The merged pivot is the difference of the merged log-sum-exps, at which `accurate` is best.
    States should be float64: they are small, and what is lost here is lost for good.
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
        # Where a slice has no reference mass its pivot means nothing, and e^shift must not overflow.
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
    # What is left of x in a state at its own pivot is rounding. Leaving it out costs x² / 2 < 1e-10 and
    # leaves a sum of which no part is negative.
    x = torch.where(x.abs() < PIVOT_ROUNDING, 0.0, x)
    accurate = h / z_p + torch.exp(-x) * (g / z_q) - phi(x)
    use_accurate = accurate.isfinite() & (x.abs() < 1)
    divergence = torch.where(use_accurate, accurate, plain)
    # Written so that a NaN in a sum fails the comparison: then the row is NaN, not infinite.
    defined = (z_p > 0) & (z_q > 0) & (m_p < torch.inf) & (m_q < torch.inf)
    divergence = torch.where(defined & ~(s < torch.inf), torch.inf, divergence)
    return torch.where(defined, divergence, torch.nan)


def _scale(part: Tensor, whole: Tensor) -> Tensor:
    """e^(part - whole), and 0 for a slice without any mass."""
    return torch.where(part == -torch.inf, 0.0, torch.exp(part - whole))
