"""Let an installed auto_circuit measure its KL divergences with fastkl."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from fastkl.backends import requested
from fastkl.errors import check_backend
from fastkl.functional import kl_div
from fastkl.measure import Batch, EdgeCount, Model, measure_kl_div

__all__ = ["Patch", "patch", "unpatch"]

_TESTED = "1.0.1"
_KL_DIV = "auto_circuit.metrics.prune_metrics.kl_div"
_PRUNE_METRICS = "auto_circuit.metrics.prune_metrics.prune_metrics"
_TENSOR_OPS = "auto_circuit.utils.tensor_ops"
_METRICS = ("CLEAN_KL_DIV_METRIC", "CORRUPT_KL_DIV_METRIC")
_MEASURE, _MULTIBATCH = "measure_kl_div", "multibatch_kl_div"
# For each function to swap: the module that defines it, and the parameters it must take.
_FUNCTIONS = {
    _MEASURE: (_KL_DIV, ("model", "dataloader", "circuit_outs", "compare_to_clean")),
    _MULTIBATCH: (_TENSOR_OPS, ("input_logprobs", "target_logprobs")),
}

_Function = Callable[..., Any]


class _Site(NamedTuple):
    """One attribute to swap: where it is, and what it held before."""

    function: str
    name: str
    owner: object
    attribute: str
    before: Any

    def write(self, value: object) -> None:
        # A PruneMetric is frozen. PRUNE_METRIC_DICT, PRUNE_METRICS and users' code all hold the
        # same object, so it cannot be replaced by a copy: object.__setattr__ bypasses the freeze.
        object.__setattr__(self.owner, self.attribute, value)


class Patch:
    """Record of what one :func:`patch` swapped; a context manager that swaps it back on exit.

    Attributes
    ----------
    sites : tuple of str
        The dotted name of every attribute that was swapped.
    backend : str or None
        The backend asked for; None leaves the choice to fastkl at each call.
    """

    def __init__(
        self, sites: list[_Site], replacements: dict[str, _Function], backend: str | None
    ) -> None:
        self.sites = tuple(site.name for site in sites)
        self.backend = backend
        self._saved = sites
        self._replacements = replacements

    def __enter__(self) -> Patch:
        if self not in _active:
            raise RuntimeError("this patch has been undone: call fastkl.auto_circuit.patch() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            if self in _active:
                _undo(_active.index(self))

    def __repr__(self) -> str:
        state = "active" if self in _active else "undone"
        backend = self.backend or "chosen at each call"
        title = f"fastkl's patch of auto_circuit {_version()} ({state}, backend: {backend})"
        return "\n  ".join([title, *self.sites])


# Patches in force, oldest first. Each has saved what the patch before it put in place.
_active: list[Patch] = []
# A thread holds this lock while it swaps attributes.
_lock = threading.RLock()


def patch(*, backend: str | None = None, progress: bool = True) -> Patch:
    """Make auto_circuit use fastkl wherever it measures KL divergence or trains on it.

    This swaps ``measure_kl_div`` and ``multibatch_kl_div`` in the modules that define them and in
    every module of auto_circuit that has already imported them. It also swaps the ``metric_func``
    of ``CLEAN_KL_DIV_METRIC`` and ``CORRUPT_KL_DIV_METRIC``, which ``PRUNE_METRICS``,
    ``PRUNE_METRIC_DICT`` and ``measure_prune_metrics`` use. The metrics themselves stay the same
    objects.

    The patch applies to the whole process until :func:`unpatch` is called. In a ``with``
    statement, it ends with the block, even if the block raises an exception. If auto_circuit has
    not been imported yet, ``patch`` imports it, which takes seconds.

    Parameters
    ----------
    backend : str, optional
        The backend to measure with, one of :func:`fastkl.available_backends`; None leaves the
        choice to each call, as for :func:`fastkl.measure_kl_div`.
    progress : bool, default True
        Whether to show a progress bar, as auto_circuit does.

    Returns
    -------
    Patch
        Lists what was swapped (``sites``). Used as a context manager, it restores the state
        before this call on exit.

    Raises
    ------
    ImportError
        If auto_circuit is not installed, or one of its own dependencies is not.
    RuntimeError
        If the installed auto_circuit is not one that fastkl can patch: the message names what is
        missing or different, and nothing is changed. Also if the backend cannot run on this
        machine.
    ValueError
        If there is no such backend.

    See Also
    --------
    unpatch : Restore auto_circuit.

    Notes
    -----
    Patches nest. A later patch (``backend="eager"``, say) is in force until its ``with`` block
    ends, which restores the earlier patch. If the earlier patch ends first, both are undone.
    Calling ``patch()`` repeatedly is harmless: one ``unpatch()`` undoes all calls. Threads may
    patch at the same time; the last patch is in force.

    Only modules of auto_circuit are changed. If another module imported a function before the
    patch, as by ``from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div``, it
    keeps that function.

    ``multibatch_kl_div`` takes log-probabilities. These are logits too, so :func:`fastkl.kl_div`
    gives the same divergence. Subnetwork probing and the training of knockouts differentiate it.
    The gradient with respect to a log-probability is then Q - P instead of -P. Backpropagated
    through the log-softmax that computed the log-probability, both give the same gradient.

    A ``PruneMetric`` hashes by its fields, so its hash differs while it is patched. auto_circuit
    itself looks metrics up by ``key``.

    Examples
    --------
    >>> import fastkl.auto_circuit
    >>> with fastkl.auto_circuit.patch() as patched:  # doctest: +SKIP
    ...     measurements = measure_prune_metrics(...)
    >>> patched  # doctest: +SKIP
    fastkl's patch of auto_circuit 1.0.1 (undone, backend: chosen at each call)
      auto_circuit.metrics.prune_metrics.kl_div.measure_kl_div
      ...
      auto_circuit.metrics.prune_metrics.prune_metrics.measure_kl_div
      auto_circuit.metrics.prune_metrics.prune_metrics.CLEAN_KL_DIV_METRIC.metric_func
      auto_circuit.metrics.prune_metrics.prune_metrics.CORRUPT_KL_DIV_METRIC.metric_func
    """
    # Check the backend now: the first measurement may be hours of circuit search away.
    check_backend(backend)
    requested(backend)
    with _lock:
        sites = _find_sites()
        replacements = _replacements(backend, progress)
        patched = Patch(sites, replacements, backend)
        # Record the patch before the first write, so that it can be undone after an interrupt.
        _active.append(patched)
        for site in sites:
            replacement = replacements[site.function]
            if isinstance(site.before, functools.partial):
                before = site.before
                replacement = functools.partial(replacement, *before.args, **before.keywords)
            site.write(replacement)
    return patched


def unpatch() -> tuple[str, ...]:
    """Undo every :func:`patch`: put the objects back that auto_circuit held before.

    Returns
    -------
    tuple of str
        The dotted name of every attribute that was restored; empty if nothing was patched.

    Examples
    --------
    >>> import fastkl.auto_circuit
    >>> fastkl.auto_circuit.unpatch()
    ()
    """
    with _lock:
        return _undo(0)


def _replacements(backend: str | None, progress: bool) -> dict[str, _Function]:
    """Build the replacements: auto_circuit's parameters, then fastkl's as keyword-only ones."""

    def measure(
        model: Model,
        dataloader: Iterable[Batch],
        circuit_outs: Mapping[EdgeCount, Mapping[Any, Tensor]],
        compare_to_clean: bool = True,
        *,
        vocab_size: int | None = None,
        backend: str | None = backend,
        progress: bool = progress,
    ) -> list[tuple[EdgeCount, float]]:
        return measure_kl_div(
            model,
            dataloader,
            circuit_outs,
            compare_to_clean,
            vocab_size=vocab_size,
            backend=backend,
            progress=progress,
        )

    def multibatch(input_logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
        """Return the mean KL(target ‖ input), in nats, of rows of log-probabilities (..., V)."""
        return kl_div(input_logprobs, target_logprobs, backend=backend)

    measure.__doc__ = measure_kl_div.__doc__
    functions: dict[str, _Function] = {_MEASURE: measure, _MULTIBATCH: multibatch}
    for name, function in functions.items():
        function.__name__ = function.__qualname__ = name
    return functions


def _find_sites() -> list[_Site]:
    """List every attribute to swap; raise an error that names each unexpected one."""
    # Import the package first, so that its absence is not reported as that of a module in it.
    _import("auto_circuit")
    prune_metrics = _import(_PRUNE_METRICS)
    problems: list[str] = []
    copies: dict[str, list[_Site]] = {}
    originals: dict[str, Any] = {}
    for name, (module_name, wanted) in _FUNCTIONS.items():
        original = originals[name] = getattr(_import(module_name), name, None)
        if original is None:
            raise _mismatch([f"{module_name}.{name} is missing"])
        # An earlier patch may have put fastkl's function here: skip its keyword-only parameters.
        ours = getattr(original, "__module__", None) == __name__
        parameters = tuple(
            name
            for name, parameter in inspect.signature(original).parameters.items()
            if not (ours and parameter.kind is parameter.KEYWORD_ONLY)
        )
        if parameters != wanted:
            raise _mismatch([f"{module_name}.{name} takes ({', '.join(parameters)})"])
        copies[name] = list(_copies(name, original))

    sites = copies[_MEASURE]
    if getattr(prune_metrics, _MEASURE, None) is not originals[_MEASURE]:
        problems.append(_problem(prune_metrics, _MEASURE))
    for name in _METRICS:
        metric = getattr(prune_metrics, name, None)
        before = getattr(metric, "metric_func", None)
        if isinstance(before, functools.partial) and before.func is originals[_MEASURE]:
            where = f"{_PRUNE_METRICS}.{name}.metric_func"
            sites.append(_Site(_MEASURE, where, metric, "metric_func", before))
        else:
            problems.append(_problem(prune_metrics, name))
    if problems:
        raise _mismatch(problems)
    return sites + copies[_MULTIBATCH]


def _copies(name: str, function: _Function) -> Iterator[_Site]:
    """Yield a site for each attribute of an auto_circuit module that is this function object."""
    # Iterate over copies, because another thread may be importing modules.
    for module_name, module in sorted(sys.modules.copy().items()):
        if module_name.partition(".")[0] != "auto_circuit" or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if value is function:
                yield _Site(name, f"{module_name}.{attribute}", module, attribute, function)


def _undo(first: int) -> tuple[str, ...]:
    """Undo the active patches from `first` on, newest first; return the names restored."""
    names: list[str] = []
    while len(_active) > first:
        patched = _active[-1]
        for site in patched._saved:
            site.write(site.before)
            names.append(site.name)
        # Modules imported since the patch hold the replacement. Give them the function that they
        # would have imported without the patch.
        for name, replacement in patched._replacements.items():
            original = next(site.before for site in patched._saved if site.function == name)
            for late in list(_copies(name, replacement)):
                late.write(original)
                names.append(late.name)
        _active.pop()
    return tuple(dict.fromkeys(names))


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "auto_circuit":
            raise ModuleNotFoundError(
                "auto_circuit is not installed: in a clone of fastkl, "
                'pip install -e ".[auto-circuit]"',
                name=missing,
            ) from error
        if missing.startswith("auto_circuit."):
            raise _mismatch([f"{missing} is missing"]) from error
        raise


def _problem(module: ModuleType, attribute: str) -> str:
    name = f"{module.__name__}.{attribute}"
    if not hasattr(module, attribute):
        return f"{name} is missing"
    return f"{name} does not hold {_KL_DIV}.{_MEASURE}"


def _mismatch(problems: list[str]) -> RuntimeError:
    return RuntimeError(
        f"cannot patch auto_circuit {_version()} (fastkl is tested with {_TESTED}), "
        f"nothing was changed: {'; '.join(problems)}"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("auto-circuit")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
