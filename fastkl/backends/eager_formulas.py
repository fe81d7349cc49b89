"""The eager backend's formula for rows on the CPU, and where it is accurate enough.

With x = q - p + c (x is -d of `fastkl.state`), for any c::

    KL = log(Σ P e^x) - Σ P x = log(1 + M + T) - M,   M = Σ P x,   T = Σ P (e^x - 1 - x)

A small divergence is almost T alone, and rounding x and e^x separately would leave nothing of T. So
e^x is rounded to a float32 u, and log u replaces x: u - 1 is exact where u is about 1, and log u is
accurate to its last digit. The sums are then the exact sums of a slightly different circuit. Its
divergence differs from the true one by the rounding error of u times Q - P, which is less than 2e-7
√KL.

The likeliest tokens are not part of the float32 sums: see `eager_workspace`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkl.backends.eager_blocks import Block

# A float32 sum is off by up to 7e-7 of itself, if many tokens move alike and so round alike. A
# result is good if the sum is at most _SUMMED_PART times the divergence, plus _SUMMED: then the
# result is off by less than 4e-6 of itself, plus 1.4e-9, which leaves room for the logarithms'
# error of 6e-8.
_SUMMED_PART, _SUMMED = 5, 0.002
# If the sides are about 4 or more apart, p - q is rounded at that size (by 2e-7 or more), so only
# divergences of at least this fraction of the distance are accepted.
_LARGE_PIVOT, _LARGE_PIVOT_PART = 3.0, 0.03
# If the sides are less than this far apart, float64 holds the difference of two logits to 1e-10.
LARGEST_PIVOT = 2.0**20
# In rows with a logit more than DEEP below the largest, tokens may rise by more than 2^_HIGH while
# KL stays small. Such a rise is rounded by 4e-6 or more, which is negligible only if KL is
# _HIGH_FROM or more. In other rows a rise that high makes KL large by itself.
DEEP, _HIGH, _HIGH_FROM = 40.0, 64.0, 2.0
# Weights of logits more than _TOO_DEEP below the largest are off by 5e-6 of themselves, and from 87
# on they may underflow in float32. If no token rises by more than 2^_TOO_HIGH, such tokens hold
# less than 1e-8 of Σ P e^x, and this does no harm.
_TOO_DEEP, _TOO_HIGH = 64.0, 64.0
# Smaller powers of two may have fewer digits, or be 0. They are compared by their bits: a larger
# number has larger bits.
LEAST_EXPONENT = -125
LEAST_BITS = (LEAST_EXPONENT + 127) << 23
# PyTorch subtracts a tensor of one element faster than a Python number.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def sums(
    x: Block, w: Block, t: Block, *, least: Tensor, sum_x: Tensor, minus_sum_phi: Tensor
) -> None:
    """Write each part's least e^x (its bits), Σ w x, and -Σ w (e^x - 1 - x).

    On entry, the block x holds x log2 e. Both x and t are overwritten.
    """
    # This is exp2, not exp, which PyTorch takes from another library: that one is several times
    # slower on one maker's processors, and hardly faster on another's.
    x.even.exp2_()
    # The minimum is taken of integers, since that of floats also checks for NaN.
    torch.amin(x.parts.view(torch.int32), -1, out=least)
    torch.log(x.even, out=t.even)
    x.even.sub_(_ONE)
    t.even.mul_(w.even)
    t.sums(out=sum_x)
    torch.addcmul(t.even, x.even, w.even, value=-1, out=x.even)
    x.sums(out=minus_sum_phi)


def divergences(
    sum_x: NDArray[np.float64],
    sum_phi: NDArray[np.float64],
    share: NDArray[np.float64],
    x: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return divergences (..., R), M, and which divergences are good.

    Parameters
    ----------
    sum_x, sum_phi : NDArray (..., R)
        Σ P x and Σ P (e^x - 1 - x) without the likeliest tokens.
    share : NDArray (R, C)
        P of the likeliest tokens.
    x : NDArray (..., R, C)
        Their x.
    """
    m = sum_x + np.einsum("...c,...c->...", share, x)
    t = sum_phi + np.einsum("...c,...c->...", share, np.expm1(x) - x)
    divergence = np.log1p(m + t) - m
    # dKL/dT is 1 / (1 + M + T), and dKL/dM is -(M + T) / (1 + M + T).
    summed = (t + np.abs(m * (m + t))) / (1 + m + t)
    # Infinite and NaN sums fail one of these.
    good = (divergence >= 0) & (summed <= _SUMMED_PART * divergence + _SUMMED)
    return divergence, m, good


def close_enough(
    divergence: NDArray[np.float64], c: NDArray[np.float64], highest: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Return for which divergences differences of logits in float32 are accurate enough.

    Parameters
    ----------
    divergence, c : NDArray (K, R)
        Divergences, and the distance between the sides.
    highest : NDArray (K, R)
        The largest x log2 e of a deep row; 0 for others.
    """
    size = np.abs(c)
    good = (size <= _LARGE_PIVOT) | (divergence >= _LARGE_PIVOT_PART * size)
    return good & ((highest <= _HIGH) | (divergence >= _HIGH_FROM))


def weights_will_do(depth: NDArray[np.float32], highest: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which rows' weights are accurate enough, given their depth and largest x log2 e."""
    return (depth <= _TOO_DEEP) | (highest <= _TOO_HIGH)
