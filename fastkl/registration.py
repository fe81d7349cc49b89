"""Registration of operators with PyTorch.

`torch.library.custom_op` can register operators too. But the first call of such an operator imports
`torch._dynamo`, which takes a second or two in every process, and each call takes more time on the
host. An operator cannot be registered twice, so a module that registers one cannot be reloaded.
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
    """Return a decorator that turns a function into an operator.

    The operator is called like the function, with positional arguments. Its results must not share
    memory with its arguments.

    Parameters
    ----------
    schema : str
        The signature in PyTorch's schema language: "name(Tensor x, float y) -> Tensor".
    """

    def decorate(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        # torch.autograd has a vmap of its own (is_grads_batched=True) that ignores torch.vmap's
        # rules: refuse it.
        _LIBRARY.impl(name, _refuse_batches, "Batched")
        return getattr(torch.ops.fastkl, name).default

    return decorate


def fake(operator: Any) -> Callable[[Function], Function]:
    """Return a decorator for a function that gives the shape and dtype of an operator's results."""
    decorate: Callable[[Function], Function] = torch.library.register_fake(operator)
    return decorate


def batches(operator: Any) -> Callable[[Function], Function]:
    """Return a decorator for a function that is an operator's rule for `torch.vmap`."""
    decorate: Callable[[Function], Function] = torch.library.register_vmap(operator)
    return decorate


def batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Return t with its batch dimension first; if dim is None, repeat t `size` times as a view."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _refuse_batches(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fastkl's gradients are not computed in batches by torch.autograd (is_grads_batched=True, "
        "jacobian(vectorize=True)): use torch.vmap of torch.autograd.grad"
    )
