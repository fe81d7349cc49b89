"""The auto_circuit contract, tested on small stand-in models; tests/integration has real models."""

import math
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm.auto
from conftest import oracle
from torch.multiprocessing.reductions import StorageWeakRef

import fastkl
from fastkl import measure

V = 60


class Model:
    """A model that looks up logits in a table; records its calls and counts live outputs then."""

    def __init__(self, out_slice, n_cols=V):
        self.out_slice = out_slice
        self.table = torch.randn(100, n_cols, generator=torch.Generator().manual_seed(1))
        self.calls = []
        self.outputs = []
        self.alive_at_call = []

    def __call__(self, tokens):
        self.alive_at_call.append(sum(not output.expired() for output in self.outputs))
        self.calls.append((tokens, torch.is_inference_mode_enabled()))
        output = self.table[tokens]
        # Track the storage: out_slice picks another tensor, which keeps only the storage alive.
        self.outputs.append(StorageWeakRef(output.untyped_storage()))
        return output


class Loader:
    """Batches of prompts; counts how often it is iterated over."""

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


class Stream:
    """Batches of an iterable data set, whose loader raises NotImplementedError for its length."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        raise NotImplementedError


class Same:
    """A model whose prompts are its logits."""

    out_slice = slice(None)

    def __call__(self, prompts):
        return prompts


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
    # The interpreter needs much time per row.
    sizes, length = ((2, 1), 2) if backend == "triton" else ((4, 4, 1), 5)
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


@pytest.mark.parametrize("no", [False, 0, np.bool_(False)], ids=["bool", "int", "NumPy's"])
def test_no_is_no(no):
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    found = fastkl.measure_kl_div(model, loader, outs, no)
    assert found == fastkl.measure_kl_div(model, loader, outs, compare_to_clean=False)
    assert found != fastkl.measure_kl_div(model, loader, outs, compare_to_clean=True)


def test_the_name_of_the_prompts_is_neither():
    model, loader = Model(LAST), Loader()
    with pytest.raises(
        TypeError, match=r"must be True, for clean .* for corrupt ones; got 'corrupt'"
    ):
        fastkl.measure_kl_div(model, loader, circuits_for(model, loader), "corrupt")
    assert (model.calls, loader.iterations) == ([], 0)


class Fetched(dict):
    """A circuit's outputs, and how often each was fetched."""

    def __init__(self, *args):
        super().__init__(*args)
        self.times = Counter()

    def __getitem__(self, key):
        self.times[key] += 1
        return super().__getitem__(key)


def test_each_output_is_fetched_once():
    """A mapping may load or compute what is fetched, so one fetch serves checks and measurement."""
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    lazy = {edges: Fetched(outputs) for edges, outputs in outs.items()}
    assert fastkl.measure_kl_div(model, loader, lazy) == fastkl.measure_kl_div(model, loader, outs)
    for outputs in lazy.values():
        assert set(outputs.times) == {batch.key for batch in loader}
        assert set(outputs.times.values()) == {1}


class Loaded(dict):
    """A circuit's outputs, loaded when fetched; at each load, counts all circuits' live outputs."""

    def __init__(self, outputs, storages, alive_at_load):
        super().__init__(outputs)
        self.storages, self.alive_at_load = storages, alive_at_load

    def __getitem__(self, key):
        self.alive_at_load.append(sum(not storage.expired() for storage in self.storages))
        logits = super().__getitem__(key).clone()
        self.storages.append(StorageWeakRef(logits.untyped_storage()))
        return logits


def test_outputs_of_one_batch_at_a_time():
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    storages, alive_at_load = [], []
    lazy = {edges: Loaded(outputs, storages, alive_at_load) for edges, outputs in outs.items()}
    fastkl.measure_kl_div(model, loader, lazy)
    assert alive_at_load == [*range(len(outs))] * len(loader.batches)


def test_edge_counts_pass_through():
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    renamed = {key: outs[edges] for key, edges in zip(("a", 2.5, None), outs, strict=True)}
    assert [edges for edges, _ in fastkl.measure_kl_div(model, loader, renamed)] == ["a", 2.5, None]


def test_rows_are_weighed_alike_not_batches():
    """A smaller last batch counts by its number of rows."""
    model, loader = Model(LAST), Loader(sizes=(8, 1))
    outs = circuits_for(model, loader)
    outs[7][1001] = outs[7][1001] * 0
    measured = dict(fastkl.measure_kl_div(model, loader, outs))
    assert measured[7] == pytest.approx(dict(expected_kl(model, loader, outs))[7], rel=1e-5)


def test_sums_are_kept_in_float64():
    """Adding the first row's large KL to the others' takes more digits than float32's seven.

    The test sums within a batch, and over batches.
    """
    reference, circuit = torch.zeros(4000, 2), torch.zeros(4000, 2)
    circuit[:, 0] = torch.linspace(0.5, 2, 4000)
    circuit[0, 0] = 3e6
    batches = [slice(0, 3), slice(3, 4000)]
    loader = [SimpleNamespace(key=i, clean=reference[rows]) for i, rows in enumerate(batches)]
    outs = {1: {i: circuit[rows] for i, rows in enumerate(batches)}}
    exact = fastkl.kl_div(circuit, reference, reduction="none").double().mean().item()
    model = Same()
    ((_, value),) = fastkl.measure_kl_div(model, loader, outs)
    assert value == pytest.approx(exact, rel=1e-12, abs=0)
    whole = [SimpleNamespace(key=0, clean=reference)]
    ((_, value),) = fastkl.measure_kl_div(model, whole, {1: {0: circuit}})
    assert value == pytest.approx(exact, rel=1e-12, abs=0)


@pytest.mark.parametrize("out_slice", [LAST, NOT_FIRST], ids=["last", "not first"])
@pytest.mark.parametrize("vocab_size", [V, V - 7])
@pytest.mark.parametrize("padding", [0.0, 1e3, math.nan])
def test_padded_vocabularies(out_slice, vocab_size, padding):
    """Pad each side by a different number of tokens; a smaller vocab_size leaves out more."""
    model, loader = Model(out_slice), Loader()
    outs = circuits_for(model, loader)
    short = Model(out_slice)
    short.table = model.table[:, :vocab_size].contiguous()
    shortened = {
        edges: {key: logits[..., :vocab_size].contiguous() for key, logits in outputs.items()}
        for edges, outputs in outs.items()
    }
    expected = fastkl.measure_kl_div(short, loader, shortened)

    def padded(logits, n):
        return torch.nn.functional.pad(logits, (0, n), value=padding)

    model.table = padded(model.table, 4)
    outs = {
        edges: {key: padded(logits, i + 1) for key, logits in outputs.items()}
        for i, (edges, outputs) in enumerate(outs.items())
    }
    found = fastkl.measure_kl_div(model, loader, outs, vocab_size=vocab_size)
    # Rows with another memory layout may be summed in another order.
    assert [edges for edges, _ in found] == [edges for edges, _ in expected]
    for (_, value), (_, exact) in zip(found, expected, strict=True):
        assert value == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert found[0][1] == 0.0


def test_padding_is_not_copied_and_a_batch_is_one_call(monkeypatch):
    model, loader = Model(NOT_FIRST), Loader()
    outs = circuits_for(model, loader)
    calls = []
    kl_rows = measure.functional.kl_rows

    def recorded(circuits, reference, backend):
        calls.append([(t.shape[-1], t.stride(-2)) for t in (reference, *circuits)])
        return kl_rows(circuits, reference, backend=backend)

    monkeypatch.setattr("fastkl.functional.kl_rows", recorded)
    fastkl.measure_kl_div(model, loader, outs, vocab_size=V - 1)
    assert calls == [[(V - 1, V)] * 4] * 3


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
    """Circuits that are still part of an autograd graph are measured under inference mode."""
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
    def __init__(self, tty=True):
        self.text = ""
        self.tty = tty

    def isatty(self):
        return self.tty

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


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize(
    ("shell", "shown"),
    [(SimpleNamespace(kernel="any"), True), (SimpleNamespace(), False), (None, False)],
    ids=["notebook", "IPython", "Python"],
)
def test_progress_bar_in_a_notebook(monkeypatch, shell, shown, progress):
    """A notebook's output is not a terminal but shows bars; IPython's output may be a file."""
    output = Terminal(tty=False)
    monkeypatch.setattr("sys.stderr", output)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    model, loader = Model(LAST), Loader()
    fastkl.measure_kl_div(model, loader, circuits_for(model, loader), progress=progress)
    assert ("KL divergence" in output.text) == (shown and progress)


@pytest.mark.parametrize("sized", [True, False])
def test_progress_bar_counts_batches(monkeypatch, sized):
    """The bar shows the number of batches if the loader has a length; a generator has none."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    model, loader = Model(LAST), Loader()
    outs = circuits_for(model, loader)
    fastkl.measure_kl_div(model, loader if sized else (b for b in loader), outs)
    assert ("/3" in terminal.text) == sized
    assert loader.iterations == 1


def test_the_bar_is_the_notebooks_own():
    """It is tqdm.auto's bar, which is a widget if widgets are available."""
    assert measure.tqdm is tqdm.auto.tqdm


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


@pytest.mark.parametrize("progress", [True, False])
def test_a_loader_that_knows_no_length(progress):
    model, loader = Model(ALL), Loader()
    outs = circuits_for(model, loader)
    expected = fastkl.measure_kl_div(model, loader, outs)
    assert fastkl.measure_kl_div(model, Stream(loader), outs, progress=progress) == expected
