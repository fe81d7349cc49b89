"""The table of backends and the rule that chooses among them."""

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastkl import errors
from fastkl.backends import eager, native, triton
from fastkl.state import RowState

ENVIRONMENT_VARIABLE = "FASTKL_BACKEND"


class Backend(Protocol):
    """What a module of this package offers."""

    NAME: str
    # How many numbers of a row and circuit `kl_rows_kept` keeps for `gradients`.
    N_KEPT: int

    def missing(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> str | None:
        """Say what is missing to run: at all, or on this device and in this dtype; None if nothing."""

    def kl_rows(
        self, circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return KL(reference ‖ circuit) (K, R) of K circuits (R, V) and a reference (R, V)."""

    def kl_rows_kept(
        self, circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return what `kl_rows` does, and what it keeps (N_KEPT, K, R) to save `gradients` work."""

    def gradients(
        self,
        grad: Tensor,
        circuits: Sequence[Tensor],
        reference: Tensor,
        wanted: Sequence[bool],
        reference_wanted: bool,
        temperature: float = 1.0,
        kept: Tensor | None = None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Return what `fastkl.gradient.gradients` does; what was not kept is computed again."""

    def js_rows(
        self, circuit: Tensor, reference: Tensor, beta: float, temperature: float
    ) -> Tensor:
        """Return what `fastkl.jensen_shannon.js_rows` does."""

    def js_gradients(
        self,
        grad: Tensor,
        circuit: Tensor,
        reference: Tensor,
        beta: float,
        temperature: float,
        wanted: bool,
        reference_wanted: bool,
    ) -> list[Tensor]:
        """Return what `fastkl.jensen_shannon.js_gradients` does."""

    def row_states(self, circuits: Sequence[Tensor], reference: Tensor) -> RowState:
        """Return the same rows' states, each field (K, R), to be merged with other slices'."""


# Fastest first: the first one that can run on the logits as they are is taken.
_TABLE: tuple[Backend, ...] = (triton, native, eager)
_BY_NAME = {backend.NAME: backend for backend in _TABLE}


def available_backends() -> dict[str, str | None]:
    """Tell which backends can run here.

    Returns
    -------
    dict
        From each backend's name to None if it can run on this machine, else to what is missing.

    Examples
    --------
    >>> import fastkl
    >>> fastkl.available_backends()["eager"] is None
    True
    """
    return {name: backend.missing() for name, backend in _BY_NAME.items()}


def named(name: str, source: str = "backend") -> Backend:
    """Return the backend of a name that `source` gave.

    Raises
    ------
    ValueError
        There is none.
    """
    if backend := _BY_NAME.get(name):
        return backend
    raise errors.unknown_backend(name, tuple(_BY_NAME), source)


def requested(name: str | None) -> Backend | None:
    """Return the backend that the argument or the environment names; None if neither does.

    Raises
    ------
    ValueError
        There is no backend of that name.
    RuntimeError
        It can not run on this machine; the message says what is missing.
    """
    source = "backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is None:
        return None
    backend = named(name, source)
    if reason := backend.missing():
        raise errors.unusable_backend(name, reason, source)
    return backend


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the backend for logits of this device and dtype.

    The argument decides, then the environment variable FASTKL_BACKEND, then the device.
    """
    if backend := requested(name):
        if reason := backend.missing(device, dtype):
            source = "backend" if name is not None else ENVIRONMENT_VARIABLE
            raise errors.unusable_backend(backend.NAME, reason, source)
        return backend
    # On a CPU, Triton is an interpreter for tests: it runs when asked for.
    candidates = _TABLE if device.type != "cpu" else (b for b in _TABLE if b is not triton)
    found = next((b for b in candidates if not b.missing(device, dtype)), None)
    if found is None:
        raise errors.no_backend(device, eager.missing(device, dtype))
    if device.type == "cuda" and found is eager and dtype != torch.float64:
        _tell_once(triton.missing(device, dtype))
    return found


@functools.cache
def _tell_once(reason: str | None) -> None:
    """Warn that the kernels do not run on a card, for which a user would take them to."""
    warnings.warn(
        f"fastkl measures on this card by PyTorch's own operations, not by its kernels: {reason}",
        stacklevel=2,
    )
