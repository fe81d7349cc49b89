"""Launching the kernels: which rows lie alike, which circuits form a group, how big a tile is."""

import contextlib
import functools
from collections import Counter
from typing import NamedTuple

import torch

import triton

from . import algebra, kernels
from .kernels import DISGUISE

# Whether the kernels were built for Triton's interpreter, which runs them on CPU tensors.
INTERPRETED = not isinstance(kernels.partial_kernel, triton.runtime.JITFunction)

# Bytes of the widest load; rows that lie alike modulo this can share tiles.
WIDEST = 16
# Tokens of a slice, which one warp sums: enough that what a program does once is a small part of the
# work, and few enough that 64 rows of GPT-2's vocabulary and 20 circuits fill an H100's 4224 places.
SLICE = 4096
# Slices of a row, at the most: larger vocabularies have larger slices.
SLICES = 64
# The fields of a slice's state, as partial_kernel writes it, and of a row's, as finish_kernel keeps it.
N_FIELDS, N_KEPT = 5, algebra.N_KEPT.value
LOG2_E = algebra.LOG2_E.value
# Numbers that table_kernel takes at a time, for 32 tensors: in a tuple, 64 take no longer to launch than
# 8 arguments by name.
TABLE_CHUNK = 64

# Registers a thread of partial_kernel: 32 warps of it fit into an SM's, half of what an A100's or H100's
# can hold. Some cards hold fewer programs: see bench/cards.py.
MAX_REGISTERS = 64
# Of finish_kernel: 23 warps. Left to itself the compiler takes fewer in half precision, and spills.
FINISH_REGISTERS = 88


class Tile(NamedTuple):
    """How partial_kernel is built for circuits in groups of G."""

    vec: int
    unroll: int


# By bytes an element and group size. VEC is one 128-bit load; a lane is a thread, so that every sum
# within a tile stays in it. Unrolled until 64 registers are used: a lone warp waits for memory less
# often, and the loop's own instructions weigh less.
# The counts: instructions a pair in the loop, of those that an H100 can issue while memory delivers a
# pair.
TILES = {
    # 18 of 44.
    (4, 4): Tile(vec=4, unroll=1),
    # 19 of 53.
    (4, 2): Tile(vec=4, unroll=2),
    # 21 of 70.
    (4, 1): Tile(vec=4, unroll=4),
    # 18 of 22: tight, and faster by far than a plain sum whose small divergences are read twice.
    (2, 4): Tile(vec=8, unroll=1),
    # 20 of 27.
    (2, 2): Tile(vec=8, unroll=2),
    # 23 of 35.
    (2, 1): Tile(vec=8, unroll=4),
}
# Circuits that share a tile of the reference: as many fours as there are, then what is left.
GROUPS = (4, 2, 1)


def launch(circuits, reference, temperature=1.0, *, keep=False):
    """Launch the kernels on K circuits (R, V) and a reference (R, V) of one dtype and device.

    Rows may have any stride; the last dimension is contiguous. Returns the divergences (K, R) in
    float32, or, to keep the rows' states too, (N_KEPT, K, R), the divergences first.
    """
    own, *places = places_of((reference, *circuits))
    layout, *layouts = layouts_of((own, *places), reference)
    if layouts.count(layout) == len(layouts):
        return _launch_part(places, reference, 1, temperature, keep)
    reference, layout = _reference_like_most(layouts, reference, layout)
    alike, apart = (
        [k for k, other in enumerate(layouts) if (other == layout) is wanted]
        for wanted in (True, False)
    )
    parts = [
        (
            picked,
            _launch_part([places[k] for k in picked], reference, aligned, temperature, keep),
        )
        for picked, aligned in ((alike, 1), (apart, 0))
        if picked
    ]
    if len(parts) == 1:
        return parts[0][1]
    dim = 1 if keep else 0
    places = [k for picked, _ in parts for k in picked]
    order = sorted(range(len(places)), key=places.__getitem__)
    joined = torch.cat([result for _, result in parts], dim=dim).unbind(dim)
    return torch.stack([joined[k] for k in order], dim=dim)


@functools.lru_cache
def slices(n_cols, itemsize):
    """Return into how many slices a vocabulary is cut, and their size: by V and the element's size."""
    # Whole tiles, however the loop is unrolled and whatever the warp's size.
    step = max(64 * tile.vec * tile.unroll for (size, _), tile in TILES.items() if size == itemsize)
    wanted = min(triton.cdiv(n_cols, SLICE), SLICES)
    size = triton.cdiv(triton.cdiv(n_cols, wanted), step) * step
    return triton.cdiv(n_cols, size), size


def groups(n_circuits):
    """Yield (first circuit, group size, number of groups) until all circuits are covered."""
    first = 0
    for size in GROUPS:
        count = (n_circuits - first) // size
        if count:
            yield first, size, count
        first += count * size


def places_of(tensors):
    """Return the addresses and row strides of tensors (R, V): 0, 0 for None."""
    return [(0, 0) if t is None else (t.data_ptr(), t.stride(0)) for t in tensors]


def layouts_of(places, like):
    """Return, for each place, where the first row starts and how long the row stride is.

    Both in elements, modulo WIDEST bytes; 0 for the stride of a single row. The places are those of
    tensors of the shape and dtype of `like`.
    """
    itemsize, several = like.itemsize, like.shape[0] > 1
    vec = WIDEST // itemsize
    return [
        (address // itemsize % vec, stride % vec if several else 0) for address, stride in places
    ]


def layout_of(rows):
    """Return where the rows of a tensor (R, V) start."""
    return layouts_of(places_of([rows]), rows)[0]


def _reference_like_most(layouts, reference, layout):
    """Return the reference and its layout.

    If more circuits lie otherwise, it is copied once to lie as most do. For a single circuit the copy
    costs more than loads of single elements.
    """
    most, count = Counter(layouts).most_common(1)[0]
    if most != layout and count > max(1, layouts.count(layout)):
        return _copy(reference, most), most
    return reference, layout


def _copy(rows, wanted):
    """Copy rows (R, V) to where they start as wanted."""
    (n_rows, n_cols), (lead, step) = rows.shape, wanted
    vec = WIDEST // rows.itemsize
    stride = n_cols + (step - n_cols) % vec
    buffer = torch.empty(n_rows * stride + vec, dtype=rows.dtype, device=rows.device)
    own_lead, _ = layout_of(buffer[None])
    start = (lead - own_lead) % vec
    copy = buffer.as_strided((n_rows, n_cols), (stride, 1), start)
    return copy.copy_(rows)


def _launch_part(places, reference, aligned, temperature, keep):
    """Launch the kernels on circuits that all lie like the reference, or none of which is sure to."""
    n_circuits, (n_rows, n_cols) = len(places), reference.shape
    device, itemsize = reference.device, reference.itemsize
    n_slices, slice_size = slices(n_cols, itemsize)
    lead, _ = layout_of(reference)
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
        "slice_size": slice_size,
        "lead": lead,
        "aligned": aligned,
        "unit": LOG2_E / temperature,
        "inverse": 1 / temperature,
        "COOL": temperature != 1,
        # A lane a thread of one warp; AMD's data-center cards have 64 in one.
        "LANES": warp_size(device),
        "state_ptr": states,
        "num_warps": 1,
    }
    # AMD's compiler has no such option.
    limits, finish_limits = (
        {} if torch.version.hip else {"maxnreg": registers}
        for registers in (MAX_REGISTERS, FINISH_REGISTERS)
    )
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        rows["table_ptr"] = pointer_table(places, device)
        for first, size, count in groups(n_circuits):
            tile = TILES[itemsize, size]
            kernels.partial_kernel[(n_rows * n_slices * count,)](
                **rows,
                first_circuit=first,
                n_groups=count,
                G=size,
                VEC=tile.vec,
                UNROLL=tile.unroll,
                **limits,
            )
        shape = (N_KEPT, n_circuits, n_rows) if keep else (n_circuits, n_rows)
        result = torch.empty(shape, dtype=torch.float32, device=device)
        kernels.finish_kernel[(n_circuits * n_rows,)](
            **rows,
            kl_ptr=result,
            VEC=TILES[itemsize, 1].vec,
            SLICES=SLICES,
            KEEP=keep,
            **finish_limits,
        )
    return result


def warp_size(device):
    """Return the threads of a warp."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def pointer_table(places, device):
    """Return a table (K, 2) on the device of addresses and row strides.

    They travel as odd numbers of more than 32 bits: Triton compiles anew for integers in a tuple that
    are 1, fit into 32 bits, or are multiples of 16.
    """
    nothing = 2 * DISGUISE.value + 1
    numbers = [2 * number + nothing for place in places for number in place]
    table = torch.empty(len(numbers), dtype=torch.int64, device=device)
    for first in range(0, len(numbers), TABLE_CHUNK):
        chunk = numbers[first : first + TABLE_CHUNK]
        padding = (nothing,) * (TABLE_CHUNK - len(chunk))
        kernels.table_kernel[(1,)](
            table_ptr=table, numbers=(*chunk, *padding), first=first, n=len(chunk), num_warps=1
        )
    return table
