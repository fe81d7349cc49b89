"""Times of several functions that are run in turns, on a machine that is not quiet."""

import ctypes
import gc
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles

import numpy as np
import torch

FEWEST_ROUNDS, MOST_ROUNDS = 5, 51
# malloc.h: how much free memory is given back to the system, how many blocks are mappings.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed, for as long as the process lives; False where it can not.

    By itself glibc gives large temporaries back to the system after each call, or keeps them,
    depending on what was freed before: the same function took three times as long in the one case
    as in the other, clearing fresh pages. Peers that need temporaries gain by this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, value) for option, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0))
    )


def interleave(
    functions: Mapping[str, Callable[[], object]], seconds: float, *, seed: int = 0
) -> dict[str, list[float]]:
    """Call all functions once a round, and return the seconds that each call took.

    What slows the machine for a while slows all of them; the order changes from round to round, so
    that nobody always finds the caches as the same other one left them. The first round does not
    count.

    Parameters
    ----------
    functions : mapping {name: function}
        What to time; warmed up or not.
    seconds : float
        How long it may take, if that allows for the fewest rounds.
    seed : int
        For the orders.
    """
    order, shuffle = list(functions), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for function in functions.values():
            function()
        wanted = int(seconds / (time.perf_counter() - started)) - 1
        for _ in range(min(max(wanted, FEWEST_ROUNDS), MOST_ROUNDS)):
            shuffle(order)
            for name in order:
                before = time.perf_counter()
                functions[name]()
                times[name].append(time.perf_counter() - before)
    finally:
        if collecting:
            gc.enable()
    return times


def summarize(times: Sequence[float]) -> dict[str, float | list[float]]:
    """Return the median and the quartiles, in milliseconds."""
    first, middle, third = quantiles(times, n=4)
    return {"ms": 1e3 * middle, "quartiles_ms": [1e3 * first, 1e3 * third]}


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over rounds of one function's time over another's in the same round."""
    return median(a / b for a, b in zip(times, others, strict=True))


class Reader:
    """Ways to read every byte of tensors once: the fastest one is the limit.

    Parameters
    ----------
    tensors : sequence of contiguous Tensors on the CPU
        What to read.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        # The largest byte, whatever the bytes mean: NumPy takes 32 of them at a time.
        arrays = [tensor.view(-1).view(torch.int8).numpy() for tensor in tensors]
        n = min(os.cpu_count() or 1, torch.get_num_threads())
        self._shares = [[part for a in arrays if len(part := _share(a, i, n))] for i in range(n)]
        self._pool = ThreadPoolExecutor(n)

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return the ways: functions that read everything and return the largest element."""
        return {"torch.amax": self.by_torch, "numpy.max in threads": self.by_threads}

    def by_torch(self) -> float:
        """Return the largest number, by PyTorch."""
        return torch.stack([tensor.amax() for tensor in self._tensors]).max().item()

    def by_threads(self) -> int:
        """Return the largest byte, by NumPy in one thread a core."""
        return max(self._pool.map(lambda arrays: max(a.max() for a in arrays), self._shares)).item()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _share(array: np.ndarray, i: int, n: int) -> np.ndarray:
    return array[len(array) * i // n : len(array) * (i + 1) // n]
