"""The ways to measure circuits that are compared with each other.

A peer is prepared with the inputs. Preparation is not timed: it converts the inputs to another
library's arrays, without a copy where possible. The first call, which compiles, is not timed
either. The prepared function takes no arguments and returns one KL per circuit, in nats per row, as
Python floats, like `measure_kl_div`.
"""

import contextlib
import functools
import importlib.util
import io
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkl
from bench.cases import Case, Inputs

Measure = Callable[[], list[float]]
# The names of the package's own peers start with this.
OURS = "fastkl "


@dataclass(frozen=True)
class Peer:
    """One way to measure.

    Attributes
    ----------
    name, what : str
        Its name, and a description of what it does.
    prepare : function
        Takes inputs, and returns a function that measures them; can be pickled.
    missing : function
        Says why it cannot measure a case here; None if it can.
    tolerance : function
        Takes a case, and returns (relative, absolute), the largest error that may be timed.
    """

    name: str
    what: str
    prepare: Callable[[Inputs], Measure]
    missing: Callable[[Case], str | None]
    tolerance: Callable[[Case], tuple[float, float]]

    def error(self, values: Sequence[float], inputs: Inputs) -> tuple[float, float]:
        """Return the largest errors of a result against float64: absolute in nats, and relative.

        Raises
        ------
        ValueError
            The result is further off than the tolerance.
        """
        relative, absolute = self.tolerance(inputs.case)
        pairs = list(zip(values, inputs.expected, strict=True))
        for k, (value, expected) in enumerate(pairs):
            # Not >: a NaN is wrong too.
            if not abs(value - expected) <= relative * expected + absolute:
                raise ValueError(
                    f"{self.name}: circuit {k} of {inputs.case} measured {value:.9g}, "
                    f"float64 says {expected:.9g}"
                )
        return (
            max(abs(value - expected) for value, expected in pairs),
            max(abs(value - expected) / expected for value, expected in pairs),
        )


def prepared(
    prepare: Callable[[Inputs], Callable[[], object]], case: Case, file: Path, n_threads: int
) -> Callable[[], object]:
    """Prepare a function with shared inputs, in a process that does nothing else."""
    torch.set_num_threads(n_threads)
    return prepare(Inputs(case, file=file))


def _prepare_fastkl(backend: str, inputs: Inputs) -> Measure:
    model, loader, outs = inputs.arguments

    def measure() -> list[float]:
        result = fastkl.measure_kl_div(model, loader, outs, backend=backend, progress=False)
        return [kl for _, kl in result]

    return measure


def _fastkl(backend: str) -> Peer:
    return Peer(
        OURS + backend,
        f'`fastkl.measure_kl_div(..., backend="{backend}")`',
        functools.partial(_prepare_fastkl, backend),
        lambda _: fastkl.unavailable_backends().get(backend),
        # The package's promise.
        lambda _: (1e-5, 1e-8),
    )


def _of_half(float32: tuple[float, float]) -> Callable[[Case], tuple[float, float]]:
    """Return a tolerance with room for bfloat16, for a peer that computes in the logits' dtype."""
    return lambda case: float32 if case.dtype == "float32" else (0.1, 0.1)


_TEXTBOOK = (1e-4, 1e-5)


def _auto_circuit(inputs: Inputs) -> Measure:
    from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div  # noqa: PLC0415

    model, loader, outs = inputs.arguments

    def measure() -> list[float]:
        # Hide its progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            return [float(kl) for _, kl in measure_kl_div(model, loader, outs)]

    return measure


def _auto_circuit_arithmetic(inputs: Inputs) -> Measure:
    model, loader, outs = inputs.arguments

    def measure() -> list[float]:
        with torch.inference_mode():
            log_p = {b.key: model(b.clean)[model.out_slice].log_softmax(-1) for b in loader}
            result = []
            for outputs in outs.values():
                pairs = [(outputs[b.key].log_softmax(-1), log_p[b.key]) for b in loader]
                log_q, target = (torch.cat(side) for side in zip(*pairs, strict=True))
                total = F.kl_div(log_q, target, reduction="sum", log_target=True)
                result.append(max((total / math.prod(target.shape[:-1])).item(), 0.0))
        return result

    return measure


def _textbook(inputs: Inputs) -> Measure:
    def measure() -> list[float]:
        with torch.inference_mode():
            log_p = inputs.reference.log_softmax(-1, dtype=torch.float32)
            log_qs = (q.log_softmax(-1, dtype=torch.float32) for q in inputs.circuits)
            sums = [F.kl_div(log_q, log_p, reduction="sum", log_target=True) for log_q in log_qs]
            return (torch.stack(sums) / inputs.case.n_rows).tolist()

    return measure


def _shared(p: Tensor) -> tuple[Tensor, Tensor]:
    log_p = p.log_softmax(-1, dtype=torch.float32)
    return log_p, log_p.exp()


def _definition(q: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    return (p * (log_p - q.log_softmax(-1, dtype=torch.float32))).sum(-1)


def _compiled(inputs: Inputs) -> Measure:
    # Compile for this very shape: after another shape, sizes would become variables.
    torch.compiler.reset()
    shared, definition = (torch.compile(f, dynamic=False) for f in (_shared, _definition))

    def measure() -> list[float]:
        with torch.inference_mode():
            log_p, p = shared(inputs.reference)
            rows = torch.stack([definition(q, log_p, p) for q in inputs.circuits])
            return rows.mean(-1).tolist()

    return measure


def _no_compiler(_: Case) -> str | None:
    if any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return None
    return "no C++ compiler on PATH"


def _jax(inputs: Inputs) -> Measure:
    import jax  # noqa: PLC0415

    @jax.jit
    def shared(p):
        log_p = jax.nn.log_softmax(p.astype("float32"))
        return log_p, jax.numpy.exp(log_p)

    # One call per circuit was faster than all circuits in one function, as a list or stacked.
    @jax.jit
    def definition(q, log_p, p):
        return (p * (log_p - jax.nn.log_softmax(q.astype("float32")))).sum(-1).mean()

    circuits = [jax.dlpack.from_dlpack(q) for q in inputs.circuits]
    reference = jax.dlpack.from_dlpack(inputs.reference)

    def measure() -> list[float]:
        log_p, p = shared(reference)
        return [kl.item() for kl in [definition(q, log_p, p) for q in circuits]]

    return measure


def _scipy(inputs: Inputs) -> Measure:
    from scipy.special import rel_entr, softmax  # noqa: PLC0415

    circuits, reference = [q.numpy() for q in inputs.circuits], inputs.reference.numpy()

    def measure() -> list[float]:
        p = softmax(reference, axis=-1)
        return [rel_entr(p, softmax(q, axis=-1)).sum().item() / len(p) for q in circuits]

    return measure


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _needs(package: str) -> Callable[[Case], str | None]:
    return lambda _: None if _installed(package) else "not installed"


def _scipy_missing(case: Case) -> str | None:
    if case.dtype == "bfloat16":
        return "NumPy has no bfloat16"
    if case.n_pairs > Case().n_pairs:
        return "not run: slow"
    return _needs("scipy")(case)


def all_peers() -> list[Peer]:
    """Return all peers, even those that cannot run here; auto_circuit's comes first."""
    original = "auto_circuit"
    if _installed(original):
        auto_circuit = Peer(
            original,
            "auto_circuit's own `measure_kl_div`",
            _auto_circuit,
            lambda _: None,
            _of_half(_TEXTBOOK),
        )
    else:
        auto_circuit = Peer(
            f"{original}'s arithmetic",
            "two `log_softmax`, two `cat`, `F.kl_div` a circuit, the reference's once",
            _auto_circuit_arithmetic,
            lambda _: None,
            _of_half(_TEXTBOOK),
        )
    return [
        auto_circuit,
        Peer(
            "eager torch",
            "`log_softmax` and `F.kl_div` a circuit, the reference's `log_softmax` once",
            _textbook,
            lambda _: None,
            lambda _: _TEXTBOOK,
        ),
        Peer(
            "torch.compile",
            "Σ P (log P − log Q) by `log_softmax`, compiled for the shape, P and log P once",
            _compiled,
            _no_compiler,
            lambda _: _TEXTBOOK,
        ),
        Peer(
            "JAX jit",
            "the same",
            _jax,
            _needs("jax"),
            lambda _: _TEXTBOOK,
        ),
        Peer(
            "scipy",
            "`scipy.special.rel_entr` of two `softmax`",
            _scipy,
            _scipy_missing,
            _of_half(_TEXTBOOK),
        ),
        _fastkl("eager"),
        _fastkl("native"),
    ]
