"""From logits (..., V) to rows (R, V), and from a number a row to what was asked for."""

import torch
from torch import Tensor


def as_rows(logits: Tensor) -> Tensor:
    """View logits (..., V) as (R, V) with a contiguous last dimension; copy only if there is no view."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def reduce(
    rows: Tensor,
    leading: torch.Size,
    reduction: str,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Reduce (K, R) over rows, in float64, or give the rows their leading dimensions back.

    A row that is masked or has weight 0 counts 0, NaN and infinite ones too. "mean" divides by the rows
    that count, or by their weights; "batchmean" by the size of the first dimension.
    """
    dtype = rows.dtype
    # Of no rows there is no mean.
    count: Tensor | float = rows.shape[1] if rows.shape[1] else float("nan")
    if weights is not None:
        weights = weights.reshape(-1)
        counts = weights != 0 if mask is None else mask.reshape(-1) & (weights != 0)
        # Replaced before it is weighted, so that the weight's gradient is not 0 · NaN.
        rows = torch.where(counts, rows, 0.0).double() * weights
        count = torch.where(counts, weights, 0.0).sum(dtype=torch.float64)
    elif mask is not None:
        counts = mask.reshape(-1)
        rows = torch.where(counts, rows, 0.0)
        count = counts.sum(dtype=torch.float64)
    if reduction == "none":
        rows = rows.to(dtype)
        return rows.reshape(-1, *leading) if rows.numel() else rows.reshape(rows.shape[0], *leading)
    total = rows.sum(dim=1, dtype=torch.float64)
    if reduction == "mean":
        total = total / count
    elif reduction == "batchmean":
        total = total / (leading[0] if leading else 1) if rows.shape[1] else total * torch.nan
    return total.to(dtype)
