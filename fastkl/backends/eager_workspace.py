"""Measures blocks of rows on the CPU: sums by one formula or another, and divergences from the sums.

After each pass over a block everything else has left the core's own cache, and a question about ten
numbers takes a fifth of a pass: what can wait is asked for all circuits together.

Which formula a row gets depends on that row alone, and so do its bits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkl.backends import eager_formulas as formulas
from fastkl.backends.eager_blocks import Block, Layout
from fastkl.backends.eager_formulas import CENTERED, EXPONENTIALS, N_SERIES

# Row sums that are kept at a time, of all circuits.
_KEPT_SUMS = 1 << 17
_MANY_PARTS = 16
# Exponentials are written over what they are taken of, and counting from the mean over a series' terms.
_ORDER = (*range(N_SERIES), CENTERED, EXPONENTIALS)
# Returns a block's rows (R, V) of a circuit by its number, or those of them that it is told.
Circuit = Callable[[int, Tensor | None], Tensor]


class _Known(NamedTuple):
    """What the circuits share of a block of reference rows (R, V)."""

    p: Tensor  # logits (R, V)
    likeliest: Tensor  # argmax p (R, 1)
    m_p: Tensor  # max p (R, 1)
    top: Tensor  # e^(p - m_p) there (R, 1): 1 if there is any mass
    z_p: Tensor  # Σ e^(p - m_p) (R,), float64


class _Buffers(NamedTuple):
    """Blocks of rows beside each other."""

    w: Block  # weights of the reference, 0 at its likeliest token
    x: Block  # rises
    t: Block
    s: Block


class _Tables(NamedTuple):
    """What is kept of a block's rows of all circuits."""

    there: Tensor  # q at the reference's likeliest token (K, R, 1)
    apart: Tensor  # p there less q (K, R, 1)
    rise: Tensor  # the largest x (K, R)
    fall: Tensor  # the smallest x (K, R), if it was asked
    first: Tensor  # Σ w x of parts (K, R, M)
    second: Tensor  # what the formula sums of parts (K, R, M)
    number: NDArray[np.int64]  # of the formula (K, R)
    less: NDArray[np.bool_]  # whether exponentials are summed less 1 (K, R)

    @classmethod
    def empty(cls, n_circuits: int, n_rows: int, n_parts: int) -> "_Tables":
        shape = n_circuits, n_rows
        there, apart = torch.empty((2, *shape, 1), dtype=torch.float32, device="cpu")
        rise, fall = torch.empty((2, *shape), dtype=torch.float32, device="cpu")
        first, second = torch.empty((2, *shape, n_parts), dtype=torch.float32, device="cpu")
        number, less = np.full(shape, EXPONENTIALS), np.zeros(shape, bool)
        return cls(there, apart, rise, fall, first, second, number, less)


class Workspace:
    """Measures blocks of rows of one length, in memory that it keeps.

    Parameters
    ----------
    layout : Layout
        Of the rows.

    Attributes
    ----------
    n_circuits : int
        How many circuits can be measured at a time.
    """

    _known: _Known

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._w, self._some_w, *self._others = layout.memory(5)
        self._wide: Tensor | None = None
        self.n_circuits = max(1, _KEPT_SUMS // (layout.n_rows * layout.n_parts))

    def read(self, p: Tensor) -> None:
        """Take a block of reference rows (R, V)."""
        w = self._layout.block(self._w, len(p))
        # PyTorch takes ten times as long to say where a maximum is.
        likeliest = torch.from_numpy(p.detach().numpy().argmax(-1))[:, None]
        m_p = p.gather(-1, likeliest)
        torch.sub(p, m_p.masked_fill(m_p == -torch.inf, 0.0), out=w.rows)
        w.even.mul_(math.log2(math.e)).exp2_()
        w.padded[:, self._layout.n_cols :] = 0
        top = w.rows.gather(-1, likeliest)
        # x is 0 there: sums of the other tokens alone are no larger than what moved.
        w.rows.scatter_(-1, likeliest, 0.0)
        self._known = _Known(p, likeliest, m_p, top, top[:, 0] + _total(w.sums()))

    def kl(self, circuit: Circuit, n_circuits: int) -> tuple[Tensor, Tensor]:
        """Return the divergences (K, R) of the block's rows in float64, and which are good enough.

        The others have infinite or NaN logits, or tokens that rise too far.

        Parameters
        ----------
        circuit : Circuit
            Returns the block's rows of a circuit.
        n_circuits : int
            How many there are.
        """
        known = self._known
        tables = _Tables.empty(n_circuits, len(known.p), self._layout.n_parts)
        z_p, top = known.z_p.numpy(), known.top[:, 0].numpy()
        # Infinite and NaN logits are for whoever measures such rows to speak of.
        with np.errstate(all="ignore"):
            self._sum(circuit, tables)
            first, second = (_total(t).numpy() / z_p for t in (tables.first, tables.second))
            rise, apart = tables.rise.numpy(), tables.apart[..., 0].numpy()
            divergence, good = formulas.divergences(
                tables.number,
                first,
                second,
                top=top / z_p,
                less=tables.less,
                rise=rise,
                apart=apart,
                deep=self._deep(np.fmax.reduce(rise)),
            )
            again = ~good & np.isfinite(first) & (rise <= formulas.HIGH_RISE)
            again &= np.abs(apart) < formulas.LARGEST_PIVOT
            circuits, rows = again.nonzero()
            for start in range(0, len(rows), self._layout.n_rows):
                some = slice(start, start + self._layout.n_rows)
                at = circuits[some], rows[some]
                divergence[at], good[at] = self._measure_again(
                    circuit, *at, tables.there[at], first[at]
                )
        return torch.from_numpy(divergence), torch.from_numpy(good)

    def _deep(self, rise: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return in which rows a token rises too far for the weights of the deepest (R,)."""
        deep = rise > formulas.HIGHEST_RISE
        for row in deep.nonzero()[0].tolist():
            depth = self._known.m_p[row] - self._known.p[row].amin()
            deep[row] = depth.item() > formulas.DEEPEST
        return deep

    def _buffers(self, weights: Tensor, n_rows: int) -> _Buffers:
        return _Buffers(
            *(self._layout.block(memory, n_rows) for memory in (weights, *self._others))
        )

    def _sum(self, circuit: Circuit, tables: _Tables) -> None:
        """Fill the tables."""
        p, likeliest, m_p = self._known[:3]
        w, x, t, s = self._buffers(self._w, len(p))
        z_p = self._known.z_p.numpy()
        # Parts tell how tokens moved if they are many.
        small = z_p * (formulas.SMALL_CHANGE if self._layout.n_parts >= _MANY_PARTS else 0.0)
        for k, (there, apart, rise, fall, first, second, number, less) in enumerate(
            zip(*tables, strict=True)
        ):
            q = circuit(k, None)
            torch.gather(q, -1, likeliest, out=there)
            torch.sub(m_p, there, out=apart)
            torch.sub(q, p, out=x.rows)
            x.rows.add_(apart)
            torch.amax(x.rows, -1, out=rise)
            # Of a NaN the sums are NaN too, by any formula.
            if np.count_nonzero(rise.numpy() < formulas.REACHES[-1]):
                torch.amin(x.rows, -1, out=fall)
                reach = np.maximum(rise.numpy(), -fall.numpy())
                number[:] = formulas.REACHES.searchsorted(reach, side="right")
            torch.mul(x.even, w.even, out=t.even)
            t.sums(out=first)
            present = np.flatnonzero(np.bincount(number)).tolist()
            if EXPONENTIALS in present:
                parts = first.numpy()
                moved = parts.sum(-1)
                np.greater(moved, formulas.FELL * z_p, out=less)
                if np.count_nonzero(few := np.abs(moved) < small):
                    few &= np.abs(parts).sum(-1) < small
                    few &= (number == EXPONENTIALS) & (rise.numpy() <= formulas.HIGH_RISE)
                    few &= np.abs(apart[:, 0].numpy()) <= formulas.LARGE_PIVOT
                    number[few] = CENTERED
                    present = np.unique(number).tolist()
            for formula in _ORDER:
                if formula not in present:
                    continue
                if formula < N_SERIES:
                    sums = formulas.series(x, t, formula, out=s)
                elif formula == CENTERED:
                    mean = torch.from_numpy((_total(first).numpy() / z_p).astype(np.float32))
                    torch.sub(x.rows, mean[:, None], out=t.rows)
                    sums = formulas.centered(t, w, out=s)
                else:
                    sums = formulas.exponentials(x, w, less)
                if len(present) == 1:
                    sums.sums(out=second)
                else:
                    which = number == formula
                    second.numpy()[which] = sums.sums().numpy()[which]

    def _measure_again(
        self,
        circuit: Circuit,
        circuits: NDArray[np.int64],
        rows: NDArray[np.int64],
        there: Tensor,
        mean: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return divergences of rows (N,) of circuits (N,), in order, and whether they are good.

        They are counted from about their means, by differences that are rounded once.
        """
        known, index = self._known, torch.from_numpy(rows)
        w, x, t, s = self._buffers(self._some_w, len(rows))
        torch.index_select(self._layout.block(self._w, len(known.p)).padded, 0, index, out=w.padded)
        # Memory that is written over later, and need not be padded.
        p = t.even[: len(rows) * self._layout.n_cols].view(len(rows), -1)
        torch.index_select(known.p, 0, index, out=p)
        if self._wide is None:
            shape = self._layout.n_rows, self._layout.n_cols
            self._wide = torch.empty(shape, dtype=torch.float64, device="cpu")
        wide = self._wide[: len(rows)]
        numbers, starts = np.unique(circuits, return_index=True)
        for k, start, stop in zip(numbers, starts, (*starts[1:], len(rows)), strict=True):
            wide[start:stop] = circuit(int(k), index[start:stop])
        apart = known.m_p[index].double() - there.double()
        x.rows.copy_(wide.sub_(p).add_(apart - torch.from_numpy(mean)[:, None]))

        z_p = known.z_p.numpy()[rows]
        top = known.top[:, 0].numpy()[rows] / z_p
        torch.mul(x.even, w.even, out=t.even)
        first = _total(t.sums()).numpy() / z_p - top * mean
        second = _total(formulas.centered(x, w, out=s).sums()).numpy() / z_p
        second += top * formulas.second_order(-mean)
        divergence = np.log1p(first + second) - first
        rise = x.rows.amax(-1).numpy() + mean
        return divergence, (divergence >= 0) & (divergence < np.inf) & (rise <= formulas.HIGH_RISE)


def _total(sums: Tensor) -> Tensor:
    """Return the sum of parts (..., M) in float64."""
    return sums.sum(-1, dtype=torch.float64)
