"""What else a row's log-softmaxes tell: log-sum-exps, entropies, and whether the top tokens agree.

Each logit is looked at for its row's maximum, and its exponential taken in a block that stays in the
cache; what is asked of a row's few numbers is asked for all rows and circuits together. An operator,
`fastkl::statistics`, does it, so that it has numbers to look at where tensors are traced or batched by
`torch.vmap`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import errors
from fastkl.registration import batch_first, batches, fake, register
from fastkl.rows import blocks, compute_dtype, divide, row_sums
from fastkl.views import as_rows

# Elements a thread takes of a block, and for how many threads at the most: two buffers of them are in
# reach of a CPU's core, and threads wait for each other after every operation on a block.
_SHARE, _SHARES = 1 << 18, 16
# An exponent of which float64 too has no exponential but 0, and 0 times it is 0.
_NO_MASS = -1e4


class KLStatistics(NamedTuple):
    """By-products of KL divergences: a number a row, in nats, and whether the likeliest tokens agree.

    Of float32 logits they are good to a few 1e-7 of the largest terms, not of themselves.

    Every field has the shape of the divergences with reduction "none": (...) from
    :func:`fastkl.kl_div`, (K, ...) from :func:`fastkl.kl_div_many`. P is the softmax of the reference's
    logits p, Q that of the circuit's logits q, both divided by the temperature first.

    Attributes
    ----------
    reference_logsumexp : Tensor
        log Σ e^p: float64 if an input is float64, else float32, as the next three are.
    circuit_logsumexp : Tensor
        log Σ e^q.
    reference_entropy : Tensor
        H(P) = -Σ P log P, in nats.
    cross_entropy : Tensor
        -Σ P log Q = H(P) + KL(P ‖ Q), in nats.
    top1_agreement : Tensor, bool
        Whether the likeliest tokens are the same (the first of equals); False where a row is NaN.
    """

    reference_logsumexp: Tensor
    circuit_logsumexp: Tensor
    reference_entropy: Tensor
    cross_entropy: Tensor
    top1_agreement: Tensor


@torch.no_grad()
def statistics(
    circuits: Sequence[Tensor], reference: Tensor, divergence: Tensor, temperature: float
) -> KLStatistics:
    """Return the statistics (K, R) of rows and their divergences KL(P ‖ Q) (K, R)."""
    lse, entropy, agreement = _statistics(circuits, reference, temperature)
    shape = divergence.shape
    return KLStatistics(
        lse[0].expand(shape),
        lse[1:],
        entropy.expand(shape),
        entropy + divergence.detach(),
        agreement,
    )


@register(
    "statistics(Tensor[] circuits, Tensor reference, float temperature) -> (Tensor, Tensor, Tensor)"
)
def _statistics(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps, the reference's first (1 + K, R), entropies (R,), and agreement (K, R)."""
    errors.check_rows(circuits, reference)
    sides = [as_rows(t.detach()) for t in (reference, *circuits)]
    dtype, (n_rows, n_cols) = compute_dtype(*sides), sides[0].shape
    # What is known of each row: the largest logit m, where it is, and Σ e^x, x being (logit - m) / T;
    # of the reference's Σ x e^x too.
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
            # Of a row of nothing but -inf, a finite number is subtracted, so that its sum is 0.
            torch.sub(block, largest.clamp(min=torch.finfo(dtype).min), out=x)
            if temperature != 1:
                divide(x, temperature)
            if side == 0:
                # A token without mass adds nothing: not 0 · inf.
                x.clamp_(min=_NO_MASS)
            torch.exp(x, out=w)
            z[side, rows] = row_sums(w)[:, 0]
            if side == 0:
                below[rows] = row_sums(x.mul_(w))[:, 0]
    # Where there is no distribution z is 0, or NaN, of a NaN or inf - inf, which fails the comparison;
    # the entropy is NaN either way.
    defined, log_z = z > 0, torch.log(z)
    entropy = log_z[0] - below / z[0]
    agreement = (top[1:] == top[0]) & defined[0] & defined[1:]
    return (m / temperature + log_z).to(dtype), entropy.to(dtype), agreement


def _slices(logits: Tensor) -> Iterator[slice]:
    """Yield the slices of rows (R, V) that are computed at a time."""
    if logits.device.type != "cpu":
        yield from blocks(logits)
        return
    n_rows, n_cols = logits.shape
    size = max(1, _SHARE * min(torch.get_num_threads(), _SHARES) // n_cols)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit (R, 1), and where it is first (R,)."""
    if logits.device.type == "cpu":
        # PyTorch takes ten times as long to say where a maximum is.
        at = torch.from_numpy(logits.numpy().argmax(-1))
        return logits.gather(-1, at[:, None]), at
    m, at = logits.max(-1, keepdim=True)
    return m, at[:, 0]


@fake(_statistics)
def _(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    del temperature
    n_circuits, n_rows = len(circuits), math.prod(reference.shape[:-1])
    lse = reference.new_empty((1 + n_circuits, n_rows), dtype=compute_dtype(reference, *circuits))
    agreement = lse.new_empty((n_circuits, n_rows), dtype=torch.bool)
    return lse, lse.new_empty(n_rows), agreement


@batches(_statistics)
def _(
    info: Any,
    in_dims: tuple[Sequence[int | None], int | None, None],
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    size, (dims, reference_dim, _) = info.batch_size, in_dims
    ref, *cir = (
        as_rows(batch_first(t, dim, size))
        for t, dim in zip((reference, *circuits), (reference_dim, *dims), strict=True)
    )
    lse, entropy, agreement = _statistics(cir, ref, temperature)
    found = lse, entropy, agreement
    shape = size, ref.shape[0] // size
    return tuple(t.reshape(*t.shape[:-1], *shape) for t in found), (1, 0, 1)
