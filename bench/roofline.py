"""Predict the kernels' speed from their machine code: `python -m bench.roofline`.

Nothing is timed, and no GPU is needed. The kernels are compiled with the launcher's own tiles; the
instructions of the inner loop are counted in the machine code; a card's published rates say how
long a pair keeps each of its units busy. The longest of these times is the prediction. It assumes
that memory delivers its peak bandwidth, and that enough warps are resident to keep the busiest unit
busy. The gradient kernel has no such loop: bench.roofline_gradient says what is counted of it.

To read another kernel:

    python -m bench.roofline --kernel FILE.py:FUNCTION --signature x_ptr=*fp32,n=i32 \
        --constexpr BLOCK=1024 --bytes-per-pair 8
"""

import argparse
import datetime
import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from bench import roofline_gradient
from bench.build import (
    ITEMSIZE,
    Kernel,
    build_finish,
    build_partial,
    compile_kernel,
    gpu_target,
    launch,
    options_for,
)
from bench.cards import CARDS, PROCESSORS, Card
from bench.machine_code import Block, Program, inspect
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

FORMAT = 1
DEVICE = "none: predicted from machine code"
NOTICE = "Predicted from machine code and datasheets; nothing here was timed on a card."
DTYPES = ("fp32", "bf16")
RESULTS = Path(__file__).parent / "results"
# Terabytes per second, marked on the axis of the picture.
YTICKS = (0.25, 0.5, 1, 2, 4, 8)
COLORS = {"fp32": "tab:blue", "bf16": "tab:orange"}
MARKERS = {"group of 1": "o", "group of 2": "s", "group of 4": "^"}
MARKERS |= dict(zip(roofline_gradient.LABELS.values(), "Ddv<", strict=True))


def body_of(kernel: Kernel) -> Block:
    """Return the body loop of partial_kernel.

    Raises
    ------
    RuntimeError
        No loop loads from global memory.
    """
    if kernel.program.body is None:
        raise RuntimeError(f"no loop with loads in {kernel.target} {kernel.dtype} G={kernel.group}")
    return kernel.program.body


def loop_bytes(kernel: Kernel) -> float:
    """Return the bytes per pair that the body loop loads, as read from the machine code."""
    return body_of(kernel).load_bytes / kernel.body_pairs


def predict_loop(kernel: Kernel, card: Card) -> Prediction:
    """Predict the time of a pair in the body loop alone."""
    operations = {u: n / kernel.body_pairs for u, n in body_of(kernel).occupied.items()}
    return predict(card, loop_bytes(kernel), operations)


def row_shape(kernel: Kernel, n_cols: int, shift: int) -> list[tuple[int, int]]:
    """Return (tiles, tokens outside tiles) of each slice of a row that starts `shift` tokens late.

    The arithmetic is that of partial_kernel and sweep.
    """
    vec, lanes = kernel.tile.vec, kernel.program.threads
    n_slices, size = launch.slices(n_cols, ITEMSIZE[kernel.dtype])
    first, last = -(-shift // vec) * vec, shift + n_cols
    shape = []
    for part in range(n_slices):
        begin = min(first + part * size, last) if part else shift
        end = min(first + (part + 1) * size, last)
        body = min(-(-begin // vec) * vec, end)
        tiles = (end - body) // (lanes * vec)
        shape.append((tiles, end - begin - tiles * lanes * vec))
    return shape


def row_operations(kernel: Kernel, finish: Program, n_cols: int) -> dict[str, float]:
    """Return each unit's operations per pair of whole rows, and the share of tokens outside tiles.

    This counts everything that a thread of both kernels executes, including prologue and merging,
    averaged over the alignments that rows of n_cols contiguous tokens have. Of finish_kernel only
    the code outside loops counts: its loops are the second look at slices, which is not predicted.
    """
    tile, program = kernel.tile, kernel.program
    body = body_of(kernel)
    wide = [
        b for b in program.loops if b.load_bytes and min(b.load_widths) == min(body.load_widths)
    ]
    # If the body is unrolled, a loop of its own processes the remaining tiles one by one.
    single = min(wide, key=lambda b: b.load_bytes)
    narrow = [b for b in program.loops if b.load_bytes and b not in wide]
    rest = max(narrow, key=lambda b: b.load_bytes, default=single)

    period = tile.vec if n_cols % tile.vec else 1
    shifts = [row * n_cols % tile.vec for row in range(period)]
    units = body.occupied
    totals = dict.fromkeys(units, 0.0)
    outside_tiles = 0
    for shift in shifts:
        for tiles, tokens in row_shape(kernel, n_cols, shift):
            outside_tiles += tokens
            whole, left = divmod(tiles, tile.unroll)
            if single is body:
                # No tile is left, or the code for it is outside all loops and is counted there.
                left = 0
            times = (
                (program.outside, 1),
                (body, whole),
                (single, left),
                (rest, -(-tokens // program.threads)),
            )
            for block, count in times:
                for unit in units:
                    totals[unit] += block.occupied[unit] * count * program.threads
    pairs = len(shifts) * n_cols * kernel.group
    result = {unit: total / pairs for unit, total in totals.items()}
    for unit in units:
        result[unit] += finish.outside.occupied[unit] * finish.threads / n_cols
    result["share_outside_tiles"] = outside_tiles / (len(shifts) * n_cols)
    return result


def predict_rows(kernel: Kernel, finish: Program, n_cols: int, card: Card) -> Prediction:
    """Predict the time of a pair of whole rows, with head, tail, merging and the second kernel."""
    operations = row_operations(kernel, finish, n_cols)
    del operations["share_outside_tiles"]
    n_slices, _ = launch.slices(n_cols, ITEMSIZE[kernel.dtype])
    logits = ITEMSIZE[kernel.dtype] * (1 + 1 / kernel.group)
    states = (2 * 4 * launch.N_FIELDS * n_slices + 4) / n_cols
    return predict(card, logits + states, operations)


def survey(
    targets: Sequence[str], dtypes: Sequence[str] = DTYPES, compiler: Callable = compile_kernel
) -> list[dict]:
    """Compile the kernels for targets, and predict them on every card with one of these targets."""
    programs = []
    for target in targets:
        for dtype in dtypes:
            finish = build_finish(target, dtype, compiler=compiler)
            for group in sorted(launch.GROUPS):
                kernel = build_partial(target, dtype, group, compiler=compiler)
                programs.append(describe_kernel(kernel, finish))
    return programs


def describe_kernel(kernel: Kernel, finish: Program) -> dict:
    """Return everything known about a compiled partial_kernel."""
    cards = [card for card in CARDS if card.target == kernel.target]
    rows = {}
    for n_cols in VOCABULARIES:
        operations = row_operations(kernel, finish, n_cols)
        share = operations.pop("share_outside_tiles")
        rows[str(n_cols)] = {
            "share_of_tokens_outside_tiles": round(share, 4),
            "operations_a_pair": {unit: round(n, 3) for unit, n in operations.items()},
            "predictions": [predict_rows(kernel, finish, n_cols, c).as_dict() for c in cards],
        }
    return {
        "target": kernel.target,
        "dtype": kernel.dtype,
        "group": kernel.group,
        "tile": kernel.tile._asdict(),
        "maxnreg": None if kernel.target.startswith("gfx") else kernel.maxnreg,
        **describe_program(kernel.program, kernel.target),
        "loop": describe_block(body_of(kernel), kernel.body_pairs),
        "expected_bytes_a_pair": ITEMSIZE[kernel.dtype] * (1 + 1 / kernel.group),
        "loop_predictions": [predict_loop(kernel, card).as_dict() for card in cards],
        "whole_rows": rows,
    }


def report(programs: list[dict], command: str, gradients: Sequence[dict] = ()) -> dict:
    """Return the JSON document on the forward kernels, or others, and on the gradient kernel."""
    return {
        "format": FORMAT,
        "device": DEVICE,
        "notice": NOTICE,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "cards": [{**asdict(c), "rates": PROCESSORS[c.target].rates} for c in CARDS],
        "programs": programs,
        "gradients": list(gradients),
    }


def code_table(programs: list[dict]) -> list[list[str]]:
    """Return the table's rows on the machine code, a heading first."""
    rows = [["target", "dtype", "G", "regs", "stack", "occ", "inst/pair", "special/pair"]]
    rows[0] += ["B/pair", "load B", "barriers", "shuffles", "spills"]
    for p in programs:
        loop = p["loop"]
        rows.append(
            [p["target"], p["dtype"], str(p["group"]), str(p["registers"]), str(p["stack_bytes"])]
            + [f"{p['occupancy']:.0%}", f"{loop['instructions_a_pair']:.1f}"]
            + [f"{loop['special_a_pair']:.2f}", f"{loop['bytes_a_pair']:g}"]
            + ["/".join(str(w) for w in sorted(set(loop["load_widths_bytes"])))]
            + [str(loop[name]) for name in ("barriers", "shuffles", "spills")]
        )
    return rows


def prediction_table(programs: list[dict]) -> list[list[str]]:
    """Return the table's rows of predictions, a heading first: the loop, then whole rows."""
    rows = [["card", "dtype", "G", *prediction_heading()]]
    for card in CARDS:
        for p in programs:
            for at, loop in enumerate(p["loop_predictions"]):
                if loop["card"] == card.name:
                    whole = [p["whole_rows"][str(n)]["predictions"][at] for n in VOCABULARIES]
                    cells = prediction_cells(loop, whole)
                    rows.append([card.name, p["dtype"], str(p["group"]), *cells])
    return rows


def show(rows: list[list[str]]) -> str:
    """Return rows as aligned text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown(document: dict) -> str:
    """Return the predictions as tables for the README: one and four circuits, and gradients."""
    chosen = [p for p in document["programs"] if p["group"] != 2 and p["dtype"] != "fp16"]
    gradients = roofline_gradient.markdown(document["gradients"])
    versions = document["versions"]
    source = f"{document['notice']} `{document['command']}`, {document['date'][:10]}, "
    source += f"torch {versions['torch']}, triton {versions['triton']}."
    return f"{report_table(prediction_table(chosen))}\n\n{gradients}\n\n{paragraph(source)}"


def plot(document: dict, path: Path) -> None:
    """Draw a roofline per card: bytes per second over bytes per issue slot, a point per kernel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    cards = [c for c in document["cards"] if _points(document, c["name"])]
    columns = min(4, len(cards))
    lines = -(-len(cards) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.3 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for ax, card in zip(axes, cards, strict=False):
        issue = card["rates"]["issue"] * card["multiprocessors"] * card["clock"]
        grid = [0.02 * 1.05**n for n in range(80)]
        roof = [min(card["bandwidth"], issue * x) / 1e12 for x in grid]
        ax.plot(grid, roof, color="0.4", linewidth=1.2)
        for dtype, what, bytes_a_slot, fraction in _points(document, card["name"]):
            style = {"color": COLORS[dtype], "markersize": 6, "fillstyle": "none"}
            y = fraction * card["bandwidth"] / 1e12
            ax.plot(bytes_a_slot, y, MARKERS[what], label=f"{dtype}, {what}", **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(card["name"], fontsize=10)
        ax.set_xlabel("bytes an issue slot")
        ax.set_ylim(0.25, 10)
        ax.set_yticks(YTICKS, [f"{tick:g}" for tick in YTICKS])
        ax.minorticks_off()
    for ax in axes[::columns]:
        ax.set_ylabel("TB/s")
    for ax in axes[len(cards) :]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MARKERS), fontsize=8)
    figure.suptitle(document["notice"], fontsize=10)
    figure.savefig(path, dpi=120)


def _points(document: dict, card: str) -> list[tuple[str, str, float, float]]:
    """Return (dtype, kernel, bytes per issue slot, fraction of peak) of a card's predictions."""
    points = [
        (
            p["dtype"],
            f"group of {p['group']}",
            p["loop"]["bytes_a_pair"] / p["loop"]["operations_a_pair"]["issue"],
            prediction["fraction_of_peak_bandwidth"],
        )
        for p in document["programs"]
        for prediction in p["loop_predictions"]
        if prediction["card"] == card
    ]
    points += roofline_gradient.points(document["gradients"], card)
    # In the order of the legend's columns, each of which holds one kernel's dtypes.
    return sorted(points, key=lambda point: list(MARKERS).index(point[1]))


def load_function(where: str):
    """Return the function that FILE.py:FUNCTION names.

    Raises
    ------
    ValueError
        The file does not exist, or has no such function.
    """
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"expected FILE.py:FUNCTION with a file that exists, got {where!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    # Triton finds a function's globals by its module's name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"no function {name!r} in {file}")
    return getattr(module, name)


def survey_other(
    fn,
    signature: dict[str, str],
    constexprs: dict,
    *,
    targets: Sequence[str],
    bytes_a_pair: float,
    warps: int = 4,
    maxnreg: int | None = None,
    compiler: Callable = compile_kernel,
) -> list[dict]:
    """Read any kernel, and predict the loop that loads the most, given its bytes per pair.

    Raises
    ------
    ValueError
        No loop of the kernel loads from global memory.
    """
    programs = []
    for target in targets:
        compiled = compiler(
            fn,
            signature,
            constexprs,
            target=gpu_target(target),
            **options_for(target, warps, maxnreg),
        )
        program = inspect(compiled)
        body = program.body
        if body is None:
            raise ValueError(f"no loop of the kernel loads from global memory on {target}")
        pairs = body.load_bytes / bytes_a_pair
        operations = {unit: n / pairs for unit, n in body.occupied.items()}
        cards = [card for card in CARDS if card.target == target]
        predictions = [predict(card, bytes_a_pair, operations).as_dict() for card in cards]
        programs.append(
            {
                "target": target,
                **describe_program(program, target),
                "loop": describe_block(body, pairs),
                "loop_predictions": predictions,
            }
        )
    return programs


def _pairs_of(text: str) -> dict[str, str]:
    """Parse NAME=VALUE,NAME=VALUE."""
    items = [item.partition("=") for item in text.split(",") if item]
    if wrong := [name for name, equals, _ in items if not equals]:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {wrong[0]!r}")
    return {name.strip(): value.strip() for name, _, value in items}


def _literal(text: str):
    return {"True": True, "False": False}.get(text) if text in {"True", "False"} else int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=NOTICE)
    parser.add_argument("--targets", nargs="+", default=list(PROCESSORS), choices=list(PROCESSORS))
    parser.add_argument("--out", type=Path, help="folder for roofline.json and roofline.png")
    other = parser.add_argument_group("another kernel")
    other.add_argument("--kernel", metavar="FILE.py:FUNCTION", help="a @triton.jit function")
    other.add_argument("--signature", type=_pairs_of, default={}, metavar="x_ptr=*fp32,n=i32")
    other.add_argument("--constexpr", type=_pairs_of, default={}, metavar="BLOCK=1024")
    other.add_argument("--bytes-per-pair", type=float, default=8.0)
    other.add_argument("--num-warps", type=int, default=4)
    other.add_argument("--maxnreg", type=int)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, read, predict, print and write; return the exit code."""
    args = _arguments(argv)
    command = shlex.join(
        ["python", "-m", "bench.roofline", *(sys.argv[1:] if argv is None else argv)]
    )
    print(NOTICE)
    if args.kernel:
        programs = survey_other(
            load_function(args.kernel),
            args.signature,
            {name: _literal(value) for name, value in args.constexpr.items()},
            targets=args.targets,
            bytes_a_pair=args.bytes_per_pair,
            warps=args.num_warps,
            maxnreg=args.maxnreg,
        )
        text = json.dumps(report(programs, command), indent=1)
        if args.out is None:
            print(json.dumps(programs, indent=1))
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "roofline.json").write_text(text + "\n")
        return 0
    gradients = roofline_gradient.survey(args.targets, DTYPES)
    document = report(survey(args.targets), command, gradients)
    print("\nThe body loop of partial_kernel, as compiled")
    print(show(code_table(document["programs"])))
    print("\nPredictions; X/mem is a unit's time over memory's, in the loop")
    print(show(prediction_table(document["programs"])))
    print("\nAll that gradient_kernel executes on a tile of each of K circuits")
    print(show(roofline_gradient.code_table(gradients)))
    print("\nPredictions of gradient_kernel; X/mem is of a tile")
    print(show(roofline_gradient.prediction_table(gradients)))
    output = args.out or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    (output / "roofline.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(document, output / "roofline.png")
    print(f"\nwritten: {output / 'roofline.json'}, {output / 'roofline.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
