"""The PyTorch operators behind `kl_div`: what compiles, exports, batches and differentiates.

`fastkl::kl_div` measures K circuits by a backend; `fastkl::kl_div_backward` is its derivative, and has
none itself; `fastkl::js_div` and `fastkl::js_div_backward` are the same of the Jensen-Shannon divergence
of one circuit. All take rows (R, V) with a contiguous last dimension.

Beside the divergences `fastkl::kl_div` returns what its backend keeps of each row (N, K, R) to save the
derivative work, if it is to `keep` it; N is 0 otherwise, and for backends that keep nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl import backends, errors
from fastkl.rows import compute_dtype


def measure(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, backend: str | None
) -> Tensor:
    """Return the divergences (K, R) of rows (R, V), by the backend that suits them."""
    return _measure_by(_choose(circuits, reference, backend), circuits, reference, temperature)


def _measure_by(
    chosen: backends.Backend, circuits: Sequence[Tensor], reference: Tensor, temperature: float
) -> Tensor:
    if not circuits or reference.shape[0] == 0:
        return _empty(circuits, reference)
    return chosen.kl_rows(list(circuits), reference, temperature)


def differentiable(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, backend: str | None
) -> Tensor:
    """Return the same, with a gradient."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*circuits, reference))
    divergence: Tensor = kl_div(circuits, reference, temperature, backend, keep)[0]
    return divergence


def _choose(circuits: Sequence[Tensor], reference: Tensor, backend: str | None) -> backends.Backend:
    dtype = reference.dtype
    for circuit in circuits:
        dtype = torch.promote_types(dtype, circuit.dtype)
    return backends.choose(backend, reference.device, dtype)


@torch.library.custom_op(
    "fastkl::kl_div",
    mutates_args=(),
    schema="(Tensor[] circuits, Tensor reference, float temperature, str? backend, bool keep) "
    "-> (Tensor, Tensor)",
)
def kl_div(
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    backend: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the divergences (K, R) of rows (R, V), with a gradient, and what is kept for it."""
    chosen = _choose(circuits, reference, backend)
    if keep and circuits and reference.shape[0]:
        return chosen.kl_rows_kept(list(circuits), reference, temperature)
    divergence = _measure_by(chosen, circuits, reference, temperature)
    return divergence, divergence.new_empty((chosen.N_KEPT if keep else 0, *divergence.shape))


@torch.library.custom_op(
    "fastkl::kl_div_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] circuits, Tensor reference, Tensor kept, bool[] wanted, "
    "bool reference_wanted, float temperature, str? backend) -> Tensor[]",
)
def kl_div_backward(
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    kept: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
    temperature: float,
    backend: str | None,
) -> list[Tensor]:
    """Return the gradients that are wanted, the circuits' first, each like its logits."""
    chosen = _choose(circuits, reference, backend)
    dqs, dp = chosen.gradients(
        grad,
        circuits,
        reference,
        wanted,
        reference_wanted,
        temperature,
        kept if kept.shape[0] else None,
    )
    return [gradient for gradient in (*dqs, dp) if gradient is not None]


def _empty(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    shape = (len(circuits), reference.shape[0])
    return reference.new_empty(shape, dtype=compute_dtype(reference, *circuits))


@kl_div.register_fake
def _(
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    backend: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    del temperature
    divergence = _empty(circuits, reference)
    # No backend runs on the meta device, and one that is forced would say so.
    keep = keep and reference.device.type != "meta"
    n_kept = _choose(circuits, reference, backend).N_KEPT if keep else 0
    return divergence, divergence.new_empty((n_kept, *divergence.shape))


@kl_div_backward.register_fake
def _(
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    kept: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
    temperature: float,
    backend: str | None,
) -> list[Tensor]:
    del grad, kept, temperature, backend
    wants = (*wanted, reference_wanted)
    logits = zip((*circuits, reference), wants, strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, want in logits if want]


def _keep(ctx: Any, *tensors: Tensor) -> None:
    """Save the logits: a backward pass reads them again rather than keep more of their size."""
    # A teacher's, made under inference mode, are copied: of such, autograd would not see that they are
    # changed meanwhile, and does not save them.
    ctx.save_for_backward(*(t.clone() if t.is_inference() else t for t in tensors))


def _save(
    ctx: Any,
    inputs: tuple[Sequence[Tensor], Tensor, float, str | None, bool],
    output: tuple[Tensor, Tensor],
) -> None:
    circuits, reference, ctx.temperature, ctx.backend, _ = inputs
    _, kept = output
    ctx.mark_non_differentiable(kept)
    _keep(ctx, *circuits, reference, kept)


def _backward(
    ctx: Any, grad: Tensor, _: Tensor
) -> tuple[list[Tensor | None], Tensor | None, None, None, None]:
    *circuits, reference, kept = ctx.saved_tensors
    wanted, reference_wanted, *_ = ctx.needs_input_grad
    found = iter(
        kl_div_backward(
            grad, circuits, reference, kept, wanted, reference_wanted, ctx.temperature, ctx.backend
        )
    )
    dqs = [next(found) if want else None for want in wanted]
    return dqs, next(found) if reference_wanted else None, None, None, None


kl_div.register_autograd(_backward, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastkl differentiates once: for a second derivative of the divergence use "
        "torch.nn.functional.kl_div of log_softmax"
    )


kl_div_backward.register_autograd(_refuse)


def _fold(t: Tensor, dim: int | None, size: int) -> tuple[Tensor, int]:
    """Return rows (R, V) of a batch as (batch * R, V), and R."""
    batch = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return batch.flatten(0, 1).contiguous(), batch.shape[1]


@kl_div.register_vmap
def _(
    info: Any,
    in_dims: tuple[Sequence[int | None], int | None, None, None, None],
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    backend: str | None,
    keep: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    errors.check_transforms((*circuits, reference))
    dims, reference_dim, *_ = in_dims
    rows = [_fold(t, dim, info.batch_size)[0] for t, dim in zip(circuits, dims, strict=True)]
    folded, n_rows = _fold(reference, reference_dim, info.batch_size)
    divergence, kept = kl_div(rows, folded, temperature, backend, keep)
    shape = (len(rows), info.batch_size, n_rows)
    return (divergence.reshape(shape), kept.reshape(kept.shape[0], *shape)), (1, 2)


@torch.library.custom_op(
    "fastkl::js_div",
    mutates_args=(),
    schema="(Tensor circuit, Tensor reference, float beta, float temperature, str? backend) "
    "-> Tensor",
)
def js_div(
    circuit: Tensor, reference: Tensor, beta: float, temperature: float, backend: str | None
) -> Tensor:
    """Return the Jensen-Shannon divergences (R,) of rows (R, V), with a gradient."""
    chosen = _choose([circuit], reference, backend)
    if reference.shape[0] == 0:
        return _empty([circuit], reference)[0]
    return chosen.js_rows(circuit, reference, beta, temperature)


@torch.library.custom_op(
    "fastkl::js_div_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor circuit, Tensor reference, float beta, float temperature, "
    "bool wanted, bool reference_wanted, str? backend) -> Tensor[]",
)
def js_div_backward(
    grad: Tensor,
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    wanted: bool,
    reference_wanted: bool,
    backend: str | None,
) -> list[Tensor]:
    """Return the gradients that are wanted, the circuit's first, each like its logits."""
    return _choose([circuit], reference, backend).js_gradients(
        grad, circuit, reference, beta, temperature, wanted, reference_wanted
    )


@js_div.register_fake
def _(
    circuit: Tensor, reference: Tensor, beta: float, temperature: float, backend: str | None
) -> Tensor:
    del beta, temperature, backend
    return _empty([circuit], reference)[0]


@js_div_backward.register_fake
def _(
    grad: Tensor,
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    wanted: bool,
    reference_wanted: bool,
    backend: str | None,
) -> list[Tensor]:
    del grad, beta, temperature, backend
    logits = ((circuit, wanted), (reference, reference_wanted))
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, want in logits if want]


def _js_save(
    ctx: Any, inputs: tuple[Tensor, Tensor, float, float, str | None], output: Tensor
) -> None:
    del output
    circuit, reference, ctx.beta, ctx.temperature, ctx.backend = inputs
    _keep(ctx, circuit, reference)


def _js_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    wanted = ctx.needs_input_grad[:2]
    found = iter(
        js_div_backward(grad, *ctx.saved_tensors, ctx.beta, ctx.temperature, *wanted, ctx.backend)
    )
    dq, dp = (next(found) if want else None for want in wanted)
    return dq, dp, None, None, None


js_div.register_autograd(_js_backward, setup_context=_js_save)
js_div_backward.register_autograd(_refuse)


@js_div.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, int | None, None, None, None],
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    backend: str | None,
) -> tuple[Tensor, int]:
    errors.check_transforms((circuit, reference))
    sides = zip((circuit, reference), in_dims[:2], strict=True)
    (cir, n_rows), (ref, _) = (_fold(t, dim, info.batch_size) for t, dim in sides)
    return js_div(cir, ref, beta, temperature, backend).reshape(info.batch_size, n_rows), 0
