"""Reduction of one number per row to the result that the caller asks for."""

import torch
from torch import Tensor


def reduce(
    rows: Tensor,
    leading: torch.Size,
    reduction: str,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Reduce (K, R) over rows, in float64, or for "none" restore the rows' leading dimensions.

    A row that is masked or has weight 0 counts as 0, even if it is NaN or infinite; a masked row
    does so whatever its weight. "mean" divides by the number of rows that count, or by the sum of
    their weights; "batchmean" divides by the size of the first dimension. For "sum", the gradient
    of a weight is its row's divergence; it is 0 if the row is masked, or if the weight is 0 and the
    divergence is not finite.
    """
    dtype = rows.dtype
    count: Tensor | None = None
    if weights is not None:
        # Use float64: a weight's gradient may have two terms, and half precision would round each.
        weights = weights.reshape(-1).double()
        counts = (weights != 0) | rows.isfinite()
        if mask is not None:
            counts = counts & mask.reshape(-1)
        # Replace both factors before the multiplication, so that neither's gradient is 0 · NaN.
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
        # Where the count is 0, divide by 1, so that the gradient is 0 and not inf · 0.
        some = count != 0
        total = torch.where(some, total / torch.where(some, count, 1.0), torch.nan)
    elif reduction == "batchmean":
        total = total / (leading[0] if leading else 1)
    return total.to(dtype)
