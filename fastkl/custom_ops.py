"""The PyTorch operators behind `kl_div` and `js_div`, and their fake, autograd and vmap rules.

`fastkl::kl_div` measures K circuits with a backend. `fastkl::kl_div_backward` computes its
gradients and cannot itself be differentiated. `fastkl::js_div` and `fastkl::js_div_backward` do the
same for the Jensen-Shannon divergence of one circuit. All take rows (R, V) of any strides. Rows
with gaps between them that no view (R, V) can skip may come as (B, S, V), with R = B·S. Logits
without a view as rows with a contiguous last dimension are copied.

Besides the divergences, `fastkl::kl_div` returns the N numbers (K, R, N) that its backend keeps of
each row and circuit to save work in the backward pass. Without `keep`, and for backends that keep
nothing, N is 0.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl import backends, errors
from fastkl.registration import batch_first, batches, fake, register
from fastkl.rows import compute_dtype
from fastkl.views import as_rows, asked_for, with_gaps


def measure(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, backend: str | None
) -> Tensor:
    """Return the divergences (K, R) of rows, differentiable if any logits require a gradient."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*circuits, reference))
    divergence: Tensor = kl_div(circuits, reference, temperature, backend, keep)[0]
    return divergence


@register(
    "kl_div(Tensor[] circuits, Tensor reference, float temperature, str? backend, bool keep) "
    "-> (Tensor, Tensor)"
)
def kl_div(
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    backend: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the differentiable divergences (K, R) of rows, and what is kept for backward."""
    errors.check_rows(circuits, reference)
    chosen = backends.choose_for(backend, (reference, *circuits))
    if not circuits or not math.prod(reference.shape[:-1]):
        divergence = _empty_divergence(circuits, reference)
    else:
        (ref, *cir), window = with_gaps([reference, *circuits])
        if keep:
            found = chosen.kl_rows_kept(cir, ref, temperature)
            return asked_for(found[0], window), asked_for(found[1], window, -2)
        divergence = asked_for(chosen.kl_rows(cir, ref, temperature), window)
    return divergence, _empty_kept(divergence, chosen, keep)


@register(
    "kl_div_backward(Tensor grad, Tensor[] circuits, Tensor reference, Tensor kept, bool[] wanted, "
    "bool reference_wanted, float temperature, str? backend) -> Tensor[]"
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
    """Return the wanted gradients, the circuits' first, each in its logits' shape and dtype."""
    errors.check_rows(circuits, reference, grad=grad, kept=kept)
    chosen = backends.choose_for(backend, (reference, *circuits))
    # FASTKL_BACKEND may have changed since the forward pass and name another backend now.
    its_own = kept.shape[-1] == chosen.N_KEPT and kept.dtype == chosen.KEPT_DTYPE
    dqs, dp = chosen.gradients(
        grad,
        [as_rows(circuit) for circuit in circuits],
        as_rows(reference),
        wanted,
        reference_wanted,
        temperature,
        kept if its_own and chosen.N_KEPT else None,
    )
    return [t.reshape(reference.shape) for t in (*dqs, dp) if t is not None]


def _empty_divergence(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    shape = (len(circuits), math.prod(reference.shape[:-1]))
    return reference.new_empty(shape, dtype=compute_dtype(reference, *circuits))


def _empty_kept(divergence: Tensor, chosen: backends.Backend, keep: bool) -> Tensor:
    """Return an uninitialized tensor for what a backend keeps of divergences (K, R)."""
    shape = (*divergence.shape, chosen.N_KEPT if keep else 0)
    return divergence.new_empty(shape, dtype=chosen.KEPT_DTYPE)


@fake(kl_div)
def _(
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    backend: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    del temperature
    divergence = _empty_divergence(circuits, reference)
    # Skip the choice on the meta device: a requested native or triton backend would refuse it.
    on_meta = reference.device.type == "meta"
    chosen = backends.eager if on_meta else backends.choose_for(backend, (reference, *circuits))
    return divergence, _empty_kept(divergence, chosen, keep)


@fake(kl_div_backward)
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
    """Save tensors for backward, which rereads the logits: nothing else of their size is kept."""
    # Clone inference tensors, such as a teacher's logits: autograd cannot detect whether they are
    # changed in place before the backward pass, and refuses to save them.
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


torch.library.register_autograd(kl_div, _backward, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastkl differentiates once: for second derivatives write the divergence with "
        "torch.log_softmax"
    )


torch.library.register_autograd(kl_div_backward, _refuse)


def _fold(t: Tensor, dim: int | None, size: int) -> tuple[Tensor, torch.Size]:
    """Return a vmap batch of logits as rows (batch * R, V), and the shape of one batch element."""
    batch = batch_first(t, dim, size)
    return as_rows(batch), batch.shape[1:]


def _fold_values(t: Tensor, dim: int | None, size: int, rows: int = -1) -> Tensor:
    """Return a vmap batch of rows' values as those of batch * R rows, along dimension `rows`."""
    return batch_first(t, dim, size).movedim(0, rows - 1).flatten(rows - 1, rows)


@batches(kl_div)
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
    folded, (*leading, _) = _fold(reference, reference_dim, info.batch_size)
    divergence, kept = kl_div(rows, folded, temperature, backend, keep)
    shape = (len(rows), info.batch_size, math.prod(leading))
    return (divergence.reshape(shape), kept.reshape(*shape, kept.shape[-1])), (1, 1)


@batches(kl_div_backward)
def _(
    info: Any,
    in_dims: tuple[
        int | None, Sequence[int | None], int | None, int | None, None, None, None, None
    ],
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    kept: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
    temperature: float,
    backend: str | None,
) -> tuple[list[Tensor], list[int]]:
    size = info.batch_size
    grad_dim, dims, reference_dim, kept_dim, *_ = in_dims
    rows = [_fold(t, dim, size)[0] for t, dim in zip(circuits, dims, strict=True)]
    folded, shape = _fold(reference, reference_dim, size)
    found = kl_div_backward(
        _fold_values(grad, grad_dim, size),
        rows,
        folded,
        _fold_values(kept, kept_dim, size, -2),
        wanted,
        reference_wanted,
        temperature,
        backend,
    )
    return [t.reshape(size, *shape) for t in found], [0] * len(found)


@register(
    "js_div(Tensor circuit, Tensor reference, float beta, float temperature, str? backend) "
    "-> Tensor"
)
def js_div(
    circuit: Tensor, reference: Tensor, beta: float, temperature: float, backend: str | None
) -> Tensor:
    """Return the differentiable Jensen-Shannon divergences (R,) of rows."""
    errors.check_rows([circuit], reference)
    chosen = backends.choose_for(backend, (reference, circuit))
    if not math.prod(reference.shape[:-1]):
        return _empty_divergence([circuit], reference)[0]
    (cir, ref), window = with_gaps([circuit, reference])
    return asked_for(chosen.js_rows(cir, ref, beta, temperature), window)


@register(
    "js_div_backward(Tensor grad, Tensor circuit, Tensor reference, float beta, float temperature, "
    "bool wanted, bool reference_wanted, str? backend) -> Tensor[]"
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
    """Return the wanted gradients, the circuit's first, each in its logits' shape and dtype."""
    errors.check_rows([circuit], reference, grad=grad[None])
    found = backends.choose_for(backend, (reference, circuit)).js_gradients(
        grad, as_rows(circuit), as_rows(reference), beta, temperature, wanted, reference_wanted
    )
    return [t.reshape(reference.shape) for t in found]


@fake(js_div)
def _(
    circuit: Tensor, reference: Tensor, beta: float, temperature: float, backend: str | None
) -> Tensor:
    del beta, temperature, backend
    return _empty_divergence([circuit], reference)[0]


@fake(js_div_backward)
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


torch.library.register_autograd(js_div, _js_backward, setup_context=_js_save)
torch.library.register_autograd(js_div_backward, _refuse)


@batches(js_div)
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
    (cir, _), (ref, (*leading, _)) = (_fold(t, dim, info.batch_size) for t, dim in sides)
    divergence = js_div(cir, ref, beta, temperature, backend)
    return divergence.reshape(info.batch_size, math.prod(leading)), 0


@batches(js_div_backward)
def _(
    info: Any,
    in_dims: tuple[int | None, int | None, int | None, None, None, None, None, None],
    grad: Tensor,
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    wanted: bool,
    reference_wanted: bool,
    backend: str | None,
) -> tuple[list[Tensor], list[int]]:
    size = info.batch_size
    sides = zip((circuit, reference), in_dims[1:3], strict=True)
    (cir, _), (ref, shape) = (_fold(t, dim, size) for t, dim in sides)
    grads = _fold_values(grad, in_dims[0], size)
    found = js_div_backward(grads, cir, ref, beta, temperature, wanted, reference_wanted, backend)
    return [t.reshape(size, *shape) for t in found], [0] * len(found)
