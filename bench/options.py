"""Time what the options of a call cost on the CPU: `python -m bench.options`.

The native backend computes the same divergence with half-precision logits, at a temperature, in the
other direction, with a mask, with statistics, and forward and backward. PyTorch's own functions are
timed beside it, all in one process and in turns. Each result is checked against float64 before it
is timed. Writes options.json into bench/results unless --quick; then `python -m bench.report`
brings the READMEs up to date.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkl
from bench import facts
from bench.report import RESULTS, paragraph, table
from bench.timing import (
    interleave,
    keep_freed_memory,
    ratio,
    seconds_after_pause,
    seconds_of,
    summarize,
)

SEED = 20261123
BACKEND = "native"
# Largest relative errors of the mean over rows: the package's promise for each row, and the
# tolerance of the textbook's float32.
_TOLERANCE, _TEXTBOOK = 1e-5, 1e-2
_SECONDS, _QUICK_SECONDS = 20.0, 0.5
# Calls that take less than a millisecond are timed this many at a time.
_SHORT_CALLS = 100


class Size(NamedTuple):
    """The numbers of circuits, rows, and tokens, and of calls that are timed at a time."""

    n_circuits: int
    n_rows: int
    n_vocabulary: int
    calls: int = 1

    def __str__(self) -> str:
        return f"K={self.n_circuits}, R={self.n_rows}, V={self.n_vocabulary}"


SIZES = (Size(20, 64, 50257), Size(1, 256, 50257), Size(1, 8, 50, _SHORT_CALLS))
QUICK_SIZES = (Size(2, 4, 300, 5), Size(1, 8, 50, 5))


class Inputs:
    """Logits of a reference (3 randn) and of circuits (plus noise of 0.5), and a mask of rows."""

    def __init__(self, size: Size, seed: int = SEED) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn() -> Tensor:
            return torch.randn(size.n_rows, size.n_vocabulary, generator=generator)

        self.reference = 3 * randn()
        self.circuits = [self.reference + 0.5 * randn() for _ in range(size.n_circuits)]
        self.mask = torch.rand(size.n_rows, generator=generator) < 0.8
        self.leaves = [circuit.clone().requires_grad_() for circuit in self.circuits]

    def rounded(self, dtype: torch.dtype) -> "Inputs":
        """Return the same logits in another dtype."""
        other = copy(self)
        other.reference = self.reference.to(dtype)
        other.circuits = [circuit.to(dtype) for circuit in self.circuits]
        return other


def exact(inputs: Inputs, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """Return the divergences (K, R) in float64."""
    log_p, *log_qs = (
        (t.double() / temperature).log_softmax(-1) for t in (inputs.reference, *inputs.circuits)
    )
    pairs = [(log_q, log_p) if reverse else (log_p, log_q) for log_q in log_qs]
    return torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in pairs])


def textbook(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    """Compute the means over rows (K,) by log_softmaxes, then F.kl_div."""
    log_p = reference.log_softmax(-1)
    means = [
        F.kl_div(circuit.log_softmax(-1), log_p, log_target=True, reduction="batchmean")
        for circuit in circuits
    ]
    return torch.stack(means)


def step(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Compute the means and their gradients; return the means."""
    for leaf in inputs.leaves:
        leaf.grad = None
    means = function(inputs.leaves, inputs.reference)
    means.sum().backward()  # type: ignore[no-untyped-call]
    return means.detach()


class Way(NamedTuple):
    """A call that returns the means (K,), what it should return, and the relative tolerance."""

    call: Callable[[], Tensor]
    expected: Tensor
    tolerance: float = _TOLERANCE


def ways(inputs: Inputs) -> dict[str, Way]:
    """Return the calls to time, by name; the others are compared with the first one."""

    def many(**options: Any) -> Callable[[], Tensor]:
        return partial(
            fastkl.kl_div_many, inputs.circuits, inputs.reference, backend=BACKEND, **options
        )

    def with_statistics() -> Tensor:
        means: Tensor = many(return_stats=True)()[0]
        return means

    def in_dtype(dtype: torch.dtype) -> Way:
        rounded = inputs.rounded(dtype)
        call = partial(fastkl.kl_div_many, rounded.circuits, rounded.reference, backend=BACKEND)
        return Way(call, exact(rounded).mean(-1))

    plain = exact(inputs)
    mean = plain.mean(-1)
    ours = partial(fastkl.kl_div_many, backend=BACKEND)
    return {
        "kl_div_many": Way(many(), mean),
        "bfloat16 logits": in_dtype(torch.bfloat16),
        "float16 logits": in_dtype(torch.float16),
        "temperature=2": Way(many(temperature=2.0), exact(inputs, temperature=2.0).mean(-1)),
        'direction="reverse"': Way(many(direction="reverse"), exact(inputs, reverse=True).mean(-1)),
        "mask": Way(many(mask=inputs.mask), plain[:, inputs.mask].mean(-1)),
        "return_stats=True": Way(with_statistics, mean),
        "forward and backward": Way(partial(step, ours, inputs), mean),
        "PyTorch": Way(partial(textbook, inputs.circuits, inputs.reference), mean, _TEXTBOOK),
        "PyTorch, forward and backward": Way(partial(step, textbook, inputs), mean, _TEXTBOOK),
    }


def run_size(size: Size, seconds: float, seed: int = SEED) -> dict[str, Any]:
    """Check and time all ways to call with inputs of one size."""
    inputs = Inputs(size, seed)
    entries: dict[str, dict[str, Any]] = {}
    turns = {}
    for name, way in ways(inputs).items():
        error = ((way.call().double() - way.expected).abs() / way.expected).max().item()
        # Not `>`: a NaN is wrong too.
        if not error <= way.tolerance:
            entries[name] = {"wrong": f"{name}: relative error {error:.1e} at {size}"}
            continue
        entries[name] = {"error_relative": error}
        turns[name] = partial(_seconds, way.call, size.calls)
    times = interleave(turns, seconds, seed=seed)
    baseline = times.get(next(iter(entries)))
    for name, found in times.items():
        entries[name] |= summarize(found)
        entries[name]["times_as_long"] = ratio(found, baseline) if baseline else None
    return size._asdict() | {"ways": entries}


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Return the seconds per call."""
    if calls == 1:
        return seconds_after_pause(call)

    def several() -> None:
        for _ in range(calls):
            call()

    return seconds_of(several) / calls


def markdown(document: dict[str, Any]) -> str:
    """Return the table of bench/README.md."""
    cases = document["cases"]
    sizes = [Size(*(case[name] for name in Size._fields)) for case in cases]
    rows = [["ms (relative to the first row)", *map(str, sizes)]]
    rows += [[name, *(_cell(case["ways"][name]) for case in cases)] for name in cases[0]["ways"]]
    caption = (
        f"{document['machine']['processor']}, {document['machine']['threads']} threads; "
        f"{facts.own_versions(document)}. "
        f"`{document['command']}`, {document['date'][:10]}, commit "
        f"{facts.short_commit(document)}. All in one process, in turns; medians; freed memory "
        f"kept. K circuits of R rows and V tokens, float32 unless a row says otherwise, noise 0.5, "
        f"{BACKEND} backend; PyTorch: a log_softmax of each tensor, and F.kl_div for each circuit."
    )
    return f"{table(rows)}\n\n{paragraph(caption)}"


def _cell(entry: dict[str, Any]) -> str:
    if "ms" not in entry:
        return "wrong"
    digits = 3 if entry["ms"] < 1 else 1
    times = "" if entry["times_as_long"] is None else f" ({entry['times_as_long']:.1f})"
    return f"{entry['ms']:.{digits}f}{times}"


def run(sizes: Sequence[Size], seconds: float, seed: int) -> dict[str, Any]:
    """Run all sizes; return the JSON document."""
    document = facts.heading("python -m bench.options", seed) | {"cases": []}
    for size in sizes:
        case = run_size(size, seconds, seed)
        document["cases"].append(case)
        cells = ", ".join(f"{name} {_cell(entry)}" for name, entry in case["ways"].items())
        print(f"{size}: {cells}", flush=True)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.options", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small inputs; writes only to --out")
    parser.add_argument("--out", type=Path, help="folder for options.json")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(argv)
    if reason := fastkl.unavailable_backends().get(BACKEND):
        print(f"bench.options: nothing timed: {BACKEND}: {reason}", file=sys.stderr)
        return 2
    keep_freed_memory()
    sizes, seconds = (QUICK_SIZES, _QUICK_SECONDS) if options.quick else (SIZES, _SECONDS)
    document = run(sizes, seconds, options.seed)
    document["command"] += " --quick" if options.quick else ""
    document["command"] += f" --seed {options.seed}" if options.seed != SEED else ""
    print(f"\n{markdown(document)}")
    out = options.out if options.quick else options.out or RESULTS
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps(document, indent=1) + "\n")
    wrong = [e["wrong"] for c in document["cases"] for e in c["ways"].values() if "wrong" in e]
    print("".join(f"WRONG: {text}\n" for text in wrong), file=sys.stderr, end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
