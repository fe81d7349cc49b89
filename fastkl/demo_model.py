"""A small attention-only transformer that learns to copy from its context, and its training.

A prompt holds a passage of distinct tokens twice, at a distance that changes from prompt to prompt.
To predict the second copy, a model has to find the token after the earlier occurrence of the
current token. The known way to do so takes two heads in two layers: a previous-token head, and an
induction head that reads its output. The corrupted prompt ends with the same passage, but has no
earlier copy of it.
"""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

_WARMUP_STEPS = 50
_STEPS_BETWEEN_CHECKS = 25


@dataclass(frozen=True)
class Task:
    """The shape of a copying prompt: filler, passage, filler, and the passage again.

    All tokens before the second copy of the passage are distinct.

    Attributes
    ----------
    n_vocab : int
        Tokens in the vocabulary.
    n_passage : int
        Tokens in the passage, which occurs twice in the prompt.
    n_filler : int
        Tokens of filler in total. A random part of it comes before the first copy, so that
        attending a fixed number of positions back does not solve the task.
    """

    n_vocab: int = 128
    n_passage: int = 24
    n_filler: int = 8

    def __post_init__(self) -> None:
        if self.n_vocab < 2 * self.n_context:
            raise ValueError(
                f"a vocabulary of {self.n_vocab} tokens is too small: two contexts of "
                f"{self.n_context} tokens (n_passage + n_filler) without a common one are needed"
            )

    @property
    def n_context(self) -> int:
        """Tokens before the second copy."""
        return self.n_passage + self.n_filler

    @property
    def n_tokens(self) -> int:
        """Tokens in a prompt."""
        return self.n_context + self.n_passage

    def prompts(self, n: int, generator: torch.Generator, key: int = 0) -> "Prompts":
        """Draw `n` prompts and their corrupted twins."""
        # Each row is a permutation of the vocabulary, so all tokens taken from it are distinct.
        tokens = torch.rand(n, self.n_vocab, generator=generator).argsort(-1)
        start = torch.randint(0, self.n_filler + 1, (n, 1), generator=generator)
        passage = tokens[:, : self.n_passage]
        # Roll the context right by `start`, so that the passage, its first part, starts there.
        column = (torch.arange(self.n_context) - start) % self.n_context
        clean = torch.cat([tokens.gather(1, column), passage], dim=1)
        other = tokens[:, self.n_context : 2 * self.n_context]
        return Prompts(key, clean, torch.cat([other, passage], dim=1), start)


class Prompts(NamedTuple):
    """A batch as `fastkl.measure_kl_div` takes it, and where its passages start."""

    key: int
    clean: Tensor  # (B, S)
    corrupt: Tensor  # (B, S), without the first copy
    start: Tensor  # (B, 1), position of the first copy


@dataclass(frozen=True)
class Shape:
    """The size of the transformer."""

    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 64


class Trace(NamedTuple):
    """What one run of the model computed."""

    logits: Tensor  # (B, S, V)
    heads: list[Tensor]  # per layer: (B, H, S, D), the heads' outputs
    patterns: list[Tensor]  # per layer: (B, H, S, S), attention from query to key


class Attention(nn.Module):
    """A layer of causal attention heads, whose outputs the caller can replace before `write`."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        d = shape.d_model
        self.n_heads = shape.n_heads
        self.norm = nn.LayerNorm(d)
        self.query_key = _weight(2 * d, d, generator)
        self.value = _weight(d, d, generator)
        self.output = _weight(d, d, generator)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs (B, H, S, D) and their attention patterns (B, H, S, S)."""
        x = self.norm(x)
        # Add positions to queries and keys only. Values then carry nothing but tokens, which makes
        # induction heads form early in training.
        query, key = F.linear(x + position, self.query_key).chunk(2, dim=-1)
        query, key, value = map(self._split, (query, key, F.linear(x, self.value)))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(future, -math.inf).softmax(-1)
        return pattern @ value, pattern

    def write(self, heads: Tensor) -> Tensor:
        """Return what the heads (B, H, S, D) add to the residual stream (B, S, H·D)."""
        return F.linear(heads.transpose(1, 2).flatten(2), self.output)

    def _split(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return x.view(batch, length, self.n_heads, width // self.n_heads).transpose(1, 2)


class CopyModel(nn.Module):
    """A transformer of attention layers only.

    Parameters
    ----------
    task : Task
        The task, whose prompts the model reads.
    shape : Shape
        The size of the model.
    generator : torch.Generator
        Source of the initial weights.

    Attributes
    ----------
    out_slice : tuple of slice
        The logits that predict the second copy: `model(tokens)[model.out_slice]` has shape
        (B, n_passage - 1, V). The passage's first token cannot be predicted and is left out.
    """

    def __init__(self, task: Task, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.out_slice = (slice(None), slice(-task.n_passage, -1))
        d = shape.d_model
        self.embedding = nn.Parameter(torch.randn(task.n_vocab, d, generator=generator))
        self.position = nn.Parameter(torch.randn(task.n_tokens, d, generator=generator))
        self.attention = [Attention(shape, generator) for _ in range(shape.n_layers)]
        # Register the layers, so that their weights move and train with the model's.
        self.layers = nn.ModuleList(self.attention)
        self.norm = nn.LayerNorm(d)
        self.unembedding = _weight(task.n_vocab, d, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, S, V) for tokens (B, S)."""
        return self.trace(tokens).logits

    def trace(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        substitutes: list[Tensor] | None = None,
    ) -> Trace:
        """Run the model, optionally with the outputs of some heads replaced.

        Parameters
        ----------
        tokens : Tensor (B, S)
            What the model reads.
        keep : bool Tensor (layers, heads), optional
            The heads that keep their own outputs; all by default.
        substitutes : list of Tensor (B, H, S, D), optional
            For each layer, the outputs that replace those of the other heads.
        """
        x = self.embedding[tokens]
        outputs, patterns = [], []
        for i, layer in enumerate(self.attention):
            heads, pattern = layer(x, self.position)
            if keep is not None and substitutes is not None:
                heads = torch.where(keep[i, :, None, None], heads, substitutes[i])
            x = x + layer.write(heads)
            outputs.append(heads)
            patterns.append(pattern)
        return Trace(F.linear(self.norm(x), self.unembedding), outputs, patterns)


class Training(NamedTuple):
    """How the training went."""

    steps: int
    accuracy: float
    seconds: float


class NotLearnedError(RuntimeError):
    """The model did not learn to copy within the limit of steps."""


def train(
    model: CopyModel,
    task: Task,
    generator: torch.Generator,
    *,
    accuracy: float = 0.99,
    max_steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 5e-3,
    progress: bool = True,
) -> Training:
    """Train until the model copies held-out prompts.

    Parameters
    ----------
    model : CopyModel
        The model, trained in place.
    task : Task
        The task to learn.
    generator : torch.Generator
        Source of the random prompts.
    accuracy : float
        Stop when this share of held-out tokens is predicted correctly.
    max_steps : int
        Give up after this number of steps.
    batch_size : int
        Prompts per step.
    learning_rate : float
        AdamW's learning rate, after a short warm-up.
    progress : bool
        Show a progress bar, if the output is a terminal.

    Returns
    -------
    Training
        Steps taken, accuracy reached, and duration in seconds.

    Raises
    ------
    NotLearnedError
        The accuracy was not reached in `max_steps`.
    """
    began = time.perf_counter()
    device = model.embedding.device
    held_out = task.prompts(128, generator).clean.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / _WARMUP_STEPS))
    reached = 0.0
    # With disable=None, tqdm shows nothing if the output is not a terminal.
    hidden = None if progress else True
    with tqdm(range(1, max_steps + 1), "training", disable=hidden, leave=False) as bar:
        for step in bar:
            tokens = task.prompts(batch_size, generator).clean.to(device)
            logits = model(tokens)[model.out_slice]
            loss = F.cross_entropy(logits.flatten(0, 1), _copied(model, tokens).flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            warmup.step()
            if step % _STEPS_BETWEEN_CHECKS == 0 or step == max_steps:
                reached = copying_accuracy(model, held_out)
                bar.set_postfix_str(f"copies {reached:.1%} of held-out tokens")
                if reached >= accuracy:
                    return Training(step, reached, time.perf_counter() - began)
    raise NotLearnedError(
        f"the model did not learn to copy: {reached:.1%} of held-out tokens right after "
        f"{max_steps} steps, {accuracy:.1%} wanted; try another seed"
    )


@torch.inference_mode()
def copying_accuracy(model: CopyModel, tokens: Tensor) -> float:
    """Return the share of the second copies' tokens in prompts (B, S) that the model predicts."""
    predicted = model(tokens)[model.out_slice].argmax(-1)
    return float((predicted == _copied(model, tokens)).double().mean())


def _copied(model: CopyModel, tokens: Tensor) -> Tensor:
    """Return the tokens (B, n_passage - 1) that the logits of `out_slice` predict."""
    return tokens.roll(-1, dims=-1)[model.out_slice]


def _weight(n_out: int, n_in: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in))
