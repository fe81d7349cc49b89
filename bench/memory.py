"""The memory that one peer takes beyond its inputs: `python -m bench.memory PEER CASE`.

In a process of its own: the inputs are made and measured once, so that code is loaded and compiled;
freed memory is given back to the system, the kernel's record of the largest resident size is reset,
and the peer measures again. The difference between the record and the size before is the answer; it
does not hide what a library frees before it returns, as a look at the size afterward would.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.cases import Case, Inputs
from bench.peers import all_peers

_SELF = Path("/proc/self")


def missing() -> str | None:
    """Say why memory can not be measured here; None if it can."""
    try:
        _reset_peak()
    except OSError as error:
        return f"no resettable record of the resident size ({error.strerror}: {error.filename})"
    return None


def peak_of(name: str, case: Case, seed: int, n_threads: int) -> int:
    """Return the bytes that a peer takes beyond the inputs at the worst moment of a measurement."""
    command = [sys.executable, "-m", "bench.memory", name, json.dumps(asdict(case))]
    command += [str(seed), str(n_threads)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout)


def environment() -> dict[str, str]:
    """Return the environment of a process whose resident size is to mean something."""
    # Or else glibc keeps and splits freed blocks of up to 32 MiB.
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}


def peak(function) -> int:
    """Return how much the resident size grew at most during a call, in bytes."""
    gc.collect()
    # What malloc keeps of the warm-up would be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _reset_peak()
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


def _reset_peak() -> None:
    # 5: set the record to the present size.
    (_SELF / "clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = (_SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def _main(name: str, case: str, seed: str, n_threads: str) -> None:
    torch.set_num_threads(int(n_threads))
    inputs = Inputs(Case(**json.loads(case)), int(seed))
    measure = next(peer for peer in all_peers() if peer.name == name).prepare(inputs)
    measure()
    print(peak(measure))


if __name__ == "__main__":
    _main(*sys.argv[1:])
