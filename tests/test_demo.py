"""Test the demo on a model small enough to train here; every figure is computed a second way."""

import json
from typing import NamedTuple

import pytest
import torch
from conftest import oracle

import fastkl
from fastkl import demo
from fastkl.demo_model import (
    CopyModel,
    NotLearnedError,
    Prompts,
    Shape,
    Task,
    Training,
    copying_accuracy,
    train,
)

SEED = 0
TASK = Task(n_vocab=32, n_passage=12, n_filler=3)
SHAPE = Shape(n_layers=2, n_heads=2, d_model=32)
N_PROMPTS = 80
PLACE = (torch.device("cpu"), "eager")


class Trained(NamedTuple):
    """What demo.run computed with, recreated from the same seed."""

    model: CopyModel
    training: Training
    batches: list[Prompts]


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run(SEED, PLACE, task=TASK, shape=SHAPE, n_prompts=N_PROMPTS, progress=False)


@pytest.fixture(scope="module")
def trained() -> Trained:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    model = CopyModel(TASK, SHAPE, generator)
    training = train(model, TASK, generator, progress=False)
    batches = demo.draw_batches(TASK, N_PROMPTS, generator, PLACE[0])
    yield Trained(model, training, batches)
    torch.set_num_threads(threads)


def all_heads() -> list[tuple[int, int]]:
    return [(i, j) for i in range(SHAPE.n_layers) for j in range(SHAPE.n_heads)]


@torch.inference_mode()
def kl64(model: CopyModel, batches: list[Prompts], keep: torch.Tensor) -> float:
    """Run a circuit head by head, and measure its divergence in float64."""
    rows = []
    for batch in batches:
        corrupt = model.trace(batch.corrupt).heads
        x = model.embedding[batch.clean]
        for i, layer in enumerate(model.attention):
            heads = layer(x, model.position)[0].clone()
            for j in range(SHAPE.n_heads):
                if not keep[i, j]:
                    heads[:, j] = corrupt[i][:, j]
            x = x + layer.write(heads)
        circuit = model.norm(x) @ model.unembedding.T
        rows.append(oracle(circuit[model.out_slice], model(batch.clean)[model.out_slice]))
    return torch.cat([row.flatten() for row in rows]).mean().item()


def test_prompts_hold_the_passage_twice_and_corrupt_prompts_once():
    prompts = TASK.prompts(200, torch.Generator().manual_seed(1), key=5)
    assert prompts.key == 5
    assert set(prompts.start.flatten().tolist()) == set(range(TASK.n_filler + 1))
    for clean, corrupt, start in zip(*(t.tolist() for t in prompts[1:]), strict=True):
        passage = clean[TASK.n_context :]
        assert len(clean) == len(corrupt) == TASK.n_tokens
        assert clean[start[0] : start[0] + TASK.n_passage] == passage
        assert len(set(clean)) == TASK.n_context
        assert corrupt[TASK.n_context :] == passage
        assert not set(corrupt[: TASK.n_context]) & set(clean)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"vocabulary of 29 tokens.*two contexts of 15 tokens"):
        Task(n_vocab=29, n_passage=12, n_filler=3)


def test_the_model_copies_what_is_there_to_copy(trained):
    prompts = TASK.prompts(200, torch.Generator().manual_seed(2))
    assert trained.training.accuracy >= 0.99
    assert copying_accuracy(trained.model, prompts.clean) > 0.95
    # What remains is guessing among tokens not yet seen: at best 1 in 6 here.
    assert copying_accuracy(trained.model, prompts.corrupt) < 0.2


def test_the_model_is_causal(trained):
    tokens = trained.batches[0].clean
    changed = tokens.clone()
    changed[:, 15:] = changed[:, 15:].flip(-1)
    with torch.inference_mode():
        before, after = trained.model(tokens), trained.model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


def test_a_seed_gives_the_same_model(result, trained):
    assert result.training[:2] == trained.training[:2]


def test_circuits_measure_as_in_float64(result, trained):
    assert result.sizes == list(range(SHAPE.n_layers * SHAPE.n_heads + 1))
    keep = torch.zeros(SHAPE.n_layers, SHAPE.n_heads, dtype=torch.bool)
    expected = [kl64(trained.model, trained.batches, keep)]
    for head in result.heads:
        keep[head.layer, head.index] = True
        expected.append(kl64(trained.model, trained.batches, keep))
    assert result.kl == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_the_ends_of_the_curve(result, trained):
    assert result.kl[-1] == 0.0
    assert result.agreement[-1] == 1.0
    assert result.kl[0] > 1
    assert result.agreement[0] < 0.2
    # Without heads the clean context is out of reach: outputs are those of the corrupt prompt.
    model, batches = trained.model, trained.batches
    outs = demo.run_circuits(model, batches, demo.growing_circuits(model, result.heads))
    with torch.inference_mode():
        for batch in batches:
            assert torch.equal(outs[0][batch.key], model(batch.corrupt)[model.out_slice])
            assert torch.equal(outs[4][batch.key], model(batch.clean)[model.out_slice])


def test_agreement_is_the_share_of_equal_first_choices(result, trained):
    model, batches = trained.model, trained.batches
    outs = demo.run_circuits(model, batches, demo.growing_circuits(model, result.heads))
    for size, share in zip(result.sizes, result.agreement, strict=True):
        same = []
        for batch in batches:
            with torch.inference_mode():
                full = model(batch.clean)[model.out_slice]
            for p, q in zip(full.flatten(0, 1), outs[size][batch.key].flatten(0, 1), strict=True):
                same.append(int(p.argmax()) == int(q.argmax()))
        assert share == pytest.approx(sum(same) / len(same), abs=1e-12)
    assert result.rows == len(same) == N_PROMPTS * (TASK.n_passage - 1)


def test_heads_are_ranked_by_ablating_each_alone(result, trained):
    assert sorted((head.layer, head.index) for head in result.heads) == all_heads()
    values = [head.kl for head in result.heads]
    assert values == sorted(values, reverse=True)
    for head in result.heads:
        keep = torch.ones(SHAPE.n_layers, SHAPE.n_heads, dtype=torch.bool)
        keep[head.layer, head.index] = False
        expected = kl64(trained.model, trained.batches, keep)
        assert head.kl == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_layers_are_ranked_by_ablating_each_alone(result, trained):
    assert sorted(layer for layer, _ in result.layers) == list(range(SHAPE.n_layers))
    values = [kl for _, kl in result.layers]
    assert values == sorted(values, reverse=True)
    for layer, kl in result.layers:
        keep = torch.ones(SHAPE.n_layers, SHAPE.n_heads, dtype=torch.bool)
        keep[layer] = False
        assert kl == pytest.approx(kl64(trained.model, trained.batches, keep), rel=1e-4, abs=1e-8)


def test_attention_scores_look_at_the_right_tokens(trained):
    model = trained.model
    batches = demo.draw_batches(TASK, 6, torch.Generator().manual_seed(3), PLACE[0], size=4)
    induction, previous = demo.attention_scores(model, batches)
    assert [len(batch.clean) for batch in batches] == [4, 2]
    looked = {head: ([], []) for head in all_heads()}
    for batch in batches:
        with torch.inference_mode():
            patterns = model.trace(batch.clean).patterns
        for b, prompt in enumerate(batch.clean.tolist()):
            for (i, j), (to_induction, to_previous) in looked.items():
                pattern = patterns[i][b, j]
                for position in range(1, TASK.n_tokens):
                    to_previous.append(pattern[position, position - 1].item())
                for position in range(TASK.n_context, TASK.n_tokens - 1):
                    after = prompt.index(prompt[position]) + 1
                    assert prompt[after] == prompt[position + 1]
                    to_induction.append(pattern[position, after].item())
    for (i, j), (to_induction, to_previous) in looked.items():
        expected = sum(to_induction) / len(to_induction)
        assert induction[i, j].item() == pytest.approx(expected, abs=1e-6)
        expected = sum(to_previous) / len(to_previous)
        assert previous[i, j].item() == pytest.approx(expected, abs=1e-6)


def test_copying_takes_an_induction_head_after_a_previous_token_head(result):
    layers = {
        role: [head.layer for head in result.heads if head.role == role]
        for role in ("induction", "previous token")
    }
    assert layers["induction"]
    assert layers["previous token"]
    # An induction head reads what a previous-token head wrote, so it cannot be in the first layer.
    assert min(layers["induction"]) > min(layers["previous token"]) == 0


def test_roles_follow_the_larger_score():
    assert demo.Head(1, 2, 0.0, induction=0.9, previous_token=0.4).role == "induction"
    assert demo.Head(1, 2, 0.0, induction=0.1, previous_token=0.4).role == "previous token"
    assert demo.Head(1, 2, 0.0, induction=0.2, previous_token=0.2).role == ""
    assert demo.Head(1, 2, 0.0, induction=0.2, previous_token=0.2).name == "L1H2"


def test_json_holds_the_facts(result):
    facts = json.loads(result.to_json())
    assert facts["fastkl"] == fastkl.__version__
    assert facts["torch"] == torch.__version__
    assert (facts["seed"], facts["backend"], facts["device"]) == (SEED, "eager", "cpu")
    assert facts["training"] == {
        "steps": result.training.steps,
        "accuracy": result.training.accuracy,
    }
    assert facts["sizes"] == result.sizes
    assert facts["kl_nats"] == result.kl
    assert facts["agreement"] == result.agreement
    assert (facts["rows"], facts["vocabulary"]) == (result.rows, TASK.n_vocab)
    assert [head["head"] for head in facts["heads"]] == [head.name for head in result.heads]
    assert [head["induction_score"] for head in facts["heads"]] == [
        head.induction for head in result.heads
    ]
    assert facts["induction_heads"] == [h.name for h in result.heads if h.role == "induction"]
    assert {entry["layer"]: entry["ablation_kl_nats"] for entry in facts["layers"]} == dict(
        result.layers
    )


def test_not_learning_is_an_error_with_the_facts():
    generator = torch.Generator().manual_seed(SEED)
    model = CopyModel(TASK, SHAPE, generator)
    facts = r"[0-9.]+% of held-out tokens right after 3 steps, 99\.0% wanted"
    with pytest.raises(NotLearnedError, match=facts):
        train(model, TASK, generator, max_steps=3, progress=False)


def test_threads_are_given_back(monkeypatch):
    threads = torch.get_num_threads()
    seen = []

    def give_up(*_args, **_keywords):
        seen.append(torch.get_num_threads())
        raise NotLearnedError("nothing was tried")

    monkeypatch.setattr(demo, "train", give_up)
    with pytest.raises(NotLearnedError):
        demo.run(SEED, PLACE, task=TASK, shape=SHAPE, progress=False)
    assert seen == [1]
    assert torch.get_num_threads() == threads
