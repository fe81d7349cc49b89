"""Predict gradient_kernel's speed from its machine code, as bench.roofline does the forward's.

A program processes one tile of a row, and within it one circuit after the other. None of its loops
is long enough to be considered alone, so everything that a thread executes is counted: the code
before the loop over circuits, an iteration for each circuit, and the code after the loop. The
iteration counted is that of a circuit whose gradient is wanted, in a row whose incoming gradient is
not 0; other iterations skip most of the code.

Only the bytes of the logits and of the gradients are counted. Every thread of a program also reads
the same 40 bytes for each row and circuit, and the table of addresses, but a cache serves these.
top_kernel and the forward pass that keeps those numbers are not counted either.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.build import ITEMSIZE, build_gradient, compile_kernel, gradient_launch
from bench.cards import CARDS, Card
from bench.control_flow import Way, special_loops, way_through
from bench.machine_code import Block, Program
from bench.prediction import (
    VOCABULARIES,
    Prediction,
    describe_block,
    describe_program,
    predict,
    prediction_cells,
    prediction_heading,
)
from bench.report import paragraph
from bench.report import table as report_table

# The numbers of circuits that share the reference's logits and its gradient.
CIRCUITS = (1, 4)
# The gradients' names, by whether the reference's gradient is wanted.
SIDES = {False: "circuits", True: "both"}
LABELS = {(side, n): f"gradients: {side}, K={n}" for side in SIDES.values() for n in CIRCUITS}


@dataclass(frozen=True)
class Gradient:
    """A compiled gradient_kernel: its target, dtype and gradients, and its machine code."""

    target: str
    dtype: str
    reference: bool
    program: Program

    @property
    def tile(self) -> gradient_launch.GradientTile:
        """The launcher's tile."""
        return gradient_launch.GRADIENT_TILES[ITEMSIZE[self.dtype]]

    @property
    def tokens(self) -> float:
        """Tokens of a tile per thread, which is also the number of pairs for each circuit."""
        return self.tile.tokens / self.program.threads

    @cached_property
    def ways(self) -> tuple[Way, Way]:
        """What a thread executes in a tile, and what it executes for single tokens.

        Raises
        ------
        RuntimeError
            The number of loops over circuits is not two.
        """
        loops = special_loops(self.program.code)
        if len(loops) != 2:
            raise RuntimeError(f"{len(loops)} loops over circuits in {self.target} {self.dtype}")
        tile, token = (way_through(self.program.code, begin) for begin in loops)
        return tile, token

    def bytes_a_pair(self, n_circuits: int) -> tuple[float, float]:
        """Return the bytes per pair that are read and written: each logit and gradient once."""
        itemsize = ITEMSIZE[self.dtype]
        return itemsize * (1 + 1 / n_circuits), itemsize * (1 + self.reference / n_circuits)

    def tile_operations(self, n_circuits: int) -> dict[str, float]:
        """Return each unit's operations per pair of a tile."""
        occupied = self.ways[0].times(n_circuits).occupied
        return {unit: n / (n_circuits * self.tokens) for unit, n in occupied.items()}

    def row_operations(self, n_circuits: int, n_cols: int) -> dict[str, float]:
        """Return each unit's operations per pair of whole rows, averaged over their alignments.

        A thread processes one token outside tiles at a time. If it processes several, the code
        before and after the loop over circuits is counted for each of them, a small overestimate.
        """
        shape = row_shape(self.tile, n_cols)
        threads, pairs = self.program.threads, len(shape) * n_cols * n_circuits
        tile, token = (way.times(n_circuits).occupied for way in self.ways)
        tiles, steps = (sum(counts) for counts in zip(*shape, strict=True))
        return {u: threads * (tile[u] * tiles + token[u] * steps) / pairs for u in tile}


def row_shape(tile: gradient_launch.GradientTile, n_cols: int) -> list[tuple[int, int]]:
    """Return (tiles, steps of single tokens) of a contiguous row, for each alignment of rows.

    The arithmetic is that of gradient_kernel.
    """
    shape = []
    for row in range(tile.vec if n_cols % tile.vec else 1):
        n_before = min(-row * n_cols % tile.vec, n_cols)
        tiles = (n_cols - n_before) // tile.tokens
        shape.append((tiles, -(-(n_cols - tiles * tile.tokens) // gradient_launch.LANES)))
    return shape


def predict_tile(kernel: Gradient, n_circuits: int, card: Card) -> Prediction:
    """Predict the time of a pair of a tile."""
    return predict(card, sum(kernel.bytes_a_pair(n_circuits)), kernel.tile_operations(n_circuits))


def predict_rows(kernel: Gradient, n_circuits: int, n_cols: int, card: Card) -> Prediction:
    """Predict the time of a pair of whole rows."""
    operations = kernel.row_operations(n_circuits, n_cols)
    return predict(card, sum(kernel.bytes_a_pair(n_circuits)), operations)


def survey(
    targets: Sequence[str], dtypes: Sequence[str], compiler: Callable = compile_kernel
) -> list[dict]:
    """Compile the kernel for targets, and predict it on every card with one of these targets."""
    return [
        describe_kernel(
            Gradient(
                target,
                dtype,
                reference,
                build_gradient(target, dtype, reference=reference, compiler=compiler),
            )
        )
        for target in targets
        for dtype in dtypes
        for reference in SIDES
    ]


def describe_kernel(kernel: Gradient) -> dict:
    """Return everything known about a compiled gradient_kernel."""
    way, _ = kernel.ways
    limit = gradient_launch.MAX_REGISTERS[kernel.reference]
    return {
        "target": kernel.target,
        "dtype": kernel.dtype,
        "gradients": SIDES[kernel.reference],
        "tile": kernel.tile._asdict(),
        "maxnreg": None if kernel.target.startswith("gfx") else limit,
        **describe_program(kernel.program, kernel.target),
        "instructions_before_circuits": len(way.before),
        "instructions_after_circuits": len(way.after),
        "circuit": describe_way(way.iteration, kernel.tokens),
        "launches": [describe_launch(kernel, n_circuits) for n_circuits in CIRCUITS],
    }


def describe_launch(kernel: Gradient, n_circuits: int) -> dict:
    """Return what is known about a launch on this many circuits."""
    cards = [card for card in CARDS if card.target == kernel.target]
    whole_rows = {
        str(n): [predict_rows(kernel, n_circuits, n, card).as_dict() for card in cards]
        for n in VOCABULARIES
    }
    read, written = kernel.bytes_a_pair(n_circuits)
    return {
        "circuits": n_circuits,
        "tile": describe_way(kernel.ways[0].times(n_circuits), n_circuits * kernel.tokens),
        "bytes_read_a_pair": read,
        "bytes_written_a_pair": written,
        "tile_predictions": [predict_tile(kernel, n_circuits, card).as_dict() for card in cards],
        "whole_rows": whole_rows,
    }


def describe_way(block: Block, pairs: float) -> dict:
    """Return the counts of executed code, in all and per pair, and accesses by width in bytes.

    Bytes per pair are left out, since most loads read addresses and numbers that all threads share.
    """
    described = describe_block(block, pairs)
    del described["bytes_a_pair"]
    for what in ("load", "store"):
        counts = Counter(described.pop(f"{what}_widths_bytes"))
        described[f"{what}s_by_width"] = {str(width): counts[width] for width in sorted(counts)}
    return described


def code_table(programs: list[dict]) -> list[list[str]]:
    """Return the table's rows on the machine code, a heading first."""
    rows = [["target", "dtype", "gradients", "K", "regs", "stack", "shared", "occ", "inst/pair"]]
    rows[0] += ["of a circuit", "special/pair", "B/pair read", "written", "load B", "store B"]
    rows[0] += ["barriers", "shuffles", "spills"]
    for p in programs:
        for launch in p["launches"]:
            tile = launch["tile"]
            rows.append(
                [p["target"], p["dtype"], p["gradients"], str(launch["circuits"])]
                + [str(p[name]) for name in ("registers", "stack_bytes", "shared_bytes")]
                + [f"{p['occupancy']:.0%}", f"{tile['instructions_a_pair']:.1f}"]
                + [f"{p['circuit']['instructions_a_pair']:.1f}", f"{tile['special_a_pair']:.2f}"]
                + [f"{launch[f'bytes_{what}_a_pair']:g}" for what in ("read", "written")]
                + ["/".join(tile[f"{what}s_by_width"]) for what in ("load", "store")]
                + [str(tile[name]) for name in ("barriers", "shuffles", "spills")]
            )
    return rows


def _launches(programs: list[dict], card: str) -> list[tuple[dict, dict, int]]:
    """Return (program, launch, index of its predictions for a card) of launches predicted on it."""
    return [
        (program, launch, at)
        for program in programs
        for launch in program["launches"]
        for at, prediction in enumerate(launch["tile_predictions"])
        if prediction["card"] == card
    ]


def prediction_table(programs: list[dict]) -> list[list[str]]:
    """Return the table's rows of predictions, a heading first: a tile, then whole rows."""
    rows = [["card", "dtype", "gradients", "K", *prediction_heading()]]
    for card in CARDS:
        for p, launch, at in _launches(programs, card.name):
            whole = [launch["whole_rows"][str(n)][at] for n in VOCABULARIES]
            rows.append(
                [card.name, p["dtype"], p["gradients"], str(launch["circuits"])]
                + prediction_cells(launch["tile_predictions"][at], whole)
            )
    return rows


def points(programs: list[dict], card: str) -> list[tuple[str, str, float, float]]:
    """Return (dtype, label, bytes per issue slot, fraction of peak) of a card's predicted tiles."""
    found = []
    for p, launch, at in _launches(programs, card):
        moved = launch["bytes_read_a_pair"] + launch["bytes_written_a_pair"]
        issued = launch["tile"]["operations_a_pair"]["issue"]
        fraction = launch["tile_predictions"][at]["fraction_of_peak_bandwidth"]
        label = LABELS[p["gradients"], launch["circuits"]]
        found.append((p["dtype"], label, moved / issued, fraction))
    return found


def markdown(programs: list[dict]) -> str:
    """Return the predictions of whole rows of GPT-2's vocabulary as a table for the README."""
    vocabulary = str(VOCABULARIES[0])
    rows = [["card", "dtype", *(f"{side}, K={n}" for side, n in LABELS)]]
    lines: dict[tuple[str, str], list[str]] = {}
    for card in CARDS:
        for p, launch, at in _launches(programs, card.name):
            found = launch["whole_rows"][vocabulary][at]
            lines.setdefault((card.name, p["dtype"]), []).append(
                f"{max(found['picoseconds_a_pair'].values()):.2f}, "
                f"{found['fraction_of_peak_bandwidth']:.0%} ({found['binds']})"
            )
    rows += [[*names, *cells] for names, cells in lines.items()]
    text = (
        f"The gradient kernel, in whole rows of {vocabulary} tokens: gradients of K circuits, or both "
        "of them and of the reference. Each cell: ps/pair, share of peak bandwidth (reads and writes), "
        "what binds."
    )
    return f"{paragraph(text)}\n\n{report_table(rows)}"
