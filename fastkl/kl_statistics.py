"""What else a row's log-softmaxes tell: log-sum-exps, entropies, and whether the top tokens agree.

An operator, `fastkl::statistics`, asks the backend, so that it has numbers to look at where tensors are
traced or batched by `torch.vmap`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl import backends, errors
from fastkl.registration import batch_first, batches, fake, register
from fastkl.rows import compute_dtype
from fastkl.views import as_rows


class KLStatistics(NamedTuple):
    """What `return_stats=True` returns: a few numbers per row, and whether the likeliest tokens agree.

    For float32 logits their errors are a few 1e-7 of the largest logits, or of the logarithm of the sum
    of exponentials; relative to a small entropy they may be much larger.

    Every field has the shape of the divergences with reduction "none": (...) from
    :func:`fastkl.kl_div`, (K, ...) from :func:`fastkl.kl_div_many`. P is the softmax of the reference's
    logits p, Q that of the circuit's logits q, both divided by the temperature first.

    Attributes
    ----------
    reference_logsumexp : Tensor
        log Σ e^p: float64 if a side's logits are, else float32, as the next three are.
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
    circuits: Sequence[Tensor],
    reference: Tensor,
    divergence: Tensor,
    temperature: float,
    backend: str | None,
) -> KLStatistics:
    """Return the statistics (K, R) of rows and their divergences KL(P ‖ Q) (K, R)."""
    lse, entropy, agreement = _statistics(circuits, reference, temperature, backend)
    # In memory of their own for each circuit: callers may write to what they get.
    reference_lse, entropy = (t.expand(divergence.shape).contiguous() for t in (lse[0], entropy))
    return KLStatistics(
        reference_lse,
        lse[1:],
        entropy,
        entropy + divergence.detach(),
        agreement,
    )


@register(
    "statistics(Tensor[] circuits, Tensor reference, float temperature, str? backend) "
    "-> (Tensor, Tensor, Tensor)"
)
def _statistics(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps, the reference's first (1 + K, R), entropies (R,), and agreement (K, R)."""
    errors.check_rows(circuits, reference)
    ref, *cir = (as_rows(t.detach()) for t in (reference, *circuits))
    return backends.choose_for(backend, (ref, *cir)).row_statistics(cir, ref, temperature)


@fake(_statistics)
def _(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    del temperature, backend
    n_circuits, n_rows = len(circuits), math.prod(reference.shape[:-1])
    lse = reference.new_empty((1 + n_circuits, n_rows), dtype=compute_dtype(reference, *circuits))
    agreement = lse.new_empty((n_circuits, n_rows), dtype=torch.bool)
    return lse, lse.new_empty(n_rows), agreement


@batches(_statistics)
def _(
    info: Any,
    in_dims: tuple[Sequence[int | None], int | None, None, None],
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    backend: str | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    size, (dims, reference_dim, *_) = info.batch_size, in_dims
    ref, *cir = (
        as_rows(batch_first(t, dim, size))
        for t, dim in zip((reference, *circuits), (reference_dim, *dims), strict=True)
    )
    lse, entropy, agreement = _statistics(cir, ref, temperature, backend)
    found = lse, entropy, agreement
    shape = size, ref.shape[0] // size
    return tuple(t.reshape(*t.shape[:-1], *shape) for t in found), (1, 0, 1)
