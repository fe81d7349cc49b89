"""The PyTorch operators behind `kl_div`: what compiles, exports, batches and differentiates.

`fastkl::kl_div` measures K circuits by a backend; `fastkl::kl_div_backward` is its derivative, and has
none itself. Both take rows (R, V) with a contiguous last dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl import backends
from fastkl.gradient import gradients


def measure(circuits: Sequence[Tensor], reference: Tensor, backend: str | None) -> Tensor:
    """Return the divergences (K, R) of rows (R, V), by the backend that suits them."""
    dtype = reference.dtype
    for circuit in circuits:
        dtype = torch.promote_types(dtype, circuit.dtype)
    chosen = backends.choose(backend, reference.device, dtype)
    if not circuits or reference.shape[0] == 0:
        return _empty(circuits, reference)
    return chosen.kl_rows(list(circuits), reference)


@torch.library.custom_op(
    "fastkl::kl_div",
    mutates_args=(),
    schema="(Tensor[] circuits, Tensor reference, str? backend) -> Tensor",
)
def kl_div(circuits: Sequence[Tensor], reference: Tensor, backend: str | None) -> Tensor:
    """Return the divergences (K, R) of rows (R, V), with a gradient."""
    return measure(circuits, reference, backend)


@torch.library.custom_op(
    "fastkl::kl_div_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] circuits, Tensor reference, bool[] wanted, "
    "bool reference_wanted) -> Tensor[]",
)
def kl_div_backward(
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
) -> list[Tensor]:
    """Return the gradients that are wanted, the circuits' first, each like its logits."""
    dqs, dp = gradients(grad, circuits, reference, wanted, reference_wanted)
    return [gradient for gradient in (*dqs, dp) if gradient is not None]


def _empty(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    wide = any(t.dtype == torch.float64 for t in (reference, *circuits))
    shape = (len(circuits), reference.shape[0])
    return reference.new_empty(shape, dtype=torch.float64 if wide else torch.float32)


@kl_div.register_fake
def _(circuits: Sequence[Tensor], reference: Tensor, backend: str | None) -> Tensor:
    del backend
    return _empty(circuits, reference)


@kl_div_backward.register_fake
def _(
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
) -> list[Tensor]:
    del grad
    wants = (*wanted, reference_wanted)
    logits = zip((*circuits, reference), wants, strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, want in logits if want]


def _save(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor, str | None], output: Tensor) -> None:
    del output
    circuits, reference, _ = inputs
    # The logits alone: a backward pass reads them once more rather than keep anything of their size.
    logits = (*circuits, reference)
    ctx.save_for_backward(*(None if t.is_inference() else t for t in logits))
    # A teacher's, made under inference mode: autograd does not save such, and no one can change them.
    ctx.inference = [t if t.is_inference() else None for t in logits]


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], Tensor | None, None]:
    kept = zip(ctx.saved_tensors, ctx.inference, strict=True)
    *circuits, reference = (saved if saved is not None else other for saved, other in kept)
    wanted, reference_wanted, _ = ctx.needs_input_grad
    found = iter(kl_div_backward(grad, circuits, reference, wanted, reference_wanted))
    dqs = [next(found) if want else None for want in wanted]
    return dqs, next(found) if reference_wanted else None, None


kl_div.register_autograd(_backward, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastkl differentiates once: for a second derivative of the divergence use "
        "torch.nn.functional.kl_div of log_softmax"
    )


kl_div_backward.register_autograd(_refuse)


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Return rows (R, V) of a batch as (batch * R, V)."""
    batch = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return batch.reshape(-1, t.shape[-1]).contiguous()


@kl_div.register_vmap
def _(
    info: Any,
    in_dims: tuple[Sequence[int | None], int | None, None],
    circuits: Sequence[Tensor],
    reference: Tensor,
    backend: str | None,
) -> tuple[Tensor, int]:
    dims, reference_dim, _ = in_dims
    rows = [_fold(t, dim, info.batch_size) for t, dim in zip(circuits, dims, strict=True)]
    result = kl_div(rows, _fold(reference, reference_dim, info.batch_size), backend)
    return result.reshape(len(rows), info.batch_size, -1), 1
