"""Memory for blocks of rows on the CPU, laid out so that a row's bits depend on that row alone.

PyTorch gives each thread a share of a tensor's elements, and computes the remainder of a share
beyond whole vectors in a scalar loop, whose exponentials differ in their last bit. So operations
always run on a number of elements that threads can share in whole vectors: the rows' own elements,
and some more whose results are never read.

Long rows are summed in parts, and padded so that all parts have the same length. PyTorch sums whole
vectors of a part, then the lanes of the result one after another, then the remainder. If one term
is as large as all the others together, each of these additions may round in the same direction. So
parts are short, and consist of whole vectors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Floats in a vector of 512 bits, and floats per iteration of PyTorch's loops.
_VECTOR = 16
_STEP = 2 * _VECTOR
# PyTorch wakes another thread for this many elements. For a logarithm, 2048 are enough, but its
# bits do not depend on where an element lies.
_GRAIN = 1 << 15
# At most this many elements are summed in float32, with an error of up to 7e-7 of the sum (256:
# 9e-7; 255, which is not whole vectors: 1.2e-6). The parts' sums are then added in float64. Parts
# of 64 take 1.4 times as long.
_PART = 128
# Elements per thread in a block, and the largest number of threads counted: a core's own cache
# holds three float32 buffers of this size. Smaller blocks spend their time on calls, larger ones
# wait for memory.
_SHARE, _SHARES = 1 << 17, 16


class Block(NamedTuple):
    """A block of rows (R, V) in memory of its own, each padded to M parts of C elements."""

    rows: Tensor  # (R, V)
    padded: Tensor  # (R, M · C)
    parts: Tensor  # (R, M, C)
    even: Tensor  # the same, and more elements until threads share evenly (N,)

    def sums(self, out: Tensor | None = None) -> Tensor:
        """Return the sum of each part (R, M)."""
        return torch.sum(self.parts, -1, out=out)


class Layout:
    """How rows of one length are padded, and how many of them form a block.

    Parameters
    ----------
    n_rows, n_cols : int
        The number of all rows, and their length.
    """

    def __init__(self, n_rows: int, n_cols: int) -> None:
        self.n_cols = n_cols
        self.n_parts = -(-n_cols // _PART)
        # Short rows are one part without padding, which would take more time than it is worth.
        step = 1 if self.n_parts == 1 else _VECTOR
        self.part = -(-n_cols // (self.n_parts * step)) * step
        self._padded = self.n_parts * self.part
        elements = _SHARE * min(torch.get_num_threads(), _SHARES)
        self.rows_per_block = max(1, min(n_rows, elements // self._padded))

    def slices(self, n_rows: int) -> Iterator[slice]:
        """Yield the slices of `n_rows` rows that form blocks."""
        for start in range(0, n_rows, self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, n_rows))

    def memory(self, n_buffers: int) -> list[Tensor]:
        """Return memory for `n_buffers` blocks, with zeros where rows are padded.

        Code that overwrites these zeros must restore them.
        """
        size = _even(self.rows_per_block * self._padded)
        buffers = [torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(n_buffers)]
        for buffer in buffers:
            self.block(buffer, self.rows_per_block).padded[:, self.n_cols :] = 0
        return buffers

    def block(self, memory: Tensor, n_rows: int) -> Block:
        """Return a block of `n_rows` rows in memory."""
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
