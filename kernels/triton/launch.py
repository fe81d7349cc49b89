"""Launching the kernels: which rows lie alike, which circuits form a group, how big a tile is."""

import contextlib
from collections import Counter
from typing import NamedTuple

import torch

import triton

from . import kernels

# Whether the kernels were built for Triton's interpreter, which runs them on CPU tensors.
INTERPRETED = not isinstance(kernels.partial_kernel, triton.runtime.JITFunction)

# Bytes of the widest load; rows that lie alike modulo this can share tiles.
WIDEST = 16
# Tokens of a slice, at the most. Enough programs to fill a card with 64 rows of GPT-2's vocabulary,
# and enough tokens each that merging the lanes is a small part of the work.
SLICE = 16384
# The fields of a slice's state, as partial_kernel writes them.
N_FIELDS = 9
LOG2_E = 1.4426950408889634
# What finish_kernel keeps of a row for its gradients.
N_KEPT = 8
# Arguments that table_kernel takes at a time.
TABLE_CHUNK = 8


# Registers a thread: eight blocks of 128 threads fit on an SM, half of what it can hold at the most.
MAX_REGISTERS = 64


class Tile(NamedTuple):
    """How partial_kernel is built for circuits in groups of G."""

    lanes: int
    vec: int
    unroll: int
    accurate: bool  # both sums in the loop; else small divergences are always looked at twice


# By bytes an element and group size. VEC is one 128-bit load; one lane a thread keeps every reduction
# within a tile in the thread, and four warps of 32 leave the scheduler many small programs to balance.
# The counts are of an H100's instructions a pair, in the loop and in the time that memory takes.
TILES = {
    # 26 of 44: both sums fit.
    (4, 4): Tile(lanes=128, vec=4, unroll=1, accurate=True),
    # 27 of 53.
    (4, 2): Tile(lanes=128, vec=4, unroll=1, accurate=True),
    # 31 of 70.
    (4, 1): Tile(lanes=128, vec=4, unroll=1, accurate=True),
    # 13 of 22, where 25 with the second sum would not fit.
    (2, 4): Tile(lanes=128, vec=8, unroll=1, accurate=False),
    # 26 of 26: no better than the limit, but two single circuits would take 35 each.
    (2, 2): Tile(lanes=128, vec=8, unroll=2, accurate=True),
    # 30 of 35; unrolled because the loop's own 2 a pair would push it past 85 %. Over whole rows,
    # merging the lanes once a slice takes the rest (bench/NOTES.md).
    (2, 1): Tile(lanes=128, vec=8, unroll=4, accurate=True),
}
# Circuits that share a tile of the reference: as many fours as there are, then what is left.
GROUPS = (4, 2, 1)


class Layout(NamedTuple):
    """Where rows start modulo WIDEST bytes, in elements: the first one, and each next one."""

    lead: int
    step: int


def launch(circuits, reference, temperature=1.0, *, keep=None):
    """Launch the kernels on K circuits (R, V) and a reference (R, V) of one dtype and device.

    Rows may have any stride; the last dimension is contiguous. Returns the divergences (K, R) in
    float32; to keep "rows", with what their gradients need (N_KEPT, K, R), the divergences first; to
    keep "slices", the states of all slices (N_FIELDS, K, R, slices).
    """
    reference, alike = _reference_like_most(circuits, reference)
    apart = [k for k in range(len(circuits)) if k not in alike]
    parts = [
        (picked, _launch_part([circuits[k] for k in picked], reference, aligned, temperature, keep))
        for picked, aligned in ((sorted(alike), 1), (apart, 0))
        if picked
    ]
    if len(parts) == 1:
        return parts[0][1]
    dim = 1 if keep else 0
    order = (
        torch.tensor([k for picked, _ in parts for k in picked], device="cpu").argsort().tolist()
    )
    joined = torch.cat([result for _, result in parts], dim=dim).unbind(dim)
    return torch.stack([joined[k] for k in order], dim=dim)


def slices(n_cols, tile):
    """Return into how many slices a vocabulary is cut, and their size; it depends on V alone."""
    n_slices = triton.cdiv(n_cols, SLICE)
    size = triton.cdiv(n_cols + tile.vec - 1, n_slices)
    step = tile.lanes * tile.vec
    return n_slices, triton.cdiv(size, step) * step


def groups(n_circuits, sizes=GROUPS):
    """Yield (first circuit, group size, number of groups) until all circuits are covered."""
    first = 0
    for size in sizes:
        count = (n_circuits - first) // size
        if count:
            yield first, size, count
        first += count * size


def n_warps(tile, warp_size):
    """Return how many warps make a lane a thread: AMD's data-center cards have 64 threads in one."""
    return max(1, tile.lanes // warp_size)


def layout(rows):
    """Return where the rows of a tensor (R, V) start."""
    vec = WIDEST // rows.itemsize
    step = rows.stride(0) % vec if rows.shape[0] > 1 else 0
    return Layout(rows.data_ptr() // rows.itemsize % vec, step)


def _reference_like_most(circuits, reference):
    """Return the reference, and the set of circuits whose rows lie as its do.

    If more circuits lie otherwise, it is copied once to lie as most do. For a single circuit the copy
    costs more than loads of single elements.
    """
    layouts = [layout(circuit) for circuit in circuits]
    most, count = Counter(layouts).most_common(1)[0]
    own = layout(reference)
    if most != own and count > max(1, layouts.count(own)):
        reference, own = _copy(reference, most), most
    return reference, {k for k, other in enumerate(layouts) if other == own}


def _copy(rows, wanted):
    """Copy rows (R, V) to where they start as wanted."""
    n_rows, n_cols = rows.shape
    vec = WIDEST // rows.itemsize
    stride = n_cols + (wanted.step - n_cols) % vec
    buffer = torch.empty(n_rows * stride + vec, dtype=rows.dtype, device=rows.device)
    start = (wanted.lead - layout(buffer[None]).lead) % vec
    copy = buffer.as_strided((n_rows, n_cols), (stride, 1), start)
    return copy.copy_(rows)


def _launch_part(circuits, reference, aligned, temperature, keep):
    """Launch the kernels on circuits that all lie like the reference, or none of which is sure to."""
    n_circuits, (n_rows, n_cols) = len(circuits), reference.shape
    device, itemsize = reference.device, reference.itemsize
    n_slices, slice_size = slices(n_cols, TILES[itemsize, 1])
    states = torch.empty(
        (N_FIELDS, n_circuits, n_rows, n_slices), dtype=torch.float32, device=device
    )
    rows = {
        "p_ptr": reference,
        "p_row_stride": reference.stride(0),
        "n_rows": n_rows,
        "n_cols": n_cols,
        "n_circuits": n_circuits,
        "n_slices": n_slices,
        "lead": layout(reference).lead,
        "aligned": aligned,
        "unit": LOG2_E / temperature,
        "inverse": 1 / temperature,
        "COOL": temperature != 1,
        "state_ptr": states,
    }
    warp_size = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    # AMD's compiler has no such option.
    limits = {} if torch.version.hip else {"maxnreg": MAX_REGISTERS}
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        rows["table_ptr"] = pointer_table(circuits, device)
        # What is kept is made of both sums.
        sizes = [size for size in GROUPS if TILES[itemsize, size].accurate or not keep]
        for first, size, count in groups(n_circuits, sizes):
            tile = TILES[itemsize, size]
            kernels.partial_kernel[(n_rows * n_slices * count,)](
                **rows,
                first_circuit=first,
                n_groups=count,
                slice_size=slice_size,
                G=size,
                LANES=tile.lanes,
                VEC=tile.vec,
                UNROLL=tile.unroll,
                ACCURATE=tile.accurate,
                num_warps=n_warps(tile, warp_size),
                **limits,
            )
        if keep == "slices":
            return states
        shape = (N_KEPT, n_circuits, n_rows) if keep else (n_circuits, n_rows)
        result = torch.empty(shape, dtype=torch.float32, device=device)
        tile = TILES[itemsize, 1]
        kernels.finish_kernel[(n_circuits * n_rows,)](
            **rows,
            kl_ptr=result,
            KEEP=keep is not None,
            LANES=tile.lanes,
            VEC=tile.vec,
            num_warps=n_warps(tile, warp_size),
            **limits,
        )
    return result


def pointer_table(tensors, device):
    """Return a table (K, 2) on the device of the tensors' addresses and row strides, 0 for None."""
    pairs = [(0, 0) if t is None else (t.data_ptr(), t.stride(0)) for t in tensors]
    numbers = [number for pair in pairs for number in pair]
    table = torch.empty(len(numbers), dtype=torch.int64, device=device)
    for first in range(0, len(numbers), TABLE_CHUNK):
        chunk = numbers[first : first + TABLE_CHUNK]
        padded = chunk + [0] * (TABLE_CHUNK - len(chunk))
        arguments = {f"a{i}": number for i, number in enumerate(padded)}
        kernels.table_kernel[(1,)](
            table_ptr=table, first=first, n=len(chunk), **arguments, num_warps=1
        )
    return table
