"""Time fastkl on a card, against other ways to compute the same divergence: `python -m bench.gpu`.

Every result is checked against float64 first, and not timed if it is wrong. There are enough copies
of the inputs that the level-two cache never holds the next one. One CUDA graph processes all copies
in turn; the reported time is the median over its replays, divided by the number of copies. Beside
it stands the time of a call without a graph, averaged over many calls in a row: if it is longer,
the GPU waits for its host. Cases that do not fit in memory are skipped and listed. Results are
written after each measurement.

GB/s counts every logit once, (K + 1)·R·V of them, no matter how much a peer really moves.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkl
from bench import facts
from bench.cards import CARDS
from bench.report import paragraph, table

FORMAT = 2
# The last positions of one or a few prompts or of common batches; all positions of such batches.
ROWS = (1, 16, 128, 256, 2560, 20480)
# GPT-2, Llama 3, Qwen 2.5, Gemma 2.
VOCABULARIES = (50257, 128256, 151936, 256000)
DTYPES = ("float32", "bfloat16")
# One divergence, one group of the kernel, and a sweep over circuits.
CIRCUITS = (1, 4, 40)
# --quick takes a few minutes: the sizes that auto_circuit's users have, by fastkl and eager torch.
QUICK_ROWS, QUICK_PEERS = (16, 256, 2560), ("fastkl", "eager")
# Bytes that are touched between two uses of an input, in sizes of the level-two cache.
CACHE_TURNOVER = 4
# AMD's drivers do not report the last-level cache in front of an MI300's memory.
AMD_CACHE_BYTES = 256 * 2**20
# The share of free memory that the inputs and a peer's temporaries may take.
MEMORY_SHARE = 0.9
REPLAYS = 20
# The fewest seconds of replays that raise the card's clocks, and of replays in one timing: a card's
# timer resolves half a microsecond, and the gap between two replays is one or two microseconds.
WARM_UP, LEAST = 0.05, 0.002
# Uncaptured calls in a row: at most CALLS, or as few as take CALLS_SECONDS.
CALLS, CALLS_SECONDS = 50, 0.02
SEED = 20261123
RESULTS = Path(__file__).parent / "results"
_BANDWIDTH = {card.name: card.bandwidth for card in CARDS}
# Datasheet bandwidths in bytes per second, by a pattern of the name that the driver gives the card.
DATASHEET = (
    (r"A100-SXM.-80GB", _BANDWIDTH["A100 SXM 80GB"]),
    (r"A100-SXM.-40GB", 1.555e12),
    (r"H100 80GB HBM3", _BANDWIDTH["H100 SXM"]),
    (r"H100 PCIe", 2.0e12),
    (r"\bH200", _BANDWIDTH["H200"]),
    (r"\bB200", _BANDWIDTH["B200"]),
    (r"RTX 3090$", _BANDWIDTH["RTX 3090"]),
    (r"RTX 4090$", 1.008e12),
    (r"RTX 5090$", _BANDWIDTH["RTX 5090"]),
    (r"MI300X", _BANDWIDTH["MI300X"]),
)

# From circuits (R, V) and a reference (R, V) to one mean divergence a circuit (K,), on the device.
Measure = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape to time."""

    n_rows: int
    n_cols: int
    dtype: str
    n_circuits: int

    def __str__(self) -> str:
        sizes = f"K={self.n_circuits} R={self.n_rows} V={self.n_cols}"
        return f"{sizes} {self.dtype}"

    @property
    def tensor_elements(self) -> int:
        """Elements of the reference, or of one circuit."""
        return self.n_rows * self.n_cols

    @property
    def needed_bytes(self) -> int:
        """Bytes of all logits, which must be read at least once."""
        itemsize = getattr(torch, self.dtype).itemsize
        return (self.n_circuits + 1) * self.tensor_elements * itemsize

    def copies(self, cache_bytes: int) -> int:
        """Return how many copies of the inputs suffice to evict each other from the cache."""
        return max(1, -(-CACHE_TURNOVER * cache_bytes // self.needed_bytes))


@dataclass(frozen=True)
class Peer:
    """One way to compute the divergence, its memory cost, and how exact it has to be."""

    name: str
    what: str
    prepare: Callable[[], Measure]
    # Returns why the peer can't run here; None if it can.
    missing: Callable[[], str | None]
    # The most float32 tensors (R, V) that the peer holds at a time.
    temporaries: int
    relative: float
    absolute: float

    def temporary_bytes(self, case: Case) -> int:
        """Return about how many bytes it takes in addition to the inputs."""
        return 4 * self.temporaries * case.tensor_elements


@dataclass(frozen=True)
class Timing:
    """One peer's measurement: seconds per run, and bytes allocated in addition to the inputs."""

    seconds: float
    fastest: float
    slowest: float
    # Seconds of a call that is not captured in a graph.
    call_seconds: float
    peak_bytes: int


class WrongResultError(RuntimeError):
    """A result is further from float64 than its peer's tolerance allows."""


def textbook(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    """Compute mean divergences (K,) by log_softmaxes in float32, then F.kl_div."""
    log_p = F.log_softmax(reference, -1, dtype=torch.float32)
    means = [
        F.kl_div(
            F.log_softmax(circuit, -1, dtype=torch.float32),
            log_p,
            reduction="batchmean",
            log_target=True,
        )
        for circuit in circuits
    ]
    return torch.stack(means)


def _fastkl() -> Measure:
    return lambda circuits, reference: fastkl.kl_div_many(circuits, reference, backend="triton")


def _compiled() -> Measure:
    # Forget other shapes: after a few of them torch.compile would silently run eagerly.
    torch.compiler.reset()
    one = torch.compile(lambda circuit, reference: textbook([circuit], reference)[0], dynamic=False)
    return lambda circuits, reference: torch.stack([one(c, reference) for c in circuits])


def _liger() -> Measure:
    from liger_kernel.transformers import LigerKLDIVLoss  # noqa: PLC0415

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def measure(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
        log_p = F.log_softmax(reference, -1, dtype=torch.float32)
        means = [loss(F.log_softmax(c, -1, dtype=torch.float32), log_p) for c in circuits]
        return torch.stack(means)

    return measure


def _needs(package: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(package) else f"{package} is not installed"


# Tolerances: fastkl's are its contract; the others' allow for rounding in float32, with room.
PEERS = (
    Peer(
        "fastkl",
        "kl_div_many of this package, Triton",
        _fastkl,
        lambda: fastkl.unavailable_backends().get("triton"),
        0,
        1e-5,
        1e-8,
    ),
    Peer(
        "eager", "two log_softmaxes, then F.kl_div", lambda: textbook, lambda: None, 4, 1e-3, 1e-5
    ),
    Peer("compile", "torch.compile of the same", _compiled, lambda: None, 4, 1e-3, 1e-5),
    Peer(
        "liger",
        "Liger-Kernel's kl_div, with the log_softmaxes it asks for",
        _liger,
        _needs("liger_kernel"),
        4,
        1e-3,
        1e-5,
    ),
)


def grid(
    rows: Sequence[int] = ROWS,
    vocabularies: Sequence[int] = VOCABULARIES,
    dtypes: Sequence[str] = DTYPES,
    circuits: Sequence[int] = CIRCUITS,
) -> list[Case]:
    """Return all cases, small ones first within a dtype and vocabulary."""
    product = itertools.product(dtypes, vocabularies, circuits, rows)
    return [Case(n_rows, n_cols, dtype, k) for dtype, n_cols, k, n_rows in product]


def too_large(case: Case, peer: Peer, free_bytes: int, cache_bytes: int) -> str | None:
    """Return why a case does not fit in memory, or None if it does."""
    inputs = case.copies(cache_bytes) * case.needed_bytes
    total = inputs + peer.temporary_bytes(case)
    if total <= MEMORY_SHARE * free_bytes:
        return None
    return f"needs about {total / 1e9:.1f} GB, {MEMORY_SHARE * free_bytes / 1e9:.1f} GB may be used"


def datasheet_bandwidth(name: str) -> float | None:
    """Return a card's bandwidth in bytes per second, by its driver's name; None if unknown."""
    return next((rate for pattern, rate in DATASHEET if re.search(pattern, name)), None)


def make_inputs(case: Case, device: torch.device | str) -> tuple[list[Tensor], Tensor]:
    """Return circuits and a reference: randn · 3, to which circuits add noise of 0.01 to 1."""
    generator = torch.Generator(device).manual_seed(SEED)
    shape, dtype = (case.n_rows, case.n_cols), getattr(torch, case.dtype)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    reference = randn().mul_(3)
    circuits = []
    for k in range(case.n_circuits):
        level = 10 ** (-2 + 2 * (k + 1) / case.n_circuits)
        circuits.append(randn().mul_(level).add_(reference))
    return circuits, reference


def exact(circuits: Sequence[Tensor], reference: Tensor, block: int = 256) -> Tensor:
    """Return the mean divergences (K,) in float64, a block of rows at a time."""
    totals = torch.zeros(len(circuits), dtype=torch.float64, device=reference.device)
    for first in range(0, reference.shape[0], block):
        rows = slice(first, first + block)
        log_p = reference[rows].double().log_softmax(-1)
        p = log_p.exp()
        for k, circuit in enumerate(circuits):
            totals[k] += (log_p - circuit[rows].double().log_softmax(-1)).mul_(p).sum()
    return totals / reference.shape[0]


def check(peer: Peer, case: Case, result: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest absolute and relative error of a result.

    Raises
    ------
    WrongResultError
        An error is larger than the peer's tolerance.
    """
    absolute = (result.double() - expected).abs()
    # Not `>`: a NaN is wrong too.
    if not bool((absolute <= peer.relative * expected.abs() + peer.absolute).all()):
        raise WrongResultError(
            f"{peer.name} is off by up to {absolute.max().item():.3g} nats of "
            f"{expected.abs().max().item():.3g} at {case}"
        )
    return absolute.max().item(), (absolute / expected.abs()).max().item()


class Cuda:
    """Everything that needs a card."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = getattr(self.properties, "L2_cache_size", 0) or 64 * 2**20
        if torch.version.hip:
            self.cache_bytes = max(self.cache_bytes, AMD_CACHE_BYTES)

    def describe(self) -> dict:
        """Return a description of the card and its driver."""
        return {
            "name": self.properties.name,
            "driver": _driver(),
            "capability": f"{self.properties.major}.{self.properties.minor}",
            "memory_bytes": self.properties.total_memory,
            "cache_bytes": self.cache_bytes,
            "multiprocessors": self.properties.multi_processor_count,
        }

    def free_bytes(self) -> int:
        """Return how many bytes can be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def copy_bandwidth(self) -> float:
        """Return the bytes per second, read and written, of a large copy."""
        size = max(2**30, CACHE_TURNOVER * self.cache_bytes)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds = self._replay([lambda: target.copy_(source)])
        return 2 * size / statistics.median(seconds)

    def time(self, measure: Measure, inputs: list[tuple[list[Tensor], Tensor]]) -> Timing:
        """Time one peer on copies of the inputs, processed in turn."""
        circuits, reference = inputs[0]
        # The first call compiles; the second shows how much memory a call allocates.
        measure(circuits, reference)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure(circuits, reference)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        runs = [lambda c=c, r=r: measure(c, r) for c, r in inputs]
        seconds = self._replay(runs)
        median = statistics.median(seconds)
        call = self._call(runs, min(CALLS, math.ceil(CALLS_SECONDS / median)))
        return Timing(median, min(seconds), max(seconds), call, peak)

    def _call(self, runs: Sequence[Callable[[], object]], calls: int) -> float:
        """Return the seconds per call of `calls` calls in a row."""
        seconds = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for run in itertools.islice(itertools.cycle(runs), calls):
                run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / calls)
        return statistics.median(seconds)

    def _replay(self, runs: Sequence[Callable[[], object]]) -> list[float]:
        """Time replays of a graph of all runs; return each timing's seconds per run."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [run() for run in runs]
        # The first replay uploads the graph; the replays after it raise the card's clocks.
        _replays(graph, 1)
        times = max(1, math.ceil(WARM_UP / _replays(graph, 1)))
        times = max(1, math.ceil(LEAST * times / _replays(graph, times)))
        return [_replays(graph, times) / times / len(kept) for _ in range(REPLAYS)]


def _replays(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Return the seconds that this many replays in a row take."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # One more replay before them hides the host's time to launch the first one that counts.
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _driver() -> str | None:
    """Return the driver's version, as nvidia-smi reports it, or ROCm's."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0]


def missing_card() -> str | None:
    """Return why nothing can be timed here, or None."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds no card" if built else "this torch is built for the CPU only"
    return None


def measure_cases(
    cases: Sequence[Case], peers: Sequence[Peer], card: Cuda
) -> Iterator[tuple[Case, Peer, dict | str]]:
    """Yield each peer's result on each case, or the reason why there is none."""
    inputs: list[tuple[list[Tensor], Tensor]] = []
    for case in cases:
        # Free the last case's inputs, which would count as memory in use.
        inputs = []
        free = card.free_bytes()
        expected = None
        for peer in peers:
            if reason := peer.missing() or too_large(case, peer, free, card.cache_bytes):
                yield case, peer, reason
                continue
            try:
                if not inputs:
                    copies = range(case.copies(card.cache_bytes))
                    inputs = [make_inputs(case, card.device) for _ in copies]
                    expected = exact(*inputs[0])
                measure = peer.prepare()
                absolute, relative = check(peer, case, measure(*inputs[0]), expected)
                timing = card.time(measure, inputs)
            except WrongResultError as error:
                yield case, peer, f"wrong, so not timed: {error}"
            except torch.OutOfMemoryError as error:
                # A peer's temporaries are an estimate; a wrong one must not end the run.
                yield case, peer, f"out of memory: {_first_line(error)}"
            except Exception as error:
                # A card's time is expensive: one peer's failure must not end the others' timing.
                yield case, peer, f"failed: {type(error).__name__}: {_first_line(error)}"
            else:
                yield case, peer, result(case, peer, timing, absolute, relative)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def result(case: Case, peer: Peer, timing: Timing, absolute: float, relative: float) -> dict:
    """Return one entry of the JSON document."""
    return {
        **asdict(case),
        "peer": peer.name,
        "microseconds": timing.seconds * 1e6,
        "fastest_microseconds": timing.fastest * 1e6,
        "slowest_microseconds": timing.slowest * 1e6,
        "call_microseconds": timing.call_seconds * 1e6,
        "needed_bytes": case.needed_bytes,
        "gb_per_s": case.needed_bytes / timing.seconds / 1e9,
        "peak_bytes": timing.peak_bytes,
        "max_absolute_error": absolute,
        "max_relative_error": relative,
    }


def report(
    device: dict, command: str, copy_bandwidth: float, results: list[dict], skipped: list[dict]
) -> dict:
    """Return the JSON document."""
    datasheet = datasheet_bandwidth(device["name"])
    for entry in results:
        entry["share_of_copy"] = entry["gb_per_s"] * 1e9 / copy_bandwidth
        entry["share_of_datasheet"] = datasheet and entry["gb_per_s"] * 1e9 / datasheet
    return {
        "format": FORMAT,
        "device": device,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": facts.commit(),
        "versions": _versions(),
        "method": f"median of {REPLAYS} timings of a CUDA graph's replays over copies of the inputs "
        f"that cover {CACHE_TURNOVER} times the level-two cache",
        "copy_gb_per_s": copy_bandwidth / 1e9,
        "datasheet_gb_per_s": datasheet and datasheet / 1e9,
        "results": results,
        "skipped": skipped,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "fastkl": fastkl.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def plot(document: dict, path: Path, n_cols: int = 50257) -> None:
    """Draw GB/s over rows at one vocabulary, a panel for each dtype and number of circuits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    entries = [entry for entry in document["results"] if entry["n_cols"] == n_cols]
    panels = sorted({(entry["dtype"], entry["n_circuits"]) for entry in entries})
    figure = Figure(figsize=(4 * max(1, len(panels)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, panel in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False
    ):
        for peer in dict.fromkeys(entry["peer"] for entry in entries):
            line = sorted(
                (e["n_rows"], e["gb_per_s"])
                for e in entries
                if (e["dtype"], e["n_circuits"], e["peer"]) == (*panel, peer)
            )
            if line:
                ax.plot(*zip(*line, strict=True), "o-", label=peer, markersize=4)
        ax.axhline(document["copy_gb_per_s"], color="0.5", linestyle="--", label="copy")
        if document["datasheet_gb_per_s"]:
            ax.axhline(document["datasheet_gb_per_s"], color="0.2", linewidth=1, label="datasheet")
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_title(f"{panel[0]}, {panel[1]} circuit{'s' if panel[1] > 1 else ''}", fontsize=10)
        ax.set_xlabel("rows")
        ax.set_ylabel("GB/s, every logit counted once")
        ax.legend(fontsize=7)
    figure.suptitle(f"{document['device']['name']}, V = {n_cols}", fontsize=11)
    figure.savefig(path, dpi=120)


def markdown(document: dict) -> str:
    """Return the table: every peer at GPT-2's vocabulary, with a caption on the setup."""
    measured = ["µs", "µs, not captured", "GB/s", "of copy", "of datasheet", "MB", "error"]
    rows = [["peer", "dtype", "K", "rows", *measured]]
    for entry in document["results"]:
        if entry["n_cols"] != VOCABULARIES[0]:
            continue
        share = entry["share_of_datasheet"]
        rows.append(
            [
                *(entry["peer"], entry["dtype"], str(entry["n_circuits"]), str(entry["n_rows"])),
                *(f"{entry['microseconds']:.1f}", f"{entry['call_microseconds']:.1f}"),
                f"{entry['gb_per_s']:.0f}",
                *(f"{entry['share_of_copy']:.0%}", "–" if share is None else f"{share:.0%}"),
                *(f"{entry['peak_bytes'] / 1e6:.1f}", f"{entry['max_absolute_error']:.0e}"),
            ]
        )
    device, versions = document["device"], document["versions"]
    made_of = f"torch {versions['torch']}, triton {versions['triton']}"
    caption = (
        f"{device['name']}, driver {device['driver']}, {made_of}. `{document['command']}`, "
        f"{document['date'][:10]}, commit {facts.short_commit(document)}, V = {VOCABULARIES[0]}; "
        f"{document['method']}. "
        f"GB/s counts every logit once; a copy reaches {document['copy_gb_per_s']:.0f} GB/s. "
        f"{len(document['skipped'])} skipped; all in bench/results/gpu.json."
    )
    return f"{table(rows)}\n\n{paragraph(caption)}"


def write(document: dict, folder: Path) -> Path:
    """Write gpu.json; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer cases: GPT-2's vocabulary, fastkl and eager; writes only to --out",
    )
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--vocabularies", type=int, nargs="+")
    parser.add_argument(
        "--dtypes", nargs="+", default=DTYPES, choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--circuits", type=int, nargs="+", default=CIRCUITS)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.png")
    args = parser.parse_args(argv)
    args.out = args.out or (None if args.quick else RESULTS)
    args.rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    args.vocabularies = args.vocabularies or VOCABULARIES[: 1 if args.quick else None]
    args.peers = args.peers or (QUICK_PEERS if args.quick else names)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print, write; return the exit code: 2 without a card, 1 if fastkl is wrong or fails."""
    args = _arguments(argv)
    if reason := missing_card():
        print(f"bench.gpu: nothing timed, nothing written: {reason}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if argv is None else argv)])
    card = Cuda()
    device, copy = card.describe(), card.copy_bandwidth()
    say = functools.partial(print, flush=True)
    say(f"{device['name']}, driver {device['driver']}: a copy reaches {copy / 1e9:.0f} GB/s")
    cases = grid(args.rows, args.vocabularies, args.dtypes, args.circuits)
    peers = [peer for peer in PEERS if peer.name in args.peers]
    results, skipped, code = [], [], 0
    document: dict = {}
    for case, peer, outcome in measure_cases(cases, peers, card):
        if isinstance(outcome, str):
            skipped.append({**asdict(case), "peer": peer.name, "reason": outcome})
            say(f"{case!s:40} {peer.name:8} skipped: {outcome}")
            if peer.name == "fastkl" and outcome.startswith(("wrong", "failed")):
                code = 1
        else:
            results.append(outcome)
            share = outcome["gb_per_s"] * 1e9 / copy
            say(
                f"{case!s:40} {peer.name:8} {outcome['microseconds']:12.1f} us, "
                f"{outcome['call_microseconds']:8.1f} not captured, "
                f"{outcome['gb_per_s']:8.0f} GB/s {share:6.1%} of copy, "
                f"{outcome['peak_bytes'] / 1e6:10.1f} MB, error {outcome['max_absolute_error']:.1e}"
            )
        document = report(device, command, copy, results, skipped)
        if args.out:
            write(document, args.out)
    if args.out:
        say(f"written: {args.out / 'gpu.json'}")
        if importlib.util.find_spec("matplotlib"):
            plot(document, args.out / "gpu.png")
    if code:
        print("bench.gpu: fastkl is wrong, or fails: see above", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
