"""`measure_kl_div`, a drop-in replacement for auto_circuit's function of the same name."""

import sys
import warnings
from collections.abc import Hashable, Iterable, Mapping
from operator import length_hint
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import TqdmWarning

from fastkl import backends, errors, functional

with warnings.catch_warnings():
    # In a notebook without ipywidgets, tqdm warns and shows a text bar, which will do.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

EdgeCount = TypeVar("EdgeCount", bound=Hashable)


class Model(Protocol):
    """A callable that turns prompts into an output, and knows which part of it is the logits."""

    @property
    def out_slice(self) -> Any:
        """The index that picks the logits (B, V) or (B, S, V) from an output."""

    def __call__(self, prompts: Any, /) -> Tensor:
        """Run the model."""


class Batch(Protocol):
    """A batch of prompt pairs."""

    @property
    def key(self) -> Hashable:
        """The key by which this batch's logits are looked up in every circuit's outputs."""

    @property
    def clean(self) -> Any:
        """The clean prompts."""

    @property
    def corrupt(self) -> Any:
        """The corrupt prompts."""


def measure_kl_div(
    model: Model,
    dataloader: Iterable[Batch],
    circuit_outs: Mapping[EdgeCount, Mapping[Any, Tensor]],
    compare_to_clean: bool = True,
    *,
    vocab_size: int | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> list[tuple[EdgeCount, float]]:
    r"""Average KL divergence between the full model and its circuits, for every circuit size.

    For each circuit, this is the mean over all rows of

    .. math:: KL(P ‖ Q) = \sum_v P_v (\log P_v - \log Q_v)

    with P the softmax of the full model's logits and Q that of the circuit's. A row is one
    distribution, so all positions of `(B, S, V)` logits count alike, including padding.

    This is a drop-in replacement for auto_circuit's function of the same name. It iterates over the
    loader once, runs the model once per batch under :func:`torch.inference_mode`, measures all
    circuits of a batch in one call, keeps sums in float64, and waits for the device once, at the
    end.

    Parameters
    ----------
    model : Model
        The full model. It is called with a batch's prompts, and `model.out_slice` picks the logits
        `(B, V)` or `(B, S, V)` from its output.
    dataloader : iterable of Batch
        Batches with the attributes `key`, `clean` and `corrupt`. They must be the same batches as
        when the circuits were run, in any order.
    circuit_outs : mapping {edge_count: {batch key: Tensor}}
        Logits of each circuit for each batch, of the shape and on the device of the logits that
        `model.out_slice` picks: float32, float16, bfloat16 or float64. Outputs for other batches
        are ignored. Each output is fetched once, when its batch is measured, so the mappings may
        load outputs lazily.
    compare_to_clean : bool
        Whether the full model runs on the clean (True) or the corrupt (False) prompts.
    vocab_size : int, optional
        Only the first `vocab_size` tokens count. Padding beyond them is not read, and the circuits
        may be padded differently from the model's output.
    backend : str, optional
        "eager", "native" or "triton". If None, the environment variable FASTKL_BACKEND decides; if
        that is not set, the device does. See :func:`fastkl.available_backends`.
    progress : bool
        Show a progress bar over batches, if the output is a terminal or a notebook.

    Returns
    -------
    list of (edge_count, float)
        Each circuit's mean divergence in nats per row, in the order of `circuit_outs`. It is never
        negative, and exactly 0 for a circuit whose logits are the model's. NaN and infinities are
        kept (see :func:`fastkl.kl_div` for when they arise). If there are no circuits, the result
        is `[]`, and the model is not run.

    Raises
    ------
    KeyError
        A circuit has no output for a batch.
    TypeError
        An argument, a batch or its key, or logits are not of the kind described above.
    ValueError
        Shapes, vocabularies or devices differ; vocab_size exceeds the number of tokens or is less
        than 1; the backend is unknown; or the loader gave no rows.
    RuntimeError
        The requested backend cannot run here, or no backend can run on the logits' device.

    References
    ----------
    .. [1] S. Kullback and R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
       Statistics 22 (1951).
    .. [2] auto_circuit, https://github.com/UFO-101/auto-circuit.

    Examples
    --------
    >>> import torch, fastkl
    >>> from types import SimpleNamespace
    >>> class Doubler:
    ...     out_slice = (slice(None), -1)
    ...     def __call__(self, prompts):
    ...         return 2 * prompts
    >>> prompts = torch.tensor([[[1.0, 2.0, 3.0], [2.0, 0.0, 1.0]]])
    >>> loader = [SimpleNamespace(key=7, clean=prompts, corrupt=-prompts)]
    >>> outs = {0: {7: torch.zeros(1, 3)}, 2: {7: torch.tensor([[4.0, 0.0, 2.0]])}}
    >>> [(edges, round(kl, 4)) for edges, kl in fastkl.measure_kl_div(Doubler(), loader, outs)]
    [(0, 0.6576), (2, 0.0)]
    """
    errors.check_circuit_outs(circuit_outs)
    if not circuit_outs:
        return []
    errors.check_model(model)
    errors.check_dataloader(dataloader)
    errors.check_compare_to_clean(compare_to_clean)
    errors.check_vocab_size(vocab_size)
    errors.check_backend(backend)
    backends.requested(backend)

    inputs = "clean" if compare_to_clean else "corrupt"
    totals: Tensor | None = None
    n_batches = n_rows = 0
    with torch.inference_mode():
        for batch in _with_bar(dataloader, progress):
            n_batches += 1
            errors.check_batch(batch, inputs)
            rows = _batch_rows(
                model, batch.key, getattr(batch, inputs), circuit_outs, vocab_size, backend
            )
            sums = rows.sum(dim=1, dtype=torch.float64)
            totals = sums if totals is None else totals.add_(sums.to(totals.device))
            n_rows += rows.shape[1]
    if totals is None or n_rows == 0:
        raise errors.no_rows(n_batches)
    return list(zip(circuit_outs, (totals / n_rows).tolist(), strict=True))


def _batch_rows(
    model: Model,
    key: Hashable,
    prompts: Any,
    circuit_outs: Mapping[EdgeCount, Mapping[Any, Tensor]],
    vocab_size: int | None,
    backend: str | None,
) -> Tensor:
    """Return the divergences (K, R) of a batch.

    This is a separate function so that a batch's logits are freed before those of the next batch
    are loaded or computed.
    """
    circuits = _outputs_for(key, circuit_outs, vocab_size)
    reference = _logits(model, prompts)
    errors.check_logits(reference, "the model's output")
    errors.check_vocab_fits(vocab_size, reference, "the model's output")
    reference = _without_padding(reference, vocab_size)
    for edge_count, circuit in zip(circuit_outs, circuits, strict=True):
        name = f"circuit_outs[{edge_count!r}][{key!r}]"
        errors.check_pair(circuit, reference, name, sliced=True)
    return functional.kl_rows(circuits, reference, backend=backend)


def _with_bar(dataloader: Iterable[Batch], progress: bool) -> Iterable[Batch]:
    """Return the loader's batches, with a progress bar if it can be seen."""
    # A notebook shows bars although its output is not a terminal. Its IPython shell has a `kernel`,
    # which the shell in a terminal does not have.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # With disable=None, tqdm shows nothing if the output is not a terminal.
    hidden = None if getattr(shell, "kernel", None) is None else False
    try:
        total = length_hint(dataloader)
    except Exception:
        # A loader over a stream may raise an error here: the bar then shows no total.
        total = 0
    # Pass an iterator: tqdm.auto's bar calls iter() twice, which would start a loader twice.
    batches: Iterable[Batch] = tqdm(
        iter(dataloader),
        desc="KL divergence",
        total=total or None,
        disable=hidden if progress else True,
    )
    return batches


def _logits(model: Model, prompts: Any) -> Any:
    """Run the model; return what its out_slice picks, which is not yet checked to be logits."""
    output = model(prompts)
    try:
        return output[model.out_slice]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise errors.unusable_output(output, error) from error


def _outputs_for(
    key: Hashable, circuit_outs: Mapping[EdgeCount, Mapping[Any, Tensor]], vocab_size: int | None
) -> list[Tensor]:
    """Return all circuits' logits for a batch, checked as far as possible without the reference."""
    errors.check_batch_key(key)
    circuits = []
    for edge_count, outputs in circuit_outs.items():
        # Test for the key first: indexing a defaultdict would create an entry.
        if key not in outputs:
            raise errors.missing_batch_key(edge_count, key, circuit_outs)
        # Fetch once: when a mapping is indexed, it may run a circuit or load its output.
        logits, name = outputs[key], f"circuit_outs[{edge_count!r}][{key!r}]"
        errors.check_logits(logits, name)
        errors.check_vocab_fits(vocab_size, logits, name)
        circuits.append(_without_padding(logits, vocab_size))
    return circuits


def _without_padding(logits: Tensor, vocab_size: int | None) -> Tensor:
    """Return a view of the logits of the tokens that count."""
    return logits if vocab_size is None else logits[..., : int(vocab_size)]
