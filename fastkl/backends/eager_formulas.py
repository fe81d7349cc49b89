"""The eager backend's formulas for rows on the CPU, each good within its reach, and the choice of one.

With x = q - p + c, where c is p - q at the reference's likeliest token (x is -d of `fastkl.state`)::

    KL = log(1 + Σ P (e^x - 1)) - Σ P x

for any c. At the likeliest token x is exactly 0, and so is the rounding of what often is most of P.
The reach of a row is its largest |x|. Which formula a row gets depends on that row alone, and so do
its bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Three of a block's shape, which are written over: for x, and for what a formula needs.
Buffers = tuple[Tensor, Tensor, Tensor]

# Up to these reaches e^x - 1 - x is a series; up to the last, exponentials are taken: weights below
# float32's smallest then hold less than 1e-8 of Σ P e^x.
# Tables lie on the CPU in float32, whatever the defaults are when this is imported.
_REACHES = torch.tensor([0.0625, 0.5, 1.0, 56.0], dtype=torch.float32, device="cpu")
# The coefficients of (e^x - 1 - x) / x² for each series, a column each, from the highest power down:
# minimax, with relative errors of 8e-9, 4e-8 and 1e-7.
_SERIES = torch.tensor(
    [
        [0.0, 0.0, 2.49956829e-5],
        [0.0, 1.98675974e-4, 2.03199597e-4],
        [0.0, 1.39750843e-3, 1.38905249e-3],
        [8.3325021e-3, 8.33345950e-3, 8.33100546e-3],
        [0.0416711494, 0.0416660048, 0.0416665711],
        [0.166666672, 0.166666657, 0.16666694],
        [0.5, 0.5, 0.5],
    ],
    dtype=torch.float32,
    device="cpu",
)
_N_SERIES = 3
# Where each column begins.
_FIRST_POWER = (3, 1, 0)
# A pivot this large is taken off the larger side before the difference is rounded at its size, to 1e-6.
_LARGE_PIVOT = 16.0
# Divergences from which float32 is good enough for e^x - 1: it is off by 1e-7 at the worst.
_PLAIN_FROM = 0.02
# Of Σ P x, below it Σ P e^x may be so far below 1 that e^x - 1 would lose it.
_FELL = -0.7
# The same as _PLAIN_FROM for float64.
_PLAIN_64_FROM = 1e-9


class Reference(NamedTuple):
    """A block of reference rows and what all circuits share of it."""

    p: Tensor  # logits (R, V)
    w: Tensor  # e^(p - m_p) (R, V)
    m_p: Tensor  # max p (R, 1)
    z_p: Tensor  # Σ w (R,), float64
    likeliest: Tensor  # argmax p (R, 1)
    absent: Tensor | None  # p = -inf (R, V); None if known to be so nowhere

    @classmethod
    def read(cls, p: Tensor, w: Tensor) -> "Reference":
        """Return the block of logits p, its weights written to w."""
        m_p, likeliest = p.max(-1, keepdim=True)
        exponentials(p, m_p, out=w)
        absent = None if on_cpu(p) and p.amin() > -torch.inf else p == -torch.inf
        return cls(p, w, m_p, row_sums(w).double(), likeliest, absent)

    def pick(self, rows: Tensor) -> "Reference":
        """Return a copy of some rows."""
        p, w, m_p, z_p, likeliest, absent = self
        some_absent = None if absent is None else absent[rows]
        return Reference(p[rows], w[rows], m_p[rows], z_p[rows], likeliest[rows], some_absent)


def on_cpu(t: Tensor) -> bool:
    """Whether values may be asked for: elsewhere the host would wait for the device."""
    return t.device.type == "cpu"


def exponentials(logits: Tensor, maximum: Tensor, *, out: Tensor) -> None:
    """Write e^(logits - maximum) to out: of a row of nothing but -inf, 0."""
    torch.sub(logits, maximum.masked_fill(maximum == -torch.inf, 0.0), out=out).exp_()


def kl_by_reach(q: Tensor, ref: Reference, buffers: Buffers) -> tuple[Tensor, Tensor | None]:
    """Return the divergences (R,) of a block of rows in float64, and where they are not good enough.

    The latter, None for nowhere, is where logits are infinite or NaN or far from the reference's.
    """
    x, t, spare = buffers
    formula = _set_rises(q, ref, x)
    first = row_sums(torch.mul(ref.w, x, out=t)) / ref.z_p
    by_series = formula < _N_SERIES
    if by_series.all():
        divergence, good = _series_kl(x, t, first, ref.z_p, formula, spare)
    elif not by_series.any():
        divergence, good = _plain_kl(x, ref.w, first, ref.z_p, spare)
    else:
        divergence, good = torch.empty_like(first), torch.empty_like(by_series)
        rows = by_series.nonzero()[:, 0]
        divergence[rows], good[rows] = _series_kl(
            x[rows], t[rows], first[rows], ref.z_p[rows], formula[rows], spare
        )
        rows = by_series.logical_not_().nonzero()[:, 0]
        divergence[rows], good[rows] = _plain_kl(
            x[rows], ref.w[rows], first[rows], ref.z_p[rows], spare
        )
    if good.all() and int(formula.max()) <= _N_SERIES:
        return divergence, None
    return divergence, good.logical_not_().logical_or_(formula > _N_SERIES)


def row_sums(x: Tensor) -> Tensor:
    """Σ over the last dimension, whose bits do not depend on how many rows there are.

    PyTorch splits the sum of a single long row over its threads: as one of two it is summed whole.
    """
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


def _set_rises(q: Tensor, ref: Reference, x: Tensor) -> Tensor:
    """Set x; return each row's formula: a series' number, then exponentials, then none."""
    there = q.gather(-1, ref.likeliest)
    c = ref.m_p - there
    apart = c.abs() > _LARGE_PIVOT
    if apart.any():
        of_p = c.where(apart & (ref.m_p.abs() > there.abs()), 0.0)
        of_q = c.where(apart, 0.0) - of_p
        rest = (ref.m_p - of_p) - (there + of_q)
        torch.add(q, of_q, out=x).sub_(ref.p - of_p).add_(rest)
    else:
        torch.sub(q, ref.p, out=x).add_(c)
    # A fall without end is summed as such by exponentials. A NaN comes out as the last.
    rise, fall = x.amax(-1), x.amin(-1).neg_().clamp_(max=2 * _REACHES[_N_SERIES - 1])
    return torch.bucketize(torch.maximum(rise, fall), _REACHES, right=True)


def _series_kl(
    x: Tensor, t: Tensor, first: Tensor, z_p: Tensor, formula: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the divergences (R,) of rows by their series, in float64, and which are good enough."""
    # A column of a row's coefficients; those above its own series are 0, and cost it no digit.
    start = _FIRST_POWER[int(formula.max())]
    highest, next_lower, *lower = _SERIES[start:, formula][:, :, None]
    # Of two operands with a number a row PyTorch's loop would take one element at a time.
    series = torch.mul(x, highest, out=spare[: len(x)]).add_(next_lower)
    for coefficient in lower:
        torch.addcmul(coefficient, series, x, out=series)
    higher = row_sums(series.mul_(x).mul_(t)) / z_p
    divergence = torch.log1p(first + higher).sub_(first)
    # About higher - first² / 2: the difference costs digits where the pivot was a bad one.
    return divergence, first.square() <= divergence * 32


def _plain_kl(
    x: Tensor, w: Tensor, first: Tensor, z_p: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same by exponentials."""
    # Without the 1 a sum's rounding is that of the differences only; with it, where all but the
    # likeliest token fell, that of the little that is left. Σ P e^x is at least e^first.
    ones = (first > _FELL).to(x.dtype)
    # Not exp2, which takes a fourth of the time: its bits depend on where in a block a number lies.
    change = row_sums(torch.exp(x, out=spare[: len(x)]).sub_(ones[:, None]).mul_(w)) / z_p
    divergence = torch.log1p(change.sub_(1).add_(ones)).sub_(first)
    # `first` is off by some 1e-7 of itself.
    good = divergence >= first.abs().div_(16).clamp_(min=_PLAIN_FROM)
    if not good.all():
        rows = (~good).nonzero()[:, 0]
        x, w = x[rows].double(), w[rows].double()
        z_p = row_sums(w)
        first = row_sums(w * x) / z_p
        found = torch.log1p(row_sums(torch.expm1(x).mul_(w)) / z_p) - first
        divergence[rows], good[rows] = found, found > _PLAIN_64_FROM
    return divergence, good
