"""From a number a row to what was asked for."""

import torch
from torch import Tensor


def reduce(
    rows: Tensor,
    leading: torch.Size,
    reduction: str,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Reduce (K, R) over rows, in float64, or give the rows their leading dimensions back.

    A row that is masked or has weight 0 counts 0, NaN and infinite ones too, and whatever the weight of
    a masked one. "mean" divides by the rows that count, or by their weights; "batchmean" by the size of
    the first dimension. In a sum a weight's gradient is its row's divergence, also where the weight is
    0, but 0 where its row is masked, or not finite and of weight 0.
    """
    dtype = rows.dtype
    count: Tensor | None = None
    if weights is not None:
        # Their gradient is a sum of two, which half precision would round each.
        weights = weights.reshape(-1).double()
        counts = (weights != 0) | rows.isfinite()
        if mask is not None:
            counts = counts & mask.reshape(-1)
        # Both are replaced before they are multiplied, so that neither's gradient is 0 · NaN.
        weights = torch.where(counts, weights, 0.0)
        rows = torch.where(counts, rows, 0.0).double() * weights
        count = weights.sum(dim=1)
    elif mask is not None:
        counts = mask.reshape(-1)
        rows = torch.where(counts, rows, 0.0)
        count = counts.sum(dtype=torch.float64)
    if reduction == "none":
        return rows.to(dtype).reshape(rows.shape[0], *leading)
    if reduction == "mean" and count is None:
        return rows.mean(dim=1, dtype=torch.float64).to(dtype)
    total = rows.sum(dim=1, dtype=torch.float64)
    if reduction == "mean" and count is not None:
        total = total / count
    elif reduction == "batchmean":
        total = total / (leading[0] if leading else 1)
    return total.to(dtype)
