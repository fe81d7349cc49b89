"""Sizes and seeded logits to measure on, and their divergences in float64."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SEED = 20261123
_KEY = 0
# Range of the standard deviation of the noise that is added to the reference's logits. The
# circuits' deviations are log-spaced between these two numbers; each row multiplies its circuit's
# by a random factor between 1/2 and 2.
_NOISE = {
    "mixed": (1e-3, 3.0),
    "small": (1e-3, 3e-2),
    "large": (3.0, 6.0),
    # Here the noise of a token is also multiplied by 1 + the square of how far its logit lies below
    # the row's largest: unlikely tokens move by far more than likely ones, and divergences stay
    # below 0.1 or so.
    "unlikely": (1e-3, 5e-3),
}
KINDS = tuple(_NOISE)


@dataclass(frozen=True)
class Case:
    """One point of the grid; the defaults are the main case."""

    n_circuits: int = 20
    n_rows: int = 64
    n_vocabulary: int = 50257
    dtype: str = "float32"
    divergences: str = "mixed"

    def __str__(self) -> str:
        sizes = f"K={self.n_circuits} R={self.n_rows} V={self.n_vocabulary}"
        return f"{sizes} {self.dtype} {self.divergences}"

    @property
    def n_pairs(self) -> int:
        """Pairs of a logit of the reference and a logit of a circuit."""
        return self.n_circuits * self.n_rows * self.n_vocabulary

    @property
    def bytes_circuits(self) -> int:
        """Bytes of the circuits' logits."""
        return self.n_pairs * getattr(torch, self.dtype).itemsize

    @property
    def bytes_read(self) -> int:
        """Bytes of all logits, including the reference's, which must be read at least once."""
        return self.bytes_circuits // self.n_circuits * (self.n_circuits + 1)


class Lookup:
    """A model that returns its prompts (R, 1, V) as its outputs: running it costs nothing."""

    out_slice = (slice(None), -1)

    def __call__(self, prompts: Tensor) -> Tensor:
        """Return the prompts."""
        return prompts


class Inputs:
    """A case's logits, as tensors and as the arguments of `measure_kl_div`.

    The reference is randn · 3, a circuit adds noise to it, and both are rounded to the dtype.

    Parameters
    ----------
    case : Case
        Sizes, dtype and the magnitudes of the divergences.
    seed : int
        The same seed gives the same logits.
    file : Path, optional
        A `shared` file of this case's logits, which are then memory-mapped instead of generated.
    """

    def __init__(self, case: Case, seed: int = SEED, file: Path | None = None) -> None:
        self.case = case
        self.reference: Tensor
        self.circuits: list[Tensor]
        self.reference, *self.circuits = (
            _make(case, seed) if file is None else torch.load(file, mmap=True, weights_only=True)
        )

    @property
    def arguments(self) -> tuple[Lookup, list[Any], dict[int, dict[int, Tensor]]]:
        """Model, loader of one batch, and circuits' outputs, for `measure_kl_div`."""
        prompts = self.reference[:, None]
        batch = SimpleNamespace(key=_KEY, clean=prompts, corrupt=prompts)
        return Lookup(), [batch], {k: {_KEY: q} for k, q in enumerate(self.circuits)}

    @cached_property
    def rows64(self) -> Tensor:
        """KL(reference ‖ circuit) of every row (K, R), computed in float64."""
        return kl_rows64(self.circuits, self.reference)

    @property
    def expected(self) -> list[float]:
        """KL of every circuit, the mean over its rows, in float64."""
        return self.rows64.mean(-1).tolist()


@contextlib.contextmanager
def shared(case: Case, seed: int = SEED) -> Iterator[Path]:
    """Write a case's logits to a file, so that all processes can map the same memory.

    Mappings are private: no process sees what another one writes to its own. The file lies in
    memory (/dev/shm) if there is room, and is removed at the end.
    """
    memory = Path("/dev/shm")
    # The file's own structure takes one page per tensor.
    needed = case.bytes_read + 2**20
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        file = Path(folder) / "logits.pt"
        torch.save(_make(case, seed), file)
        yield file


def kl_rows64(circuits: Sequence[Tensor], reference: Tensor) -> Tensor:
    """Return KL(reference ‖ circuit) of finite logits (R, V), for every row (K, R), in float64.

    It sums the definition term by term. Its own absolute rounding error is about 1e-14.
    """
    log_p = reference.double().log_softmax(-1)
    p = log_p.exp()
    return torch.stack([(log_p - q.double().log_softmax(-1)).mul_(p).sum(-1) for q in circuits])


def _make(case: Case, seed: int) -> list[Tensor]:
    """Return the reference's logits (R, V), then those of the circuits."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    shape = (case.n_rows, case.n_vocabulary)
    reference = 3 * torch.randn(shape, generator=generator)
    logits = [reference.to(dtype)]
    for level in _levels(case):
        factor = 2 ** (2 * torch.rand(case.n_rows, 1, generator=generator) - 1)
        noise = torch.randn(shape, generator=generator).mul_(level * factor)
        if case.divergences == "unlikely":
            noise.mul_((reference.amax(-1, keepdim=True) - reference).square_().add_(1))
        logits.append(noise.add_(reference).to(dtype))
    return logits


def _levels(case: Case) -> list[float]:
    low, high = _NOISE[case.divergences]
    last = case.n_circuits - 1
    # A single circuit takes the (geometric) middle of the range.
    steps = [k / last for k in range(case.n_circuits)] if last else [0.5]
    return [low * (high / low) ** step for step in steps]
