"""Views of logits (..., V) as the rows (R, V) that backends take; copies where there is no view.

An index such as `[:, 1:]` into a model's output (B, S, V) gives logits (B, S - 1, V), with a gap
between the rows of one prompt and those of the next. No tensor (R, V) can be a view of such rows.
"""

import math
from collections.abc import Sequence

from torch import Tensor

# Rows in the gaps are measured too, and discarded, if the total is then at most this many times the
# number of rows asked for; beyond that, a copy costs less.
_MOST = 2
# The number of rows in a prompt, and the number of rows from its first to the next prompt's first.
Window = tuple[int, int]


def flattened(logits: Sequence[Tensor]) -> list[Tensor]:
    """View logits (..., V) of one shape as rows (R, V), or as (B, S, V) if any of them has gaps."""
    shape = logits[0].shape
    if len(shape) == 2:
        return list(logits)
    if len(shape) > 3:
        logits = [t.flatten(0, -3) for t in logits]
    if len(shape) > 2 and not all(_is_gapless(t) for t in logits):
        return list(logits)
    return [t.reshape(math.prod(shape[:-1]), shape[-1]) for t in logits]


def _is_gapless(logits: Tensor) -> bool:
    """Return whether all consecutive rows of (B, S, V) are equally far apart in memory."""
    n_prompts, n_positions, _ = logits.shape
    if n_prompts == 1 or n_positions == 1:
        return True
    return logits.stride(0) == n_positions * logits.stride(1)


def as_rows(logits: Tensor) -> Tensor:
    """View logits (..., V) as (R, V) with a contiguous last dimension; copy if there is no view."""
    # Skip needless views: K + 1 of them would make a call with many circuits a third slower.
    if logits.dim() != 2:
        logits = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return logits if logits.stride()[1] == 1 or logits.shape[1] == 1 else logits.contiguous()


def with_gaps(logits: Sequence[Tensor]) -> tuple[list[Tensor], Window | None]:
    """Return logits of one shape (R, V) or (B, S, V) as rows (N, V), and which rows are asked for.

    If the gaps of all logits (B, S, V) are the same number of rows long, and short, the rows in the
    gaps are included, which saves a copy; they are measured only to be discarded. The distance
    between consecutive rows may differ between tensors.
    """
    if logits[0].dim() == 3:
        n_prompts, n_positions, n_cols = logits[0].shape
        steps = {_step(t) for t in logits}
        step = steps.pop()
        if not steps and n_positions <= step <= _MOST * n_positions:
            shape = (n_prompts - 1) * step + n_positions, n_cols
            return [t.as_strided(shape, (t.stride(1), 1)) for t in logits], (n_positions, step)
    return [as_rows(t) for t in logits], None


def _step(logits: Tensor) -> int:
    """Return how many rows lie from a prompt's first to the next prompt's; 0 without a view."""
    far, near, element = logits.stride()
    if near == 0 or far % near or (element != 1 and logits.shape[2] != 1):
        return 0
    return far // near


def asked_for(values: Tensor, window: Window | None, dim: int = -1) -> Tensor:
    """Return the values of the R rows asked for, from those of all N rows, along dimension `dim`."""
    if window is None:
        return values
    at = values.dim() + dim
    return values.unfold(at, *window).movedim(-1, at + 1).flatten(at, at + 1)
