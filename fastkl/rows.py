"""Blocks of rows in plain PyTorch: their exponentials and log-sum-exps, on any device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements per block of rows: half a dozen float32 buffers of this size stay in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 17
# On other devices, a block fills the chip many times over, and few launches are needed.
DEVICE_BLOCK_ELEMENTS = 1 << 23
# Logits of sides less than this far apart are subtracted directly: the rounding error is at most
# 3e-8.
_APART = 0.5
# Beyond this, float64 holds the distance between the sides to no better than 1e-4.
KNOWN = 2.0**40


class Rows(NamedTuple):
    """A block of one side's rows: logits (R, V), and m and z of log-sum-exps m/T + log z (R, 1)."""

    logits: Tensor
    weights: Tensor  # e^((logits - m) / T) (R, V)
    m: Tensor  # float64
    z: Tensor  # float64

    @property
    def defined(self) -> Tensor:
        """Which rows have a distribution (R, 1): some mass, and no NaN or +inf."""
        # A NaN in a sum fails the comparison.
        return (self.z > 0) & (self.m < torch.inf)


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """Return the dtype for computations on logits: float64 if any of them are, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in logits) else torch.float32


def blocks(logits: Tensor) -> Iterator[slice]:
    """Yield the slices of rows (R, V) that are computed one after another."""
    n_rows, n_cols = logits.shape
    elements = _BLOCK_ELEMENTS if logits.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    size = max(1, elements // n_cols)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def at_temperature(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """Return logits (R, V) converted to a dtype and divided by the temperature in that dtype.

    The row's largest logit is subtracted first, which changes no divergence. A division's rounding
    error is relative, so it is small for the likely tokens, whose logits are then small. A finite
    logit whose quotient overflows becomes the least finite number, so that a finite mask stays
    finite.
    """
    logits = logits.to(dtype)
    if temperature == 1:
        return logits
    divided = divide(torch.sub(logits, tops(logits)), temperature)
    if temperature < 1:
        overflowed = (divided == -torch.inf) & (logits > -torch.inf)
        divided.masked_fill_(overflowed, torch.finfo(dtype).min)
    return divided


def divide(x: Tensor, temperature: float) -> Tensor:
    """Divide x in place by a temperature, or by the dtype's least normal number if larger."""
    return x.div_(max(temperature, torch.finfo(x.dtype).tiny))


def tops(logits: Tensor) -> Tensor:
    """Return each row's largest logit (R, 1), 0 where all are -inf."""
    m = logits.amax(-1, keepdim=True)
    return m.masked_fill(m == -torch.inf, 0.0)


def read(logits: Tensor, dtype: torch.dtype, temperature: float) -> Rows:
    """Return a block of logits (R, V) with their exponentials at a temperature."""
    logits = logits.to(dtype)
    # From a row of nothing but -inf, 0 is subtracted, so that its sum is 0.
    weights = torch.sub(logits, tops(logits))
    if temperature != 1:
        divide(weights, temperature)
    weights.exp_()
    return Rows(logits, weights, logits.amax(-1, keepdim=True).double(), row_sums(weights))


def log_ratios(cir: Rows, ref: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (p - q) / T - c (R, V), and c (R, 1) in float64: near lse_p - lse_q, 0 if not finite.

    The difference of two logits is divided, since two quotients would each have a rounding error.
    """
    c = (ref.m - cir.m) + temperature * torch.log(ref.z / cir.z)
    c = torch.where(c.isfinite(), c, 0.0)
    d, c = differences(cir.logits, ref.logits, c)
    if temperature == 1:
        return d, c
    # As in `at_temperature`, a finite d stays finite: an infinite d times a weight of 0 would be
    # NaN.
    finite = d.isfinite() if temperature < 1 else None
    divide(d, temperature)
    if finite is not None:
        largest = torch.finfo(d.dtype).max
        d = torch.where(finite, d.clamp(-largest, largest), d)
    return d, c / temperature


def differences(q: Tensor, p: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return p - q - c (R, V), and c as it was subtracted.

    If the sides lie far apart, p - q is rounded at the size of c, and the rounding error is added
    back.

    Parameters
    ----------
    q, p : Tensor (R, V)
        Logits.
    c : Tensor (R, 1)
        A pivot in float64.
    """
    apart = (c.abs() >= _APART) & (c.abs() < KNOWN)
    high = c.to(p.dtype)
    d = torch.sub(p, q)
    # On other devices than the CPU, this test would make the host wait.
    if p.device.type == "cpu" and not apart.any():
        return d.sub_(high), high.double()
    lost = _rounded_off(p, q).masked_fill_(~apart, 0.0)
    low = torch.where(apart, c - high.double(), 0.0).to(p.dtype)
    # Keep this order: what is left of d is on a finer grid than lost - low.
    return d.sub_(high).add_(lost).sub_(low), high.double() + low.double()


def _rounded_off(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact a - b minus the rounded one; 0 where that is infinite or NaN.

    After D. Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """
    difference = a - b
    taken = difference - a
    return (a - difference.sub_(taken)).sub_(taken.add_(b)).nan_to_num_(nan=0.0)


def masked(logits: Tensor) -> Tensor | None:
    """Return a mask of the logits that are -inf, or None if it is known that there are none."""
    # On other devices than the CPU, this test would make the host wait.
    if logits.device.type == "cpu" and logits.amin() > -torch.inf:
        return None
    return logits == -torch.inf


def row_sums(x: Tensor) -> Tensor:
    """Return Σ over the last dimension (R, 1) in float64; a row's bits do not depend on other rows.

    PyTorch splits the sum of a single long row over its threads, but does not split the sums of two
    rows. So a single row is summed as one of two identical rows.
    """
    sums = x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)
    return sums.double()[:, None]
