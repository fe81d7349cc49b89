"""KL divergence by the fused Triton kernels, on CUDA and ROCm tensors.

The kernels also run on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), which is slow and
meant for tests.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl import errors, jensen_shannon, state, summaries
from fastkl.backends import eager
from fastkl.state import RowState

NAME = "triton"
# Equal to fastkl._triton.N_KEPT, which is not imported before triton is known to be installed.
N_KEPT, KEPT_DTYPE = 10, torch.float32
# Triton 3.3 cannot compile the kernels. pyproject.toml requires the same version.
OLDEST_TRITON = (3, 4)
# NVIDIA's cards since Ampere, which have an instruction for a maximum that propagates NaN.
OLDEST_CAPABILITY = (8, 0)
# The names of Triton's distributions: its own, and those of PyTorch's builds for ROCm.
_DISTRIBUTIONS = ("triton", "pytorch-triton-rocm", "pytorch-triton")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# There are no kernels for these yet.
js_rows = jensen_shannon.js_rows
js_gradients = jensen_shannon.js_gradients
row_statistics = summaries.row_statistics


def missing(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Say what is missing to run, at all or on this device and dtype; None if nothing is."""
    if problem := installation_problem():
        return problem
    if problem := _device_problem(device):
        return problem
    if dtype is not None and dtype not in _DTYPES:
        return f"the kernels take {errors.names_of(_DTYPES)} (eager takes float64 too), got {dtype}"
    return None


def _device_problem(device: torch.device | None) -> str | None:
    """Say why the kernels do not run on a device, or on any; None if they do."""
    import fastkl._triton as _triton

    if device is None:
        if _triton.INTERPRETED or torch.cuda.is_available():
            return None
        return "PyTorch sees no CUDA or ROCm device"
    if (device.type == "cpu") != _triton.INTERPRETED:
        wanted = "CPU" if _triton.INTERPRETED else "CUDA or ROCm"
        mode = " under TRITON_INTERPRET=1" if _triton.INTERPRETED else ""
        return f"Triton runs on {wanted} tensors{mode}, got {device}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            oldest, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
            return f"the kernels need compute capability {oldest}, {device} has {found}"
    elif device.type not in ("cpu", "cuda"):
        return f"Triton runs on CUDA or ROCm tensors, got {device}"
    return None


def installation_problem() -> str | None:
    """Say which package is missing, too old or broken; None if the kernels are imported."""
    if importlib.util.find_spec("triton") is None:
        if torch.cuda.is_available():
            return "the package triton is not installed (pip install triton)"
        return "PyTorch sees no CUDA or ROCm device, and the package triton is not installed"
    if importlib.util.find_spec("fastkl._triton") is None:
        return errors.not_in_this_folder(
            "the kernels fastkl._triton are", "fastkl was not installed by pip"
        )
    found = version()
    # The first two numbers of a version such as "3.4.0+git1a2b3c4" or "3.5.0rc1".
    if found and tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {found} is too old: the kernels need {oldest} or newer"
    return _import_problem()


@functools.cache
def _import_problem() -> str | None:
    """Say why Triton or the kernels cannot be imported, though installed; None if they can."""
    # An import may fail in any way: a missing system library, another package's version.
    try:
        importlib.import_module("fastkl._triton")
    except Exception as error:
        said = " ".join(str(error).split())
        return f"triton, or its kernels here, cannot be imported: {type(error).__name__}: {said}"
    return None


@functools.cache
def version() -> str | None:
    """Return Triton's version without importing it; None if none of its distributions is known."""
    for distribution in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@torch.no_grad()
def kl_rows(circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(reference ‖ circuit) of every row, in nats.

    Parameters
    ----------
    circuits : sequence of K Tensors (R, V)
        Logits of the circuits: float32, float16 or bfloat16, any row stride.
    reference : Tensor (R, V)
        Logits of the full model, on the same device.
    temperature : float
        The divisor of all logits, applied in the kernels.

    Returns
    -------
    Tensor (K, R)
        float32.
    """
    import fastkl._triton as _triton

    circuits, reference = _one_dtype(circuits, reference)
    divergence: Tensor = _triton.launch(circuits, reference, temperature)
    return divergence


@torch.no_grad()
def kl_rows_kept(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what `kl_rows` does, and a few numbers of each row for `gradients` (K, R, N_KEPT)."""
    import fastkl._triton as _triton

    circuits, reference = _one_dtype(circuits, reference)
    kept: Tensor = _triton.launch(circuits, reference, temperature, keep=True)
    return kept[..., 0].clone(), kept


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

    Each logit is read once, except that the reference's gradient needs more reads of rows in which
    one token may have nearly all mass. Nothing else of the logits' size is allocated, except
    float32 copies where dtypes differ. Without `kept`, the forward pass is run again, so that the
    logits are read twice. Where KL = inf, Q - P is only as accurate as two rounded softmaxes. If
    one token has nearly all of both sides' mass, its gradient is as small as the others' mass, and
    is the least accurate: with a mass of 1e-6 left to the others, relative errors of 1e-4 were
    seen, and larger ones with less mass, up to a third of the gradient where KL is large because of
    tokens that the reference all but masks.
    """
    import fastkl._triton as _triton

    if not circuits or reference.shape[0] == 0:
        dqs = [
            torch.zeros_like(c) if want else None for c, want in zip(circuits, wanted, strict=True)
        ]
        return dqs, torch.zeros_like(reference) if reference_wanted else None
    dtypes = [circuit.dtype for circuit in circuits], reference.dtype
    circuits, reference = _one_dtype(circuits, reference)
    if kept is None:
        kept = _triton.launch(circuits, reference, temperature, keep=True)
    dqs = [
        torch.empty(circuit.shape, dtype=circuit.dtype, device=circuit.device) if want else None
        for circuit, want in zip(circuits, wanted, strict=True)
    ]
    dp = None
    if reference_wanted:
        dp = torch.empty(reference.shape, dtype=reference.dtype, device=reference.device)
    kept = kept.contiguous()
    _triton.launch_gradients(grad.float(), circuits, reference, kept, dqs, dp, temperature)
    dqs = [None if dq is None else dq.to(dtype) for dq, dtype in zip(dqs, dtypes[0], strict=True)]
    return dqs, None if dp is None else dp.to(dtypes[1])


@torch.no_grad()
def row_states(circuits: Sequence[Tensor], reference: Tensor) -> RowState:
    """Return the states of rows that are slices of a vocabulary, each field (K, R) in float64."""
    import fastkl._triton as _triton

    if not circuits:
        return eager.row_states(circuits, reference)
    circuits, reference = _one_dtype(circuits, reference)
    kept_rows = _triton.launch(circuits, reference, keep=True).double()
    divergence, b_p, z_p, b_q, rest, moved, s, growth, *_ = kept_rows.unbind(-1)
    # The bases are in units of log 2, and growth is e^x - 1.
    m_p, m_q = b_p * math.log(2), b_q * math.log(2)
    c, x = moved + rest, torch.log1p(growth)
    z_q = z_p * torch.exp((m_p - m_q) - c - x)
    # The kernel does not keep h, which follows from KL = h / z_p - φ(x).
    h = z_p * (divergence + state.phi(x))
    kept = RowState(m_p, z_p, m_q, z_q, s, h, torch.zeros_like(s), c)
    finite = torch.stack(kept).isfinite().all(0)
    if finite.all():
        return kept
    # A slice without mass on a side, or with an infinite divergence, has a state, but not from
    # these numbers, which are not all finite.
    others = eager.row_states(circuits, reference)
    pairs = zip(kept, others, strict=True)
    return RowState(*(torch.where(finite, ours, other) for ours, other in pairs))


def _one_dtype(circuits: Sequence[Tensor], reference: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the logits as they are if all have one dtype, else as float32, which is exact."""
    if all(circuit.dtype == reference.dtype for circuit in circuits):
        return list(circuits), reference
    return [circuit.float() for circuit in circuits], reference.float()
