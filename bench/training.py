"""Time a loss and its gradients, as in distillation: `python -m bench.training`.

The student's logits require a gradient, the teacher's do not; one case differentiates both. Each
peer's gradients are checked against float64 before it is timed, in turns with the others. Memory is
measured in a process of its own, beyond the logits and their gradients. Writes training.json into
bench/results unless --quick. With --device cuda it writes training_gpu.json, whose times include
waiting for the device. Then `python -m bench.report` brings the READMEs up to date.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkl
from bench import facts, memory
from bench.cases import SEED
from bench.peers import OURS
from bench.report import RESULTS, paragraph, table
from bench.timing import interleave, keep_freed_memory, ratio, seconds_after_pause, summarize

# Largest relative errors of the gradient, norm-wise over all rows: the package's promise, and the
# tolerance of the textbook's float32 at these divergences.
_TOLERANCE, _TEXTBOOK = 1e-5, 1e-2
_MIB = 2**20
_SECONDS, _QUICK_SECONDS = 12.0, 0.5


@dataclass(frozen=True)
class Training:
    """One point of the grid; the defaults are the main case."""

    n_rows: int = 256
    n_vocabulary: int = 50257
    dtype: str = "float32"
    noise: float = 0.5
    both: bool = False
    js: bool = False
    temperature: float = 1.0

    def __str__(self) -> str:
        sides = "both gradients" if self.both else "the student's gradient"
        name = "Jensen-Shannon " if self.js else ""
        what = f"R={self.n_rows} V={self.n_vocabulary} {self.dtype} noise {self.noise:g}"
        return f"{name}{what} T={self.temperature:g}, {sides}"

    def logits(self, device: str, seed: int = SEED) -> tuple[Tensor, Tensor]:
        """Return the logits of the student and of the teacher, as leaf tensors."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.n_rows, self.n_vocabulary)
        teacher = 3 * torch.randn(shape, generator=generator)
        student = teacher + self.noise * torch.randn(shape, generator=generator)
        dtype = getattr(torch, self.dtype)
        student, teacher = (t.to(dtype).to(device) for t in (student, teacher))
        return student.requires_grad_(), teacher.requires_grad_(self.both)


GRID = (
    Training(),
    Training(noise=1e-3),
    Training(both=True),
    Training(temperature=2.0),
    Training(dtype="bfloat16"),
    Training(n_rows=16),
    Training(n_rows=1),
    Training(n_vocabulary=151936, n_rows=64),
    Training(js=True),
)
QUICK_GRID = (
    Training(8, 5000),
    Training(8, 5000, both=True, temperature=2.0),
    Training(8, 5000, js=True),
)


def log_masses(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-softmaxes of logits divided by a temperature, the teacher's first."""
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    return teacher.log_softmax(-1), student.log_softmax(-1)


def definition(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence by PyTorch's own functions."""
    log_p, log_q = log_masses(student, teacher, temperature)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def js_definition(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean Jensen-Shannon divergence by PyTorch's own functions."""
    log_p, log_q = log_masses(student, teacher, temperature)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    halves = [
        F.kl_div(log_m, side, reduction="batchmean", log_target=True) for side in (log_p, log_q)
    ]
    return (halves[0] + halves[1]) / 2


def liger(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence by Liger-Kernel, with the log_softmaxes that it requires."""
    from liger_kernel.transformers import LigerKLDIVLoss  # noqa: PLC0415

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    log_p, log_q = log_masses(student, teacher, temperature)
    divergence: Tensor = loss(log_q, log_p)
    return divergence


Loss = Callable[[Tensor, Tensor], Tensor]


def losses(device: str, js: bool = False, temperature: float = 1.0) -> dict[str, Loss]:
    """Return the peers that can run here; the others are compared with the first one."""

    def textbook(student: Tensor, teacher: Tensor) -> Tensor:
        return (js_definition if js else definition)(student, teacher, temperature)

    found: dict[str, Loss] = {"eager torch": textbook}
    if sys.platform != "win32":
        found["torch.compile"] = torch.compile(textbook, dynamic=False)
    if not js and device != "cpu" and importlib.util.find_spec("liger_kernel"):
        found["Liger-Kernel"] = partial(liger, temperature=temperature)
    for backend in fastkl.available_backends():
        if backend == "eager" or (backend == "native") == (device == "cpu"):
            found[f"{OURS}{backend}"] = _fastkl(backend, js, temperature)
    return found


def _fastkl(backend: str, js: bool = False, temperature: float = 1.0) -> Loss:
    function = fastkl.js_div if js else fastkl.kl_div
    return lambda student, teacher: function(
        student, teacher, temperature=temperature, backend=backend
    )


def step(loss: Loss, leaves: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that computes a loss and its gradients anew."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()  # type: ignore[no-untyped-call]
        if leaves[0].is_cuda:
            torch.cuda.synchronize()

    return run


def errors(leaves: Sequence[Tensor], js: bool = False, temperature: float = 1.0) -> float:
    """Return the largest relative error of the leaves' gradients, norm-wise, against float64."""
    student, teacher = ((t.detach().double() / temperature).log_softmax(-1) for t in leaves)
    if js:
        mixture = torch.logaddexp(student, teacher) - math.log(2)
        exact = tuple(_weighted(side, side - mixture) / 2 for side in (student, teacher))
    else:
        d = teacher - student
        exact = (teacher.exp() * torch.expm1(-d), _weighted(teacher, d))
    found = [
        (
            (leaf.grad.double() * (temperature * len(leaf)) - gradient).norm() / gradient.norm()
        ).item()
        for leaf, gradient in zip(leaves, exact, strict=True)
        if leaf.grad is not None
    ]
    return max(found)


def _weighted(log_mass: Tensor, worth: Tensor) -> Tensor:
    """Return each token's mass times the excess of its worth over the mean worth."""
    mass = log_mass.exp()
    return mass * (worth - (mass * worth).sum(-1, keepdim=True))


def run_case(
    case: Training,
    device: str,
    seconds: float,
    seed: int = SEED,
    remember: Callable[[str], bool] = lambda _: True,
) -> dict[str, Any]:
    """Check and time all peers on one case; `remember(name)` says whether to measure memory too."""
    torch.compiler.reset()
    leaves = case.logits(device, seed)
    steps, entries = {}, {}
    for name, loss in losses(device, case.js, case.temperature).items():
        run = step(loss, leaves)
        try:
            run()
        except Exception as raised:
            # torch.compile raises if there is no compiler. The other peers are timed all the same.
            entries[name] = {"failed": f"{name}: {type(raised).__name__} on {case}: {raised}"}
            continue
        error = errors(leaves, case.js, case.temperature)
        limit = _TOLERANCE if name.startswith(OURS) else _TEXTBOOK
        if case.dtype != "float32":
            # The gradient is rounded to this dtype, and other packages also compute in it.
            limit = 2**-8 if name.startswith(OURS) else 0.1
        if case.noise < 1e-2 and not name.startswith(OURS):
            limit = 1.0
        if not error <= limit:
            entries[name] = {"wrong": f"{name}: relative error {error:.1e} on {case}"}
            continue
        entries[name] = {"error_relative": error}
        steps[name] = run
    turns = {name: partial(seconds_after_pause, run) for name, run in steps.items()}
    times = interleave(turns, seconds, seed=seed)
    baseline = times.get(next(iter(entries)))
    for name in steps:
        entries[name] |= summarize(times[name])
        entries[name]["times_faster"] = ratio(baseline, times[name]) if baseline else None
        entries[name]["peak_bytes"] = _peak(name, case, device, seed) if remember(name) else None
    return asdict(case) | {"peers": entries}


def _peak(name: str, case: Training, device: str, seed: int) -> int | None:
    """Return the bytes that a step takes beyond the logits and their gradients."""
    if device == "cpu" and memory.missing() is not None:
        return None
    command = [sys.executable, "-m", "bench.training", "--peak", name, "--seed", str(seed)]
    command += ["--device", device, "--case", json.dumps(asdict(case))]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=memory.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def _measure_peak(name: str, case: Training, device: str, seed: int) -> int:
    leaves = case.logits(device, seed)
    run = step(losses(device, case.js, case.temperature)[name], leaves)
    run()
    gradients = sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
    for leaf in leaves:
        leaf.grad = None
    if device == "cpu":
        return max(memory.peak(run) - gradients, 0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before - gradients


def markdown(document: dict[str, Any]) -> str:
    """Return the README's table."""
    names = list(document["cases"][0]["peers"])
    rows = [["R, V, dtype, noise, gradients", *(f"{name}, ms (MiB)" for name in names)]]
    for case in document["cases"]:
        sides = "both" if case["both"] else "student's"
        sizes = (
            f"{case['n_rows']}, {case['n_vocabulary']}, {case['dtype']}, {case['noise']:g}, {sides}"
        )
        sizes += ", Jensen-Shannon" if case.get("js") else ""
        sizes += f", T = {case['temperature']:g}" if case.get("temperature", 1) != 1 else ""
        rows.append([sizes, *(_cell(case["peers"].get(name)) for name in names)])
    first = document["cases"][0]["peers"]
    accuracy = ", ".join(
        f"{name} {entry['error_relative']:.0e}"
        for name, entry in document["cases"][1]["peers"].items()
        if "ms" in entry
    )
    faster = ", ".join(
        f"{name} {entry['times_faster']:.1f}"
        for name, entry in first.items()
        if entry.get("times_faster") is not None
    )
    caption = [
        f"{document['device']}, {document['machine']['threads']} threads; "
        f"{facts.own_versions(document)}. `{document['command']}`, {document['date'][:10]}, commit "
        f"{facts.short_commit(document)}.",
        "Forward and backward, all in one process, in turns, each after a pause and calls that do not "
        "count; medians. In brackets: memory beyond the logits and their gradients, in a process of its "
        f"own. Speed relative to {names[0]} in the first row: {faster or 'not known'}. Relative error "
        f"of the gradient in the second row: {accuracy}.",
    ]
    return table(rows) + "\n\n" + "\n".join(map(paragraph, caption))


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or "ms" not in entry:
        return next((word for word in ("wrong", "failed") if word in (entry or {})), "")
    peak = "" if entry["peak_bytes"] is None else f" ({entry['peak_bytes'] / _MIB:.1f})"
    return f"{entry['ms']:.1f}{peak}"


def run(
    cases: Sequence[Training],
    device: str,
    seconds: float,
    seed: int,
    remember: Callable[[str], bool],
) -> dict[str, Any]:
    """Run all cases; return the JSON document."""
    document = facts.heading("python -m bench.training", seed)
    on_cpu = device == "cpu"
    document["device"] = (
        document["machine"]["processor"] if on_cpu else torch.cuda.get_device_name()
    )
    document["cases"] = []
    for case in cases:
        result = run_case(case, device, seconds, seed, remember)
        document["cases"].append(result)
        cells = ", ".join(f"{name} {_cell(entry)}" for name, entry in result["peers"].items())
        print(f"{case}: {cells}", flush=True)
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small inputs; writes only to --out")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak:
        case = replace(Training(), **json.loads(options.case))
        print(_measure_peak(options.peak, case, options.device, options.seed))
        return 0
    keep_freed_memory()
    cases, seconds = (QUICK_GRID, _QUICK_SECONDS) if options.quick else (GRID, _SECONDS)
    document = run(
        cases,
        options.device,
        seconds,
        options.seed,
        lambda name: not options.quick or name.startswith(OURS),
    )
    document["command"] += " --quick" if options.quick else ""
    document["command"] += f" --device {options.device}" if options.device != "cpu" else ""
    document["command"] += f" --seed {options.seed}" if options.seed != SEED else ""
    print(f"\n{markdown(document)}")
    out = options.out if options.quick else options.out or RESULTS
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = "training.json" if options.device == "cpu" else "training_gpu.json"
        (out / name).write_text(json.dumps(document, indent=1) + "\n")
    problems = [
        (word, entry[word])
        for case in document["cases"]
        for entry in case["peers"].values()
        for word in ("wrong", "failed")
        if word in entry
    ]
    print("".join(f"{word.upper()}: {text}\n" for word, text in problems), file=sys.stderr, end="")
    return 1 if any(text.startswith(OURS) for _, text in problems) else 0


if __name__ == "__main__":
    sys.exit(main())
