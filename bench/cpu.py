"""Measure circuits on the CPU with all peers side by side: `python -m bench.cpu`.

All peers measure the same seeded logits in turns, each in a process of its own. Each peer is
checked against float64 before it is timed. The main case is timed with malloc's default settings,
and again in processes that keep freed memory. Full runs write cpu.json and cpu.png into
bench/results; then `python -m bench.report` brings the tables of the READMEs up to date. The exit
status is 1 if fastkl measured wrong or failed.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import facts, memory, reads
from bench.cases import SEED, Case, Inputs, shared
from bench.cpu_report import markdown, plot
from bench.peers import OURS, Measure, Peer, all_peers, prepared
from bench.timing import ratio, summarize, take_turns
from bench.worker import AS_IT_COMES, KEEP_FREED_MEMORY, WorkerError

MAIN = Case()
# Each case differs from the main case in one field.
GRID = (
    MAIN,
    replace(MAIN, divergences="small"),
    replace(MAIN, divergences="large"),
    replace(MAIN, divergences="unlikely"),
    replace(MAIN, dtype="bfloat16"),
    replace(MAIN, dtype="float16"),
    replace(MAIN, n_circuits=1),
    replace(MAIN, n_circuits=41),
    replace(MAIN, n_rows=1),
    replace(MAIN, n_rows=16),
    replace(MAIN, n_rows=256),
    replace(MAIN, n_vocabulary=128256),
    replace(MAIN, n_vocabulary=151936),
)
_QUICK_MAIN = Case(4, 8)
QUICK_GRID = (_QUICK_MAIN, replace(_QUICK_MAIN, dtype="bfloat16"))
# Seconds that the timing of a case may take; with slow peers the fewest rounds may take longer.
_SECONDS, _QUICK_SECONDS = 8.0, 0.5
RESULTS = Path(__file__).parent / "results"


def run_case(
    case: Case,
    peers: Sequence[Peer],
    seconds: float,
    seed: int = SEED,
    *,
    n_processes: int = 1,
    keep_too: bool = False,
    remember: Callable[[str], bool] = lambda _: False,
) -> dict[str, Any]:
    """Check and time all peers on one case; return what cpu.json says about it.

    Parameters
    ----------
    case, peers, seconds, seed
        As for `run`.
    n_processes : int
        How many processes each peer gets, one after the other, with `seconds` for each timing.
    keep_too : bool
        Time all peers a second time, in processes that keep freed memory.
    remember : function
        Says, by a peer's name, whether its memory is measured too.
    """
    skipped = {peer.name: reason for peer in peers if (reason := peer.missing(case))}
    chosen = [peer for peer in peers if peer.name not in skipped]
    with shared(case, seed) as file:
        inputs = Inputs(case, file=file)
        checks = {peer.name: partial(_errors, peer, inputs) for peer in chosen}
        functions = {peer.name: peer.prepare for peer in chosen} | reads.WAYS
        tasks = {
            name: partial(prepared, prepare, case, file, torch.get_num_threads())
            for name, prepare in functions.items()
        }
        in_turns = partial(_in_turns, tasks, checks, peers[0].name, n_processes, seconds, seed)
        result = in_turns(AS_IT_COMES)
        if keep_too:
            result["freed_memory_kept"] = in_turns(KEEP_FREED_MEMORY)
        for entry in result["peers"].values():
            if "ms" in entry:
                entry["gb_s"] = case.bytes_read / entry["ms"] / 1e6
        for name, entry in result["peers"].items():
            if "ms" in entry and memory.missing() is None and remember(name):
                entry.update(_peak(tasks[name]))
        rows = inputs.rows64
    result["read"]["gb_s"] = case.bytes_circuits / result["read"]["ms"] / 1e6
    result["peers"] |= {name: {"skipped": reason} for name, reason in skipped.items()}
    return asdict(case) | {
        "bytes_circuits": case.bytes_circuits,
        "bytes_read": case.bytes_read,
        "kl_row_nats": [rows.min().item(), rows.max().item()],
        "rows_below_0.1": (rows < 0.1).double().mean().item(),
        **result,
    }


def _errors(peer: Peer, inputs: Inputs, values: Sequence[float]) -> dict[str, float]:
    absolute, relative = peer.error(values, inputs)
    return {"error_nats": absolute, "error_relative": relative}


def _peak(task: Callable[[], Measure]) -> dict[str, Any]:
    try:
        return {"peak_bytes": memory.peak_of(task)}
    except WorkerError as error:
        return {"peak_failed": str(error)}


def _in_turns(
    tasks: Mapping[str, Callable[[], Measure]],
    checks: Mapping[str, Callable[[Any], dict[str, Any]]],
    baseline: str,
    n_processes: int,
    seconds: float,
    seed: int,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Return the time of one read and every peer's entry, as measured in one environment."""
    entries: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(n_processes):
        # Tasks that were wrong or failed get no more turns.
        left = {name: tasks[name] for name in times}
        found, more = take_turns(left, checks, seconds, seed=seed + i, environment=environment)
        entries |= found
        times = {name: times[name] + seconds_taken for name, seconds_taken in more.items()}
    ways = [way for way in reads.WAYS if way in times]
    if not ways:
        raise WorkerError(f"nobody could read the logits: {[entries[w] for w in reads.WAYS]}")
    way = min(ways, key=lambda name: summarize(times[name])["ms"])
    for name in checks.keys() & times.keys():
        entries[name] |= summarize(times[name]) | {
            "times_read": ratio(times[name], times[way]),
            "times_faster": ratio(times[baseline], times[name]) if baseline in times else None,
        }
    return {
        "rounds": len(times[way]),
        "read": {"way": way, **summarize(times[way])},
        "peers": {name: entries[name] for name in checks},
    }


def run(
    cases: Sequence[Case],
    peers: Sequence[Peer],
    seconds: float,
    seed: int = SEED,
    *,
    n_processes: int = 3,
    remember: Callable[[str], bool] = lambda _: True,
) -> dict[str, Any]:
    """Run all cases; return the JSON document.

    Parameters
    ----------
    cases : sequence of Case
        What to measure, the main case first.
    peers : sequence of Peer
        What measures; the others are compared with the first one.
    seconds : float
        How long the timing of a case may take, with one process for each peer.
    seed : int
        Seed of the logits and of the order of turns.
    n_processes : int
        How many processes each peer gets on the main case, one after the other.
    remember : function
        Says, by a peer's name, whether its memory is measured too, on the main case.
    """
    load = [facts.load()]
    document = facts.heading("python -m bench.cpu", seed) | {
        "memory_missing": memory.missing(),
        "n_processes": n_processes,
        "baseline": peers[0].name,
        "peers": {peer.name: peer.what for peer in peers},
        "cases": [],
    }
    glibc = platform.libc_ver()[0] == "glibc"
    for case in cases:
        print(case, end="", flush=True)
        # The main case's table shows more, and its ratios are the ones that get quoted. It takes
        # several processes: where malloc gets its memory from differs among them, and so do times.
        if case is cases[0]:
            result = run_case(
                *(case, peers, seconds, seed),
                n_processes=n_processes,
                keep_too=glibc,
                remember=remember,
            )
        else:
            result = run_case(case, peers, seconds, seed)
        document["cases"].append(result)
        print(f": read {result['read']['ms']:.1f} ms", end="")
        for name, entry in result["peers"].items():
            print(f", {name} {entry['ms']:.1f}" if "ms" in entry else "", end="")
        print(f" ({result['rounds']} rounds)", flush=True)
    document["load_average"] = [*load, facts.load()]
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small inputs; writes only to --out")
    parser.add_argument("--out", type=Path, help="folder for cpu.json and cpu.png")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases, seconds = (QUICK_GRID, _QUICK_SECONDS) if options.quick else (GRID, _SECONDS)
    out = options.out if options.quick else options.out or RESULTS

    document = run(
        cases,
        all_peers(),
        seconds,
        options.seed,
        n_processes=1 if options.quick else 3,
        remember=lambda name: not options.quick or name.startswith(OURS),
    )
    # Record the options that change the measurement, not the one that says where it is written.
    document["command"] += " --quick" if options.quick else ""
    document["command"] += f" --threads {options.threads}" if options.threads else ""
    document["command"] += f" --seed {options.seed}" if options.seed != SEED else ""
    print(f"\n{markdown(document)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu.json").write_text(json.dumps(document, indent=1) + "\n")
        plot(document, out / "cpu.png")
        print(f"\nwritten: {out / 'cpu.json'}, {out / 'cpu.png'}")
    ours = [
        (name, entry)
        for case in document["cases"]
        for setting in (case, case.get("freed_memory_kept", {"peers": {}}))
        for name, entry in setting["peers"].items()
        if name.startswith(OURS)
    ]
    bad = [f"WRONG: {entry['wrong']}" for _, entry in ours if "wrong" in entry]
    bad += [f"FAILED: {name}: {entry['failed']}" for name, entry in ours if "failed" in entry]
    print("".join(f"{line}\n" for line in bad), file=sys.stderr, end="")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
