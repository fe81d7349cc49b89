"""Tables of errors: what is wrong, which error is raised, and the facts that its text carries."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastkl
from fastkl import errors
from fastkl.backends import triton

F32 = torch.zeros(2, 5)

KL_DIV = {
    "not a tensor": ([0.0], F32, TypeError, "circuit must be a torch.Tensor of logits, got list"),
    "reference not a tensor": (F32, None, TypeError, "reference must be .* got NoneType"),
    "integers": (F32.long(), F32, TypeError, "circuit must hold logits of dtype .* torch.int64"),
    "booleans": (F32, F32.bool(), TypeError, "reference must hold logits .* torch.bool"),
    "complex": (F32.cfloat(), F32, TypeError, "got torch.complex64"),
    "sparse": (F32.to_sparse(), F32, TypeError, "circuit must be a dense tensor, .*sparse"),
    "nested": (
        torch.nested.nested_tensor([F32[0], F32[0]]),
        F32,
        TypeError,
        "circuit must be a dense tensor, got a nested one",
    ),
    "a scalar": (F32[0, 0], F32[0, 0], ValueError, r"shape \(\.\.\., V\) .* got \(\)"),
    "no vocabulary": (F32[:, :0], F32[:, :0], ValueError, r"at least one token, got \(2, 0\)"),
    "vocabularies": (
        torch.zeros(1, 151936),
        torch.zeros(1, 152064),
        ValueError,
        r"same vocabulary, got 151936 tokens in shape \(1, 151936\) and 152064 in \(1, 152064\)",
    ),
    "rows": (F32, F32[:1], ValueError, r"same shape, got \(2, 5\) and \(1, 5\)"),
    "dimensions": (F32, F32[None], ValueError, r"same shape, got \(2, 5\) and \(1, 2, 5\)$"),
    "an output": (
        SimpleNamespace(logits=F32),
        F32,
        TypeError,
        "Namespace; it has .logits: pass those$",
    ),
    "devices": (F32.to("meta"), F32, ValueError, "same device, got meta and cpu"),
}


@pytest.mark.parametrize("case", KL_DIV)
def test_kl_div(case):
    circuit, reference, error, text = KL_DIV[case]
    with pytest.raises(error, match=text):
        fastkl.kl_div(circuit, reference)


CIRCUITS = {
    "nothing": (None, TypeError, "circuits must be an iterable of Tensors, .* got NoneType$"),
    "a mapping": (
        {"a": F32},
        TypeError,
        r"an iterable of Tensors, .* got dict: pass its values\(\)$",
    ),
    "a name": ("ab", TypeError, "circuits must be an iterable of Tensors, .* got str$"),
    "an output": (SimpleNamespace(logits=F32), TypeError, "SimpleNamespace; it has .logits: pass"),
    "a scalar": (F32[0, 0], ValueError, r"circuits must be .* stacked \(K, \.\.\., V\); got \(\)"),
}


@pytest.mark.parametrize("case", CIRCUITS)
def test_circuits_that_are_no_sequence(case):
    circuits, error, text = CIRCUITS[case]
    with pytest.raises(error, match=text):
        fastkl.kl_div_many(circuits, F32)


def test_a_reference_that_comes_first():
    with pytest.raises(
        ValueError, match=r"same shape, .*; the circuits come first, .*: are they swapped\?$"
    ):
        fastkl.kl_div_many(F32, F32.expand(3, 2, 5))


def test_rows_of_two_devices():
    with pytest.raises(ValueError, match=r"circuits\[1\] and .* same device, got meta and cpu"):
        errors.check_rows([F32, F32.to("meta")], F32)


def test_a_vocabulary_size_that_one_side_has_not():
    with pytest.raises(
        ValueError, match=r"at most 5, the number of tokens of circuit with shape \(2, 5\)"
    ):
        fastkl.kl_div(F32, torch.zeros(2, 8), vocab_size=7)


@pytest.mark.parametrize("circuit", [F32, F32[0], F32[:, None]])
def test_a_single_circuit_that_is_taken_for_many(circuit):
    hint = "; a single circuit goes to kl_div, or as [circuit]"
    with pytest.raises(ValueError, match=r"circuits\[0\] .* got \(.*\)" + re.escape(hint) + "$"):
        fastkl.kl_div_many(circuit, circuit)
    with pytest.raises(ValueError, match="same shape") as raised:
        fastkl.kl_div_many([F32, F32[0]], F32)
    assert hint not in str(raised.value)


def test_kl_div_many_names_the_circuit():
    with pytest.raises(ValueError, match=r"circuits\[1\] and reference must have the same shape"):
        fastkl.kl_div_many([F32, F32[:1]], F32)


@pytest.mark.parametrize(("name", "values"), [("mask", F32[:, 0] == 0), ("weights", F32[:, 0])])
def test_sparse_values_of_rows(name, values):
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got layout torch.sparse"):
        fastkl.kl_div(F32, F32, **{name: values.to_sparse()})


MASKS = {
    "integers": (F32[:, 0].long(), r"got torch.int64: pass mask.bool\(\)$"),
    "floating": (F32[:, 0], r"torch.float32: pass mask.bool\(\); fractions go into weights$"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_are_not_boolean(case):
    mask, text = MASKS[case]
    with pytest.raises(TypeError, match=f"mask must be boolean, .*{text}"):
        fastkl.kl_div(F32, F32, mask=mask)


@pytest.mark.parametrize("number", [10**400, -(10**400), math.nan, -1])
def test_numbers_out_of_range(number):
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got -?[1n]"):
        fastkl.kl_div(F32, F32, temperature=number)
    with pytest.raises(ValueError, match=r"beta must be more than 0 and less than 1, got -?[1n]"):
        fastkl.js_div(F32, F32, beta=number)


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.kl_div_many])
def test_reduction(function):
    with pytest.raises(ValueError, match=r"'mean', 'batchmean'\), got 'average'"):
        function(F32, F32, reduction="average")


NUMBERS = {
    "a boolean temperature": (fastkl.kl_div, {"temperature": True}, "temperature .* got bool"),
    "NumPy's boolean": (fastkl.kl_div, {"temperature": np.bool_(True)}, "temperature .* got bool"),
    "a tensor": (
        fastkl.kl_div,
        {"temperature": F32[0, 0]},
        r"temperature must be a number, got Tensor: pass temperature.item\(\)$",
    ),
    "a parameter": (
        fastkl.js_div,
        {"beta": torch.nn.Parameter(F32[:1, 0])},
        "beta must be a number, got Parameter: there is no gradient with respect to beta$",
    ),
    "a learned temperature": (
        fastkl.kl_div,
        {"temperature": torch.nn.Parameter(F32[0, 0])},
        "got Parameter: there is no gradient .* to learn it, divide the logits of both sides by it$",
    ),
    "a tensor of many": (fastkl.kl_div, {"temperature": F32}, "must be a number, got Tensor$"),
    "a boolean beta": (fastkl.js_div, {"beta": True}, "beta must be a number, got bool"),
    "a boolean size": (fastkl.kl_div, {"vocab_size": True}, "vocab_size .* integer, got bool"),
    "a broken size": (fastkl.kl_div, {"vocab_size": np.float32(2)}, "integer, got float32"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_what_is_no_number(case):
    function, keywords, text = NUMBERS[case]
    with pytest.raises(TypeError, match=text):
        function(F32, F32, **keywords)


@pytest.mark.parametrize("clone", [True, False])
def test_what_was_not_built_may_lie_elsewhere_in_a_clone_alone(monkeypatch, tmp_path, clone):
    if clone:
        (tmp_path / "setup.py").touch()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "fastkl" / "errors.py"))
    said = errors.not_in_this_folder("the kernel is", "it was not built")
    assert said.startswith(f"the kernel is not in {tmp_path / 'fastkl'}: ")
    assert "it was not built" in said
    assert ("imports the clone" in said) is clone


LOSSES = {
    "vocab_size no integer": (
        {"vocab_size": "a"},
        TypeError,
        "vocab_size must be an integer, got str",
    ),
    "vocab_size negative": (
        {"vocab_size": -1},
        ValueError,
        "vocab_size must be at least 1, got -1",
    ),
    "unknown backend": ({"backend": "nope"}, ValueError, "backend must be one of .*got 'nope'"),
    "backend no name": (
        {"backend": 3},
        TypeError,
        "backend must be a string such as 'native', or None",
    ),
    "temperature": (
        {"temperature": 0},
        ValueError,
        "temperature must be positive and finite, got 0",
    ),
    "reduction": ({"reduction": "average"}, ValueError, "reduction must be one of"),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("module", [fastkl.KLDivLoss, fastkl.JSDivLoss])
def test_modules_refuse_on_construction(module, case):
    keywords, error, text = LOSSES[case]
    with pytest.raises(error, match=text):
        module(**keywords)


def test_modules_can_be_made_where_their_backend_can_not_run(monkeypatch):
    """A module may be configured on one machine and used on another."""
    monkeypatch.setattr(triton, "missing", lambda *_: "no card")
    loss = fastkl.KLDivLoss(backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton' was requested .*: no card"):
        loss(F32, F32)


UNUSABLE = "'native' was requested but cannot be used here: the kernel takes .* got torch.float64"


@pytest.mark.skipif(fastkl.unavailable_backends().get("native") is not None, reason="not built")
def test_a_dtype_that_the_backend_does_not_take(monkeypatch):
    """The message blames the dtype, not the machine."""
    with pytest.raises(RuntimeError, match=f"^backend={UNUSABLE}"):
        fastkl.kl_div(F32.double(), F32, backend="native")
    monkeypatch.setenv("FASTKL_BACKEND", "native")
    with pytest.raises(RuntimeError, match=f"^FASTKL_BACKEND={UNUSABLE}"):
        fastkl.kl_div(F32.double(), F32)


class Model:
    out_slice = (slice(None), -1)

    def __init__(self, output=None, out_slice=out_slice):
        self.out_slice = out_slice
        self.output = output if output is not None else torch.zeros(2, 3, 5)
        self.calls = 0

    def __call__(self, prompts):
        self.calls += 1
        return self.output


def batch(key=7):
    return SimpleNamespace(key=key, clean="clean prompts", corrupt="corrupt prompts")


OUTS = {30: {7: F32}, 20: {7: F32}}

MEASURE = {
    "no out_slice": (lambda p: p, [batch()], OUTS, TypeError, "out_slice, .* function has none", 0),
    "not callable": ("gpt2", [batch()], OUTS, TypeError, "callable on prompts, got str", 0),
    "circuit_outs a list": (Model(), [batch()], [F32], TypeError, "mapping {edge_count: ", 0),
    "outputs a tensor": (
        Model(),
        [batch()],
        {30: F32},
        TypeError,
        r"circuit_outs\[30\] must be a mapping",
        0,
    ),
    "missing key": (
        Model(),
        [batch(8)],
        OUTS,
        KeyError,
        r"circuit_outs\[30\] has no output for batch key 8 .* shuffle=True",
        0,
    ),
    "missing key in one circuit": (
        Model(),
        [batch()],
        {30: {7: F32}, 20: {1: F32}},
        KeyError,
        r"circuit_outs\[20\] .* key 7 \(it has 1 other key, such as 1 of type int\)\. The dataloader",
        0,
    ),
    "no keys": (
        Model(),
        [batch()],
        {30: {}},
        KeyError,
        r"batch key 7 \(it has 0 other keys\)\. The dataloader must give the same",
        0,
    ),
    "a key of another type": (
        Model(),
        [batch("7")],
        OUTS,
        KeyError,
        r"'7' \(it has .* 7 of type int\)\. The batch key is of another type, str",
        0,
    ),
    "a key of another type of number": (
        Model(),
        [batch(np.int64(8))],
        OUTS,
        KeyError,
        "shuffle=True",
        0,
    ),
    "nesting swapped": (
        Model(),
        [batch()],
        {7: {30: F32, 20: F32}},
        KeyError,
        r"must be {edge_count: {batch key: logits}}, and batch key 7 is among its edge counts",
        0,
    ),
    "edge counts for batch keys": (
        Model(),
        [batch()],
        {30: {30: F32}},
        KeyError,
        r"must be {edge_count: {batch key: logits}}, and these keys are among its edge counts: is the "
        r"nesting swapped\? If not: the dataloader must give .* shuffle=True",
        0,
    ),
    "a key that cannot be looked up": (
        Model(),
        [batch([7])],
        OUTS,
        TypeError,
        r"each batch's key must be hashable: .*; got list \(unhashable type: 'list'\)",
        0,
    ),
    "a key that holds such": (
        Model(),
        [batch(([7],))],
        OUTS,
        TypeError,
        "each batch's key must be hashable: .*; got tuple",
        0,
    ),
    "no key": (
        Model(),
        [SimpleNamespace(clean=1)],
        OUTS,
        TypeError,
        "SimpleNamespace has no key",
        0,
    ),
    "no clean prompts": (
        Model(),
        [SimpleNamespace(key=7)],
        OUTS,
        TypeError,
        "SimpleNamespace has no clean",
        0,
    ),
    "output not a tensor": (
        Model(),
        [batch()],
        {30: {7: "logits"}},
        TypeError,
        r"circuit_outs\[30\]\[7\] .* got str",
        0,
    ),
    "integer output": (
        Model(),
        [batch()],
        {30: {7: F32.int()}},
        TypeError,
        r"circuit_outs\[30\]\[7\] .*int32",
        0,
    ),
    "shape": (
        Model(),
        [batch()],
        {30: {7: F32[:1]}},
        ValueError,
        r"circuit_outs\[30\]\[7\] and reference .* got \(1, 5\) and \(2, 5\)",
        1,
    ),
    "vocabulary": (
        Model(torch.zeros(2, 3, 152064)),
        [batch()],
        {30: {7: torch.zeros(2, 151936)}},
        ValueError,
        r"151936 tokens in shape .* and 152064 .* pass vocab_size=, .* they share; .*out_slice picks",
        1,
    ),
    "device": (
        Model(),
        [batch()],
        {30: {7: F32.to("meta")}},
        ValueError,
        "got meta and cpu",
        1,
    ),
    "integer model": (
        Model(torch.zeros(2, 3, 5).long()),
        [batch()],
        OUTS,
        TypeError,
        "the model's output must hold logits",
        1,
    ),
    "an output that holds the logits": (
        Model(SimpleNamespace(logits=F32)),
        [batch()],
        OUTS,
        TypeError,
        "model must return logits, .* got SimpleNamespace; it has .logits: wrap the model",
        1,
    ),
    "an output of another kind": (
        Model((F32,)),
        [batch()],
        OUTS,
        TypeError,
        "model must return logits, .* got tuple$",
        1,
    ),
    "out_slice of too many": (
        Model(F32, (slice(None), -1, 0)),
        [batch()],
        OUTS,
        ValueError,
        r"model.out_slice does not index the model's output of shape \(2, 5\): too many",
        1,
    ),
    "out_slice out of range": (
        Model(F32, 2),
        [batch()],
        OUTS,
        ValueError,
        r"model.out_slice does not index .* shape \(2, 5\): index 2 is out of bounds",
        1,
    ),
    "out_slice of too few": (
        Model(out_slice=slice(None)),
        [batch()],
        OUTS,
        ValueError,
        r"\(2, 5\) and \(2, 3, 5\); the reference is what model.out_slice picks",
        1,
    ),
    "no loader": (Model(), None, OUTS, TypeError, "dataloader must be an iterable .* NoneType", 0),
    "one other key": (Model(), [batch(8)], OUTS, KeyError, r"\(it has 1 other key, such as 7 ", 0),
    "empty loader": (Model(), [], OUTS, ValueError, "gave 0 batches and no rows", 0),
    "batches without rows": (
        Model(torch.zeros(0, 3, 5)),
        [batch()],
        {30: {7: F32[:0]}},
        ValueError,
        "gave 1 batch and no rows",
        1,
    ),
}


@pytest.mark.parametrize("case", MEASURE)
def test_measure(case):
    model, loader, outs, error, text, calls = MEASURE[case]
    if isinstance(model, Model):
        model.calls = 0
    with pytest.raises(error, match=text):
        fastkl.measure_kl_div(model, loader, outs)
    if isinstance(model, Model):
        assert model.calls == calls


SIZES = {
    "more than the circuit has": (
        6,
        F32,
        torch.zeros(2, 3, 8),
        ValueError,
        r"at most 5, the number of tokens of circuit_outs\[30\]\[7\] with shape \(2, 5\); got 6",
        0,
    ),
    "more than the model has": (
        6,
        torch.zeros(2, 7),
        torch.zeros(2, 3, 5),
        ValueError,
        r"at most 5, the number of tokens of the model's output with shape \(2, 5\); got 6",
        1,
    ),
    "none": (0, F32, F32[:, None], ValueError, "vocab_size must be at least 1, got 0", 0),
    "no number": (5.0, F32, F32[:, None], TypeError, "must be an integer, got float", 0),
}


@pytest.mark.parametrize("case", SIZES)
def test_vocab_size_of_measure(case):
    vocab_size, circuit, output, error, text, calls = SIZES[case]
    model = Model(output)
    with pytest.raises(error, match=text):
        fastkl.measure_kl_div(model, [batch()], {30: {7: circuit}}, vocab_size=vocab_size)
    assert model.calls == calls


def test_a_used_up_iterator():
    loader = iter([batch()])
    fastkl.measure_kl_div(Model(), loader, OUTS)
    with pytest.raises(ValueError, match="an iterator that was already used up"):
        fastkl.measure_kl_div(Model(), loader, OUTS)


def test_messages_never_hold_contents():
    secret = torch.full((1, 4), 31337.0)
    with pytest.raises(ValueError, match="same shape") as raised:
        fastkl.kl_div(secret, secret[None])
    assert "31337" not in str(raised.value)


@pytest.mark.parametrize("backend", [3, ["eager"]])
def test_a_backend_that_is_no_name(backend):
    with pytest.raises(TypeError, match="backend must be a string such as 'native', or None; got"):
        fastkl.kl_div(F32, F32, backend=backend)
