"""Statistics of a row's own log-softmax, in plain PyTorch: log-sum-exp, entropy, likeliest token.

Rows are processed in blocks that stay in the cache: first the maxima are found, then exponentials
are taken. The last operations, on a few numbers per row, run once for all rows and circuits.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastkl.rows import blocks, compute_dtype, divide, row_sums

# Elements per thread in a block, and the largest number of threads counted: two buffers of this
# size stay in a CPU core's caches, and threads wait for each other after every operation on a
# block.
_SHARE, _SHARES = 1 << 18, 16
# An exponent whose exponential is 0 even in float64, and finite, so that 0 times it is 0.
_NO_MASS = -1e4


@torch.no_grad()
def row_statistics(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics of rows (R, V) that do not need their divergences.

    These are the log-sum-exps (1 + K, R), the reference's first, and the reference's entropies
    (R,), both in nats, and whether the likeliest tokens agree (K, R).
    """
    sides = [reference, *circuits]
    dtype, (n_rows, n_cols) = compute_dtype(*sides), sides[0].shape
    # For each row: the largest logit m, its index, and Σ e^x with x = (logit - m) / T; for the
    # reference's rows also Σ x e^x.
    m, z = sides[0].new_empty((2, len(sides), n_rows), dtype=torch.float64)
    top = m.new_empty(m.shape, dtype=torch.int64)
    below = m.new_empty(n_rows)
    slices = list(_slices(sides[0]))
    most = max((rows.stop - rows.start for rows in slices), default=0)
    x_memory, w_memory = sides[0].new_empty((2, most, n_cols), dtype=dtype)
    for rows in slices:
        n = rows.stop - rows.start
        x, w = x_memory[:n], w_memory[:n]
        for side, logits in enumerate(sides):
            block = logits[rows]
            if block.dtype != dtype:
                block = x.copy_(block)
            largest, top[side, rows] = _largest(block)
            m[side, rows] = largest[:, 0]
            # From a row of nothing but -inf, a finite number is subtracted, so that its sum is 0.
            torch.sub(block, largest.clamp(min=torch.finfo(dtype).min), out=x)
            if temperature != 1:
                divide(x, temperature)
            if side == 0:
                # A token without mass adds 0, not 0 · inf.
                x.clamp_(min=_NO_MASS)
            torch.exp(x, out=w)
            z[side, rows] = row_sums(w)[:, 0]
            if side == 0:
                below[rows] = row_sums(x.mul_(w))[:, 0]
    return finish(m, z, below, top, temperature, dtype)


def finish(
    m: Tensor, z: Tensor, below: Tensor, top: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics, given each row's sums.

    Parameters
    ----------
    m, z : Tensor (1 + K, R)
        The largest logit, and Σ e^x with x = (logit - m) / temperature, in float64, the reference's
        first.
    below : Tensor (R,)
        The reference's Σ x e^x.
    top : Tensor (1 + K, R)
        The index of the largest logit.
    """
    # A row without a distribution has z = 0, or z = NaN from a NaN or inf - inf, which fails the
    # comparison. Its entropy is NaN either way.
    defined, log_z = z > 0, torch.log(z)
    entropy = log_z[0] - below / z[0]
    agreement = (top[1:] == top[0]) & defined[0] & defined[1:]
    return (m / temperature + log_z).to(dtype), entropy.to(dtype), agreement


def _slices(logits: Tensor) -> Iterator[slice]:
    """Yield the slices of rows (R, V) that are computed one after another."""
    if logits.device.type != "cpu":
        yield from blocks(logits)
        return
    n_rows, n_cols = logits.shape
    size = max(1, _SHARE * min(torch.get_num_threads(), _SHARES) // n_cols)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit (R, 1), and its first index (R,)."""
    if logits.device.type == "cpu":
        # PyTorch takes ten times as long as NumPy to find the index of a maximum.
        at = torch.from_numpy(logits.numpy().argmax(-1))
        return logits.gather(-1, at[:, None]), at
    m, at = logits.max(-1, keepdim=True)
    return m, at[:, 0]
