"""What else a row's log-softmaxes tell: log-sum-exps, entropies, and whether the top tokens agree."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.rows import Rows, blocks, compute_dtype, read, row_sums


class KLStatistics(NamedTuple):
    """By-products of KL divergences: a number a row, in nats, and whether the likeliest tokens agree.

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
    """Return the statistics (K, R) of rows (R, V) and their divergences KL(P ‖ Q) (K, R)."""
    dtype = compute_dtype(reference, *circuits)
    n_rows = reference.shape[0]
    lse_p, entropy = (torch.empty(n_rows, dtype=dtype, device=reference.device) for _ in range(2))
    lse_q = torch.empty((len(circuits), n_rows), dtype=dtype, device=reference.device)
    agreement = torch.empty((len(circuits), n_rows), dtype=torch.bool, device=reference.device)
    for rows in blocks(reference):
        ref = read(reference[rows], dtype, temperature)
        lse_p[rows] = _logsumexp(ref, temperature).to(dtype)
        below = torch.sub(ref.logits, ref.m.to(dtype)).div_(temperature)
        # A token without mass adds nothing: not 0 · inf.
        below.masked_fill_(ref.weights == 0, 0.0)
        surprise = torch.log(ref.z) - row_sums(below.mul_(ref.weights)) / ref.z
        entropy[rows] = torch.where(ref.defined, surprise, torch.nan)[:, 0].to(dtype)
        top = ref.logits.argmax(-1)
        for k, circuit in enumerate(circuits):
            cir = read(circuit[rows], dtype, temperature)
            lse_q[k, rows] = _logsumexp(cir, temperature).to(dtype)
            defined = (ref.defined & cir.defined)[:, 0]
            agreement[k, rows] = (cir.logits.argmax(-1) == top) & defined
    lse_p, entropy = lse_p.expand(lse_q.shape), entropy.expand(lse_q.shape)
    return KLStatistics(lse_p, lse_q, entropy, entropy + divergence.detach(), agreement)


def _logsumexp(rows: Rows, temperature: float) -> Tensor:
    """Return log Σ e^(logits / T) of rows (R,), in float64."""
    return (rows.m / temperature + torch.log(rows.z))[:, 0]
