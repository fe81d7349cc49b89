"""Measure the memory that a function takes beyond its inputs.

The function is called once in a process of its own, so that its code is loaded and compiled. Then
freed memory is returned to the system, the kernel's record of the peak resident size is reset, and
the function is called again. The result is that record minus the size before the call. Unlike the
size after the call, it includes memory that a library frees before it returns.
"""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

from bench.worker import Worker, call

_SELF = Path("/proc/self")
# Without this setting, glibc keeps and splits freed blocks of up to 32 MiB.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def missing() -> str | None:
    """Say why memory cannot be measured here; None if it can."""
    try:
        _reset_peak()
    except OSError as error:
        return f"no resettable record of the resident size ({error.strerror}: {error.filename})"
    return None


def peak_of(prepare: Callable[[], Callable[[], object]]) -> int:
    """Return the peak of the bytes that a prepared function takes during its second call."""
    with Worker(prepare, _MALLOC) as worker:
        worker.ask(call)
        peak_bytes: int = worker.ask(peak)
        return peak_bytes


def environment() -> dict[str, str]:
    """Return the environment for a process whose resident size is measured with `peak`."""
    return os.environ | _MALLOC


def peak(function: Callable[[], object]) -> int:
    """Return by how many bytes the resident size grew at most during a call."""
    gc.collect()
    # Memory that malloc keeps from the warm-up would be reused without being counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _reset_peak()
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


def _reset_peak() -> None:
    # 5 sets the peak resident size to the current one.
    (_SELF / "clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = (_SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
