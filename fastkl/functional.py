"""Divergences from logits (..., V): checks of the arguments, shapes and reductions."""

from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fastkl import custom_ops, errors
from fastkl.errors import Direction, Reduction
from fastkl.kl_statistics import KLStatistics, statistics
from fastkl.reductions import reduce
from fastkl.views import flattened


@overload
def kl_div(
    circuit: Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def kl_div(
    circuit: Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, KLStatistics]: ...
@overload
def kl_div(
    circuit: Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, KLStatistics]: ...
def kl_div(
    circuit: Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, KLStatistics]:
    r"""KL divergence KL(P ‖ Q) of a reference P and a circuit Q, in nats, straight from logits.

    .. math:: KL(P ‖ Q) = \sum_v P_v (\log P_v - \log Q_v),
        \quad P = softmax(reference), \quad Q = softmax(circuit)

    The arguments come in the order of :func:`torch.nn.functional.kl_div`, but both are logits.

    Parameters
    ----------
    circuit : Tensor (..., V)
        Logits of the circuit, quantized model or student: float32, float16, bfloat16 or float64.
        Half-precision logits are converted exactly to float32 and computed in it.
    reference : Tensor (..., V)
        Logits of the full model, of the same shape and on the same device.
    reduction : {"mean", "sum", "none", "batchmean"}
        A row is one distribution, the V logits at one index into the other dimensions. "mean"
        divides the sum over rows by the number of rows that count, or by the sum of their weights.
        If the mask leaves no rows, the mean is NaN and its gradient 0; use "sum" for batches that
        may be empty.
        "batchmean" divides by the size of the first dimension, as torch does, even if rows are
        masked; for logits (V,) it divides by 1. "none" returns one number per row.
    direction : {"forward", "reverse"}
        "forward" is KL(P ‖ Q); "reverse" is KL(Q ‖ P), which weights tokens by Q.
    temperature : float
        All logits are divided by it first. The result is not multiplied by temperature²; for
        Hinton's distillation loss, do that yourself.
    mask : Tensor (...), bool, optional
        True for rows that count. All other rows contribute 0 and have gradient 0, whatever their
        logits.
    weights : Tensor (...), floating, optional
        The factor of each row's divergence. A row of weight 0 contributes 0, whatever its logits.
        "mean" divides by the sum of the weights; if that sum is 0, the mean is NaN and its gradient
        0. Weights may be negative. They have gradients too, even where they are 0, but a weight of
        0 whose row's divergence is +inf or NaN has gradient 0.
    vocab_size : int, optional
        Only the first `vocab_size` tokens count. Padding beyond them is not read, and circuit and
        reference may be padded differently.
    return_stats : bool
        Also return a :class:`fastkl.KLStatistics`: for every row, masked or not, the log-sum-exps,
        the entropies, and whether the likeliest tokens agree. The statistics have no gradients.
        They take one more pass over the logits: on the native backend, a call takes about two and a
        half times as long. With direction "reverse" they take yet another pass, for the forward
        divergence that the cross-entropy needs.
    backend : str, optional
        "eager", "native" or "triton". If None, the environment variable FASTKL_BACKEND decides; if
        that is not set, the device does. See :func:`fastkl.available_backends`.

    Returns
    -------
    Tensor, or (Tensor, KLStatistics) with `return_stats`
        A scalar, or (...) for "none", in nats; float64 if either side's logits are, else float32.
        It is never negative (unless weights are), and exactly 0 for identical rows. A row's
        divergence is NaN if either side's row holds a NaN or +inf, or only -inf; otherwise it is
        +inf if a token is -inf in the circuit and finite in the reference. A token that is -inf in
        the reference contributes 0. In the reverse direction, the two sides change places. Each
        statistic has the shape (...).

    Notes
    -----
    The result is differentiable once in both arguments. With q the circuit's logits and p the
    reference's, dKL/dq = Q - P and dKL/dp = P (log P/Q - KL). The gradients are as accurate for
    nearly identical rows as the divergence itself. For the backward pass, only the logits and a few
    numbers per row are kept.

    Gradients in special cases, in the forward direction (in the reverse direction, the two sides
    change places):

    - at a logit of -inf: 0;
    - at a token that is -inf on the other side only: Q for the circuit, 0 for the reference;
    - in a row whose KL is +inf: Q - P as always for the circuit, NaN for the reference wherever
      both logits are finite;
    - in a row whose KL is NaN: NaN throughout;
    - in a row whose incoming gradient is 0: 0 throughout, whatever the row holds.

    Use `.backward()` or `torch.autograd.grad`: forward mode and the derivatives of `torch.func`
    (grad, vjp, jvp, jacrev, jacfwd, hessian) raise an error. The operator `torch.ops.fastkl.kl_div`
    behind this function can be compiled, exported and batched by `torch.vmap`.

    Raises
    ------
    TypeError
        An argument is not a dense tensor or not of a dtype listed above (boolean for the mask,
        floating for the weights); or the temperature, vocab_size or backend is of a wrong type.
    ValueError
        Shapes, vocabularies or devices differ, or a vocabulary is empty; mask or weights do not
        have one value per row; the temperature is not positive and finite; vocab_size exceeds the
        number of tokens or is less than 1; or the reduction, direction or backend is unknown.
    RuntimeError
        The requested backend cannot run here, or no backend can run on this device; or an
        unsupported derivative is requested.

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
    divergence = _kl_div(
        [circuit],
        "circuit",
        reference,
        reduction=reduction,
        direction=direction,
        temperature=temperature,
        mask=mask,
        weights=weights,
        vocab_size=vocab_size,
        return_stats=return_stats,
        backend=backend,
    )
    if isinstance(divergence, Tensor):
        return divergence[0]
    return divergence[0][0], KLStatistics(*(field[0] for field in divergence[1]))


@overload
def kl_div_many(
    circuits: Iterable[Tensor] | Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def kl_div_many(
    circuits: Iterable[Tensor] | Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, KLStatistics]: ...
@overload
def kl_div_many(
    circuits: Iterable[Tensor] | Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, KLStatistics]: ...
def kl_div_many(
    circuits: Iterable[Tensor] | Tensor,
    reference: Tensor,
    *,
    reduction: Reduction = "mean",
    direction: Direction = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, KLStatistics]:
    """KL divergence of K circuits from one reference, in nats, straight from logits.

    This gives the same results as :func:`kl_div` for each circuit, but reads and exponentiates the
    reference only once for many circuits. (In the reverse direction, it does so for each circuit.)

    Parameters
    ----------
    circuits : iterable of K Tensors (..., V), or Tensor (K, ..., V)
        Logits of the circuits; dtypes as for :func:`kl_div`. A generator is exhausted before
        anything is measured, so the logits of all circuits are in memory at the same time.
    reference : Tensor (..., V)
        Logits of the full model, of the same shape and on the same device as each circuit's.
    reduction : {"mean", "sum", "none", "batchmean"}
        As for :func:`kl_div`, over the rows of each circuit.
    direction, temperature, mask, weights, vocab_size, return_stats, backend
        As for :func:`kl_div`; the same for all circuits.

    Returns
    -------
    Tensor, or (Tensor, KLStatistics) with `return_stats`
        (K,), or (K, ...) for "none"; the statistics are (K, ...) each.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for :func:`kl_div`; messages name the circuit by its index.

    Notes
    -----
    The result is differentiable in all circuits and the reference, as that of :func:`kl_div` is.

    References
    ----------
    .. [1] S. Kullback and R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
       Statistics 22 (1951).

    Examples
    --------
    >>> import torch, fastkl
    >>> reference = torch.tensor([[2.0, 1.0]])
    >>> fastkl.kl_div_many([reference, reference.flip(-1), -2 * reference], reference)
    tensor([0.0000, 0.4621, 1.0068])
    """
    errors.check_circuits(circuits)
    return _kl_div(
        list(circuits),
        "circuits[{}]",
        reference,
        reduction=reduction,
        direction=direction,
        temperature=temperature,
        mask=mask,
        weights=weights,
        vocab_size=vocab_size,
        return_stats=return_stats,
        backend=backend,
    )


def js_div(
    circuit: Tensor,
    reference: Tensor,
    *,
    beta: float = 0.5,
    reduction: Reduction = "mean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence of a circuit and a reference, in nats, from logits.

    .. math:: JS = β KL(P ‖ M) + (1 - β) KL(Q ‖ M), \quad M = βP + (1 - β) Q,
        \quad P = softmax(reference), \quad Q = softmax(circuit)

    Parameters
    ----------
    circuit, reference : Tensor (..., V)
        Logits, as for :func:`kl_div`.
    beta : float
        The reference's weight in the mixture M, more than 0 and less than 1. At 0.5 the divergence
        is symmetric and at most log 2. A β below 1e-30 counts as 1e-30.
    reduction, temperature, mask, weights, vocab_size, backend
        As for :func:`kl_div`.

    Returns
    -------
    Tensor
        A scalar, or (...) for "none"; float64 if either side's logits are, else float32. It is
        never negative (unless weights are), 0 for identical rows, and finite if a token is masked
        (-inf) on one side only. It is NaN for a row with a NaN or +inf, or with only -inf, on
        either side.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for :func:`kl_div`; also if beta is not a number strictly between 0 and 1.

    Notes
    -----
    For CPU tensors, the native backend has a kernel that computes this divergence; elsewhere
    PyTorch computes it in blocks of rows. Neither allocates temporaries of the logits' size. The
    result is differentiable once in both arguments, in the same ways as that of :func:`kl_div`.

    References
    ----------
    .. [1] J. Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on
       Information Theory 37 (1991).
    .. [2] R. Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649 (2023).

    Examples
    --------
    >>> import torch, fastkl
    >>> fastkl.js_div(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.0895)
    """
    errors.check_reduction(reduction)
    errors.check_beta(beta)
    errors.check_temperature(temperature)
    errors.check_backend(backend)
    (circuit,), reference = _checked([circuit], "circuit", reference, vocab_size, mask, weights)
    cir, ref = flattened([circuit, reference])
    rows = custom_ops.js_div(cir, ref, float(beta), float(temperature), backend)
    return reduce(rows[None], reference.shape[:-1], reduction, mask, weights)[0]


def kl_rows(
    circuits: Sequence[Tensor],
    reference: Tensor,
    *,
    temperature: float = 1.0,
    backend: str | None,
) -> Tensor:
    """Return the divergences (K, R) of checked logits (..., V), without a gradient."""
    ref, *cir = flattened([reference, *circuits])
    # Call the operator here too: only its rules handle tensors that are traced or have no memory.
    with torch.no_grad():
        return custom_ops.measure(cir, ref, temperature, backend)


def _kl_div(
    circuits: list[Tensor],
    name: str,
    reference: Tensor,
    *,
    reduction: Reduction,
    direction: Direction,
    temperature: float,
    mask: Tensor | None,
    weights: Tensor | None,
    vocab_size: int | None,
    return_stats: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, KLStatistics]:
    errors.check_reduction(reduction)
    errors.check_direction(direction)
    errors.check_temperature(temperature)
    errors.check_backend(backend)
    circuits, reference = _checked(circuits, name, reference, vocab_size, mask, weights)
    leading, temperature = reference.shape[:-1], float(temperature)
    ref, *cir = flattened([reference, *circuits])
    if direction == "forward" or not cir:
        rows = custom_ops.measure(cir, ref, temperature, backend)
    else:
        # Autograd adds up the reference's gradients from all circuits. Do so in float32, so that a
        # half-precision sum is rounded only once.
        shared = ref.float() if ref.requires_grad and len(cir) > 1 and ref.itemsize == 2 else ref
        rows = torch.cat([custom_ops.measure([shared], c, temperature, backend) for c in cir])
    divergence = reduce(rows, leading, reduction, mask, weights)
    if not return_stats:
        return divergence
    forward = (
        rows
        if direction == "forward"
        else kl_rows(cir, ref, temperature=temperature, backend=backend)
    )
    found = statistics(cir, ref, forward, temperature, backend)
    return divergence, KLStatistics(*(field.reshape(len(cir), *leading) for field in found))


def _checked(
    circuits: list[Tensor],
    name: str,
    reference: Tensor,
    vocab_size: int | None,
    mask: Tensor | None,
    weights: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Check that logits, mask and weights fit together; return the logits without padding.

    Error messages call a circuit `name`, with its index in place of the braces.
    """
    errors.check_vocab_size(vocab_size)
    errors.check_logits(reference, "reference")
    errors.check_vocab_fits(vocab_size, reference, "reference")
    alike = errors.are_alike(circuits, reference)
    if not alike:
        for k, circuit in enumerate(circuits):
            errors.check_logits(circuit, name.format(k))
            errors.check_vocab_fits(vocab_size, circuit, name.format(k))
    errors.check_transforms((*circuits, reference))
    if vocab_size is not None:
        vocab_size = int(vocab_size)
        reference = reference[..., :vocab_size]
        circuits = [circuit[..., :vocab_size] for circuit in circuits]
    if not alike:
        for k, circuit in enumerate(circuits):
            errors.check_pair(circuit, reference, name.format(k))
    errors.check_row_values(mask, reference, "mask", boolean=True)
    errors.check_row_values(weights, reference, "weights", boolean=False)
    return circuits, reference
