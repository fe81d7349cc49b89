"""The memory that a function takes beyond its inputs.

The function is called in a process of its own, once, so that its code is loaded and compiled. Then freed
memory is returned to the system, the kernel's record of the largest resident size is reset, and the
function is called again. The answer is that record less the size before the call. Unlike the size after
the call, it includes memory that a library frees before it returns.
"""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

from bench.worker import Worker, call

_SELF = Path("/proc/self")
# Or else glibc keeps and splits freed blocks of up to 32 MiB.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def missing() -> str | None:
    """Say why memory cannot be measured here; None if it can."""
    try:
        _reset_peak()
    except OSError as error:
        return f"no resettable record of the resident size ({error.strerror}: {error.filename})"
    return None


def peak_of(prepare: Callable[[], Callable[[], object]]) -> int:
    """Return the bytes that a prepared function takes at the worst moment of its second call."""
    with Worker(prepare, _MALLOC) as worker:
        worker.ask(call)
        peak_bytes: int = worker.ask(peak)
        return peak_bytes


def environment() -> dict[str, str]:
    """Return the environment of a process whose resident size is to mean something."""
    return os.environ | _MALLOC


def peak(function: Callable[[], object]) -> int:
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
