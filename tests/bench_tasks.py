"""Tasks that workers prepare in tests; a module of its own, since workers import it."""

import os
import resource
import time
from itertools import count

import torch


def constant(value):
    return lambda: value


def unprepared():
    raise ValueError("not today")


def unsendable():
    return lambda: constant(0)


def after(n_calls, end):
    """Return a function that calls `end` at its n-th call."""
    calls = count(1)
    return lambda: end() if next(calls) == n_calls else 0.0


def slow_first(seconds):
    """Return a function that sleeps for `seconds` and for 1 ms in turn."""
    calls = count()
    return lambda: time.sleep(1e-3 if next(calls) % 2 else seconds)


def boom():
    raise RuntimeError("boom")


def die():
    os._exit(3)


def talk():
    """Return a function that writes to the standard output, as Python does and as C does."""

    def function():
        print("from Python", flush=True)
        os.write(1, b"from C\n")
        return "answer"

    return function


def variable(name):
    return lambda: os.environ.get(name)


def faults():
    """Return a function that counts the page faults of allocating 64 MiB."""

    def function():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(64 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return function


def scaled(factor, inputs):
    """Return a function that measures the float64 results times a factor."""
    return lambda: [factor * value for value in inputs.expected]


def broken(inputs):
    """Return a function that measures correctly the first time only, then raises."""
    calls = count()
    return lambda: boom() if next(calls) else inputs.expected


def seen(inputs):
    """Return a function that reports the inputs and the number of threads in its process."""
    return lambda: (inputs.reference, inputs.circuits, torch.get_num_threads())
