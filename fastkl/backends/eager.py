"""KL divergence in plain PyTorch: on any device that has float64, without a compiler.

Rows are processed in blocks that stay in the cache. So a logit is read from memory once, or twice
in rows that are measured again, and some ten elementwise passes over a block do not leave the chip.
The reference's exponentials are computed once for all circuits.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastkl import gradient, jensen_shannon, summaries
from fastkl.backends import eager_states as states
from fastkl.backends.eager_blocks import Layout
from fastkl.backends.eager_workspace import Workspace
from fastkl.rows import DEVICE_BLOCK_ELEMENTS, at_temperature, compute_dtype
from fastkl.state import RowState

NAME = "eager"
N_KEPT, KEPT_DTYPE = 0, torch.float32
# Elements per block, on the CPU, where all rows are measured by their states.
_BLOCK_ELEMENTS = 1 << 19


gradients = gradient.gradients
js_rows = jensen_shannon.js_rows
js_gradients = jensen_shannon.js_gradients
row_statistics = summaries.row_statistics


def missing(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Say what is missing to run: float64 on the device; None if nothing is. Any dtype will do."""
    del dtype
    if device is not None and device.type == "mps":
        return (
            f"sums are kept in float64, which {device} does not support: move the logits to the CPU"
        )
    return None


@torch.no_grad()
def kl_rows(circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(reference ‖ circuit) of every row, in nats.

    Parameters
    ----------
    circuits : sequence of K Tensors (R, V)
        Logits of the circuits.
    reference : Tensor (R, V)
        Logits of the full model.
    temperature : float
        The divisor of all logits.

    Returns
    -------
    Tensor (K, R)
        float64 if any input is, else float32.
    """
    dtype = compute_dtype(reference, *circuits)
    divergence = torch.empty(
        (len(circuits), reference.shape[0]), dtype=dtype, device=reference.device
    )
    if states.on_cpu(reference) and dtype == torch.float32:
        _measure_blocks(circuits, reference, temperature, divergence)
        return divergence
    # All rows are measured by their states: the other formula needs float32 and the CPU, since
    # choosing rows by their values would make the host wait for any other device.
    for rows, ref, e in _blocks(reference, dtype, temperature):
        for k, circuit in enumerate(circuits):
            cir = states.read_circuit(at_temperature(circuit[rows], dtype, temperature), e)
            divergence[k, rows] = states.finalize(cir, ref)
    return divergence


@torch.no_grad()
def kl_rows_kept(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return what `kl_rows` does; nothing is kept for `gradients`."""
    divergence = kl_rows(circuits, reference, temperature)
    return divergence, divergence.new_empty((*divergence.shape, N_KEPT), dtype=KEPT_DTYPE)


@torch.no_grad()
def row_states(circuits: Sequence[Tensor], reference: Tensor) -> RowState:
    """Return the states of rows that are slices of a vocabulary, each field (K, R) in float64."""
    dtype = compute_dtype(reference, *circuits)
    shape = (len(circuits), reference.shape[0])
    result = RowState(
        *(
            torch.empty(shape, dtype=torch.float64, device=reference.device)
            for _ in RowState._fields
        )
    )
    for rows, ref, e in _blocks(reference, dtype):
        for k, circuit in enumerate(circuits):
            cir = states.read_circuit(circuit[rows], e)
            for field, value in zip(result, states.row_state(cir, ref), strict=True):
                field[k, rows] = value
    return result


def _measure_blocks(
    circuits: Sequence[Tensor], reference: Tensor, temperature: float, divergence: Tensor
) -> None:
    """Set the divergences (K, R) of rows on the CPU."""
    layout = Layout(*reference.shape)
    workspace = Workspace(layout)
    for rows in layout.slices(len(reference)):
        p = at_temperature(reference[rows], torch.float32, temperature)
        workspace.read(p)
        for start in range(0, len(circuits), workspace.n_circuits):
            blocks = [circuit[rows] for circuit in circuits[start : start + workspace.n_circuits]]

            def circuit(k: int, some: Tensor | None, blocks: Sequence[Tensor] = blocks) -> Tensor:
                block = blocks[k] if some is None else blocks[k][some]
                # Half-precision logits are converted when they are subtracted.
                return (
                    block if temperature == 1 else at_temperature(block, torch.float32, temperature)
                )

            found, good = workspace.kl(circuit, len(blocks))
            bad = good.logical_not()
            for k in bad.any(-1).nonzero()[:, 0].tolist():
                far = bad[k].nonzero()[:, 0]
                ref = p[far]
                found[k, far] = states.finalize(
                    states.read_circuit(circuit(k, far), torch.empty_like(ref)),
                    states.Reference.read(ref, torch.empty_like(ref)),
                )
            divergence[start : start + len(blocks), rows] = found


def _blocks(
    reference: Tensor, dtype: torch.dtype, temperature: float = 1.0
) -> Iterator[tuple[slice, states.Reference, Tensor]]:
    """Yield blocks of rows with the reference's exponentials, and a buffer of their shape."""
    n_rows, n_cols = reference.shape
    elements = _BLOCK_ELEMENTS if states.on_cpu(reference) else DEVICE_BLOCK_ELEMENTS
    size = max(1, min(n_rows, elements // n_cols))
    w, e = torch.empty((2, size, n_cols), dtype=dtype, device=reference.device)
    for start in range(0, n_rows, size):
        rows = slice(start, min(start + size, n_rows))
        n = rows.stop - rows.start
        yield (
            rows,
            states.Reference.read(at_temperature(reference[rows], dtype, temperature), w[:n]),
            e[:n],
        )
