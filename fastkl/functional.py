"""KL divergence from logits: shapes and reductions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl import errors, operator


def kl_div(
    circuit: Tensor, reference: Tensor, *, reduction: str = "mean", backend: str | None = None
) -> Tensor:
    r"""KL divergence KL(P ‖ Q) of a circuit from a reference, in nats, straight from logits.

    .. math:: KL(P ‖ Q) = \sum_v P_v (\log P_v - \log Q_v),
        \quad P = softmax(reference), \quad Q = softmax(circuit)

    The arguments come in the order of :func:`torch.nn.functional.kl_div`, but both are logits.

    Parameters
    ----------
    circuit : Tensor (..., V)
        Logits of the circuit, quantized model or student: float32, float16, bfloat16 or float64.
        Half precision is computed in float32; nothing is rounded first.
    reference : Tensor (..., V)
        Logits of the full model; the same shape and device.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum over rows by their number (a row is one distribution: everything but
        the last dimension); "none" keeps one number a row. The mean of no rows is NaN.
    backend : str, optional
        "eager", "native" or "triton"; otherwise the environment variable FASTKL_BACKEND, then the
        device, decide. See :func:`fastkl.available_backends`.

    Returns
    -------
    Tensor
        A scalar, or (...) for "none"; float64 if an input is float64, else float32. It is never
        negative, and exactly 0 for identical rows. A row with a NaN or +inf, or with only -inf, is
        NaN; a circuit logit of -inf where the reference's is finite makes the row +inf; a token that
        is -inf in the reference counts 0.

    Notes
    -----
    Differentiable once in both arguments: dKL/dq = Q - P and dKL/dp = P (log P/Q - KL), as accurate for
    nearly identical rows as the divergence itself. Only the logits are kept for it. A logit of -inf has
    gradient 0, but for a circuit's where the reference alone is -inf, which has Q; a row that is NaN has
    NaN. Gradients are computed by PyTorch, whatever the backend. The operator `torch.ops.fastkl.kl_div`
    behind it can be compiled, exported and batched by `torch.vmap`.

    Raises
    ------
    TypeError
        Something is not a tensor, or not of a floating dtype.
    ValueError
        Shapes, vocabularies or devices differ; the reduction is unknown.
    RuntimeError
        The backend asked for can not run here.

    References
    ----------
    .. [1] S. Kullback and R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
       Statistics 22 (1951).

    Examples
    --------
    >>> import torch, fastkl
    >>> reference = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    >>> circuit = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    >>> fastkl.kl_div(circuit, reference, reduction="none")
    tensor([0.1201, 0.0000])
    """
    errors.check_reduction(reduction)
    errors.check_backend(backend)
    errors.check_logits(reference, "reference")
    errors.check_logits(circuit, "circuit")
    errors.check_pair(circuit, reference)
    rows = _kl_rows([circuit], reference, backend)
    return _reduce(rows, reference.shape[:-1], reduction)[0]


def kl_div_many(
    circuits: Sequence[Tensor],
    reference: Tensor,
    *,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """KL divergence of K circuits from one reference, in nats, straight from logits.

    The same as :func:`kl_div` of each circuit, but the reference is read and exponentiated once for
    many circuits.

    Parameters
    ----------
    circuits : sequence of K Tensors (..., V), or Tensor (K, ..., V)
        Logits of the circuits; dtypes as for :func:`kl_div`.
    reference : Tensor (..., V)
        Logits of the full model; the shape and device of each circuit.
    reduction : {"mean", "sum", "none"}
        As for :func:`kl_div`, over the rows of each circuit.
    backend : str, optional
        As for :func:`kl_div`.

    Returns
    -------
    Tensor
        (K,), or (K, ...) for "none".

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`kl_div`; messages name the circuit by its index.

    Examples
    --------
    >>> import torch, fastkl
    >>> reference = torch.tensor([[2.0, 1.0]])
    >>> fastkl.kl_div_many([reference, reference + 3, -reference], reference)
    tensor([0.0000, 0.0000, 0.4621])
    """
    errors.check_reduction(reduction)
    errors.check_backend(backend)
    errors.check_logits(reference, "reference")
    circuits = list(circuits)
    for k, circuit in enumerate(circuits):
        errors.check_logits(circuit, f"circuits[{k}]")
        errors.check_pair(circuit, reference, f"circuits[{k}]")
    rows = _kl_rows(circuits, reference, backend)
    return _reduce(rows, reference.shape[:-1], reduction)


def kl_rows(circuits: Sequence[Tensor], reference: Tensor, *, backend: str | None) -> Tensor:
    """Return the divergences (K, R) of checked logits (..., V), without a gradient."""
    return operator.measure([_as_rows(c) for c in circuits], _as_rows(reference), backend)


def _kl_rows(circuits: Sequence[Tensor], reference: Tensor, backend: str | None) -> Tensor:
    """Return the same through the operator, which has one."""
    rows: Tensor = operator.kl_div([_as_rows(c) for c in circuits], _as_rows(reference), backend)
    return rows


def _as_rows(logits: Tensor) -> Tensor:
    """View logits (..., V) as (R, V) with a contiguous last dimension; copy only if there is no view."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _reduce(rows: Tensor, leading: torch.Size, reduction: str) -> Tensor:
    """Reduce (K, R) over rows, in float64, or give the rows their leading dimensions back."""
    if reduction == "none":
        return rows.reshape(-1, *leading) if rows.numel() else rows.reshape(rows.shape[0], *leading)
    total = rows.sum(dim=1, dtype=torch.float64)
    if reduction == "mean":
        total /= rows.shape[1] if rows.shape[1] else float("nan")
    return total.to(rows.dtype)
