"""Measure blocks of rows on the CPU: sums, and divergences from the sums.

A pass over a block evicts all else from the core's own cache, so that even an operation on ten
numbers takes a fifth as long as a pass. So computations that can wait are done once, for all
circuits together.

Whether a row is measured again depends on that row alone, and so do the bits of its result.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkl.backends import eager_formulas as formulas
from fastkl.backends.eager_blocks import Block, Layout

# How many parts' sums are kept at a time, over all circuits.
_KEPT_SUMS = 1 << 17
# The number of stretches of the vocabulary; the likeliest token of each is measured in float64.
# These tokens tell roughly how far apart the sides are, and excluding them leaves few large terms
# among small ones in the float32 sums.
_STRETCHES = 8
_LOG2E = math.log2(math.e)
# Returns a block's rows (R, V) of a circuit, given its index, or only the rows at given indices.
CircuitReader = Callable[[int, Tensor | None], Tensor]


class _Known(NamedTuple):
    """What all circuits use of a block of reference rows (R, V)."""

    p: Tensor  # logits (R, V)
    likely: Tensor  # index of the largest p in each stretch of the vocabulary (R, C)
    p_likely: NDArray[np.float32]  # p there (R, C)
    share: NDArray[np.float64]  # P there (R, C)
    weights: NDArray[np.float32]  # share / Σ share, times log2 e (R, C)
    z_p: NDArray[np.float64]  # Σ e^(p - max p) (R,)
    depth: NDArray[np.float32]  # max p - min p (R,)
    deep: bool  # whether any row's depth is above DEEP


class _Sums(NamedTuple):
    """The sums kept of the parts of rows (..., V)."""

    least: Tensor  # the least e^x, as its bits (..., M)
    highest: Tensor  # the largest x log2 e (..., M); 0 in a block that is not deep
    sum_x: Tensor  # Σ w x (..., M)
    minus_sum_phi: Tensor  # -Σ w (e^x - 1 - x) (..., M)

    @classmethod
    def empty(cls, shape: tuple[int, ...], n_parts: int) -> "_Sums":
        """Return memory for the sums."""
        shape = (*shape, n_parts)
        least = torch.empty(shape, dtype=torch.int32, device="cpu")
        highest = torch.zeros(shape, dtype=torch.float32, device="cpu")
        sum_x, minus_sum_phi = torch.empty((2, *shape), dtype=torch.float32, device="cpu")
        return cls(least, highest, sum_x, minus_sum_phi)


class Workspace:
    """Measures blocks of rows of one length, in memory that it reuses.

    Parameters
    ----------
    layout : Layout
        The layout of the rows.

    Attributes
    ----------
    n_circuits : int
        How many circuits can be measured at a time.
    """

    _known: _Known

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._w, self._x, self._t = layout.memory(3)
        # Memory for rows that are measured again: their weights, and their differences in float64.
        self._again: tuple[Tensor, Tensor] | None = None
        self.n_circuits = max(1, _KEPT_SUMS // (layout.rows_per_block * layout.n_parts))

    def read(self, p: Tensor) -> None:
        """Take a block of reference rows (R, V)."""
        w = self._layout.block(self._w, len(p))
        likely = torch.from_numpy(self._likely(p.detach().numpy()))
        p_likely = p.gather(-1, likely)
        m_p = p_likely.amax(-1, keepdim=True)
        torch.sub(p, m_p.masked_fill(m_p == -torch.inf, 0.0), out=w.rows)
        depth = -w.rows.amin(-1).numpy()
        w.even.mul_(_LOG2E).exp2_()
        w.padded[:, self._layout.n_cols :] = 0
        top = w.rows.gather(-1, likely).double()
        w.rows.scatter_(-1, likely, 0.0)
        z_p = top.sum(-1).numpy() + _total(w.sums())
        weights = (top / top.sum(-1, keepdim=True) * _LOG2E).float().numpy()
        # A row of nothing but -inf has no shares.
        with np.errstate(all="ignore"):
            share, deep = top.numpy() / z_p[:, None], bool((depth > formulas.DEEP).any())
        self._known = _Known(p, likely, p_likely.numpy(), share, weights, z_p, depth, deep)

    def _likely(self, p: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the index of each row's largest logit in each stretch of the vocabulary (R, C)."""
        n = min(_STRETCHES, self._layout.n_parts)
        edges = (self._layout.n_cols * i // n for i in range(n + 1))
        # PyTorch takes ten times as long as NumPy to find the index of a maximum.
        return np.stack(
            [p[:, start:stop].argmax(-1) + start for start, stop in pairwise(edges)], -1
        )

    def kl(self, circuit: CircuitReader, n_circuits: int) -> tuple[Tensor, Tensor]:
        """Return the divergences (K, R) of the block's rows in float64, and which are good enough.

        The other rows have infinite or NaN logits, tokens that rise or fall too far, sides too far
        apart, a divergence that rounding makes negative, or sums too large compared with the
        divergence.

        Parameters
        ----------
        circuit : CircuitReader
            Returns the block's rows of a circuit.
        n_circuits : int
            The number of circuits.
        """
        known, (w, x, t) = self._known, self._blocks(len(self._known.p))
        shape = n_circuits, len(known.p)
        there = torch.empty((*shape, known.likely.shape[1]), dtype=torch.float32, device="cpu")
        c_log2e = torch.empty((*shape, 1), dtype=torch.float32, device="cpu")
        sums = _Sums.empty(shape, self._layout.n_parts)
        pivots, logits = c_log2e.numpy()[..., 0], there.numpy()
        # No warnings of infinite and NaN logits: the caller measures such rows by their states.
        with np.errstate(all="ignore"):
            for k, (there_k, c_k, *kept) in enumerate(zip(there, c_log2e, *sums, strict=True)):
                q = circuit(k, None)
                if q.dtype == torch.float32:
                    torch.sub(q, known.p, out=x.rows)
                else:
                    x.rows.copy_(q).sub_(known.p)
                there_k.copy_(q.gather(-1, known.likely))
                apart = known.p_likely - logits[k]
                np.einsum("rc,rc->r", apart, known.weights, out=pivots[k])
                # All elements get a fused multiply-add here, or none does: compilers contract a
                # loop's tail too.
                torch.add(c_k, x.rows, alpha=_LOG2E, out=x.rows)
                self._sum(x, w, t, _Sums(*kept))
            # log2 e is rounded to float32 here, as it was for the other tokens.
            moved = (logits.astype(np.float64) - known.p_likely) * float(np.float32(_LOG2E))
            likely = (moved + pivots[..., None]) * math.log(2)
            c = pivots.astype(np.float64) * math.log(2)
            divergence, mean, good = self._divergences(sums, slice(None), likely)
            good &= formulas.close_enough(divergence, c, self._highest(sums, slice(None)))
            again = ~good & np.isfinite(mean) & (np.abs(c) < formulas.LARGEST_PIVOT)
            for i in again.any(-1).nonzero()[0].tolist():
                rows = again[i].nonzero()[0]
                found = self._measure_exactly(circuit, i, rows, (c - mean)[i, rows])
                divergence[i, rows], good[i, rows] = found
        return torch.from_numpy(divergence), torch.from_numpy(good)

    def _blocks(self, n_rows: int) -> tuple[Block, Block, Block]:
        """Return blocks of `n_rows` rows for weights, x, and the terms to sum."""
        w, x, t = (self._layout.block(memory, n_rows) for memory in (self._w, self._x, self._t))
        return w, x, t

    def _sum(self, x: Block, w: Block, t: Block, sums: _Sums) -> None:
        """Set the sums, given x log2 e in the block x, which is overwritten."""
        # Maxima are taken of parts, not rows: threads share parts evenly, but not a few rows.
        if self._known.deep:
            torch.amax(x.parts, -1, out=sums.highest)
        formulas.sums(x, w, t, least=sums.least, sum_x=sums.sum_x, minus_sum_phi=sums.minus_sum_phi)

    def _divergences(
        self, sums: _Sums, rows: slice | NDArray[np.int64], x: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Return divergences (..., R), Σ P x, and which are good, given the likely tokens' x."""
        known = self._known
        sum_x, minus = (_total(t) / known.z_p[rows] for t in (sums.sum_x, sums.minus_sum_phi))
        divergence, mean, good = formulas.divergences(sum_x, -minus, known.share[rows], x)
        good &= sums.least.numpy().min(-1) >= formulas.LEAST_BITS
        good &= formulas.weights_will_do(known.depth[rows], self._highest(sums, rows))
        return divergence, mean, good

    def _highest(self, sums: _Sums, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the largest x log2 e of deep rows, 0 of others, whatever else is in the block."""
        highest: NDArray[np.float32] = sums.highest.numpy().max(-1)
        return np.where(self._known.depth[rows] > formulas.DEEP, highest, np.float32(0))

    def _measure_exactly(
        self, circuit: CircuitReader, k: int, rows: NDArray[np.int64], c: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return divergences (N,) of rows of a circuit, and whether they are good.

        x = q - p + c is computed in float64, with a pivot that makes its mean about 0, and rounded
        once.
        """
        known, n = self._known, len(rows)
        p, likely, (w, x, t) = known.p, known.likely, self._blocks(n)
        if self._again is None:
            shape = self._layout.rows_per_block, self._layout.n_cols
            wide = torch.empty(shape, dtype=torch.float64, device="cpu")
            self._again = self._layout.memory(1)[0], wide
        some_w, wide = self._again
        some = None
        if n < len(p):
            some = torch.from_numpy(rows)
            weights = self._layout.block(self._w, len(p)).padded
            w = self._layout.block(some_w, n)
            torch.index_select(weights, 0, some, out=w.padded)
            p, likely = p[some], likely[some]
        d = wide[:n].copy_(circuit(k, some)).sub_(p).add_(torch.from_numpy(c)[:, None])
        x_likely = d.gather(-1, likely).numpy()
        x.rows.copy_(d.mul_(_LOG2E))
        sums = _Sums.empty((n,), self._layout.n_parts)
        self._sum(x, w, t, sums)
        divergence, _, good = self._divergences(sums, rows, x_likely)
        return divergence, good


def _total(sums: Tensor) -> NDArray[np.float64]:
    """Return the sums over parts (..., M) in float64."""
    total: NDArray[np.float64] = sums.sum(-1, dtype=torch.float64).numpy()
    return total
