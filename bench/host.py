"""Measure what a call on a card costs its host: `python -m bench.host`.

A GPU works asynchronously, but it may have to wait for the host, which first checks, allocates and
launches. Timing the host needs no GPU: a driver that compiles for an H100 and launches nothing
replaces Triton's, and no kernel reads the logits. The time of a real driver and allocator, some
microseconds per launch and tensor, comes on top, and so does copying a result to the host.
"""

import argparse
import datetime
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import fastkl
from bench import facts
from bench.cards import CARDS
from bench.report import paragraph, table
from fastkl.backends import triton as backend

NOTICE = "Timed with a driver that launches nothing; no card was used."
RESULTS = Path(__file__).parent / "results"
N_CIRCUITS = (1, 4, 20, 200)
# Rows; tokens of the logits in timed calls; tokens of those in the column of memory times.
N_ROWS, N_COLS, CARD_COLS = 64, 64, 50257
_CARD = next(card for card in CARDS if card.name == "H100 SXM")
_ROUNDS = 9


class _Utils:
    """The functions of a driver that Triton calls after it has compiled."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        # Module, function, registers, spills, maximum threads.
        return 1, 1, 64, 0, 1024


class IdleDriver(DriverBase):
    """A driver of an H100 that launches nothing, but counts its launches."""

    utils = _Utils()

    def __init__(self) -> None:
        self.launches = 0
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Return the function that Triton calls to launch a kernel."""

        def launch(*arguments: object) -> None:
            self.launches += 1

        return launch

    @classmethod
    def is_active(cls) -> bool:
        """Return whether the driver's device is present."""
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Return the C type of a kernel's argument."""
        return kind

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return the device that holds the tensors."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., None]:
        """Refuse to time kernels: nothing is autotuned."""
        raise NotImplementedError


def _microseconds(call: Callable[[], object], calls: int) -> float:
    """Return the microseconds per call: the least of several rounds, as timeit reports it."""
    call()
    rounds = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            rounds.append((time.perf_counter() - start) / calls)
    finally:
        if collecting:
            gc.enable()
    return min(rounds) * 1e6


def measure(n_circuits: int, driver: IdleDriver, calls: int) -> dict[str, Any]:
    """Return the launches and the microseconds of a call with this many circuits."""
    reference = torch.zeros(N_ROWS, N_COLS)
    circuits = [torch.zeros(N_ROWS, N_COLS) for _ in range(n_circuits)]
    leaves = [circuit.clone().requires_grad_() for circuit in circuits]

    def forward() -> None:
        fastkl.kl_div_many(circuits, reference, backend="triton")

    def step() -> None:
        fastkl.kl_div_many(leaves, reference, reduction="sum", backend="triton").sum().backward()
        for leaf in leaves:
            leaf.grad = None

    forward()
    driver.launches = 0
    forward()
    launches = driver.launches
    n_bytes = (n_circuits + -(-n_circuits // 4)) * N_ROWS * CARD_COLS * 4
    return {
        "n_circuits": n_circuits,
        "launches": launches,
        "us": _microseconds(forward, calls),
        "us_with_backward": _microseconds(step, calls),
        "us_of_memory": n_bytes / _CARD.bandwidth * 1e6,
    }


def run(calls: int) -> dict[str, Any]:
    """Measure all numbers of circuits; return the JSON document.

    Afterwards no kernel can run in this process.
    """
    driver = IdleDriver()
    triton.runtime.driver.set_active(driver)
    # The backend asks for a card, but is given tensors on the CPU.
    backend.missing = lambda *_: None
    cases = [measure(n_circuits, driver, calls) for n_circuits in N_CIRCUITS]
    return {
        "command": "python -m bench.host",
        "notice": NOTICE,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": facts.commit(),
        "device": facts.machine()["processor"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "cases": cases,
    }


def markdown(document: dict[str, Any]) -> str:
    """Return the table of bench/README.md."""
    rows = [
        [
            "circuits",
            "launches",
            "forward, µs",
            "forward and backward, µs",
            f"{_CARD.name}'s memory time, µs",
        ]
    ]
    for case in document["cases"]:
        rows.append(
            [
                str(case["n_circuits"]),
                str(case["launches"]),
                f"{case['us']:.0f}",
                f"{case['us_with_backward']:.0f}",
                f"{case['us_of_memory']:.0f}",
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    caption = (
        f"{document['notice']} {document['device']}; {versions}. `{document['command']}`, "
        f"{document['date'][:10]}, commit {facts.short_commit(document)}. Times are the least "
        f"of {_ROUNDS} rounds. Last column: how long the card's memory, at its peak bandwidth, takes to "
        f"deliver what the forward reads of {N_ROWS} rows of {CARD_COLS} float32 logits."
    )
    return table(rows) + "\n\n" + paragraph(caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few calls; writes only to --out")
    parser.add_argument("--out", type=Path, help="folder for host.json")
    options = parser.parse_args(argv)
    document = run(calls=5 if options.quick else 200)
    document["command"] += " --quick" if options.quick else ""
    print(markdown(document))
    out = options.out if options.quick else options.out or RESULTS
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "host.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
