"""Checks of users' arguments, and the messages of the errors that they raise.

The checks run before any computation. They look at arguments' types, shapes, dtypes and devices,
never at the contents of tensors. Each backend itself reports what it is missing.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

# A private module of PyTorch. If it moves, transforms are no longer refused, but all else works.
_functorch: Any = getattr(torch._C, "_functorch", None)
_is_batched = getattr(_functorch, "is_batchedtensor", lambda _: False)
_is_tracking = getattr(_functorch, "is_gradtrackingtensor", lambda _: False)

Reduction = Literal["none", "sum", "mean", "batchmean"]
Direction = Literal["forward", "reverse"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
DIRECTIONS: tuple[str, ...] = get_args(Direction)
_SINGLE = "; a single circuit goes to kl_div, or as [circuit]"
_INSTEAD = "use .backward() or torch.autograd.grad, or write the divergence with torch.log_softmax"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that is not one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        got = repr(reduction) if isinstance(reduction, str) else type(reduction).__name__
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {got}")


def check_direction(direction: str) -> None:
    """Refuse a direction that is not one of DIRECTIONS."""
    if direction not in DIRECTIONS:
        got = repr(direction) if isinstance(direction, str) else type(direction).__name__
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {got}")


def check_temperature(temperature: object) -> None:
    """Refuse a temperature that is not a positive, finite number."""
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise _no_number(temperature, "temperature")
    if not 0 < _as_float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_beta(beta: object) -> None:
    """Refuse a beta that is not a number strictly between 0 and 1."""
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise _no_number(beta, "beta")
    if not 0 < _as_float(beta) < 1:
        raise ValueError(
            f"beta must be more than 0 and less than 1, got {beta}: at 0 and 1 the Jensen-Shannon "
            f"divergence is 0. Use kl_div for its limits: as beta goes to 0, divergence / beta goes to "
            f"kl_div with direction='forward'; as beta goes to 1, divergence / (1 - beta) goes to "
            f"direction='reverse'"
        )


def _no_number(value: object, name: str) -> TypeError:
    # Tensors are refused too: reading one would silently wait for its device and lose its gradient.
    instead = ""
    if isinstance(value, Tensor) and value.requires_grad:
        instead = f": there is no gradient with respect to {name}"
        if name == "temperature":
            instead += "; to learn it, divide the logits of both sides by it"
    elif isinstance(value, Tensor) and value.numel() == 1:
        instead = f": pass {name}.item()"
    return TypeError(f"{name} must be a number, got {type(value).__name__}{instead}")


def _as_float(number: Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.nan


def check_vocab_size(vocab_size: object) -> None:
    """Refuse a vocab_size that cannot be a number of tokens."""
    if vocab_size is None:
        return
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral):
        raise TypeError(f"vocab_size must be an integer, got {type(vocab_size).__name__}")
    if int(vocab_size) < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")


def check_vocab_fits(vocab_size: int | None, logits: Tensor, name: str) -> None:
    """Refuse a vocab_size that exceeds the number of logits in a row."""
    if vocab_size is not None and vocab_size > logits.shape[-1]:
        raise ValueError(
            f"vocab_size must be at most {logits.shape[-1]}, the number of tokens of {name} with shape "
            f"{tuple(logits.shape)}; got {vocab_size}"
        )


def check_row_values(values: object, reference: Tensor, name: str, *, boolean: bool) -> None:
    """Refuse a mask or weights that do not hold one value of the right dtype per row."""
    if values is None:
        return
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    if boolean and values.dtype != torch.bool:
        cast = f": pass {name}.bool()"
        if values.is_floating_point():
            cast += "; fractions go into weights"
        raise TypeError(
            f"{name} must be boolean, True for rows that count; got {values.dtype}{cast}"
        )
    if not boolean and not values.is_floating_point():
        instead = "; pass a boolean tensor as mask" if values.dtype == torch.bool else ""
        raise TypeError(f"{name} must be floating-point, got {values.dtype}{instead}")
    if values.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {values.layout}")
    if values.shape != reference.shape[:-1]:
        raise ValueError(
            f"{name} must have one value per row: shape {tuple(reference.shape[:-1])} for logits of "
            f"shape {tuple(reference.shape)}; got {tuple(values.shape)}"
        )
    if values.device != reference.device:
        raise ValueError(
            f"{name} and the logits must be on the same device, got {values.device} and "
            f"{reference.device}"
        )


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """Return the names of dtypes, separated by commas."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_logits(logits: object, name: str) -> None:
    """Refuse anything but a dense tensor of logits (..., V)."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of logits, got {type(logits).__name__}{_with_logits(logits)}"
        )
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{name} must hold logits of dtype {names_of(_DTYPES)}; got {logits.dtype}")
    if logits.layout != torch.strided or logits.is_nested:
        what = "a nested one" if logits.is_nested else f"layout {logits.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {what}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        # A single circuit (V,), passed as the sequence of circuits, falls apart into scalars.
        single = _SINGLE if name == "circuits[0]" and logits.dim() == 0 else ""
        raise ValueError(
            f"{name} must have shape (..., V) with a vocabulary of at least one token, "
            f"got {tuple(logits.shape)}{single}"
        )


def are_alike(circuits: Sequence[object], reference: Tensor) -> bool:
    """Return whether circuits are dense tensors of a reference's shape, dtype and device.

    If the reference is valid, such circuits are valid too. This check takes half the time of
    checking each circuit for every possible mistake, which matters in calls with many circuits.
    """
    shape, dtype, device = reference.shape, reference.dtype, reference.device
    return all(
        isinstance(circuit, Tensor)
        and circuit.layout is torch.strided
        and not circuit.is_nested
        and circuit.dtype is dtype
        and circuit.shape == shape
        and circuit.device == device
        for circuit in circuits
    )


def _with_logits(output: object) -> str:
    """Return the hint to pass the attribute `logits` of a model's output, if it has one."""
    return "; it has .logits: pass those" if hasattr(output, "logits") else ""


def check_circuits(circuits: object) -> None:
    """Refuse anything but an iterable of circuits or a Tensor of them."""
    wanted = "circuits must be an iterable of Tensors, or one Tensor of them stacked (K, ..., V)"
    if isinstance(circuits, Tensor):
        if circuits.dim() == 0:
            raise ValueError(f"{wanted}; got ()")
    elif isinstance(circuits, (Mapping, str)) or not _is_iterable(circuits):
        values = ": pass its values()" if isinstance(circuits, Mapping) else ""
        raise TypeError(f"{wanted}; got {type(circuits).__name__}{values}{_with_logits(circuits)}")


def _is_iterable(value: object) -> bool:
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def check_pair(
    circuit: Tensor, reference: Tensor, name: str = "circuit", *, sliced: bool = False
) -> None:
    """Refuse a circuit whose vocabulary, shape or device is not the reference's.

    Both must be known to be logits. With `sliced`, the messages add that the reference is what
    model.out_slice picks from the model's output.
    """
    if circuit.shape == reference.shape and circuit.device == reference.device:
        return
    source = (
        "; the reference is what model.out_slice picks from the model's output" if sliced else ""
    )
    if circuit.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"{name} and reference must have the same vocabulary, got {circuit.shape[-1]} tokens "
            f"in shape {tuple(circuit.shape)} and {reference.shape[-1]} in "
            f"{tuple(reference.shape)}; if one is padded, pass vocab_size=, the number of tokens that "
            f"they share{source}"
        )
    if circuit.shape != reference.shape:
        raise ValueError(
            f"{name} and reference must have the same shape, got {tuple(circuit.shape)} and "
            f"{tuple(reference.shape)}{source}{_likely_mistake(circuit, reference, name)}"
        )
    raise ValueError(
        f"{name} and reference must be on the same device, got {circuit.device} and "
        f"{reference.device}"
    )


def _likely_mistake(circuit: Tensor, reference: Tensor, name: str) -> str:
    """Return a hint at the likely mistake, if the shapes differ by leading dimensions only."""
    # A single circuit, passed as the sequence of circuits, falls apart along its first dimension.
    if name == "circuits[0]" and circuit.shape == reference.shape[1:]:
        return _SINGLE
    if name == "circuits[0]" and circuit.shape == reference.shape[2:]:
        return "; the circuits come first, then the reference: are they swapped?"
    return ""


def check_rows(
    circuits: Sequence[Tensor],
    reference: Tensor,
    *,
    grad: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Refuse logits that are not rows (R, V) or (B, S, V), or that do not match one another."""
    if reference.dim() not in (2, 3) or reference.shape[-1] == 0:
        raise ValueError(
            f"reference must be rows (R, V), or (B, S, V), of at least one token; "
            f"got {tuple(reference.shape)}"
        )
    whole, device = reference.shape, reference.device
    for k, circuit in enumerate(circuits):
        # Compare here first: making a name for each circuit takes as long as the comparison.
        if circuit.shape != whole or circuit.device != device:
            check_pair(circuit, reference, f"circuits[{k}]")
    shape = (len(circuits), math.prod(reference.shape[:-1]))
    if grad is not None and grad.shape != shape:
        raise ValueError(f"grad must have the divergences' shape {shape}, got {tuple(grad.shape)}")
    if kept is not None and kept.shape[-1] and kept.shape[:-1] != shape:
        raise ValueError(
            f"kept must be what the divergences {shape} were returned with, got {tuple(kept.shape)}"
        )


def check_transforms(logits: Sequence[Tensor]) -> None:
    """Refuse derivatives for which the operators have no rules; PyTorch would treat some as 0.

    Tensors that `torch.vmap` batches pass: the operators' vmap rules check the tensors inside.
    """
    if torch.compiler.is_compiling():
        # A compiler does not see the tangents of its inputs: refuse forward mode altogether.
        if getattr(forward_ad, "_current_level", -1) >= 0:
            raise _no_forward_mode()
        return
    forward = getattr(forward_ad, "_current_level", 0) >= 0
    backward = torch.is_grad_enabled()
    for t in logits:
        if forward and not _is_batched(t):
            unpacked = forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call]
            if unpacked.tangent is not None:
                raise _no_forward_mode()
        if backward and t.requires_grad and _is_tracking(t):
            raise RuntimeError(
                "fastkl's gradients are for .backward() and torch.autograd.grad, not for torch.func "
                f"(grad, vjp, jacrev, hessian): {_INSTEAD}"
            )


def _no_forward_mode() -> RuntimeError:
    return RuntimeError(
        "fastkl's gradients are for .backward() and torch.autograd.grad, not for forward mode "
        f"(torch.func.jvp, jacfwd, torch.autograd.forward_ad): {_INSTEAD}"
    )


def check_backend(backend: object) -> None:
    """Refuse a backend that is neither None nor a string."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(
            f"backend must be a string such as 'native', or None; got {type(backend).__name__}"
        )


def check_model(model: object) -> None:
    """Refuse a model that cannot be called or has no out_slice."""
    if not callable(model):
        raise TypeError(f"model must be callable on prompts, got {type(model).__name__}")
    if not hasattr(model, "out_slice"):
        raise TypeError(
            f"model must have an out_slice, the index that picks the logits from its output "
            f"(for example (slice(None), -1)); {type(model).__name__} has none"
        )


def check_compare_to_clean(compare_to_clean: object) -> None:
    """Refuse anything but a boolean or an integer, such as the name of the prompts."""
    if not isinstance(compare_to_clean, (Integral, np.bool_)):
        what = compare_to_clean
        got = repr(what) if isinstance(what, str) else type(what).__name__
        raise TypeError(
            f"compare_to_clean must be True, for clean prompts, or False, for corrupt ones; got {got}"
        )


def check_dataloader(dataloader: object) -> None:
    """Refuse a dataloader that cannot be iterated."""
    if not _is_iterable(dataloader):
        raise TypeError(
            f"dataloader must be an iterable of batches, got {type(dataloader).__name__}"
        )


def unusable_output(output: object, error: Exception) -> TypeError | ValueError:
    """Build the error for a model's output from which model.out_slice could not pick logits."""
    if isinstance(output, Tensor):
        return ValueError(
            f"model.out_slice does not index the model's output of shape {tuple(output.shape)}: "
            f"{error}"
        )
    logits = "; it has .logits: wrap the model to return those" if hasattr(output, "logits") else ""
    return TypeError(
        "model must return logits, a torch.Tensor that model.out_slice indexes, "
        f"got {type(output).__name__}{logits}"
    )


def check_circuit_outs(circuit_outs: object) -> None:
    """Refuse circuit_outs that are not a mapping {edge_count: {batch key: logits}}."""
    if not isinstance(circuit_outs, Mapping):
        raise TypeError(
            "circuit_outs must be a mapping {edge_count: {batch key: logits}}, "
            f"got {type(circuit_outs).__name__}"
        )
    for edge_count, outputs in circuit_outs.items():
        if not isinstance(outputs, Mapping):
            raise TypeError(
                f"circuit_outs[{edge_count!r}] must be a mapping {{batch key: logits}}, "
                f"got {type(outputs).__name__}"
            )


def check_batch(batch: object, inputs: str) -> None:
    """Refuse a batch without the attribute `key` or the attribute that holds the prompts."""
    for attribute in ("key", inputs):
        if not hasattr(batch, attribute):
            raise TypeError(
                f"each batch of the dataloader must have the attributes key and {inputs}; "
                f"{type(batch).__name__} has no {attribute}"
            )


def check_batch_key(key: object) -> None:
    """Refuse a batch key that is not hashable."""
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(
            "each batch's key must be hashable: the circuits' outputs are looked up by it; "
            f"got {type(key).__name__} ({error})"
        ) from error


def missing_batch_key(
    edge_count: object, key: Hashable, circuit_outs: Mapping[Any, Mapping[Any, Any]]
) -> KeyError:
    """Build the error for a batch for which a circuit has no output, with the likeliest cause."""
    outputs = circuit_outs[edge_count]
    has = _count(len(outputs), "other key")
    if outputs:
        example = next(iter(outputs))
        has += f", such as {example!r} of type {type(example).__name__}"
    cause = (
        "The dataloader must give the same batches as when the circuits were run: the usual cause "
        "is a loader with shuffle=True"
    )
    if outputs and not any(_can_equal(key, other) for other in outputs):
        cause = f"The batch key is of another type, {type(key).__name__}"
    counts = f"batch key {key!r} is" if key in circuit_outs else "these keys are"
    if key in circuit_outs or (outputs and all(other in circuit_outs for other in outputs)):
        # Small integers may be batch keys and edge counts, so the message keeps the first cause.
        cause = (
            f"circuit_outs must be {{edge_count: {{batch key: logits}}}}, and {counts} among its "
            f"edge counts: is the nesting swapped? If not: {cause[0].lower()}{cause[1:]}"
        )
    return KeyError(
        f"circuit_outs[{edge_count!r}] has no output for batch key {key!r} (it has {has}). {cause}"
    )


def _can_equal(key: object, other: object) -> bool:
    if isinstance(key, Number) and isinstance(other, Number):
        return True
    return isinstance(key, type(other)) or isinstance(other, type(key))


def no_rows(n_batches: int) -> ValueError:
    """Build the error for a dataloader that gave no rows to average over."""
    return ValueError(
        f"the dataloader gave {_count(n_batches, 'batch', 'batches')} and no rows, so there is no KL "
        f"divergence to average (an iterator that was already used up gives none)"
    )


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def not_in_this_folder(what: str, why: str) -> str:
    """Return the message that something built with the package is not in the imported folder."""
    folder = Path(__file__).parent
    if not (folder.parent / "setup.py").exists():
        return f"{what} not in {folder}: {why}"
    return (
        f"{what} not in {folder}: either {why}, or Python, started in a clone, imports the clone "
        "instead of what pip installed elsewhere"
    )


def unknown_backend(name: object, names: Sequence[str], source: str) -> ValueError:
    """Build the error for a backend's name that is not in the table."""
    return ValueError(f"{source} must be one of {', '.join(names)}; got {name!r}")


def no_backend(device: torch.device, reason: str | None) -> RuntimeError:
    """Build the error for logits on a device on which no backend runs."""
    return RuntimeError(f"no backend runs on {device}: {reason}")


def unusable_backend(name: str, reason: str, source: str) -> RuntimeError:
    """Build the error for a requested backend that cannot run on this machine or these logits."""
    return RuntimeError(f"{source}={name!r} was requested but cannot be used here: {reason}")
