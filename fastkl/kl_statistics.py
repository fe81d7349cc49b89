"""Statistics of a row's distributions: log-sum-exps, entropies, and whether the top tokens agree.

The operator `fastkl::statistics` calls the backend, so that the backend gets tensors with numbers
in them even if the caller's are traced or batched by `torch.vmap`.
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
    """Statistics of every row's two distributions, which `return_stats=True` adds to the result.

    For float32 logits, the errors are a few 1e-7 times the largest logit or the log-sum-exp. A
    small entropy may therefore have a much larger relative error.

    Every field has the shape of the divergences with reduction "none": (...) from
    :func:`fastkl.kl_div`, (K, ...) from :func:`fastkl.kl_div_many`. P is the softmax of the
    reference's logits p, and Q that of the circuit's logits q, after both are divided by the
    temperature.

    Attributes
    ----------
    reference_logsumexp : Tensor
        log Σ e^p. This field and the next three are float64 if either side's logits are, else
        float32.
    circuit_logsumexp : Tensor
        log Σ e^q.
    reference_entropy : Tensor
        H(P) = -Σ P log P, in nats.
    cross_entropy : Tensor
        -Σ P log Q = H(P) + KL(P ‖ Q), in nats.
    top1_agreement : Tensor, bool
        Whether both sides have the same likeliest token (the first of equals); False if either
        side's row has no distribution, as with a NaN.
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
    """Return the statistics (K, R) of rows whose divergences KL(P ‖ Q) (K, R) are known."""
    lse, entropy, agreement = _statistics(circuits, reference, temperature, backend)
    # Give each circuit memory of its own: callers may write to the tensors that they get.
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
    """Return log-sum-exps (1 + K, R), the reference's first, entropies (R,), agreement (K, R)."""
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
