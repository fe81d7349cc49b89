"""Launch the kernels: which rows share an alignment, which circuits form a group, tile sizes."""

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

# Bytes of the widest load; rows whose addresses are equal modulo this can share tiles.
WIDEST = 16
# Tokens of a slice, which one warp sums: enough that a program's fixed costs are a small part of
# its work, and few enough that 64 rows of GPT-2's vocabulary and 20 circuits fill an H100's 4224
# places for warps.
SLICE = 4096
# The largest number of slices of a row: one for each lane of finish_kernel's warp. Vocabularies of
# more than 131,072 tokens have larger slices.
SLICES = 32
# How many fields partial_kernel writes for a slice's state, and finish_kernel keeps for a row.
N_FIELDS, N_KEPT = kernels.N_FIELDS.value, algebra.N_KEPT.value
LOG2_E = algebra.LOG2_E.value
# The numbers that one launch of table_kernel takes, for 32 tensors: 64 in a tuple take no longer to
# launch than 8 arguments by name.
TABLE_CHUNK = 64

# Registers per thread of partial_kernel: 32 of its warps fit on an SM, half of what an A100's or
# H100's SM can hold. Some cards hold fewer programs: see bench/cards.py.
MAX_REGISTERS = 64


class Tile(NamedTuple):
    """How partial_kernel is built for circuits in groups of G."""

    vec: int
    unroll: int


# By bytes per element and group size. VEC is one 128-bit load; a lane is a thread, so that every
# sum within a tile stays in the thread. Loops are unrolled until 64 registers are used: a lone warp
# then waits for memory less often, and the loop's own instructions weigh less. The counts are
# instructions per pair in the loop, of those that an H100 can issue while memory delivers a pair.
TILES = {
    # 17 of 44.
    (4, 4): Tile(vec=4, unroll=1),
    # 18 of 53.
    (4, 2): Tile(vec=4, unroll=2),
    # 21 of 70.
    (4, 1): Tile(vec=4, unroll=4),
    # 18 of 22.
    (2, 4): Tile(vec=8, unroll=1),
    # 19 of 27.
    (2, 2): Tile(vec=8, unroll=2),
    # 22 of 35.
    (2, 1): Tile(vec=8, unroll=4),
}
# Tiles that differ where operations are packed, which takes pairs of adjacent registers.
PACKED_TILES = {
    # With two tiles at a time, registers spill.
    (2, 2): Tile(vec=8, unroll=1),
}
# How many circuits share a tile of the reference: groups of four as long as possible, then smaller
# ones.
GROUPS = (4, 2, 1)


def launch(circuits, reference, temperature=1.0, *, keep=False):
    """Launch the kernels on K circuits (R, V) and a reference (R, V) of one dtype and device.

    Rows may have any stride; the last dimension is contiguous. Returns the divergences (K, R) in
    float32, or, with `keep`, what is kept of the rows (K, R, N_KEPT), the divergences first.
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
    places = [k for picked, _ in parts for k in picked]
    order = sorted(range(len(places)), key=places.__getitem__)
    joined = torch.cat([result for _, result in parts]).unbind()
    return torch.stack([joined[k] for k in order])


@functools.lru_cache
def slices(n_cols, itemsize):
    """Return a vocabulary's number of slices and their size, given V and the element's size."""
    # A slice holds whole tiles, however the loop is unrolled and whatever the warp's size.
    tiles = [*TILES.items(), *PACKED_TILES.items()]
    step = max(64 * tile.vec * tile.unroll for (size, _), tile in tiles if size == itemsize)
    wanted = min(triton.cdiv(n_cols, SLICE), SLICES)
    size = triton.cdiv(triton.cdiv(n_cols, wanted), step) * step
    return triton.cdiv(n_cols, size), size


def tile_of(packing, itemsize, group):
    """Return how partial_kernel is built, given how floats are packed: see `packing_of`."""
    tile = TILES[itemsize, group]
    return PACKED_TILES.get((itemsize, group), tile) if packing == "ptx" else tile


def groups(n_circuits):
    """Yield (first circuit, group size, number of groups) until all circuits are covered."""
    first = 0
    for size in GROUPS:
        count = (n_circuits - first) // size
        if count:
            yield first, size, count
        first += count * size


def places_of(tensors):
    """Return the addresses and row strides of tensors (R, V), or (0, 0) for None."""
    return [(0, 0) if t is None else (t.data_ptr(), t.stride(0)) for t in tensors]


def layouts_of(places, like):
    """Return the start of the first row, and the row stride, for each place.

    Both in elements, modulo WIDEST bytes; 0 for the stride of a single row. The places are those of
    tensors of the shape and dtype of `like`.
    """
    itemsize, several = like.itemsize, like.shape[0] > 1
    vec = WIDEST // itemsize
    return [
        (address // itemsize % vec, stride % vec if several else 0) for address, stride in places
    ]


def layout_of(rows):
    """Return the layout of a tensor (R, V): see `layouts_of`."""
    return layouts_of(places_of([rows]), rows)[0]


def _reference_like_most(layouts, reference, layout):
    """Return the reference and its layout.

    If more circuits have another layout, the reference is copied once into the layout of most
    circuits. For a single circuit, the copy costs more than loads of single elements.
    """
    most, count = Counter(layouts).most_common(1)[0]
    if most != layout and count > max(1, layouts.count(layout)):
        return _copy(reference, most), most
    return reference, layout


def _copy(rows, wanted):
    """Copy rows (R, V) into memory with the wanted layout."""
    (n_rows, n_cols), (lead, step) = rows.shape, wanted
    vec = WIDEST // rows.itemsize
    stride = n_cols + (step - n_cols) % vec
    buffer = torch.empty(n_rows * stride + vec, dtype=rows.dtype, device=rows.device)
    own_lead, _ = layout_of(buffer[None])
    start = (lead - own_lead) % vec
    copy = buffer.as_strided((n_rows, n_cols), (stride, 1), start)
    return copy.copy_(rows)


def _launch_part(places, reference, aligned, temperature, keep):
    """Launch the kernels on circuits that all have the reference's layout, if `aligned`."""
    n_circuits, (n_rows, n_cols) = len(places), reference.shape
    device, itemsize = reference.device, reference.itemsize
    packing = packing_of(device, itemsize)
    n_slices, slice_size = slices(n_cols, itemsize)
    lead, _ = layout_of(reference)
    states = torch.empty(
        (n_rows, n_slices, n_circuits, N_FIELDS), dtype=torch.float32, device=device
    )
    rows = {
        "p_ptr": reference,
        "p_row_stride": reference.stride(0),
        "n_cols": n_cols,
        "n_circuits": n_circuits,
        "n_slices": n_slices,
        "slice_size": slice_size,
        "lead": lead,
        "aligned": aligned,
        "unit": LOG2_E / temperature,
        "inverse": 1 / temperature,
        "DIVIDE": temperature != 1,
        "PACKING": packing,
        # One lane per thread of a warp; a warp of AMD's data-center cards has 64 threads.
        "LANES": warp_size(device),
        "state_ptr": states,
        "num_warps": 1,
    }
    # AMD's compiler has no such option.
    limits = {} if torch.version.hip else {"maxnreg": MAX_REGISTERS}
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        rows["table_ptr"] = pointer_table(places, device)
        for first, size, count in groups(n_circuits):
            tile = tile_of(packing, itemsize, size)
            kernels.partial_kernel[(n_rows * count, n_slices)](
                **rows,
                first_circuit=first,
                n_groups=count,
                G=size,
                VEC=tile.vec,
                UNROLL=tile.unroll,
                **limits,
            )
        shape = (n_circuits, n_rows, N_KEPT) if keep else (n_circuits, n_rows)
        result = torch.empty(shape, dtype=torch.float32, device=device)
        kernels.finish_kernel[(n_circuits * n_rows,)](
            **rows,
            n_rows=n_rows,
            kl_ptr=result,
            VEC=TILES[itemsize, 1].vec,
            SLICES=SLICES,
            KEEP=keep,
        )
    return result


def warp_size(device):
    """Return the number of threads in a warp."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def packing_of(device, itemsize):
    """Return how the kernels pack floats, as in arithmetic.py, for elements of a size."""
    if device.type != "cuda" or torch.version.hip:
        return "compiler"
    return nvidia_packing(torch.cuda.get_device_capability(device)[0], itemsize)


def nvidia_packing(major, itemsize):
    """Return the same for NVIDIA's cards, by their major compute capability.

    Cards of 10 are data-center Blackwell, whose memory is so fast that issue binds half precision.
    Cards of 12 take the same PTX, but issue two operations for a packed one.
    """
    return "ptx" if (major, itemsize) == (10, 2) else "none"


def pointer_table(places, device):
    """Return a table (K, 2) on the device of addresses and row strides.

    The numbers are passed as odd numbers of more than 32 bits: Triton compiles anew for integers in
    a tuple that are 1, fit into 32 bits, or are multiples of 16.
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
