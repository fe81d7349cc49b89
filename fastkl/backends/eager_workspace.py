"""Measures blocks of rows on the CPU: sums by one formula or another, and divergences from the sums.

After each pass over a block everything else has left the core's own cache, and a question about ten
numbers takes a fifth of a pass: what can wait is asked for all circuits together.

Which formula a row gets depends on that row alone, and so do its bits.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkl.backends import eager_formulas as formulas
from fastkl.backends.eager_blocks import Block, Layout

# Row sums that are kept at a time, of all circuits.
_KEPT_SUMS = 1 << 17
# What is summed of a row at first. PLAIN: exponentials of x as it is. CENTERED: those of x counted from
# its mean. LEFT: nothing; the row is measured again, from its mean, since few rows of its block are, or
# since it takes exact differences.
PLAIN, CENTERED, LEFT = range(3)
# Returns a block's rows (R, V) of a circuit by its number, or those of them that it is told.
Circuit = Callable[[int, Tensor | None], Tensor]


class _Known(NamedTuple):
    """What the circuits share of a block of reference rows (R, V)."""

    p: Tensor  # logits (R, V)
    likeliest: Tensor  # argmax p (R, 1)
    m_p: Tensor  # max p (R, 1)
    top: Tensor  # e^(p - m_p) there (R, 1): 1 if there is any mass
    z_p: Tensor  # Σ e^(p - m_p) (R,), float64
    spread: formulas.Spread  # of w, to estimate divergences


class _Buffers(NamedTuple):
    """Blocks of rows beside each other."""

    w: Block  # weights of the reference, 0 at its likeliest token
    x: Block  # rises
    t: Block  # what is summed


class _Tables(NamedTuple):
    """What is kept of a block's rows of all circuits."""

    there: Tensor  # q at the reference's likeliest token (K, R, 1)
    apart: Tensor  # p there less q (K, R, 1)
    rise: Tensor  # the largest x (K, R)
    first: Tensor  # Σ w x of parts (K, R, M)
    second: Tensor  # what the formula sums of parts (K, R, M), anything if LEFT
    formula: NDArray[np.int64]  # PLAIN, CENTERED or LEFT (K, R)

    @classmethod
    def empty(cls, n_circuits: int, n_rows: int, n_parts: int) -> "_Tables":
        shape = n_circuits, n_rows
        there, apart = torch.empty((2, *shape, 1), dtype=torch.float32, device="cpu")
        rise = torch.empty(shape, dtype=torch.float32, device="cpu")
        first, second = torch.empty((2, *shape, n_parts), dtype=torch.float32, device="cpu")
        return cls(there, apart, rise, first, second, np.full(shape, PLAIN))


class _Some(NamedTuple):
    """Rows that are measured again, of whichever circuits, in order."""

    circuits: NDArray[np.int64]  # (N,)
    rows: NDArray[np.int64]  # (N,)
    there: Tensor  # q at the reference's likeliest token (N, 1)
    mean: NDArray[np.float64]  # Σ P x (N,)


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
        self._w, self._some_w, self._x, self._t = layout.memory(4)
        self._wide: Tensor | None = None
        self.n_circuits = max(1, _KEPT_SUMS // (layout.n_rows * layout.n_parts))

    def read(self, p: Tensor) -> None:
        """Take a block of reference rows (R, V)."""
        w, _, t = self._buffers(self._w, len(p))
        # PyTorch takes ten times as long to say where a maximum is.
        likeliest = torch.from_numpy(p.detach().numpy().argmax(-1))[:, None]
        m_p = p.gather(-1, likeliest)
        torch.sub(p, m_p.masked_fill(m_p == -torch.inf, 0.0), out=w.rows)
        w.even.mul_(math.log2(math.e)).exp2_()
        w.padded[:, self._layout.n_cols :] = 0
        top = w.rows.gather(-1, likeliest)
        # x is 0 there: sums of the other tokens alone are no larger than what moved.
        w.rows.scatter_(-1, likeliest, 0.0)
        masses = w.sums()
        z_p = top[:, 0] + _total(masses)
        torch.mul(w.even, w.even, out=t.even)
        # Of a row that has no other tokens, or no weights, there is nothing to estimate.
        with np.errstate(all="ignore"):
            spread = formulas.Spread.of(masses.numpy(), _total(t.sums()).numpy(), z_p.numpy())
        self._known = _Known(p, likeliest, m_p, top, z_p, spread)

    def kl(self, circuit: Circuit, n_circuits: int) -> tuple[Tensor, Tensor]:
        """Return the divergences (K, R) of the block's rows in float64, and which are good enough.

        The others have infinite or NaN logits, tokens that rise too far, or sides too far apart.

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
            mean, second = (_total(t).numpy() / z_p for t in (tables.first, tables.second))
            rise, apart = tables.rise.numpy(), tables.apart[..., 0].numpy()
            divergence, good = formulas.plain_divergences(
                mean,
                second,
                top=top / z_p,
                rise=rise,
                apart=apart,
                deep=self._deep(np.fmax.reduce(rise)),
            )
            # What float32 rounds x to is too much of what is left when its mean has been taken off.
            exact = (np.abs(apart) > formulas.LARGE_PIVOT) | (np.abs(mean) > formulas.LARGE_MEAN)
            centered = tables.formula == CENTERED
            from_mean, from_mean_good = formulas.centered_divergences(mean, second, top / z_p)
            divergence = np.where(centered, from_mean, divergence)
            good = np.where(centered, from_mean_good & ~exact, good & (tables.formula == PLAIN))
            again = ~good & np.isfinite(mean) & (rise <= formulas.HIGH_RISE)
            again &= np.abs(apart) < formulas.LARGEST_PIVOT
            for which, measure in (
                (again & ~exact & ~centered, self._measure_centered),
                (again & exact, self._measure_exactly),
            ):
                for at in self._groups(which):
                    found, fine = measure(circuit, _Some(*at, tables.there[at], mean[at]))
                    # A block that is taken as a whole has other rows too.
                    divergence[at] = np.where(which[at], found, divergence[at])
                    good[at] = np.where(which[at], fine, good[at])
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
            *(self._layout.block(memory, n_rows) for memory in (weights, self._x, self._t))
        )

    def _sum(self, circuit: Circuit, tables: _Tables) -> None:
        """Fill the tables."""
        known = self._known
        w, x, t = self._buffers(self._w, len(known.p))
        for k, fields in enumerate(zip(*tables, strict=True)):
            table, q = _Tables(*fields), circuit(k, None)
            torch.gather(q, -1, known.likeliest, out=table.there)
            torch.sub(known.m_p, table.there, out=table.apart)
            torch.sub(q, known.p, out=x.rows)
            x.rows.add_(table.apart)
            torch.amax(x.rows, -1, out=table.rise)
            torch.mul(x.even, w.even, out=t.even)
            t.sums(out=table.first)
            self._choose(table)
            n_plain, n_centered, _ = np.bincount(table.formula, minlength=3)
            if n_plain:
                # In place if x is not needed again: another buffer takes longer.
                sums = formulas.plain(x, w, out=t if n_centered else x)
                sums.sums(out=table.second)
            if n_centered:
                mean = _total(table.first) / known.z_p
                x.rows.sub_(mean.float()[:, None])
                sums = formulas.centered(x, w, out=t)
                if n_plain:
                    which = table.formula == CENTERED
                    table.second.numpy()[which] = sums.sums().numpy()[which]
                else:
                    sums.sums(out=table.second)

    def _choose(self, table: _Tables) -> None:
        """Set the formulas, given the first sums, the largest x, and c."""
        small = self._known.spread.estimates(table.first.numpy()) < formulas.PLAIN_FROM
        # The estimate knows nothing of a token that only the circuit prefers.
        small &= table.rise.numpy() <= formulas.HIGH_RISE
        if np.count_nonzero(small):
            table.formula[small] = LEFT
            at_once = small & (np.abs(table.apart[:, 0].numpy()) <= formulas.LARGE_PIVOT)
            # A pass takes as long for few rows as for all.
            if 2 * np.count_nonzero(at_once) >= len(small):
                table.formula[at_once] = CENTERED

    def _groups(
        self, again: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield circuits and rows (N,) to measure together: whole blocks where half of one is asked."""
        n_rows = again.shape[1]
        many = 2 * again.sum(-1) >= n_rows
        for k in many.nonzero()[0]:
            yield np.full(n_rows, k), np.arange(n_rows)
        circuits, rows = (again & ~many[:, None]).nonzero()
        for start in range(0, len(rows), self._layout.n_rows):
            some = slice(start, start + self._layout.n_rows)
            yield circuits[some], rows[some]

    def _gather(
        self, circuit: Circuit, circuits: NDArray[np.int64], index: Tensor, q: Tensor
    ) -> tuple[_Buffers, Tensor]:
        """Return memory for rows of circuits, with the weights, and the reference's logits.

        These last until t is written. q becomes the circuits' logits.
        """
        p, n = self._known.p, len(index)
        numbers, starts = np.unique(circuits, return_index=True)
        if n == len(p) and len(numbers) == 1:
            q.copy_(circuit(int(numbers[0]), None))
            return self._buffers(self._w, n), p
        buffers = self._buffers(self._some_w, n)
        weights = self._layout.block(self._w, len(p)).padded
        torch.index_select(weights, 0, index, out=buffers.w.padded)
        for k, start, stop in zip(numbers, starts, (*starts[1:], n), strict=True):
            q[start:stop] = circuit(int(k), index[start:stop])
        some_p = buffers.t.even[: n * self._layout.n_cols].view(n, -1)
        return buffers, torch.index_select(p, 0, index, out=some_p)

    def _measure_centered(
        self, circuit: Circuit, some: _Some
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return divergences (N,), and whether they are good.

        To the last bit those that the rows would have had among others that are counted from the mean.
        """
        circuits, rows, there, mean = some
        known, index = self._known, torch.from_numpy(rows)
        x = self._layout.block(self._x, len(rows))
        (w, _, t), p = self._gather(circuit, circuits, index, x.rows)
        x.rows.sub_(p).add_(known.m_p[index] - there)
        x.rows.sub_(torch.from_numpy(mean.astype(np.float32))[:, None])
        z_p = known.z_p.numpy()[rows]
        second = _total(formulas.centered(x, w, out=t).sums()).numpy() / z_p
        top = known.top[:, 0].numpy()[rows] / z_p
        return formulas.centered_divergences(mean, second, top)

    def _measure_exactly(
        self, circuit: Circuit, some: _Some
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return divergences (N,), and whether they are good.

        They are counted from about their means, by differences that are rounded once.
        """
        circuits, rows, there, mean = some
        known, index = self._known, torch.from_numpy(rows)
        if self._wide is None:
            shape = self._layout.n_rows, self._layout.n_cols
            self._wide = torch.empty(shape, dtype=torch.float64, device="cpu")
        d = self._wide[: len(rows)]
        (w, x, t), p = self._gather(circuit, circuits, index, d)
        apart = known.m_p[index].double() - there.double()
        x.rows.copy_(d.sub_(p).add_(apart - torch.from_numpy(mean)[:, None]))

        z_p = known.z_p.numpy()[rows]
        top = known.top[:, 0].numpy()[rows] / z_p
        torch.mul(x.even, w.even, out=t.even)
        left = _total(t.sums()).numpy() / z_p - top * mean
        second = _total(formulas.centered(x, w, out=t).sums()).numpy() / z_p
        second += top * formulas.second_order(-mean)
        divergence = np.log1p(left + second) - left
        rise = x.rows.amax(-1).numpy() + mean
        return divergence, (divergence >= 0) & (divergence < np.inf) & (rise <= formulas.HIGH_RISE)


def _total(sums: Tensor) -> Tensor:
    """Return the sum of parts (..., M) in float64."""
    return sums.sum(-1, dtype=torch.float64)
