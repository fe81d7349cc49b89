"""What else a row's log-softmaxes tell: log-sum-exps, entropies, and whether the top tokens agree."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.rows import Rows, blocks, compute_dtype, read, row_sums


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
    """Return the statistics (K, R) of rows (R, V) and their divergences KL(P ‖ Q) (K, R)."""
    dtype = compute_dtype(reference, *circuits)
    # Not written into tensors made before: what torch.vmap batches does not fit into them.
    lse_p, entropy = _Pieces(reference, dtype), _Pieces(reference, dtype)
    lse_q = [_Pieces(reference, dtype) for _ in circuits]
    agreement = [_Pieces(reference, torch.bool) for _ in circuits]
    for rows in blocks(reference):
        ref = read(reference[rows], dtype, temperature)
        lse_p.append(_logsumexp(ref, temperature))
        below = torch.sub(ref.logits, ref.m.to(dtype)).div_(temperature)
        # A token without mass adds nothing: not 0 · inf.
        below.masked_fill_(ref.weights == 0, 0.0)
        surprise = torch.log(ref.z) - row_sums(below.mul_(ref.weights)) / ref.z
        entropy.append(torch.where(ref.defined, surprise, torch.nan)[:, 0])
        top = ref.logits.argmax(-1)
        for k, circuit in enumerate(circuits):
            cir = read(circuit[rows], dtype, temperature)
            lse_q[k].append(_logsumexp(cir, temperature))
            defined = (ref.defined & cir.defined)[:, 0]
            agreement[k].append((cir.logits.argmax(-1) == top) & defined)
    shape = divergence.shape
    of_reference = [pieces.joined().expand(shape) for pieces in (lse_p, entropy)]
    of_circuits = [
        torch.stack([pieces.joined() for pieces in field]) if field else divergence.new_empty(shape)
        for field in (lse_q, agreement)
    ]
    cross_entropy = of_reference[1] + divergence.detach()
    return KLStatistics(
        of_reference[0], of_circuits[0], of_reference[1], cross_entropy, of_circuits[1].bool()
    )


class _Pieces(list[Tensor]):
    """A number a row, block by block."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        super().__init__([like.new_empty(0, dtype=dtype)])
        self._dtype = dtype

    def joined(self) -> Tensor:
        """Return all of them (R,)."""
        return torch.cat([piece.to(self._dtype) for piece in self])


def _logsumexp(rows: Rows, temperature: float) -> Tensor:
    """Return log Σ e^(logits / T) of rows (R,), in float64."""
    return (rows.m / temperature + torch.log(rows.z))[:, 0]
