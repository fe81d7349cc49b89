"""Fixtures: the real auto_circuit, and a model with GPT-2's vocabulary and prompts made offline."""

import functools
import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import fastkl.auto_circuit

VOCABULARY = 50257
POSITIONS = 5
PROMPTS = 7
BATCH_SIZE = 2


@pytest.fixture(scope="session")
def ac():
    """Return auto_circuit's modules; skip if it is neither installed nor required."""
    if os.environ.get("FASTKL_REQUIRE_AUTO_CIRCUIT") != "1":
        reason = 'auto_circuit is not installed: pip install -e ".[auto-circuit]"'
        pytest.importorskip("auto_circuit", reason=reason)
    from auto_circuit import data, prune, types  # noqa: PLC0415
    from auto_circuit.metrics.prune_metrics import kl_div, prune_metrics  # noqa: PLC0415
    from auto_circuit.utils import graph_utils, tensor_ops  # noqa: PLC0415

    return SimpleNamespace(
        data=data,
        prune=prune,
        types=types,
        kl_div=kl_div,
        prune_metrics=prune_metrics,
        graph_utils=graph_utils,
        tensor_ops=tensor_ops,
    )


@pytest.fixture(autouse=True)
def _leave_nothing_patched():
    yield
    fastkl.auto_circuit.unpatch()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # The model is tiny: several threads, waiting for each other, took six times the processor time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build_model(ac):
    """Return a function that builds the same patchable transformer for any slice of its output."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: PLC0415

    def build(slice_output, **options):
        config = HookedTransformerConfig(
            d_vocab=VOCABULARY,
            n_layers=2,
            n_heads=2,
            d_model=32,
            d_head=16,
            d_mlp=64,
            n_ctx=16,
            act_fn="gelu",
            seed=0,
            device="cpu",
            use_attn_result=True,
            use_attn_in=True,
            use_split_qkv_input=True,
            use_hook_mlp_in=True,
        )
        transformer = HookedTransformer(config).eval().requires_grad_(False)
        # Fresh weights give nearly flat distributions; a trained model's are peaked.
        transformer.unembed.W_U.mul_(4)
        return ac.graph_utils.patchable_model(
            transformer,
            factorized=True,
            slice_output=slice_output,
            separate_qkv=True,
            **options,
        )

    return build


@pytest.fixture(scope="session")
def dataset(ac):
    """Prompt pairs that differ in two of their tokens."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(VOCABULARY, (PROMPTS, POSITIONS), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2:4] = torch.randint(VOCABULARY, (PROMPTS, 2), generator=generator)
    answers, wrong_answers = torch.randint(VOCABULARY, (2, PROMPTS, 1), generator=generator)
    return ac.data.PromptDataset(clean, corrupt, list(answers), list(wrong_answers))


@pytest.fixture(scope="session")
def loader(ac, dataset):
    """Return a loader of three batches of two prompts; it drops the seventh prompt."""
    return ac.data.PromptDataLoader(
        dataset, seq_len=POSITIONS, diverge_idx=0, batch_size=BATCH_SIZE
    )


@pytest.fixture(scope="session")
def prune_scores():
    """Return a function that gives a model's edges random scores, all different."""

    def score(model):
        # Sort: the model keeps its modules in a set, whose order differs from run to run.
        names = sorted(model.patch_masks)
        sizes = [model.patch_masks[name].numel() for name in names]
        ranks = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(2)) + 1.0
        return {
            name: rank.reshape(model.patch_masks[name].shape)
            for name, rank in zip(names, ranks.split(sizes), strict=True)
        }

    return score


class Run(NamedTuple):
    """measure_kl_div's arguments: a model, a loader, and outputs of circuits of several sizes."""

    model: Any
    loader: Any
    outs: Any


@pytest.fixture(scope="session")
def run_circuits(ac, prune_scores):
    """Return a function that runs a model's circuits, in no particular order of their sizes."""

    def run(model, loader, patch_type="TREE_PATCH", ablation="RESAMPLE"):
        outs = ac.prune.run_circuits(
            model,
            loader,
            [20, 0, model.n_edges, 5, 1],
            prune_scores(model),
            patch_type=ac.types.PatchType[patch_type],
            ablation_type=ac.types.AblationType[ablation],
        )
        return Run(model, loader, outs)

    return run


@pytest.fixture(scope="session")
def circuits(build_model, loader, run_circuits):
    """Return a function that returns a :class:`Run`, computed only once for all tests."""
    build, run = functools.cache(build_model), functools.cache(run_circuits)

    def get(slice_output="last_seq", patch_type="TREE_PATCH", ablation="RESAMPLE"):
        return run(build(slice_output), loader, patch_type, ablation)

    return get
