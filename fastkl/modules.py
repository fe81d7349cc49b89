"""The divergences as modules, for losses that are configured once and called often."""

import torch
from torch import Tensor

from fastkl import backends, errors
from fastkl.errors import Direction, Reduction
from fastkl.functional import js_div, kl_div


def _check(reduction: str, temperature: float, vocab_size: int | None, backend: str | None) -> None:
    """Check what can be checked without logits and on a machine without the backend."""
    errors.check_reduction(reduction)
    errors.check_temperature(temperature)
    errors.check_vocab_size(vocab_size)
    errors.check_backend(backend)
    if backend is not None:
        backends.backend_by_name(backend)


class KLDivLoss(torch.nn.Module):
    r"""KL divergence from logits, as :func:`fastkl.kl_div`, in nats.

    .. math:: KL(P ‖ Q) = \sum_v P_v (\log P_v - \log Q_v),
        \quad P = softmax(reference), \quad Q = softmax(circuit)

    Call it as ``loss(circuit, reference, mask=None, weights=None)``. In distillation, pass the
    student's logits first, then the teacher's. Despite its name, this is not a drop-in replacement
    for :class:`torch.nn.KLDivLoss`. The reference must be logits or log-probabilities (which are
    logits too), never probabilities, which are torch's default. "mean" averages over rows, not over
    all elements; for logits (R, V), torch calls that "batchmean".

    Parameters
    ----------
    reduction : {"mean", "sum", "none", "batchmean"}
        How the rows' divergences are combined; "none" keeps them. See :func:`fastkl.kl_div`.
    direction : {"forward", "reverse"}
        KL(P ‖ Q), or KL(Q ‖ P).
    temperature : float
        All logits are divided by it first.
    vocab_size : int, optional
        Only the first `vocab_size` tokens count; the rest is padding.
    backend : str, optional
        The name of a backend. If None, the environment variable FASTKL_BACKEND decides; if that is
        not set, the device does.

    Raises
    ------
    TypeError, ValueError
        On construction, if an argument is not as described above. Whether `vocab_size` fits the
        logits, and whether the backend can run on them, is checked when the loss is called.

    Examples
    --------
    >>> import torch, fastkl
    >>> loss = fastkl.KLDivLoss(reduction="sum", temperature=2.0)
    >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.1109)
    """

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        direction: Direction = "forward",
        temperature: float = 1.0,
        vocab_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        errors.check_direction(direction)
        _check(reduction, temperature, vocab_size, backend)
        self.reduction = reduction
        self.direction = direction
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.backend = backend

    def forward(
        self,
        circuit: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the divergence of the circuit's logits from the reference's.

        Parameters
        ----------
        circuit : Tensor (..., V)
            Logits of the circuit.
        reference : Tensor (..., V)
            Logits of the reference, of the same shape and on the same device.
        mask : Tensor (...), bool, optional
            True for rows that count.
        weights : Tensor (...), floating, optional
            The factor of each row's divergence.

        Returns
        -------
        Tensor
            As returned by :func:`fastkl.kl_div`.
        """
        return kl_div(
            circuit,
            reference,
            reduction=self.reduction,
            direction=self.direction,
            temperature=self.temperature,
            mask=mask,
            weights=weights,
            vocab_size=self.vocab_size,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return (
            f"reduction={self.reduction!r}, direction={self.direction!r}, "
            f"temperature={self.temperature}, vocab_size={self.vocab_size}, backend={self.backend!r}"
        )


class JSDivLoss(torch.nn.Module):
    r"""Generalized Jensen-Shannon divergence from logits, as :func:`fastkl.js_div`, in nats.

    .. math:: JS = β KL(P ‖ M) + (1 - β) KL(Q ‖ M), \quad M = βP + (1 - β) Q,
        \quad P = softmax(reference), \quad Q = softmax(circuit)

    Call it as ``loss(circuit, reference, mask=None, weights=None)``.

    Parameters
    ----------
    beta : float
        The reference's weight in the mixture, more than 0 and less than 1.
    reduction : {"mean", "sum", "none", "batchmean"}
        How the rows' divergences are combined; "none" keeps them. See :func:`fastkl.kl_div`.
    temperature : float
        All logits are divided by it first.
    vocab_size : int, optional
        Only the first `vocab_size` tokens count; the rest is padding.
    backend : str, optional
        The name of a backend. If None, the environment variable FASTKL_BACKEND decides; if that is
        not set, the device does.

    Raises
    ------
    TypeError, ValueError
        On construction, if an argument is not as described above. Whether `vocab_size` fits the
        logits, and whether the backend can run on them, is checked when the loss is called.

    Examples
    --------
    >>> import torch, fastkl
    >>> fastkl.JSDivLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.0895)
    """

    def __init__(
        self,
        *,
        beta: float = 0.5,
        reduction: Reduction = "mean",
        temperature: float = 1.0,
        vocab_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        errors.check_beta(beta)
        _check(reduction, temperature, vocab_size, backend)
        self.beta = beta
        self.reduction = reduction
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.backend = backend

    def forward(
        self,
        circuit: Tensor,
        reference: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the divergence between the circuit's logits and the reference's.

        The arguments are those of :meth:`KLDivLoss.forward`. The result is that of
        :func:`fastkl.js_div`.
        """
        return js_div(
            circuit,
            reference,
            beta=self.beta,
            reduction=self.reduction,
            temperature=self.temperature,
            mask=mask,
            weights=weights,
            vocab_size=self.vocab_size,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return (
            f"beta={self.beta}, reduction={self.reduction!r}, temperature={self.temperature}, "
            f"vocab_size={self.vocab_size}, backend={self.backend!r}"
        )
