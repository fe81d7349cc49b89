"""Divergences of CPU tensors by the compiled kernel, with vector instructions and many threads.

The kernel has one version for each instruction-set level of the processor's architecture. The best
level that this processor has is used; FASTKL_NATIVE_ISA forces another one.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastkl import errors, summaries
from fastkl.state import RowState

NAME = "native"
# The numbers of a row's state: see `_states`.
N_KEPT, KEPT_DTYPE = 5, torch.float64
LEVEL_VARIABLE = "FASTKL_NATIVE_ISA"
_Matrix = tuple[int, int, int]
_NOTHING: _Matrix = (0, 0, 0)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _extension() -> ModuleType | ImportError:
    """Return the extension, or why it cannot be loaded."""
    try:
        return importlib.import_module("fastkl._native")
    except ImportError as error:
        return error.with_traceback(None)


def _loaded() -> ModuleType:
    extension = _extension()
    if isinstance(extension, ImportError):
        raise RuntimeError(missing())
    return extension


def missing(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Say what is missing to run, at all or on this device and dtype; None if nothing is.

    Raises
    ------
    RuntimeError
        The device is the CPU, and FASTKL_NATIVE_ISA names a level that this machine lacks.
    """
    extension = _extension()
    if isinstance(extension, ModuleNotFoundError):
        return errors.not_in_this_folder(
            "the extension fastkl._native is",
            "it was not built (pip needs GCC or Clang and Python's headers; `pip install -v` shows the "
            "error)",
        )
    if isinstance(extension, ImportError):
        return f"the extension fastkl._native cannot be loaded: {extension}"
    if device is None:
        return _level_problem(extension)
    if device.type != "cpu":
        return f"the compiled kernel runs on CPU tensors, got {device}"
    if dtype is not None and dtype not in _DTYPES:
        return f"the kernel takes {errors.names_of(_DTYPES)} (eager takes float64 too), got {dtype}"
    # This is an error, not a reason to fall back: another backend must not silently replace a
    # forced level.
    if problem := _level_problem(extension):
        raise RuntimeError(problem)
    return None


@torch.no_grad()
def kl_rows(circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(reference ‖ circuit) of every row, in nats.

    Parameters
    ----------
    circuits : sequence of K Tensors (R, V)
        Logits of the circuits: float32, float16 or bfloat16 each, any row stride.
    reference : Tensor (R, V)
        Logits of the full model.
    temperature : float
        The divisor of all logits, applied as they are read.

    Returns
    -------
    Tensor (K, R)
        float32.
    """
    result = torch.empty((len(circuits), reference.shape[0]), dtype=torch.float32, device="cpu")
    _measure(circuits, reference, temperature, kl=result)
    return result


@torch.no_grad()
def kl_rows_kept(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what `kl_rows` does, and the rows' states (K, R, N_KEPT)."""
    states = _states(circuits, reference, temperature)
    _, z_p, _, z_q, divergence = states.unbind(-1)
    divergence = torch.where((z_p > 0) & (z_q > 0), divergence, torch.nan)
    return divergence.float(), states


@torch.no_grad()
def row_statistics(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `fastkl.summaries.row_statistics` does, in float32; each logit is read once."""
    extension = _loaded()
    sides = [reference, *circuits]
    # The largest logit, Σ e^x, the reference's Σ x e^x, and the index of the largest logit.
    found = torch.empty((len(sides), len(reference), 4), dtype=torch.float64, device="cpu")
    extension.summarize(
        _level(extension),
        [_matrix(side) for side in sides],
        *reference.shape,
        temperature,
        found.data_ptr(),
        torch.get_num_threads(),
    )
    m, z, below, _ = found.unbind(-1)
    top = found.view(torch.int64)[..., 3]
    return summaries.finish(m, z, below[0], top, temperature, torch.float32)


@torch.no_grad()
def row_states(circuits: Sequence[Tensor], reference: Tensor) -> RowState:
    """Return the states of rows that are slices of a vocabulary, each field (K, R) in float64.

    The pivot is the slice's own difference of log-sum-exps, at which s / z_p and h / z_p are both
    its divergence. m_p and m_q are not the maxima, but numbers near them.
    """
    m_p, z_p, m_q, z_q, divergence = _states(circuits, reference, 1.0).unbind(-1)
    # The kernel leaves any number here if there is no mass.
    m_p, m_q = (m.masked_fill(z == 0, -torch.inf) for m, z in ((m_p, z_p), (m_q, z_q)))
    pivot = (m_p - m_q) + torch.log(z_p / z_q)
    return RowState(
        m_p=m_p,
        z_p=z_p,
        m_q=m_q,
        z_q=z_q,
        s=z_p * divergence,
        h=z_p * divergence,
        # The far tokens' circuit mass is part of h already, except in a slice without reference
        # mass, where all tokens are far.
        g=torch.where(z_p == 0, z_q, 0.0),
        c=torch.where(pivot.isfinite(), pivot, 0.0),
    )


@torch.no_grad()
def gradients(
    grad: Tensor,
    circuits: Sequence[Tensor],
    reference: Tensor,
    wanted: Sequence[bool],
    reference_wanted: bool,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the gradients of Σ grad · KL for the logits: see `fastkl.gradient.gradients`.

    Each logit is read from memory once, or twice without `kept`. Besides the gradients, every
    thread needs 8 bytes of memory per token of a row, or 16 if the reference's gradient is wanted.
    """
    extension = _loaded()
    n_rows, n_cols = reference.shape
    dqs = [
        torch.empty(circuit.shape, dtype=circuit.dtype, device="cpu") if want else None
        for circuit, want in zip(circuits, wanted, strict=True)
    ]
    dp = None
    if reference_wanted:
        dp = torch.empty(reference.shape, dtype=reference.dtype, device="cpu")
    if not circuits or not n_rows:
        return dqs, None if dp is None else dp.zero_()
    states = _states(circuits, reference, temperature) if kept is None else kept.contiguous()
    scaled = (grad.double() / temperature).contiguous()
    extension.gradients(
        _level(extension),
        scaled.data_ptr(),
        states.data_ptr(),
        [_matrix(circuit) for circuit in circuits],
        _matrix(reference),
        [_NOTHING if dq is None else _matrix(dq) for dq in dqs],
        _NOTHING if dp is None else _matrix(dp),
        n_rows,
        n_cols,
        temperature,
        torch.get_num_threads(),
    )
    return dqs, dp


@torch.no_grad()
def js_rows(circuit: Tensor, reference: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the Jensen-Shannon divergence (R,) of rows (R, V), in nats, in float32.

    Every thread uses some 150 KiB of memory. Rows are divided by the temperature as they are read.
    """
    result = torch.empty(circuit.shape[:1], dtype=torch.float32, device="cpu")
    _js(circuit, reference, beta, temperature, result=result)
    return result


@torch.no_grad()
def js_gradients(
    grad: Tensor,
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    wanted: bool,
    reference_wanted: bool,
) -> list[Tensor]:
    """Return the wanted gradients: see `fastkl.jensen_shannon.js_gradients`.

    Besides the gradients, every thread needs 8 bytes of memory per token of a row for each of them.
    """
    dq, dp = (
        torch.empty(rows.shape, dtype=rows.dtype, device="cpu") if want else None
        for rows, want in ((circuit, wanted), (reference, reference_wanted))
    )
    scaled = (grad.double() / temperature).contiguous()
    _js(circuit, reference, beta, temperature, grad=scaled, dq=dq, dp=dp)
    return [gradient for gradient in (dq, dp) if gradient is not None]


def _states(circuits: Sequence[Tensor], reference: Tensor, temperature: float) -> Tensor:
    """Return the states (K, R, 5) of rows in float64: max and sum of p and of q, and divergence."""
    shape = (len(circuits), reference.shape[0], N_KEPT)
    states = torch.empty(shape, dtype=KEPT_DTYPE, device="cpu")
    _measure(circuits, reference, temperature, states=states)
    return states


def _js(
    circuit: Tensor,
    reference: Tensor,
    beta: float,
    temperature: float,
    *,
    result: Tensor | None = None,
    grad: Tensor | None = None,
    dq: Tensor | None = None,
    dp: Tensor | None = None,
) -> None:
    extension = _loaded()
    extension.js(
        _level(extension),
        _matrix(circuit),
        _matrix(reference),
        beta,
        temperature,
        *circuit.shape,
        0 if result is None else result.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        _NOTHING if dq is None else _matrix(dq),
        _NOTHING if dp is None else _matrix(dp),
        torch.get_num_threads(),
    )


def _measure(
    circuits: Sequence[Tensor],
    reference: Tensor,
    temperature: float,
    *,
    kl: Tensor | None = None,
    states: Tensor | None = None,
) -> None:
    extension = _loaded()
    n_rows, n_cols = reference.shape
    extension.measure(
        _level(extension),
        [_matrix(circuit) for circuit in circuits],
        _matrix(reference),
        n_rows,
        n_cols,
        temperature,
        0 if kl is None else kl.data_ptr(),
        0 if states is None else states.data_ptr(),
        torch.get_num_threads(),
    )


def _matrix(rows: Tensor) -> _Matrix:
    return rows.data_ptr(), rows.stride(0), _DTYPES[rows.dtype]


def _level(extension: ModuleType) -> str:
    best: str = extension.levels()[0]
    return os.environ.get(LEVEL_VARIABLE, "").lower() or best


def _level_problem(extension: ModuleType) -> str | None:
    level, known = _level(extension), extension.levels()
    if level in known:
        return None
    return (
        f"{LEVEL_VARIABLE} asks for the instruction-set level {level!r}, "
        f"but this machine supports only {', '.join(map(repr, known))}"
    )
