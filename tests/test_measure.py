"""The auto_circuit contract, on small models of our own; tests/integration has the real ones."""

import gc
import math
import weakref
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import oracle

import fastkl

V = 60


class Model:
    """Logits from a table of embeddings; counts its calls and what is alive of its outputs."""

    def __init__(self, out_slice, n_cols=V):
        self.out_slice = out_slice
        self.table = torch.randn(100, n_cols, generator=torch.Generator().manual_seed(1))
        self.calls = []
        self.outputs = []
        self.alive_at_call = []

    def __call__(self, tokens):
        gc.collect()
        self.alive_at_call.append(sum(output() is not None for output in self.outputs))
        self.calls.append((tokens, torch.is_inference_mode_enabled()))
        output = self.table[tokens]
        self.outputs.append(weakref.ref(output))
        return output


class Loader:
    """Batches of prompts; counts how often it is iterated."""

    def __init__(self, sizes=(4, 4, 1), length=5):
        generator = torch.Generator().manual_seed(2)
        self.batches = [
            SimpleNamespace(
                key=1000 + i,
                clean=torch.randint(100, (size, length), generator=generator),
                corrupt=torch.randint(100, (size, length), generator=generator),
            )
            for i, size in enumerate(sizes)
        ]
        self.iterations = 0

    def __iter__(self):
        self.iterations += 1
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


LAST = (slice(None), -1)
NOT_FIRST = (slice(None), slice(1, None))
ALL = (slice(None),)


def circuits_for(model, loader, noises=(0.0, 1e-3, 2.0), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    outs = {}
    for edges, noise in zip((40, 0, 7), noises, strict=True):
        outs[edges] = {}
        for batch in loader.batches:
            logits = model.table[batch.clean][model.out_slice]
            noisy = logits + noise * torch.randn(logits.shape, generator=generator)
            outs[edges][batch.key] = noisy.to(dtype)
    return outs


def expected_kl(model, loader, outs, inputs="clean"):
    result = []
    for edges, outputs in outs.items():
        rows = [
            oracle(outputs[b.key], model.table[getattr(b, inputs)][model.out_slice]).flatten()
            for b in loader.batches
        ]
        result.append((edges, torch.cat(rows).mean().item()))
    return result


@pytest.mark.parametrize("out_slice", [LAST, NOT_FIRST, ALL], ids=["last", "not first", "all"])
@pytest.mark.parametrize("clean", [True, False])
def test_values(out_slice, clean, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the model of this test is on the CPU")
    # The interpreter is slow, a row.
    sizes, length = ((2, 1, 1), 2) if backend == "triton" else ((4, 4, 1), 5)
    model, loader = Model(out_slice), Loader(sizes, length)
    outs = circuits_for(model, loader)
    measured = fastkl.measure_kl_div(model, loader, outs, clean, backend=backend)
    expected = expected_kl(model, loader, outs, "clean" if clean else "corrupt")
    assert [edges for edges, _ in measured] == [40, 0, 7]
    for (_, value), (_, exact) in zip(measured, expected, strict=True):
        assert isinstance(value, float)
        assert abs(value - exact) <= 1e-5 * exact + 1e-8
    if clean:
        assert measured[0][1] == 0.0


def test_one_pass():
    model, loader = Model(ALL), Loader()
    outs = circuits_for(model, loader)
    model.calls.clear()
    fastkl.measure_kl_div(model, loader, outs)
    assert loader.iterations == 1
    pairs = zip(model.calls, loader.batches, strict=True)
    assert all(tokens is batch.clean for (tokens, _), batch in pairs)
    assert all(inference for _, inference in model.calls)
    assert len(model.calls) == len(loader.batches)


def test_one_reference_at_a_time():
    model, loader = Model(ALL), Loader()
    fastkl.measure_kl_div(model, loader, circuits_for(model, loader))
    assert model.alive_at_call == [0, 0, 0]


def test_no_circuits_do_not_run_the_model():
    model, loader = Model(ALL), Loader()
    assert fastkl.measure_kl_div(model, loader, {}) == []
    assert (model.calls, loader.iterations) == ([], 0)


def test_positional_like_auto_circuit():
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    assert fastkl.measure_kl_div(model, loader, outs) == fastkl.measure_kl_div(
        model=model, dataloader=loader, circuit_outs=outs, compare_to_clean=True
    )


def test_edge_counts_pass_through():
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    renamed = {key: outs[edges] for key, edges in zip(("a", 2.5, None), outs, strict=True)}
    assert [edges for edges, _ in fastkl.measure_kl_div(model, loader, renamed)] == ["a", 2.5, None]


def test_rows_are_weighed_alike_not_batches():
    """A last, smaller batch counts by its rows."""
    model, loader = Model(LAST), Loader(sizes=(8, 1))
    outs = circuits_for(model, loader)
    outs[7][1001] = outs[7][1001] * 0
    measured = dict(fastkl.measure_kl_div(model, loader, outs))
    assert measured[7] == pytest.approx(dict(expected_kl(model, loader, outs))[7], rel=1e-5)


def test_nan_and_infinity_survive():
    model, loader = Model(ALL), Loader()
    outs = circuits_for(model, loader)
    outs[40][1001][0, 0, 0] = torch.nan
    outs[7][1001][0, 0, 0] = -torch.inf
    measured = dict(fastkl.measure_kl_div(model, loader, outs))
    assert math.isnan(measured[40])
    assert measured[7] == math.inf
    assert measured[0] > 0


def test_outputs_without_a_batch_and_defaultdicts_are_left_alone():
    model, loader = Model(LAST), Loader()
    outs = defaultdict(dict, circuits_for(model, loader))
    outs[7][5] = "not even a tensor"
    keys = {edges: list(outputs) for edges, outputs in outs.items()}
    fastkl.measure_kl_div(model, loader, outs)
    assert {edges: list(outputs) for edges, outputs in outs.items()} == keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model, loader = Model(LAST), Loader()
    model.table = model.table.to(dtype)
    outs = circuits_for(model, loader, dtype=dtype)
    measured = fastkl.measure_kl_div(model, loader, outs)
    for (_, value), (_, exact) in zip(measured, expected_kl(model, loader, outs), strict=True):
        assert abs(value - exact) <= 1e-5 * exact + 1e-8


def test_gradients_are_not_asked_for():
    """Circuits that still hang in a graph are measured, under inference mode."""
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    plain = fastkl.measure_kl_div(model, loader, outs)
    for outputs in outs.values():
        for key in outputs:
            outputs[key] = outputs[key].requires_grad_() * 1
    assert fastkl.measure_kl_div(model, loader, outs) == plain


def test_generators_are_loaders():
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    expected = fastkl.measure_kl_div(model, loader, outs)
    assert fastkl.measure_kl_div(model, (batch for batch in loader), outs) == expected


def test_silent_when_not_a_terminal(capfd):
    model, loader = Model(LAST), Loader()
    fastkl.measure_kl_div(model, loader, circuits_for(model, loader))
    assert capfd.readouterr() == ("", "")


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_on_a_terminal(monkeypatch, progress):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    model, loader = Model(LAST), Loader()
    fastkl.measure_kl_div(model, loader, circuits_for(model, loader), progress=progress)
    assert ("KL divergence" in terminal.text) == progress


def test_one_synchronization(monkeypatch):
    """Sums stay on the device; Python floats are made once, for all circuits together."""
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _original=original, _name=name):
            if self.device.type != "meta":
                reads.append((_name, tuple(self.shape)))
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    monkeypatch.setattr("fastkl.functional.kl_rows", lambda cs, ref, backend: ref.new_ones(3, 4))
    fastkl.measure_kl_div(model, loader, outs)
    assert reads == [("tolist", (3,))]
