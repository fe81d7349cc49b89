"""What workers are asked to prepare under test: they import it, so it stands apart from the tests."""

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
    """A function that ends at its n-th call."""
    calls = count(1)
    return lambda: end() if next(calls) == n_calls else 0.0


def slow_first(seconds):
    """A function that sleeps, every other time as good as not at all."""
    calls = count()
    return lambda: time.sleep(1e-3 if next(calls) % 2 else seconds)


def boom():
    raise RuntimeError("boom")


def die():
    os._exit(3)


def talk():
    """A function that writes to the standard output, by Python's way and by C's."""

    def function():
        print("from Python", flush=True)
        os.write(1, b"from C\n")
        return "answer"

    return function


def variable(name):
    return lambda: os.environ.get(name)


def faults():
    """A function that counts the pages it gets from the system for 64 MiB."""

    def function():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(64 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return function


def scaled(factor, inputs):
    """Measures what float64 says, times a factor."""
    return lambda: [factor * value for value in inputs.expected]


def broken(inputs):
    """Measures right the first time only."""
    calls = count()
    return lambda: boom() if next(calls) else inputs.expected


def seen(inputs):
    """A function that tells of the inputs and the threads in its process."""
    return lambda: (inputs.reference, inputs.circuits, torch.get_num_threads())
