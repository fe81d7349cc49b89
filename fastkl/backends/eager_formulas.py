"""The eager backend's formula for rows on the CPU, and what it is good for.

With x = q - p + c (x is -d of `fastkl.state`), for any c::

    KL = log(Σ P e^x) - Σ P x = log(1 + M + T) - M,   M = Σ P x,   T = Σ P (e^x - 1 - x)

For a small divergence hardly anything but T is left, and rounding x and e^x separately would leave
nothing of T. So e^x is rounded to a float32 u, and log u takes the place of x: u - 1 is exact where u
is about 1, and log u is accurate to its last digit. The sums are then exact ones of a slightly
different circuit, whose divergence differs from that asked for by the rounding of u times Q - P: by
less than 2e-7 √KL.

The likeliest tokens are not part of the float32 sums: see `eager_workspace`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkl.backends.eager_blocks import Block

# A float32 sum is off by up to 7e-7 of itself, where many tokens move alike and so round alike. A
# result is good if the sum is at most _SUMMED_PART times the divergence, plus _SUMMED: then it is off
# by less than 4e-6 of itself, plus 1.4e-9, which leaves room for the 6e-8 of the logarithms.
_SUMMED_PART, _SUMMED = 5, 0.002
# Of sides about 4 apart or more the difference is rounded at that size, to 2e-7 and more, which is
# little only of a divergence that is no smaller than this part of it.
_LARGE_PIVOT, _LARGE_PIVOT_PART = 3.0, 0.03
# Less far apart, float64 holds the difference of two logits to 1e-10.
LARGEST_PIVOT = 2.0**20
# In rows with a logit more than DEEP below the largest, tokens may rise by more than 2^_HIGH while KL
# stays small. Such a rise is rounded to 4e-6 or more, which is little only if KL is _HIGH_FROM or more.
# In other rows a rise that high makes KL large by itself.
DEEP, _HIGH, _HIGH_FROM = 40.0, 64.0, 2.0
# Weights of logits more than _TOO_DEEP below the largest are off by 5e-6 of themselves, and from 87 on
# they may vanish in float32. Where no token rises by more than 2^_TOO_HIGH such tokens hold less than
# 1e-8 of Σ P e^x, and this does no harm.
_TOO_DEEP, _TOO_HIGH = 64.0, 64.0
# Smaller powers of two have fewer digits, or are 0. As bits: larger numbers have larger ones.
LEAST_EXPONENT = -125
LEAST_BITS = (LEAST_EXPONENT + 127) << 23
# PyTorch subtracts a tensor of one element faster than a Python number.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def sums(
    x: Block, w: Block, t: Block, *, least: Tensor, sum_x: Tensor, minus_sum_phi: Tensor
) -> None:
    """Write the bits of the least e^x, Σ w x and -Σ w (e^x - 1 - x) of parts.

    Given is x log2 e, which is written over, as t is.
    """
    # exp2 and not exp, which PyTorch takes from another library: that is several times slower on one
    # maker's processors, and hardly faster on another's.
    x.even.exp2_()
    # As integers, since the least of floats asks about NaN besides.
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
        Σ P x and Σ P (e^x - 1 - x) without the tokens that are not summed.
    share : NDArray (R, C)
        P of those.
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
    """Return which divergences are good by differences in float32.

    Parameters
    ----------
    divergence, c : NDArray (K, R)
        Divergences, and how far the sides are apart.
    highest : NDArray (K, R)
        The largest x log2 e of a deep row, 0 of others.
    """
    size = np.abs(c)
    good = (size <= _LARGE_PIVOT) | (divergence >= _LARGE_PIVOT_PART * size)
    return good & ((highest <= _HIGH) | (divergence >= _HIGH_FROM))


def weights_will_do(depth: NDArray[np.float32], highest: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which rows have weights that will do, given how deep they are, and the largest x log2 e."""
    return (depth <= _TOO_DEEP) | (highest <= _TOO_HIGH)
