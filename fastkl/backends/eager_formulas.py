"""The eager backend's formulas for rows on the CPU, and from where to where each is good.

With x = q - p + c, where c is p - q at the reference's likeliest token (x is -d of `fastkl.state`)::

    KL = log(Σ P e^x) - Σ P x

for any c. At the likeliest token x is exactly 0, and so is the rounding of what often is most of P.
The reach of a row is its largest |x|:

- where it is small, Σ P e^x is 1 + Σ P x and a sum of higher order, by a series;
- where it is not, exponentials are taken, which is good for divergences that are not small;
- where neither is good, x is counted from its mean: KL = log(1 + Σ P (e^x - 1 - x)) then.

What no formula is good for, the backend measures by `fastkl.state`.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fastkl.backends.eager_blocks import Block

# Up to these reaches e^x - 1 - x is x² by a series.
REACHES = np.array([0.25, 1.4], np.float32)
# The coefficients of x² / (e^x - 1 - x) for each, from the highest power down: minimax, with relative
# errors of 1.1e-7 and 1.2e-7. It takes fewer of them than its reciprocal does.
_SERIES = (
    (0.00369357713, 0.0555395894, -0.666666389, 2.0),
    (-6.96224379e-5, -3.09602008e-4, 0.00370000559, 0.0555561259, -0.666665852, 2.0),
)
# The highest is a factor in PyTorch's first term, the rest are tensors. These lie on the CPU in float32,
# whatever the defaults are when this is imported.
_LOWER = tuple(
    torch.tensor(coefficients[1:], dtype=torch.float32, device="cpu").unbind()
    for coefficients in _SERIES
)
N_SERIES = len(_SERIES)
# Numbers of the other formulas: exponentials; counted from the mean; the same, but not summed.
EXPONENTIALS, CENTERED, LEFT = range(N_SERIES, N_SERIES + 3)
# Of (Σ P x)² / KL, for each: up to it the errors of sums, which are 7e-7 of them where roundings align,
# leave something of the tolerance.
_BAD_PIVOTS = np.array([8.0, 5.0])
# By exponentials less 1 a divergence is good from here on, and from this part of |Σ P x|: where many
# tokens move alike, so does their rounding. And by exponentials alone.
_CHANGE_FROM, _CHANGE_PART = 0.03, 1 / 8
_PLAIN_FROM, _PLAIN_PART = 0.12, 1 / 4
# Of Σ P x: only above it 1 is taken off. Σ P e^x, at least e^(Σ P x), may be so far below 1 that the
# difference would lose it.
FELL = -0.7
# Of the sum of the parts' |Σ P x|: below it most divergences are too small for exponentials.
SMALL_CHANGE = 0.1
# The exponential of a rise like this is off by 5e-6 of itself and more, which is little only of a large
# divergence.
HIGH_RISE, _HIGH_FROM = 24.0, 3.0
# A reference's logits so far below its largest may have weights too small for float32: where one has, no
# token may rise by more than 56, so that what these weights hold of Σ P e^x is less than 1e-8.
DEEPEST, HIGHEST_RISE = 87.0, 56.0
# Of sides this far apart the difference is rounded at that size, to 2e-7 and more, which is little only
# of a divergence that is no smaller than this part of it.
LARGE_PIVOT, _LARGE_PIVOT_PART = 4.0, 0.03
# Rows apart that reach no further are likely to have small divergences, and are not tried as they are.
LOW_REACH = 4.0
# Less far apart, float64 holds the difference of two logits to 1e-10.
LARGEST_PIVOT = 2.0**20
# Counted from a mean this large, what it is off by counts.
LARGE_MEAN = 1.0


def series(x: Block, t: Block, number: int, *, out: Block) -> Block:
    """Return w (e^x - 1 - x) by one of the series, in out, given t = w x."""
    next_lower, *lower = _LOWER[number]
    torch.add(next_lower, x.even, alpha=_SERIES[number][0], out=out.even)
    for coefficient in lower:
        torch.addcmul(coefficient, out.even, x.even, out=out.even)
    torch.div(x.even, out.even, out=out.even).mul_(t.even)
    return out


def exponentials(x: Block, w: Block, less: NDArray[np.bool_]) -> Block:
    """Return w e^x, in x, or w (e^x - 1) in some rows (R,)."""
    # exp2 is PyTorch's own, and takes down to a fourth of the time of exp, another library's.
    x.even.mul_(math.log2(math.e)).exp2_()
    if np.count_nonzero(less):
        x.padded.sub_(torch.from_numpy(less.astype(np.float32))[:, None])
    x.even.mul_(w.even)
    return x


def centered(x: Block, w: Block, *, out: Block) -> Block:
    """Return w (e^x - 1 - x), in out."""
    torch.expm1(x.even, out=out.even).sub_(x.even).mul_(w.even)
    return out


def second_order(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return e^x - 1 - x."""
    return np.expm1(x) - x


def divergences(
    number: NDArray[np.int64],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    *,
    top: NDArray[np.float64],
    less: NDArray[np.bool_],
    rise: NDArray[np.float32],
    apart: NDArray[np.float32],
    deep: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return divergences (K, R) from sums without the likeliest token, and whether they are good.

    Parameters
    ----------
    number : NDArray (K, R)
        Of the formula.
    first : NDArray (K, R)
        Σ P x.
    second : NDArray (K, R)
        What the formula sums, over z_p.
    top : NDArray (R,)
        P of the likeliest token.
    less : NDArray (K, R)
        Whether exponentials were summed less 1.
    rise : NDArray (K, R)
        The largest x.
    apart : NDArray (K, R)
        c, or 0 where x is as good as if it were.
    deep : NDArray (R,)
        Whether the reference has logits that lie too deep for the highest rises.
    """
    by_series, plain = number < N_SERIES, number == EXPONENTIALS
    change = second + np.where(by_series, first, 0.0)
    divergence = np.where(plain & ~less, np.log(top + second), np.log1p(change)) - first
    size = np.abs(apart)
    near, high = size <= LARGE_PIVOT, rise > HIGH_RISE
    least = np.where(less, _CHANGE_FROM, _PLAIN_FROM)
    least = np.maximum(least, np.where(less, _CHANGE_PART, _PLAIN_PART) * np.abs(first))
    least = np.maximum(least, np.where(high, _HIGH_FROM, 0.0))
    least = np.maximum(least, np.where(near, 0.0, _LARGE_PIVOT_PART * size))
    good = np.where(plain, divergence >= least, near)
    good &= ~plain | ~(deep & (rise > HIGHEST_RISE))
    # About second - first² / 2: the difference costs digits where the pivot was a bad one.
    limit = _BAD_PIVOTS[np.minimum(number, N_SERIES - 1)]
    good &= ~by_series | (first**2 <= divergence * limit)
    good &= np.isfinite(first) & np.isfinite(second) & (number != LEFT)
    from_mean, fine = centered_divergences(first, second, top)
    which = number == CENTERED
    return np.where(which, from_mean, divergence), good & (fine | ~which)


def centered_divergences(
    mean: NDArray[np.float64], second: NDArray[np.float64], top: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return divergences of rows that were counted from their mean, and whether they are good."""
    # As float32 rounds it, it was taken from x.
    change = second + top * second_order(-mean.astype(np.float32).astype(np.float64))
    # A rounded sum of terms that are not below 0 may be.
    return np.log1p(change), (change >= 0) & (change < np.inf)
