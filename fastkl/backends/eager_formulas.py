"""The eager backend's formulas for rows on the CPU, and from where to where each is good.

With x = q - p + c, where c is p - q at the reference's likeliest token (x is -d of `fastkl.state`)::

    KL = log(Σ P e^x) - Σ P x

for any c. At the likeliest token x is exactly 0, and so is the rounding of what often is most of P.

- Plain: exponentials are taken of x as it is, which is good for divergences that are not small.
- Centered: for the others x is counted from its mean first::

      KL = log(1 + Σ P (e^x - 1 - x))

`Spread` guesses beforehand which it will be. What neither is good for, the backend measures by
`fastkl.state`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastkl.backends.eager_blocks import Block

# A plain divergence is good from here on, and from this part of |Σ P x|: where many tokens
# move alike, so does their rounding, and sums are off by up to 7e-7 of themselves.
PLAIN_FROM, _PLAIN_PART = 0.15, 1 / 4
# The exponential of a rise like this is off by 5e-6 of itself and more, which is little only of a large
# divergence.
HIGH_RISE, _HIGH_FROM = 24.0, 3.0
# A reference's logits so far below its largest may have weights too small for float32: where one has, no
# token may rise by more than 56, so that what these weights hold of Σ P e^x is less than 1e-8.
DEEPEST, HIGHEST_RISE = 87.0, 56.0
# Of sides this far apart the difference is rounded at that size, to 2e-7 and more, which is little only
# of a divergence that is no smaller than this part of it.
LARGE_PIVOT, _LARGE_PIVOT_PART = 4.0, 0.03
# Less far apart, float64 holds the difference of two logits to 1e-10.
LARGEST_PIVOT = 2.0**20
# Counted from a mean this large, what it is off by counts.
LARGE_MEAN = 1.0


def plain(x: Block, w: Block, *, out: Block) -> Block:
    """Return w e^x, in out."""
    # exp2 is PyTorch's own. exp is another library's: some times slower on one maker's processors, and
    # not even twice as fast on another's.
    torch.mul(x.even, math.log2(math.e), out=out.even).exp2_().mul_(w.even)
    return out


def centered(x: Block, w: Block, *, out: Block) -> Block:
    """Return w (e^x - 1 - x), in out."""
    torch.expm1(x.even, out=out.even).sub_(x.even).mul_(w.even)
    return out


def second_order(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return e^x - 1 - x."""
    return np.expm1(x) - x


class Spread(NamedTuple):
    """What reference rows tell, from Σ w x of parts, of about how large a divergence is.

    Suppose that each token but the likeliest moves by a drift, alike for all, and by noise of its own,
    of variance σ². Then Σ w x of a part is drift · Σ w, to within σ √Σ w², and a small divergence is
    half the variance of x, which is, with share = Σ w / z_p::

        share σ² + share (1 - share) drift²

    Where tokens move otherwise the estimate is a bad one, which costs time alone.
    """

    masses: NDArray[np.float32]  # Σ w of parts (R, M)
    per_square: NDArray[np.float64]  # 1 / Σ masses² (R,)
    noise_factor: NDArray[np.float64]  # share / (2 Σ w²) (R,)
    drift_factor: NDArray[np.float64]  # share (1 - share) / 2 (R,)

    @classmethod
    def of(
        cls,
        masses: NDArray[np.float32],
        squares: NDArray[np.float64],
        z_p: NDArray[np.float64],
    ) -> "Spread":
        """Return it for Σ w (R, M), Σ w² and z_p (R,)."""
        share = masses.sum(-1, dtype=np.float64) / z_p
        per_square = 1 / np.einsum("rm,rm->r", masses, masses, dtype=np.float64)
        # Of a single part only the drift is known: half of x's mean square then, not of its variance.
        rest = 1 if masses.shape[1] == 1 else 1 - share
        return cls(masses, per_square, share / (2 * squares), share * rest / 2)

    def estimates(self, first: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return about what small divergences are (R,), from Σ w x (R, M)."""
        along = np.einsum("rm,rm->r", first, self.masses, dtype=np.float64)
        drift = along * self.per_square
        # Σ (first - drift · masses)², about σ² Σ w².
        noise = np.einsum("rm,rm->r", first, first, dtype=np.float64) - along * drift
        estimates: NDArray[np.float64] = self.noise_factor * noise + self.drift_factor * drift**2
        return estimates


def plain_divergences(
    mean: NDArray[np.float64],
    second: NDArray[np.float64],
    *,
    top: NDArray[np.float64],
    rise: NDArray[np.float32],
    apart: NDArray[np.float32],
    deep: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return plain divergences (K, R), and whether they are good.

    Parameters
    ----------
    mean : NDArray (K, R)
        Σ P x.
    second : NDArray (K, R)
        Σ P e^x without the likeliest token.
    top : NDArray (R,)
        P of the likeliest token.
    rise : NDArray (K, R)
        The largest x.
    apart : NDArray (K, R)
        c.
    deep : NDArray (R,)
        Whether the reference has logits that lie too deep for the highest rises.
    """
    divergence = np.log(top + second) - mean
    size = np.abs(apart)
    least = np.maximum(PLAIN_FROM, _PLAIN_PART * np.abs(mean))
    least = np.maximum(least, np.where(rise > HIGH_RISE, _HIGH_FROM, 0.0))
    least = np.maximum(least, np.where(size > LARGE_PIVOT, _LARGE_PIVOT_PART * size, 0.0))
    good = (divergence >= least) & ~(deep & (rise > HIGHEST_RISE))
    return divergence, good & np.isfinite(mean) & np.isfinite(second)


def centered_divergences(
    mean: NDArray[np.float64], second: NDArray[np.float64], top: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return divergences of rows that were counted from their mean, and whether they are good."""
    # The mean was taken from x as float32 rounds it.
    change = second + top * second_order(-mean.astype(np.float32).astype(np.float64))
    # A rounded sum of terms that are not below 0 may be.
    return np.log1p(change), (change >= 0) & (change < np.inf)
