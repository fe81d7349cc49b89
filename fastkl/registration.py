"""Registering operators with PyTorch.

`torch.library.custom_op` does it too, but the first call of such an operator imports `torch._dynamo`,
which takes a second or two in every process, and each call takes its host longer. An operator cannot be
registered twice: modules that do so cannot be reloaded.
"""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
# PyTorch's class is not annotated.
_Library: Any = torch.library.Library
_LIBRARY = _Library("fastkl", "FRAGMENT")


def register(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes an operator of a function.

    What it returns is called as the function is, with positional arguments. Its results must not share
    memory with its arguments.

    Parameters
    ----------
    schema : str
        In PyTorch's words: "name(Tensor x, float y) -> Tensor".
    """

    def decorate(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        # torch.autograd has a vmap of its own (is_grads_batched=True) that ignores torch.vmap's rules.
        _LIBRARY.impl(name, _refuse_batches, "Batched")
        return getattr(torch.ops.fastkl, name).default

    return decorate


def fake(operator: Any) -> Callable[[Function], Function]:
    """Return a decorator: the function says what an operator's results look like."""
    decorate: Callable[[Function], Function] = torch.library.register_fake(operator)
    return decorate


def batches(operator: Any) -> Callable[[Function], Function]:
    """Return a decorator: the function is an operator's rule for `torch.vmap`."""
    decorate: Callable[[Function], Function] = torch.library.register_vmap(operator)
    return decorate


def batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Return t with its batch dimension first; dim None: the same t `size` times."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _refuse_batches(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fastkl's gradients are not computed in batches by torch.autograd (is_grads_batched=True, "
        "jacobian(vectorize=True)): use torch.vmap of torch.autograd.grad"
    )
