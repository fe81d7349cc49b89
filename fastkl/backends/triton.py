"""KL divergence by the fused Triton kernels, on CUDA and ROCm tensors.

On CPU tensors too, under Triton's interpreter (TRITON_INTERPRET=1): slow, and there for tests.
"""

import importlib.util
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fastkl import gradient, jensen_shannon, state
from fastkl.state import RowState

NAME = "triton"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# No kernels of these yet.
gradients = gradient.gradients
js_rows = jensen_shannon.js_rows
js_gradients = jensen_shannon.js_gradients


def missing(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Say what is missing to run: at all, or on this device and in this dtype; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'fastkl[triton]')"
    import fastkl._triton as _triton

    if device is None:
        if not (_triton.INTERPRETED or torch.cuda.is_available()):
            return "PyTorch sees no CUDA or ROCm device"
    elif (device.type == "cpu") != _triton.INTERPRETED:
        wanted = "CPU" if _triton.INTERPRETED else "CUDA or ROCm"
        mode = " under TRITON_INTERPRET=1" if _triton.INTERPRETED else ""
        return f"Triton runs on {wanted} tensors{mode}, got {device}"
    elif device.type not in ("cpu", "cuda"):
        return f"Triton runs on CUDA or ROCm tensors, got {device}"
    if dtype is not None and dtype not in _DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        return f"the kernels take {known} (eager takes float64 too), got {dtype}"
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
        What all logits are divided by, in the kernels.

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
def row_states(circuits: Sequence[Tensor], reference: Tensor) -> RowState:
    """Return the states of rows that are slices of a vocabulary, each field (K, R) in float64."""
    import fastkl._triton as _triton

    circuits, reference = _one_dtype(circuits, reference)
    m_p, z_p, m_q, z_q, s, h, g, c, _ = _triton.launch(
        circuits, reference, keep_states=True
    ).double()
    log_2 = torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    whole = RowState(m_p * log_2, z_p, m_q * log_2, z_q, s, h, g, c)
    parts = zip(*(field.unbind(-1) for field in whole), strict=True)
    return reduce(state.merge, (RowState(*part) for part in parts))


def _one_dtype(circuits: Sequence[Tensor], reference: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the logits as they are if all have one dtype, else as float32, which loses nothing."""
    if all(circuit.dtype == reference.dtype for circuit in circuits):
        return list(circuits), reference
    return [circuit.float() for circuit in circuits], reference.float()
