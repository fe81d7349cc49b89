"""The table of backends and the rule that chooses among them."""

import functools
import os
import sys
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
    """The interface of each backend module in this package."""

    NAME: str
    # How many numbers per row and circuit `kl_rows_kept` keeps for `gradients`, and their dtype.
    N_KEPT: int
    KEPT_DTYPE: torch.dtype

    def missing(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> str | None:
        """Say what is missing to run, at all or on this device and dtype; None if nothing is."""

    def kl_rows(
        self, circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return KL(reference ‖ circuit) (K, R) of K circuits (R, V) and a reference (R, V)."""

    def kl_rows_kept(
        self, circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return what `kl_rows` does, and numbers (K, R, N_KEPT) that save `gradients` work."""

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
        """Return what `fastkl.gradient.gradients` does; compute again what was not kept."""

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

    def row_statistics(
        self, circuits: Sequence[Tensor], reference: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `fastkl.summaries.row_statistics` does."""

    def row_states(self, circuits: Sequence[Tensor], reference: Tensor) -> RowState:
        """Return the rows' states, each field (K, R), to be merged with those of other slices."""


# Fastest first: `choose` takes the first backend that can run on the logits as they are.
_TABLE: tuple[Backend, ...] = (triton, native, eager)
_BY_NAME = {backend.NAME: backend for backend in _TABLE}
NAMES = tuple(_BY_NAME)
# Top-level packages whose frames are skipped when finding the user's line for a warning.
_OWN = ("fastkl", "torch")


def available_backends() -> tuple[str, ...]:
    """Return the backends that can run on this machine.

    Returns
    -------
    tuple of str
        Their names, the fastest first.

    Examples
    --------
    >>> import fastkl
    >>> "eager" in fastkl.available_backends()
    True
    """
    return tuple(name for name, backend in _BY_NAME.items() if not backend.missing())


def unavailable_backends() -> dict[str, str]:
    """Return the backends that cannot run on this machine, and what each is missing.

    Returns
    -------
    dict {name: reason}
        The backends that :func:`fastkl.available_backends` does not name.

    Examples
    --------
    >>> import fastkl
    >>> "eager" in fastkl.unavailable_backends()
    False
    """
    found = ((name, backend.missing()) for name, backend in _BY_NAME.items())
    return {name: reason for name, reason in found if reason}


def backend_by_name(name: str, source: str = "backend") -> Backend:
    """Return the backend with the name that `source` gave.

    Raises
    ------
    ValueError
        There is no backend of that name.
    """
    if backend := _BY_NAME.get(name):
        return backend
    raise errors.unknown_backend(name, NAMES, source)


def requested(name: str | None) -> Backend | None:
    """Return the backend that the argument or the environment names; None if neither does.

    Raises
    ------
    ValueError
        There is no backend of that name.
    RuntimeError
        It cannot run on this machine; the message says what is missing.
    """
    source = "backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is None:
        return None
    backend = backend_by_name(name, source)
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
    # On a CPU, Triton runs in an interpreter, which is for tests: it is chosen only on request.
    candidates = _TABLE if device.type != "cpu" else (b for b in _TABLE if b is not triton)
    found = next((b for b in candidates if not b.missing(device, dtype)), None)
    if found is None:
        raise errors.no_backend(device, eager.missing(device, dtype))
    usual = {"cuda": triton, "cpu": native}.get(device.type)
    if usual is not None and found is eager and dtype != torch.float64:
        _tell_once(usual.NAME, usual.missing(device, dtype))
    return found


def choose_for(name: str | None, logits: Sequence[Tensor]) -> Backend:
    """Return the backend for logits that are measured together, on one device."""
    dtypes = dict.fromkeys(t.dtype for t in logits)
    return choose(name, logits[0].device, functools.reduce(torch.promote_types, dtypes))


@functools.cache
def _tell_once(usual: str, reason: str | None) -> None:
    """Warn, once, that the slowest backend runs where a user would expect a faster one."""
    warnings.warn(
        f"fastkl falls back to its slow backend, eager (PyTorch's own operations), because the backend "
        f'{usual} cannot be used: {reason}. Pass backend="eager" to silence this warning.',
        stacklevel=_outside(),
    )


def _outside() -> int:
    """Return the caller's `stacklevel` for the nearest frame outside of fastkl and PyTorch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "torch").partition(".")[0] in _OWN:
        frame, level = frame.f_back, level + 1
    return level
