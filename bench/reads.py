"""Ways to read every byte of the circuits' logits once; the fastest one sets the limit."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from bench.cases import Inputs


def by_torch(inputs: Inputs) -> Callable[[], float]:
    """Return a function that finds the largest logit with PyTorch."""
    return lambda: torch.stack([q.amax() for q in inputs.circuits]).max().item()


def by_threads(inputs: Inputs) -> Callable[[], int]:
    """Return a function that finds the largest byte with NumPy, in one thread per core."""
    # Read bytes, whatever they mean: NumPy processes 32 of them at a time.
    arrays = [q.view(-1).view(torch.int8).numpy() for q in inputs.circuits]
    n = min(os.cpu_count() or 1, torch.get_num_threads())
    shares = [[part for a in arrays if len(part := _share(a, i, n))] for i in range(n)]
    pool = ThreadPoolExecutor(n)
    return lambda: max(pool.map(lambda share: max(a.max() for a in share), shares)).item()


def _share(array: np.ndarray, i: int, n: int) -> np.ndarray:
    return array[len(array) * i // n : len(array) * (i + 1) // n]


WAYS = {"torch.amax": by_torch, "numpy.max in threads": by_threads}
