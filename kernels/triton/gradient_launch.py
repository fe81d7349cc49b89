"""Launch the kernels of the gradients."""

import contextlib
from typing import NamedTuple

import torch

from . import gradient_kernels as kernels
from .launch import LOG2_E, layouts_of, packing_of, places_of, pointer_table, warp_size

# Threads per program.
LANES = 128
# Registers per thread, with and without the reference's gradient: at least six and eight programs
# fit on an SM.
MAX_REGISTERS = {True: 80, False: 64}


class GradientTile(NamedTuple):
    """How gradient_kernel is built for one element size."""

    vec: int
    loads: int  # of 128 bits, by each thread from each tensor

    @property
    def tokens(self):
        """The number of tokens that a program takes at a time."""
        return LANES * self.vec * self.loads


# By bytes per element. The eight tokens of a thread share what it loads and computes for the row;
# with sixteen, its registers would spill.
GRADIENT_TILES = {4: GradientTile(vec=4, loads=2), 2: GradientTile(vec=8, loads=1)}


def launch_gradients(grad, circuits, reference, rows, dqs, dp, temperature):
    """Launch the kernels that write the gradients of Σ grad · KL.

    `grad` (K, R) is float32, with any strides; K circuits and a reference (R, V) are as for
    `launch`, and `rows` is what it kept. `dqs`, K contiguous tensors (R, V) or None, and `dp`, one
    more or None, are written to.
    """
    n_circuits, (n_rows, n_cols) = len(circuits), reference.shape
    device, itemsize = reference.device, reference.itemsize
    own, *places = places_of((reference, *circuits, *dqs, dp))
    present = [place for place in places if place[0]]
    layout, *others = layouts_of((own, *present), reference)
    lead, _ = layout
    numbers = {
        "p_ptr": reference,
        "rows_ptr": rows,
        "p_row_stride": reference.stride(0),
        "n_rows": n_rows,
        "n_cols": n_cols,
        "unit": LOG2_E / temperature,
        "inverse": 1 / temperature,
        "DIVIDE": temperature != 1,
    }
    tile, warps = GRADIENT_TILES[itemsize], LANES // warp_size(device)
    limits = {} if torch.version.hip else {"maxnreg": MAX_REGISTERS[dp is not None]}
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        numbers["table_ptr"] = pointer_table(places, device)
        top = rows
        if dp is not None:
            top = torch.empty((n_circuits, n_rows, 2), dtype=torch.float32, device=device)
            kernels.top_kernel[(n_circuits * n_rows,)](
                **numbers,
                top_ptr=top,
                TILE=tile.tokens,
                num_warps=warps,
            )
        # A grid's second dimension is limited to 65535, so it is the vocabulary's.
        kernels.gradient_kernel[(n_rows, n_cols // tile.tokens + 1)](
            **numbers,
            n_circuits=n_circuits,
            grad_ptr=grad,
            lead=lead,
            top_ptr=top,
            grad_circuit_stride=grad.stride(0),
            grad_row_stride=grad.stride(1),
            aligned=int(others.count(layout) == len(others)),
            LANES=LANES,
            TILE=tile.tokens,
            VEC=tile.vec,
            REFERENCE=dp is not None,
            PACKING=packing_of(device, itemsize),
            num_warps=warps,
            **limits,
        )
