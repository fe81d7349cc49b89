"""Time several functions in turns, on a machine that is not quiet."""

import contextlib
import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

from bench.worker import AS_IT_COMES, Worker, WorkerError, call

FEWEST_ROUNDS, MOST_ROUNDS = 5, 51
# Threads that wait for more work may keep a core busy for a while; after this they are asleep.
PAUSE_SECONDS = 0.02
# A call that lasts this long loses less than 1 % by finding the cores asleep.
_LONG_SECONDS = 0.1
# A virtual machine may take several milliseconds to wake a core, which slows the first two calls.
_WAKING_SECONDS = 0.02
# Options in malloc.h: how much free memory goes back to the system, how many blocks are mappings.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the life of the process; return False if it cannot.

    By default glibc gives large temporaries back to the system after each call, or keeps them,
    depending on what was freed before. The same function took three times as long in the first
    case, where fresh pages had to be cleared. Peers that need temporaries gain by this setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, value) for option, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0))
    )


def seconds_of(function: Callable[[], object]) -> float:
    """Call a function, and return the seconds that it took."""
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def seconds_once_awake(function: Callable[[], object]) -> float:
    """Return the seconds of a call after warm-up calls, which may find cores asleep."""
    end = time.perf_counter() + _WAKING_SECONDS
    function()
    while time.perf_counter() < end:
        function()
    return seconds_of(function)


def seconds_after_pause(function: Callable[[], object]) -> float:
    """Pause until other functions' threads have fallen asleep; then return `seconds_once_awake`."""
    time.sleep(PAUSE_SECONDS)
    return seconds_once_awake(function)


def interleave(
    turns: Mapping[str, Callable[[], float]], seconds: float, *, seed: int = 0
) -> dict[str, list[float]]:
    """Let every function take one turn per round; return the seconds that each turn reports.

    A temporary slowdown of the machine slows all functions. The order changes from round to round,
    so that no function always finds the caches as the same other function left them. The first
    round is a warm-up and is not counted.

    Parameters
    ----------
    turns : mapping {name: function}
        The functions to call, each of which returns the seconds that count.
    seconds : float
        How long the timing may take, if that allows for the fewest rounds.
    seed : int
        Seed of the orders.
    """
    order, shuffle = list(turns), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in turns}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in turns.values():
            turn()
        wanted = int(seconds / (time.perf_counter() - started)) - 1
        for _ in range(min(max(wanted, FEWEST_ROUNDS), MOST_ROUNDS)):
            shuffle(order)
            for name in order:
                times[name].append(turns[name]())
    finally:
        if collecting:
            gc.enable()
    return times


def take_turns(
    tasks: Mapping[str, Callable[[], Callable[[], Any]]],
    checks: Mapping[str, Callable[[Any], dict[str, Any]]],
    seconds: float,
    *,
    seed: int = 0,
    environment: Mapping[str, str] = AS_IT_COMES,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Time functions as `interleave` does, each in a process of its own, all alive at once.

    Parameters
    ----------
    tasks : mapping {name: function}
        Each prepares the function to time: see `Worker`.
    checks : mapping {name: function}
        Called with a function's first result; returns what to record about it, or raises ValueError
        if the result is wrong.
    seconds, seed
        As for `interleave`.
    environment : mapping {str: str}
        Environment variables of the processes.

    Returns
    -------
    entries : dict {name: dict}
        What the check returned; {"wrong": text} if it raised ValueError; {"failed": text} if the
        process raised an error or died.
    times : dict {name: list of float}
        The times of all functions that were neither wrong nor failed.
    """
    entries: dict[str, dict[str, Any]] = {}

    def turn(name: str) -> float:
        if "failed" in entries[name]:
            return math.nan
        time.sleep(PAUSE_SECONDS)
        try:
            return workers[name].ask(requests[name])
        except WorkerError as error:
            entries[name] = {"failed": str(error)}
            return math.nan

    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(task, environment)) for name, task in tasks.items()
        }
        for worker in workers.values():
            worker.send(call)
        for name, worker in workers.items():
            try:
                result = worker.receive()
                entries[name] = checks[name](result) if name in checks else {}
            except WorkerError as error:
                entries[name] = {"failed": str(error)}
            except ValueError as error:
                entries[name] = {"wrong": str(error)}
        good = [name for name in tasks if entries[name].keys().isdisjoint(("wrong", "failed"))]
        # Decide once for all rounds: if each call chose anew, slow calls would count more often.
        requests = dict.fromkeys(good, seconds_of)
        for name in good:
            if turn(name) < _LONG_SECONDS:
                requests[name] = seconds_once_awake
        times = interleave({name: partial(turn, name) for name in good}, seconds, seed=seed)
    return entries, {name: times[name] for name in good if "failed" not in entries[name]}


def summarize(times: Sequence[float]) -> dict[str, float | list[float]]:
    """Return the median and the quartiles, in milliseconds."""
    first, middle, third = quantiles(times, n=4)
    return {"ms": 1e3 * middle, "quartiles_ms": [1e3 * first, 1e3 * third]}


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over rounds of one function's time over another's in the same round."""
    return median(a / b for a, b in zip(times, others, strict=True))
