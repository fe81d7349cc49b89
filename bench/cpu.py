"""Measure circuits on the CPU in every way there is, side by side: `python -m bench.cpu`.

All peers measure the same seeded logits in one process, in turns; each is checked against float64
before it is timed. Full runs write cpu.json and cpu.png into bench/results; then
`python -m bench.report` brings the README's tables up to date. Exits 1 if fastkl measured wrong.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import facts, memory
from bench.cases import SEED, Case, Inputs
from bench.cpu_report import markdown, plot
from bench.peers import OURS, Measure, Peer, all_peers
from bench.timing import Reader, interleave, keep_freed_memory, ratio, summarize

MAIN = Case()
# One thing changes at a time.
GRID = (
    MAIN,
    replace(MAIN, divergences="small"),
    replace(MAIN, divergences="large"),
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
# What a case's timing may take; slow peers may need more, for the fewest rounds.
_SECONDS, _QUICK_SECONDS = 9.0, 0.5
RESULTS = Path(__file__).parent / "results"


def run_case(case: Case, peers: Sequence[Peer], seconds: float, seed: int = SEED) -> dict[str, Any]:
    """Check and time all peers on one case; return what cpu.json says about it."""
    inputs = Inputs(case, seed)
    entries: dict[str, dict[str, Any]] = {}
    measures: dict[str, Measure] = {}
    for peer in peers:
        if reason := peer.missing(case):
            entries[peer.name] = {"skipped": reason}
            continue
        measure = peer.prepare(inputs)
        try:
            absolute, relative = peer.error(measure(), inputs)
        except ValueError as error:
            entries[peer.name] = {"wrong": str(error)}
            continue
        entries[peer.name] = {"error_nats": absolute, "error_relative": relative}
        measures[peer.name] = measure

    reader = Reader(inputs.circuits)
    functions: dict[str, Callable[[], object]] = {**measures, **reader.ways()}
    times = interleave(functions, seconds, seed=seed)
    reader.close()

    way = min(reader.ways(), key=lambda name: summarize(times[name])["ms"])
    read = summarize(times[way])
    for name in measures:
        entry = summarize(times[name])
        entries[name] |= entry | {
            "gb_s": case.bytes_read / entry["ms"] / 1e6,
            "times_read": ratio(times[name], times[way]),
            "times_faster": ratio(times[peers[0].name], times[name])
            if peers[0].name in times
            else None,
        }
    rows = inputs.rows64
    return asdict(case) | {
        "bytes_circuits": case.bytes_circuits,
        "bytes_read": case.bytes_read,
        "rounds": len(times[way]),
        "kl_row_nats": [rows.min().item(), rows.max().item()],
        "rows_below_0.1": (rows < 0.1).double().mean().item(),
        "read": {"way": way, "gb_s": case.bytes_circuits / read["ms"] / 1e6, **read},
        "peers": entries,
    }


def run(
    cases: Sequence[Case],
    peers: Sequence[Peer],
    seconds: float,
    seed: int = SEED,
    *,
    remember: Callable[[str], bool] = lambda _: True,
) -> dict[str, Any]:
    """Run all cases; return the JSON document.

    Parameters
    ----------
    cases : sequence of Case
        What to measure, the main case first.
    peers : sequence of Peer
        Who measures; the first one is what the others are compared with.
    seconds : float
        For the timing of a case; three times that for the main one.
    seed : int
        For the logits.
    remember : function
        Whose memory is measured too, on the main case, by name.
    """
    load = [facts.load()]
    document: dict[str, Any] = {
        "command": "python -m bench.cpu",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": facts.commit(),
        "seed": seed,
        "machine": facts.machine(),
        "versions": facts.versions(),
        "baseline": peers[0].name,
        "peers": {peer.name: peer.what for peer in peers},
        "cases": [],
    }
    for case in cases:
        print(case, end="", flush=True)
        # The main case's table says more, and its ratios are the ones that get quoted.
        result = run_case(case, peers, 3 * seconds if case is cases[0] else seconds, seed)
        document["cases"].append(result)
        print(f": read {result['read']['ms']:.1f} ms", end="")
        for name, entry in result["peers"].items():
            print(f", {name} {entry['ms']:.1f}" if "ms" in entry else "", end="")
        print(f" ({result['rounds']} rounds)", flush=True)
    document["memory_missing"] = memory.missing()
    if document["memory_missing"] is None:
        for name, entry in document["cases"][0]["peers"].items():
            if "ms" in entry and remember(name):
                entry["peak_bytes"] = memory.peak_of(name, cases[0], seed, torch.get_num_threads())
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

    # Here and not in run: it is for the whole process.
    kept = keep_freed_memory()
    document = run(
        cases,
        all_peers(),
        seconds,
        options.seed,
        remember=lambda name: not options.quick or name.startswith(OURS),
    )
    document["freed_memory_is_kept"] = kept
    # What changes the measurement; not where it is written to.
    document["command"] += " --quick" if options.quick else ""
    document["command"] += f" --threads {options.threads}" if options.threads else ""
    document["command"] += f" --seed {options.seed}" if options.seed != SEED else ""
    print(f"\n{markdown(document)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu.json").write_text(json.dumps(document, indent=1) + "\n")
        plot(document, out / "cpu.png")
        print(f"\nwritten: {out / 'cpu.json'}, {out / 'cpu.png'}")
    wrong = [
        entry["wrong"]
        for case in document["cases"]
        for name, entry in case["peers"].items()
        if name.startswith(OURS) and "wrong" in entry
    ]
    print("".join(f"WRONG: {text}\n" for text in wrong), file=sys.stderr, end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
