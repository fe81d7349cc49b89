"""From logits (..., V) to the rows (R, V) that backends take, copied only where no view has them.

What an index such as `[:, 1:]` picks from a model's output (B, S, V) is (B, S - 1, V): rows with a gap
between those of one prompt and those of the next, which no tensor (R, V) can be a view of.
"""

import math
from collections.abc import Sequence

from torch import Tensor

# Rows in the gaps are measured too, for nothing, if that makes no more than so many times as many rows
# as were asked for: beyond that a copy costs less.
_MOST = 2
# How many rows a prompt has, and how many rows the next prompt's first lies after this one's first.
Window = tuple[int, int]


def flattened(logits: Sequence[Tensor]) -> list[Tensor]:
    """View logits (..., V) of one shape as rows (R, V), or as (B, S, V) where some have gaps."""
    shape = logits[0].shape
    if len(shape) == 2:
        return list(logits)
    if len(shape) > 3:
        logits = [t.flatten(0, -3) for t in logits]
    if len(shape) > 2 and not all(_is_gapless(t) for t in logits):
        return list(logits)
    return [t.reshape(math.prod(shape[:-1]), shape[-1]) for t in logits]


def _is_gapless(logits: Tensor) -> bool:
    """Return whether rows (B, S, V) are all as far apart as one is from the next."""
    n_prompts, n_positions, _ = logits.shape
    if n_prompts == 1 or n_positions == 1:
        return True
    return logits.stride(0) == n_positions * logits.stride(1)


def as_rows(logits: Tensor) -> Tensor:
    """View logits (..., V) as (R, V) with a contiguous last dimension; copy if there is no view."""
    # Asked for K + 1 views, a call with many circuits would take a third longer.
    if logits.dim() != 2:
        logits = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return logits if logits.stride()[1] == 1 or logits.shape[1] == 1 else logits.contiguous()


def with_gaps(logits: Sequence[Tensor]) -> tuple[list[Tensor], Window | None]:
    """Return rows (N, V) of all logits, (R, V) or (B, S, V) alike, and which of them were asked for.

    Where the gaps of all logits (B, S, V) are equally many rows long, the rows in the gaps are measured
    too, for nothing, which saves a copy. The distance from row to row may differ from tensor to tensor.
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
    """Return how many rows (B, S, V) lie from one prompt's first to the next one's; 0 if no number."""
    far, near, element = logits.stride()
    if near == 0 or far % near or (element != 1 and logits.shape[2] != 1):
        return 0
    return far // near


def asked_for(values: Tensor, window: Window | None) -> Tensor:
    """Return the values (..., R) of the rows that were asked for, of those (..., N) of all."""
    return values if window is None else values.unfold(-1, *window).flatten(-2)
