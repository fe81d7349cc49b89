"""The context of a measurement: the machine, the versions, the commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastkl

_PACKAGES = ("numpy", "auto-circuit", "jax", "scipy")


def heading(command: str, seed: int) -> dict[str, Any]:
    """Return the entries with which a document of results begins."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "seed": seed,
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    """Return the processor, its cores, cache and instruction sets, threads used, memory, system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "fastkl native": _native_level(),
        },
        "last_level_cache_bytes": _last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, fastkl, PyTorch, NumPy and the peers that are installed."""
    found = {"python": platform.python_version(), "fastkl": fastkl.__version__}
    # PyTorch's own version names the build; the distribution's may not.
    found["torch"] = str(torch.__version__)
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the checkout's commit, with "+ changes" if files differ from it; None outside git."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    try:
        head = _output([*git, "rev-parse", "HEAD"])
        # Files that a benchmark itself wrote do not count as changes.
        changed = _output([*git, "status", "--porcelain", "--", "fastkl", "kernels", "setup.py"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" + changes" if changed else "")


def own_versions(document: dict[str, Any]) -> str:
    """Return the versions that matter in a document that compares fastkl with PyTorch alone."""
    versions = document["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "fastkl", "torch", "numpy"))


def short_commit(document: dict[str, Any]) -> str:
    """Return a document's commit as tables quote it: shortened, "+ changes" kept."""
    head, *changes = (document["commit"] or "unknown").split(" ", 1)
    return " ".join([head[:12], *changes])


def load() -> float | None:
    """Return how many processes wanted to run, on average over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _native_level() -> str | None:
    if fastkl.unavailable_backends().get("native") is not None:
        return None
    from fastkl import _native  # noqa: PLC0415
    from fastkl.backends.native import LEVEL_VARIABLE  # noqa: PLC0415

    return os.environ.get(LEVEL_VARIABLE) or _native.levels()[0]


def _last_level_cache() -> int | None:
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=None)
