"""The eager backend's formulas for rows on the CPU, each good within its reach, and the choice of one.

With x = q - p + c, where c is p - q at the reference's likeliest token (x is -d of `fastkl.state`)::

    KL = log(1 + Σ P (e^x - 1)) - Σ P x

for any c. At the likeliest token x is exactly 0, and so is the rounding of what often is most of P.
The reach of a row is its largest |x|:

- where it is small, Σ P (e^x - 1) is Σ P x and a sum of higher order, by a series;
- where it is not, exponentials are taken, which is good for divergences that are not small;
- where neither is good, x is counted from its mean: KL = log(1 + Σ P (e^x - 1 - x)) then.

What no formula is good for, the backend measures by `fastkl.state`.

Which formula a row gets depends on that row alone, and so do its bits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.backends.eager_blocks import Block, Layout

# Up to these reaches e^x - 1 - x is x² by a series.
# Tables lie on the CPU in float32, whatever the defaults are when this is imported.
_REACHES = torch.tensor([0.25, 1.4], dtype=torch.float32, device="cpu")
# The coefficients of x² / (e^x - 1 - x) for each, from the highest power down: minimax, with relative
# errors of 1.1e-7 and 1.2e-7. It takes fewer of them than its reciprocal does.
_SERIES = (
    (0.00369357713, 0.0555395894, -0.666666389, 2.0),
    (-6.96224379e-5, -3.09602008e-4, 0.00370000559, 0.0555561259, -0.666665852, 2.0),
)
# The highest is a factor in PyTorch's first term, the rest are tensors.
_LOWER = tuple(
    torch.tensor(coefficients[1:], dtype=torch.float32, device="cpu").unbind()
    for coefficients in _SERIES
)
_N_SERIES = len(_SERIES)
# Numbers of the other formulas: exponentials, the same with a high rise, none.
_EXPONENTIALS, _HIGH, _NONE = range(_N_SERIES, _N_SERIES + 3)
# Of (Σ P x)² / KL, up to it a series' error and its sums' are multiplied by no more than five.
_BAD_PIVOT = 8.0
# By exponentials a divergence is good from here on, and from this part of |Σ P x|: where many tokens
# move alike, so does their rounding, to 1e-7 of either.
_PLAIN_FROM, _PLAIN_PART = 0.03, 1 / 8
# Of Σ P x, below it Σ P e^x may be so far below 1 that e^x - 1 would lose it.
_FELL = -0.7
# The exponential of a rise like this is off by 5e-6 of itself and more, which is little only of a large
# divergence.
_HIGH_RISE, _HIGH_FROM = 24.0, 3.0
# A reference's logits so far below its largest may have weights too small for float32: where one has, no
# token may rise by more than 56, so that what these weights hold of Σ P e^x is less than 1e-8.
_DEEPEST, _HIGHEST_RISE = 87.0, 56.0
# Of a pivot this large, integers are taken off the larger side before the difference is rounded at its
# size, to 5e-7.
_LARGE_PIVOT = 4.0
# Row sums that are kept at a time, of all circuits.
_KEPT_SUMS = 1 << 17


class Reference(NamedTuple):
    """A block of reference rows and what all circuits share of it."""

    p: Tensor  # logits (R, V)
    w: Tensor  # e^(p - m_p) (R, V)
    m_p: Tensor  # max p (R, 1)
    z_p: Tensor  # Σ w (R,), float64
    likeliest: Tensor  # argmax p (R, 1)
    absent: Tensor | None  # p = -inf (R, V); None if known to be so nowhere
    deep: Tensor | None = None  # whether logits lie too deep (R,); None if they do nowhere

    @classmethod
    def read(cls, p: Tensor, w: Tensor) -> "Reference":
        """Return the block of logits p, its weights written to w."""
        m_p, likeliest = p.max(-1, keepdim=True)
        exponentials(p, m_p, out=w)
        absent = None if on_cpu(p) and p.amin() > -torch.inf else p == -torch.inf
        return cls(p, w, m_p, row_sums(w).double(), likeliest, absent)

    def pick(self, rows: Tensor) -> "Reference":
        """Return a copy of some rows."""
        p, w, m_p, z_p, likeliest, absent, _ = self
        some_absent = None if absent is None else absent[rows]
        return Reference(p[rows], w[rows], m_p[rows], z_p[rows], likeliest[rows], some_absent)


def on_cpu(t: Tensor) -> bool:
    """Whether values may be asked for: elsewhere the host would wait for the device."""
    return t.device.type == "cpu"


def exponentials(logits: Tensor, maximum: Tensor, *, out: Tensor) -> None:
    """Write e^(logits - maximum) to out: of a row of nothing but -inf, 0."""
    torch.sub(logits, maximum.masked_fill(maximum == -torch.inf, 0.0), out=out).exp_()


def row_sums(x: Tensor) -> Tensor:
    """Σ over the last dimension, whose bits do not depend on how many rows there are.

    PyTorch splits the sum of a single long row over its threads: as one of two it is summed whole.
    """
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


class Workspace:
    """Measures blocks of rows of one length by these formulas, in memory that it keeps.

    Parameters
    ----------
    layout : Layout
        Of the rows.

    Attributes
    ----------
    n_circuits : int
        How many circuits can be measured at a time.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._w, self._x, self._t, self._s, *self._copies = layout.memory(6)
        self.n_circuits = max(1, _KEPT_SUMS // (layout.n_rows * layout.n_parts))

    def read(self, p: Tensor) -> Reference:
        """Return a block of reference rows (R, V), which is good until the next is read."""
        w = self._layout.block(self._w, len(p))
        # PyTorch takes ten times as long to say where a maximum is.
        likeliest = torch.from_numpy(p.detach().numpy().argmax(-1))[:, None]
        m_p, lowest = p.gather(-1, likeliest), p.amin(-1, keepdim=True)
        exponentials(p, m_p, out=w.rows)
        absent = None if lowest.amin() > -torch.inf else p == -torch.inf
        deep = (m_p - lowest > _DEEPEST)[:, 0]
        return Reference(
            p, w.rows, m_p, _total(w.sums()), likeliest, absent, deep if deep.any() else None
        )

    def kl(
        self, circuit: Callable[[int], Tensor], n_circuits: int, ref: Reference
    ) -> tuple[Tensor, Tensor]:
        """Return the divergences (K, R) of a block's rows in float64, and which are good enough.

        The others have infinite or NaN logits, or tokens that rise too far.

        Parameters
        ----------
        circuit : function
            Returns the rows (R, V) of a circuit by its number.
        n_circuits : int
            How many there are.
        ref : Reference
            The block that was read last.
        """
        n_rows = len(ref.p)
        w, x, t, s = (
            self._layout.block(memory, n_rows) for memory in (self._w, self._x, self._t, self._s)
        )
        shape = (2, n_circuits, n_rows, self._layout.n_parts)
        firsts, seconds = torch.empty(shape, dtype=torch.float32, device="cpu")
        formulas = torch.empty(shape[1:3], dtype=torch.int64, device="cpu")
        for k in range(n_circuits):
            first, second, formula = firsts[k], seconds[k], formulas[k]
            _set_rises(circuit(k), ref, x.rows, t.rows)
            _choose(x.rows, ref.deep, out=formula)
            torch.mul(x.even, w.even, out=t.even)
            t.sums(out=first)
            lowest, highest = map(int, torch.aminmax(formula))
            lower = [
                (rows, self._series_of(rows, x, t, number))
                for number in range(lowest, min(highest, _N_SERIES))
                if len(rows := (formula == number).nonzero()[:, 0])
            ]
            if highest < _N_SERIES:
                _set_higher(x, t, highest, out=s)
                s.sums(out=second)
            else:
                _change(x, w, _total(first) / ref.z_p)
                x.sums(out=second)
            for rows, sums in lower:
                second[rows] = sums
        first, second = _total(firsts) / ref.z_p, _total(seconds) / ref.z_p
        divergence, good = _divergence(first, second, formulas)
        again = ~good & (formulas <= _EXPONENTIALS) & first.isfinite() & second.isfinite()
        for k in again.any(-1).nonzero()[:, 0].tolist():
            rows = again[k].nonzero()[:, 0]
            found = self._centered(circuit(k), ref, rows, first[k])
            divergence[k, rows] = torch.log1p(found)
            # A rounded sum of terms that are not below 0 may be.
            good[k, rows] = (found >= 0) & (found < torch.inf)
        return divergence, good

    def _series_of(self, rows: Tensor, x: Block, t: Block, number: int) -> Tensor:
        """Return Σ w (e^x - 1 - x) of some rows' parts by one of the series."""
        copied = _few(rows, len(x.rows))
        if copied:
            x, t = (self._copy(rows, *pair) for pair in zip((x, t), self._copies, strict=True))
        out = self._layout.block(self._s, len(x.rows))
        _set_higher(x, t, number, out=out)
        return out.sums() if copied else out.sums()[rows]

    def _centered(self, q: Tensor, ref: Reference, rows: Tensor, mean: Tensor) -> Tensor:
        """Return Σ P (e^x - 1 - x) of some rows, x less its mean (R,) under P."""
        w = self._layout.block(self._w, len(ref.p))
        copied = _few(rows, len(q))
        if copied:
            w = self._copy(rows, w, self._copies[0])
            q, p, m_p, likeliest, mean = (y[rows] for y in (q, ref.p, ref.m_p, ref.likeliest, mean))
            ref = ref._replace(p=p, m_p=m_p, z_p=ref.z_p[rows], likeliest=likeliest)
        x, s = (self._layout.block(memory, len(q)) for memory in (self._x, self._s))
        _set_rises(q, ref, x.rows, s.rows, mean.float()[:, None])
        # What the mean is off by hardly counts: its square is a part of the sum of second order.
        torch.expm1(x.even, out=s.even).sub_(x.even).mul_(w.even)
        found = _total(s.sums()) / ref.z_p
        return found if copied else found[rows]

    def _copy(self, rows: Tensor, block: Block, memory: Tensor) -> Block:
        """Return a copy of some rows."""
        copy = self._layout.block(memory, len(rows))
        torch.index_select(block.padded, 0, rows, out=copy.padded)
        return copy


def _few(rows: Tensor, n_rows: int) -> bool:
    """Whether it takes less time to copy some rows than to compute what is asked of some for all."""
    return 2 * len(rows) < n_rows


def _total(sums: Tensor) -> Tensor:
    return sums.sum(-1, dtype=torch.float64)


def _set_rises(
    q: Tensor, ref: Reference, x: Tensor, spare: Tensor, less: Tensor | None = None
) -> None:
    """Set x, less a number a row if there is one; spare, of its shape, may be written over."""
    there = q.gather(-1, ref.likeliest)
    rest = ref.m_p - there
    lowest, highest = map(float, torch.aminmax(rest))
    if lowest >= -_LARGE_PIVOT and highest <= _LARGE_PIVOT:
        torch.sub(q, ref.p, out=x)
    else:
        # An integer's sum with a logit is exact, but for unlikely tokens.
        large = rest.round().where(rest.abs() > _LARGE_PIVOT, 0.0)
        of_p = large.where(ref.m_p.abs() > there.abs(), 0.0)
        of_q = large - of_p
        rest = (ref.m_p - of_p) - (there + of_q)
        torch.add(q, of_q, out=x).sub_(torch.sub(ref.p, of_p, out=spare))
    x.add_(rest if less is None else rest - less)


def _choose(x: Tensor, deep: Tensor | None, *, out: Tensor) -> None:
    """Set the number of each row's formula (R,)."""
    rise, fall = x.amax(-1), x.amin(-1)
    # Of a NaN the sums are NaN too, by any formula; here it comes out as exponentials.
    torch.bucketize(torch.maximum(rise, fall.neg_()), _REACHES, right=True, out=out)
    out.add_(rise > _HIGH_RISE)
    if deep is not None:
        out.masked_fill_((rise > _HIGHEST_RISE).logical_and_(deep), _NONE)


def _set_higher(x: Block, t: Block, number: int, *, out: Block) -> None:
    """Set w (e^x - 1 - x) by one of the series, given t = w x."""
    next_lower, *lower = _LOWER[number]
    torch.add(next_lower, x.even, alpha=_SERIES[number][0], out=out.even)
    for coefficient in lower:
        torch.addcmul(coefficient, out.even, x.even, out=out.even)
    torch.div(x.even, out.even, out=out.even).mul_(t.even)


def _change(x: Block, w: Block, first: Tensor) -> None:
    """Replace x by w (e^x - 1), or by w e^x in rows that fell."""
    # exp2 is PyTorch's own, and takes down to a fourth of the time of exp, which is another library's.
    x.even.mul_(math.log2(math.e)).exp2_()
    # Without the 1 a sum's rounding is that of the differences only; with it, where all but the
    # likeliest token fell, that of the little that is left. Σ P e^x is at least e^first.
    x.padded.sub_((first > _FELL).to(torch.float32)[:, None])
    x.even.mul_(w.even)


def _divergence(first: Tensor, second: Tensor, formula: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergences (K, R), and which are good enough, from each row's sums."""
    by_series = formula < _N_SERIES
    change = torch.where(by_series, first + second, second - (first <= _FELL).double())
    divergence = torch.log1p(change) - first
    smallest = torch.where(formula == _HIGH, _HIGH_FROM, _PLAIN_FROM)
    good = torch.where(
        by_series,
        # About second - first² / 2: the difference costs digits where the pivot was a bad one.
        first.square() <= divergence * _BAD_PIVOT,
        divergence >= torch.maximum(first.abs() * _PLAIN_PART, smallest),
    )
    return divergence, good & (formula < _NONE) & (second < torch.inf)
