"""The demo: how many attention heads copying takes, on a model that needs no download.

A small transformer is trained to copy from its context. Its heads are ranked by how much the
predictions change when each head alone is ablated. Then circuits of the most important heads are
run with all other heads ablated, and `fastkl.measure_kl_div` measures how far each circuit is from
the full model.
"""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

import fastkl
from fastkl.backends import choose
from fastkl.demo_model import (
    CopyModel,
    NotLearnedError,
    Prompts,
    Shape,
    Task,
    Training,
    train,
)

__all__ = ["Head", "NotLearnedError", "Result", "pick_place", "run"]

Key = TypeVar("Key", bound=Hashable)
# The device to run on, and the name of the backend.
Place = tuple[torch.device, str]

# A head has a role if it gives at least this share of its attention to that role's tokens.
_ROLE_SCORE = 0.3


@dataclass(frozen=True)
class Head:
    """An attention head and its measurements.

    Attributes
    ----------
    layer, index : int
        Its layer, and its index within the layer, both from 0.
    kl : float
        KL(full model ‖ model with this head ablated), in nats.
    induction : float
        Mean attention from a token of the second copy to the token after its first occurrence.
    previous_token : float
        Mean attention from a token to the one before it.
    """

    layer: int
    index: int
    kl: float
    induction: float
    previous_token: float

    @property
    def name(self) -> str:
        """Layer and index in readable form, such as L0H1."""
        return f"L{self.layer}H{self.index}"

    @property
    def role(self) -> str:
        """Either "induction" or "previous token"; empty if both scores are low."""
        if max(self.induction, self.previous_token) < _ROLE_SCORE:
            return ""
        return "induction" if self.induction > self.previous_token else "previous token"


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes
    ----------
    heads : list of Head
        All heads, the most important first.
    layers : list of (int, float)
        Each layer and the KL divergence (nats) with all its heads ablated; most important first.
    sizes : list of int
        Number of heads in each circuit: a circuit of n heads holds the first n of `heads`.
    kl : list of float
        KL(full model ‖ circuit) of each circuit, in nats.
    agreement : list of float
        Share of predictions where circuit and full model have the same most probable token.
    rows : int
        Number of predictions that each divergence and agreement is averaged over.
    """

    seed: int
    backend: str
    device: str
    n_vocab: int
    training: Training
    heads: list[Head]
    layers: list[tuple[int, float]]
    sizes: list[int]
    kl: list[float]
    agreement: list[float]
    rows: int

    def to_json(self) -> str:
        """Return results as JSON, without the training's seconds, which the seed does not fix."""
        facts = {
            "fastkl": fastkl.__version__,
            "torch": torch.__version__,
            "seed": self.seed,
            "backend": self.backend,
            "device": self.device,
            "training": {"steps": self.training.steps, "accuracy": self.training.accuracy},
            "rows": self.rows,
            "vocabulary": self.n_vocab,
            "sizes": self.sizes,
            "kl_nats": self.kl,
            "agreement": self.agreement,
            "heads": [
                {
                    "head": head.name,
                    "ablation_kl_nats": head.kl,
                    "induction_score": head.induction,
                    "previous_token_score": head.previous_token,
                    "role": head.role or None,
                }
                for head in self.heads
            ],
            "layers": [{"layer": layer, "ablation_kl_nats": kl} for layer, kl in self.layers],
            "induction_heads": [head.name for head in self.heads if head.role == "induction"],
        }
        return json.dumps(facts, indent=2, allow_nan=False) + "\n"


def pick_place(backend: str | None) -> Place:
    """Return the device to run on, a GPU if the backend can use one, and the backend's name.

    Raises
    ------
    ValueError
        There is no backend of that name.
    RuntimeError
        The backend cannot run here.
    """
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        try:
            return gpu, choose(backend, gpu, torch.float32).NAME
        except RuntimeError:
            # The requested backend may be one for the CPU.
            pass
    cpu = torch.device("cpu")
    return cpu, choose(backend, cpu, torch.float32).NAME


def run(
    seed: int,
    place: Place,
    *,
    task: Task | None = None,
    shape: Shape | None = None,
    n_prompts: int = 256,
    progress: bool = True,
) -> Result:
    """Train the model, rank its heads and layers by ablation, and measure its circuits.

    Parameters
    ----------
    seed : int
        Seed of the weights and all prompts.
    place : tuple of torch.device and str
        Device, and name of the backend.
    task, shape : Task, Shape, optional
        What the model learns, and its size.
    n_prompts : int
        Number of prompts that the circuits are measured on.
    progress : bool
        Show the training's progress.

    Raises
    ------
    NotLearnedError
        The model did not learn to copy; a subclass of RuntimeError.
    """
    task, shape = task or Task(), shape or Shape()
    device, backend = place
    generator = torch.Generator().manual_seed(seed)
    with _one_thread():
        model = CopyModel(task, shape, generator).to(device)
        training = train(model, task, generator, progress=progress)
        batches = draw_batches(task, n_prompts, generator, device)
        heads = rank_heads(model, batches, backend)
        layers = rank_layers(model, batches, backend)
        outs = run_circuits(model, batches, growing_circuits(model, heads))
        kl = fastkl.measure_kl_div(model, batches, outs, backend=backend, progress=False)
        agreement = top1_agreement(model, batches, outs)
    return Result(
        seed=seed,
        backend=backend,
        device=str(device),
        n_vocab=task.n_vocab,
        training=training,
        heads=heads,
        layers=layers,
        sizes=[size for size, _ in kl],
        kl=[value for _, value in kl],
        agreement=agreement,
        rows=n_prompts * (task.n_passage - 1),
    )


def draw_batches(
    task: Task, n_prompts: int, generator: torch.Generator, device: torch.device, size: int = 64
) -> list[Prompts]:
    """Draw prompts, in batches of at most `size`."""
    batches = []
    for key, first in enumerate(range(0, n_prompts, size)):
        prompts = task.prompts(min(size, n_prompts - first), generator, key)
        moved = (tensor.to(device) for tensor in prompts[1:])
        batches.append(Prompts(key, *moved))
    return batches


@torch.inference_mode()
def run_circuits(
    model: CopyModel, batches: Sequence[Prompts], keep: Mapping[Key, Tensor]
) -> dict[Key, dict[int, Tensor]]:
    """Run circuits on the clean prompts; the other heads' outputs come from the corrupted prompts.

    Parameters
    ----------
    model : CopyModel
        The full model.
    batches : sequence of Prompts
        The prompts to run on.
    keep : mapping {key: bool Tensor (layers, heads)}
        The heads of each circuit.

    Returns
    -------
    dict {key: {batch key: Tensor (B, n_passage - 1, V)}}
        Logits, as `fastkl.measure_kl_div` takes them.
    """
    outs: dict[Key, dict[int, Tensor]] = {key: {} for key in keep}
    for batch in batches:
        substitutes = model.trace(batch.corrupt).heads
        for key, mask in keep.items():
            logits = model.trace(batch.clean, mask, substitutes).logits
            outs[key][batch.key] = logits[model.out_slice]
    return outs


def rank_heads(model: CopyModel, batches: Sequence[Prompts], backend: str) -> list[Head]:
    """Ablate each head alone; return the heads, the most important first."""
    everything = _no_heads(model).logical_not()
    keep = {}
    for layer, index in everything.nonzero().tolist():
        keep[layer, index] = everything.clone()
        keep[layer, index][layer, index] = False
    outs = run_circuits(model, batches, keep)
    kl = fastkl.measure_kl_div(model, batches, outs, backend=backend, progress=False)
    induction, previous = attention_scores(model, batches)
    heads = [
        Head(layer, i, value, induction[layer, i].item(), previous[layer, i].item())
        for (layer, i), value in kl
    ]
    return sorted(heads, key=lambda head: -head.kl)


def rank_layers(
    model: CopyModel, batches: Sequence[Prompts], backend: str
) -> list[tuple[int, float]]:
    """Ablate each layer alone; return layers and KL (nats), the most important first."""
    everything = _no_heads(model).logical_not()
    keep = {layer: everything.clone() for layer in range(len(everything))}
    for layer, mask in keep.items():
        mask[layer] = False
    outs = run_circuits(model, batches, keep)
    kl = fastkl.measure_kl_div(model, batches, outs, backend=backend, progress=False)
    return sorted(kl, key=lambda layer_and_kl: -layer_and_kl[1])


def growing_circuits(model: CopyModel, heads: Sequence[Head]) -> dict[int, Tensor]:
    """Return masks (layers, heads) of circuits of the first 0, 1, ... all ranked heads, by size."""
    mask = _no_heads(model)
    circuits = {0: mask}
    for size, head in enumerate(heads, start=1):
        mask = mask.clone()
        mask[head.layer, head.index] = True
        circuits[size] = mask
    return circuits


@torch.inference_mode()
def attention_scores(model: CopyModel, batches: Sequence[Prompts]) -> tuple[Tensor, Tensor]:
    """Return the heads' induction and previous-token scores, two CPU Tensors (layers, heads).

    The induction score is the mean attention from a token of the second copy to the token after its
    first occurrence; the previous-token score is the mean attention from a token to the one before.
    """
    induction, previous = [], []
    for batch in batches:
        # `patterns` has the shape (B, layers, heads, queries, keys).
        patterns = torch.stack(model.trace(batch.clean).patterns, dim=1)
        previous.append(patterns.diagonal(-1, -2, -1).mean(-1))
        queries = patterns[..., model.out_slice[1], :]
        after = batch.start + 1 + torch.arange(queries.shape[-2], device=queries.device)
        after = after[:, None, None, :, None].expand(*queries.shape[:-1], 1)
        induction.append(queries.gather(-1, after).flatten(-2).mean(-1))
    return torch.cat(induction).mean(0).cpu(), torch.cat(previous).mean(0).cpu()


@torch.inference_mode()
def top1_agreement(
    model: CopyModel, batches: Sequence[Prompts], outs: Mapping[int, Mapping[int, Tensor]]
) -> list[float]:
    """Return the share of rows where a circuit's most probable token is the full model's."""
    full = [model(batch.clean)[model.out_slice].argmax(-1) for batch in batches]
    shares = []
    for logits in outs.values():
        same = [
            (logits[batch.key].argmax(-1) == expected).flatten()
            for batch, expected in zip(batches, full, strict=True)
        ]
        shares.append(torch.cat(same).double().mean().item())
    return shares


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread.

    Tensors this small gain little from a second thread and lose much time to waiting where cores
    are shared. Also, with one thread a seed's results do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _no_heads(model: CopyModel) -> Tensor:
    shape = (len(model.attention), model.attention[0].n_heads)
    return torch.zeros(shape, dtype=torch.bool, device=model.embedding.device)
