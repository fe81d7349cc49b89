"""Memory for blocks of rows on the CPU, laid out so that a row's bits depend on that row alone.

PyTorch gives each thread a share of a tensor's elements, and computes what a share has beyond whole
vectors in a scalar loop, whose exponentials differ in their last bit. So the number of elements
computed on is always one that threads can share in whole vectors: the rows' own, and some more that are
never looked at.

Long rows are summed in parts, and padded so that all parts have the same length. PyTorch sums whole
vectors of a part, then the lanes of the result one after another, then what is left over. Where one
term is as large as all the others together, each of these additions may round in the same direction. So
parts are short, and consist of whole vectors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Floats of a vector of 512 bits, and what PyTorch's loops take at a time.
_VECTOR = 16
_STEP = 2 * _VECTOR
# Elements for which PyTorch wakes another thread; 2048 for a logarithm, whose bits are the same wherever
# an element lies.
_GRAIN = 1 << 15
# Elements that are summed in float32, with an error of up to 7e-7 of the sum (256: 9e-7; 255, which is
# not whole vectors: 1.2e-6), before their sums are added up in float64. Parts of 64 take 1.4 times as
# long.
_PART = 128
# Elements a thread takes of a block, and for how many threads at the most: its core's own cache holds
# three float32 buffers of them. Smaller blocks spend their time on calls, larger ones wait for memory.
_SHARE, _SHARES = 1 << 17, 16


class Block(NamedTuple):
    """A block of rows (R, V) in memory of its own, each padded to M parts of C elements."""

    rows: Tensor  # (R, V)
    padded: Tensor  # (R, M · C)
    parts: Tensor  # (R, M, C)
    even: Tensor  # the same, and what follows until threads share evenly (N,)

    def sums(self, out: Tensor | None = None) -> Tensor:
        """Return Σ of each row's parts (R, M)."""
        return torch.sum(self.parts, -1, out=out)


class Layout:
    """How rows of a length are padded, and how many make a block.

    Parameters
    ----------
    n_rows, n_cols : int
        All rows that there are, and their length.
    """

    def __init__(self, n_rows: int, n_cols: int) -> None:
        self.n_cols = n_cols
        self.n_parts = -(-n_cols // _PART)
        # Short rows are one part as they are: padding takes more time than it is worth.
        step = 1 if self.n_parts == 1 else _VECTOR
        self.part = -(-n_cols // (self.n_parts * step)) * step
        self._padded = self.n_parts * self.part
        elements = _SHARE * min(torch.get_num_threads(), _SHARES)
        self.rows_per_block = max(1, min(n_rows, elements // self._padded))

    def slices(self, n_rows: int) -> Iterator[slice]:
        """Yield the blocks of so many rows."""
        for start in range(0, n_rows, self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, n_rows))

    def memory(self, n_buffers: int) -> list[Tensor]:
        """Return memory for as many blocks, with zeros where rows are padded.

        Whoever writes over these restores them.
        """
        size = _even(self.rows_per_block * self._padded)
        buffers = [torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(n_buffers)]
        for buffer in buffers:
            self.block(buffer, self.rows_per_block).padded[:, self.n_cols :] = 0
        return buffers

    def block(self, memory: Tensor, n_rows: int) -> Block:
        """Return a block of so many rows in memory."""
        size = n_rows * self._padded
        padded = memory[:size].view(n_rows, self._padded)
        parts = padded.view(n_rows, self.n_parts, self.part)
        return Block(padded[:, : self.n_cols], padded, parts, memory[: _even(size)])


def _even(n: int) -> int:
    """Return the smallest number of elements >= n that threads share in whole vectors."""
    n, most = -(-n // _STEP) * _STEP, torch.get_num_threads()
    while n % (_STEP * min(most, -(-n // _GRAIN))):
        n += _STEP
    return n
