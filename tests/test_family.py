"""Directions, temperatures, masks, paddings, statistics, and the modules."""

import math
import re
import typing
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from conftest import LEVELS, assert_matches, oracle, oracle_gradients, where_it_runs

import fastkl
from fastkl import backends
from fastkl.summaries import row_statistics

NAN, INF = math.nan, math.inf
NOISES = (1e-5, 1e-3, 0.1, 1, 5)


def make(generator, n_rows, n_cols, noise, dtype=torch.float32):
    reference = torch.randn(n_rows, n_cols, generator=generator) * 3
    circuit = reference + noise * torch.randn(n_rows, n_cols, generator=generator)
    return circuit.to(dtype), reference.to(dtype)


@pytest.mark.parametrize("noise", NOISES)
def test_reverse(generator, backend, largest_vocabulary, noise):
    circuit, reference = where_it_runs(backend, *make(generator, 3, largest_vocabulary, noise))
    found = fastkl.kl_div(
        circuit, reference, direction="reverse", reduction="none", backend=backend
    )
    assert_matches(found, oracle(reference, circuit))


def test_reverse_of_many(generator):
    circuit, reference = make(generator, 4, 300, 0.5)
    circuits = [circuit, reference, 2 * circuit]
    found = fastkl.kl_div_many(circuits, reference, direction="reverse", reduction="none")
    assert_matches(found, torch.stack([oracle(reference, c) for c in circuits]))
    assert fastkl.kl_div_many([], reference, direction="reverse").shape == (0,)


def test_gradient_of_reverse(generator):
    circuit, reference = make(generator, 4, 300, 0.5)
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    fastkl.kl_div(*leaves, direction="reverse", reduction="sum").backward()
    of_reference, of_circuit = oracle_gradients(reference, circuit)
    for leaf, exact in zip(leaves, (of_circuit, of_reference), strict=True):
        assert (leaf.grad - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shared_gradient_of_reverse_is_rounded_once(generator, dtype):
    """Adding the gradients of many circuits in half precision would lose most of them."""
    circuit, reference = make(generator, 2, 50, 1.0, dtype)
    leaf = reference.clone().requires_grad_()
    fastkl.kl_div_many([circuit] * 300, leaf, direction="reverse", reduction="sum").sum().backward()
    exact = 300 * oracle_gradients(reference, circuit)[0]
    assert leaf.grad.dtype == dtype
    assert (leaf.grad - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("temperature", [0.5, 2, 3.7])
@pytest.mark.parametrize("noise", NOISES)
def test_temperature(generator, backend, largest_vocabulary, noise, temperature):
    """The divergence is that of the exact quotients, not of quotients rounded to float32."""
    n_rows = 1 + (backend != "triton")
    rows = make(generator, n_rows, largest_vocabulary, noise)
    circuit, reference = where_it_runs(backend, *rows)
    found = fastkl.kl_div(
        circuit, reference, temperature=temperature, reduction="none", backend=backend
    )
    assert_matches(found, oracle(circuit.double() / temperature, reference.double() / temperature))
    same = fastkl.kl_div(reference, reference.clone(), temperature=temperature, backend=backend)
    assert same == 0


@pytest.mark.parametrize("temperature", [0.01, 0.7, 3.7])
@pytest.mark.parametrize("offset", [-100.0, 400.0])
def test_temperature_of_logits_far_from_zero(generator, backend, offset, temperature):
    """As GPT-2's logits are: divided directly, their quotients would be rounded at their size."""
    rows = make(generator, 2 if backend == "triton" else 6, 1500, 0.03)
    circuit, reference = where_it_runs(backend, *rows)
    circuit, reference = (t * min(1, 3 * temperature) + offset for t in (circuit, reference))
    found = fastkl.kl_div(
        circuit, reference, temperature=temperature, reduction="none", backend=backend
    )
    assert_matches(found, oracle(circuit.double() / temperature, reference.double() / temperature))


@pytest.mark.parametrize("temperature", [1e-39, 1e-300, 1e300])
def test_temperatures_beyond_float32(generator, implementation, temperature):
    circuit, reference = make(generator, 3, 50, 0.1)
    options = {"temperature": temperature, "reduction": "none", "backend": implementation}
    assert (fastkl.kl_div(reference.clone(), reference, **options) == 0).all()
    assert not fastkl.kl_div(circuit, reference, **options).isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_temperature_of_other_dtypes(generator, dtype):
    circuit, reference = make(generator, 9, 40000, 0.3, dtype)
    found = fastkl.kl_div(circuit, reference, temperature=1.5, reduction="none")
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(found, oracle(circuit.double() / 1.5, reference.double() / 1.5))


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("noise", NOISES)
def test_gradient_at_a_temperature(generator, noise, backend):
    if reason := fastkl.unavailable_backends().get(backend):
        pytest.skip(reason)
    circuit, reference = make(generator, 4, 5003, noise)
    grad = torch.rand(4, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    rows = fastkl.kl_div(*leaves, temperature=2.5, reduction="none", backend=backend)
    rows.backward(grad)
    scaled = [t.double() / 2.5 for t in (circuit, reference)]
    for leaf, exact in zip(leaves, oracle_gradients(*scaled, grad / 2.5), strict=True):
        # With each side's quotient rounded, the relative error would be 5e-7 / noise.
        assert ((leaf.grad - exact).norm(dim=-1) <= 1e-5 * exact.norm(dim=-1)).all()


def test_masked_rows_count_nothing(generator):
    circuit, reference = make(generator, 6, 50, 0.5)
    mask = torch.tensor([True, False, True, True, False, False])
    circuit[1, 3], reference[4], circuit[5, 2] = NAN, -INF, -INF
    circuit, reference = circuit.reshape(2, 3, 50), reference.reshape(2, 3, 50)
    kept = oracle(circuit, reference).flatten()[mask]
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    for reduction, expected in (
        ("mean", kept.mean()),
        ("sum", kept.sum()),
        ("batchmean", kept.sum() / 2),
    ):
        found = fastkl.kl_div(*leaves, mask=mask.reshape(2, 3), reduction=reduction)
        assert_matches(found.detach(), expected)
    rows = fastkl.kl_div(*leaves, mask=mask.reshape(2, 3), reduction="none")
    assert (rows.detach()[~mask.reshape(2, 3)] == 0).all()
    rows.sum().backward()
    for leaf in leaves:
        assert (leaf.grad.reshape(6, 50)[~mask] == 0).all()
        assert (leaf.grad.reshape(6, 50)[mask] != 0).any(-1).all()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert fastkl.kl_div(circuit, reference, mask=nothing).isnan()
    assert fastkl.kl_div(circuit, reference, mask=nothing, reduction="sum") == 0


def test_gradient_of_half_precision_weights_is_rounded_once(generator):
    """The gradient is the difference of a row's divergence and the mean, which are close."""
    circuit, reference = make(generator, 2, 50, 1.0)
    circuit[1], reference[1] = circuit[0], reference[0]
    circuit[1, 3] += 1e-2
    weights = torch.tensor([1.0, 1.001], dtype=torch.float16)
    found, wide = (w.clone().requires_grad_() for w in (weights, weights.double()))
    for leaf in (found, wide):
        fastkl.kl_div(circuit, reference, weights=leaf).backward()
    torch.testing.assert_close(found.grad, wide.grad.half(), rtol=0, atol=0)


def test_row_weights(generator):
    circuit, reference = make(generator, 5, 50, 0.5)
    circuit[1, 3] = NAN
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0])
    mask = torch.tensor([True, True, True, False, True])
    exact = oracle(circuit, reference)
    each = torch.where(weights != 0, exact * weights, 0.0)
    assert_matches(fastkl.kl_div(circuit, reference, weights=weights), each.sum() / 6.5)
    assert_matches(fastkl.kl_div(circuit, reference, weights=weights, reduction="none"), each)
    negative = fastkl.kl_div(circuit, reference, weights=-weights, reduction="none")
    assert torch.equal(
        negative, -fastkl.kl_div(circuit, reference, weights=weights, reduction="none")
    )
    # For example, 1 over a length of 0.
    weights[3] = torch.inf
    both = fastkl.kl_div_many([circuit, circuit], reference, weights=weights, mask=mask)
    assert_matches(both, (each[mask].sum() / 5.5).expand(2))
    weights.requires_grad_()
    fastkl.kl_div(circuit, reference, weights=weights, reduction="sum").backward()
    expected = torch.where(weights > 0, exact, 0.0).float()
    torch.testing.assert_close(weights.grad, expected)


def test_gradient_of_a_weight_of_0(generator):
    """The gradient is like any other weight's, or a gate that has closed could never open again."""
    circuit, reference = make(generator, 6, 50, 0.5)
    circuit[1, 3], circuit[2, 3] = NAN, -INF
    exact = oracle(circuit, reference)
    weights = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], requires_grad=True)
    mask = torch.tensor([True, True, True, True, True, False])
    leaf = circuit.clone().requires_grad_()
    fastkl.kl_div(leaf, reference, weights=weights, mask=mask, reduction="sum").backward()
    expected = torch.stack([exact[0], *exact.new_zeros(2), *exact[3:5], *exact.new_zeros(1)])
    torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=1e-8)
    weights.grad = None
    fastkl.kl_div(circuit, reference, weights=weights, mask=mask).backward()
    # The weights add up to 1, and the mean is the one weighted row's divergence.
    expected = torch.where(expected == 0, 0.0, expected - exact[3])
    torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert leaf.grad.count_nonzero(-1).tolist() == [0, 0, 0, 50, 0, 0]


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
def test_batchmean_is_torchs(generator, function):
    circuit, reference = make(generator, 6, 50, 0.5)
    circuit, reference = circuit.reshape(2, 3, 50), reference.reshape(2, 3, 50)
    total = function(circuit, reference, reduction="sum")
    torch.testing.assert_close(function(circuit, reference, reduction="batchmean"), total / 2)
    assert function(circuit[:0], reference[:0], reduction="batchmean").isnan()
    assert function(circuit[:, :0], reference[:, :0], reduction="batchmean") == 0


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
def test_padded_vocabularies(generator, function):
    """Each side has another padding, with any content, which gets no gradient."""
    circuit, reference = make(generator, 6, 50, 0.5)
    padded = [
        torch.cat([t, torch.full((6, n), NAN)], -1).reshape(2, 3, -1).requires_grad_()
        for t, n in ((circuit, 3), (reference, 14))
    ]
    found = function(*padded, vocab_size=50)
    assert torch.equal(found, function(circuit, reference))
    assert torch.equal(found, function(circuit, reference, vocab_size=50))
    found.backward()
    for leaf in padded:
        assert (leaf.grad[..., 50:] == 0).all()
        assert (leaf.grad[..., :50] != 0).any()


def test_statistics(generator, implementation):
    circuit, reference = make(generator, 6, 5000, 0.5)
    reference[0, 7] = -INF
    circuit[1] = reference[1]
    circuit[2, 3] = NAN
    circuits = [t.reshape(2, 3, -1) for t in (circuit, 3 * circuit)]
    reference = reference.reshape(2, 3, -1).requires_grad_()
    options = {"temperature": 2, "reduction": "none", "backend": implementation}
    divergence, stats = fastkl.kl_div_many(circuits, reference, return_stats=True, **options)
    plain = fastkl.kl_div_many(circuits, reference, **options)
    torch.testing.assert_close(divergence, plain, rtol=0, atol=0, equal_nan=True)
    log_p = (reference.detach().double() / 2).log_softmax(-1)
    entropy = -torch.where(log_p > -INF, log_p.exp() * log_p, 0.0).sum(-1)
    for k, c in enumerate(circuits):
        log_q = (c.double() / 2).log_softmax(-1)
        cross = -torch.where(log_p > -INF, log_p.exp() * log_q, 0.0).sum(-1)
        agree = (c.argmax(-1) == reference.argmax(-1)) & ~log_q.isnan().any(-1)
        expected = fastkl.KLStatistics(
            (reference.detach().double() / 2).logsumexp(-1),
            (c.double() / 2).logsumexp(-1),
            entropy,
            cross,
            agree,
        )
        for name, field, exact in zip(stats._fields, stats, expected, strict=True):
            assert field.shape == (2, 2, 3), name
            assert not field.requires_grad
            torch.testing.assert_close(
                field[k].double(), exact.double(), rtol=1e-5, atol=1e-6, equal_nan=True
            )
    assert stats.top1_agreement.dtype == torch.bool
    assert stats.top1_agreement[0, 0, 1]
    # A caller may write to one circuit's numbers: no other circuit shares them.
    for field in stats:
        assert field[0].data_ptr() != field[1].data_ptr()
    one, alone = fastkl.kl_div(circuits[0], reference, return_stats=True, direction="reverse")
    assert one.shape == ()
    torch.testing.assert_close(
        alone.cross_entropy - alone.reference_entropy,
        fastkl.kl_div(circuits[0], reference, reduction="none"),
        equal_nan=True,
        rtol=1e-5,
        atol=1e-5,
    )


def exact_statistics(circuit, reference, temperature):
    """Return the statistics of rows (R, V) in float64, by the definitions; NaN if undefined."""
    log_p, log_q = ((t.double() / temperature).log_softmax(-1) for t in (reference, circuit))
    p = log_p.exp()
    lse = [
        torch.where((t == INF).any(-1), NAN, (t.double() / temperature).logsumexp(-1))
        for t in (reference, circuit)
    ]
    entropy = -torch.where(p > 0, p * log_p, p * 0).sum(-1)
    cross = -torch.where(p > 0, p * log_q, p * 0 + log_q.exp() * 0).sum(-1)
    # The index of the first maximum, by counting.
    top = [
        (t == t.amax(-1, keepdim=True)).int().cumsum(-1).eq(0).sum(-1) for t in (reference, circuit)
    ]
    agreement = (top[0] == top[1]) & ~log_p.isnan().any(-1) & ~log_q.isnan().any(-1)
    return fastkl.KLStatistics(*lse, entropy, cross, agreement)


def assert_statistics_match(found, expected):
    for name, field, exact in zip(found._fields, found, expected, strict=True):
        if exact.dtype == torch.bool:
            assert torch.equal(field, exact), name
            continue
        # The errors are a few 1e-7 of the largest terms: logits, or a log-sum-exp.
        eps = 2e-6 if field.dtype == torch.float32 else 1e-14
        message = f"{name}: {field.tolist()} for {exact.tolist()}"
        close = torch.isclose(field.double(), exact, rtol=eps, atol=10 * eps, equal_nan=True)
        assert close.all(), message


@pytest.mark.parametrize("temperature", [1, 0.25, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_statistics_at_the_edges(generator, implementation, dtype, temperature):
    """Tokens and rows without mass, NaN, infinities, and ties, in which the first token counts."""
    if implementation == "native" and dtype == torch.float64:
        pytest.skip("the native kernel takes no float64")
    # Spread out, so that there are no ties by chance.
    reference = torch.randn(16, 300, generator=generator) * 3
    circuit = reference + 0.3 * torch.randn(16, 300, generator=generator)
    reference[0, 5:200] = circuit[0, 7:200] = -INF
    circuit[0, 5] = reference[0, 205] = 0
    # In an undefined row the first NaN, +inf or -inf counts as largest. Here it is at the other
    # side's top token, and the sides still do not agree.
    circuit[1:4, 0] = reference[4:7, 0] = 50
    reference[1, 0], reference[2, 0], reference[3] = NAN, INF, -INF
    circuit[4, 0], circuit[5, 0], circuit[6] = NAN, INF, -INF
    reference[7] = circuit[7] = -INF
    # Ties at 40 and 70: against 70 alone, against both, and against 70 and 90.
    reference[8:11, 40] = reference[8:11, 70] = 40
    circuit[8:11, 70] = 40
    circuit[9, 40] = circuit[10, 90] = 40
    reference[11] = circuit[11] = 7
    # One token has all the mass; in two more rows, logits lie far from 0.
    reference[12, 9], reference[13:15] = 2000, reference[13:15] - 300
    circuit[13] -= 300
    circuit[15, :-1] = reference[15, :-1] = -INF
    circuit, reference = circuit.to(dtype), reference.to(dtype)
    before = circuit.clone(), reference.clone()
    options = {"temperature": temperature, "reduction": "none", "backend": implementation}
    _, found = fastkl.kl_div(circuit, reference, return_stats=True, **options)
    assert found.circuit_logsumexp.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    expected = exact_statistics(circuit, reference, temperature)
    assert_statistics_match(found, expected)
    assert found.top1_agreement[8:12].tolist() == [False, True, False, True]
    assert found.reference_logsumexp[3] == found.circuit_logsumexp[6] == -INF
    for t, was in zip((circuit, reference), before, strict=True):
        assert torch.equal(t.nan_to_num(nan=123.0), was.nan_to_num(nan=123.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_several_blocks(generator, dtype):
    """The last block is not full, and the circuits' rows are not adjacent in memory."""
    wide = torch.randn(3, 7, 50300, generator=generator).to(dtype) * 3
    reference, *circuits = wide[..., :50257]
    circuits[1][2] = reference[2]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = row_statistics(circuits, reference, 1.0)
    finally:
        torch.set_num_threads(n_threads)
    assert [e.count for e in profile.key_averages() if e.key == "aten::exp"] == [3 * 2]
    assert_rows_match(found, circuits, reference)
    assert found[2][1].tolist() == [False, False, True, False, False, False, False]


def assert_rows_match(found, circuits, reference, temperature=1):
    """Assert that what `row_statistics` found matches the definitions."""
    lse, entropy, agreement = found
    for k, circuit in enumerate(circuits):
        expected = exact_statistics(circuit, reference, temperature)
        cross = expected.cross_entropy.to(lse.dtype)
        fields = lse[0], lse[1 + k], entropy, cross, agreement[k]
        assert_statistics_match(fastkl.KLStatistics(*fields), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_cols", [1, 15, 16, 17, 12289, 50257])
@pytest.mark.parametrize("implementation", LEVELS, indirect=True)
def test_native_statistics(generator, implementation, dtype, n_cols):
    """Groups of 16 tokens, blocks of 12288, remainders; bits do not depend on rows or threads."""
    wide = torch.randn(4, 5, n_cols + 3, generator=generator).to(dtype) * 3
    reference, *circuits = wide[..., :n_cols]
    circuits[2] = circuits[2].float()
    # The largest logit is in the first block, in the last, or in both, where the first counts.
    first = min(5, n_cols - 1)
    reference[0, first] = reference[1, -1] = reference[2, first] = reference[2, -1] = 40
    circuits[0][2, -1] = circuits[1][2, first] = 40
    # A NaN or +inf in a block before the last one, and largest logits at one offset in two blocks.
    circuits[0][3, first], circuits[1][3, first] = NAN, INF
    block = 64 * math.ceil(n_cols / math.ceil(n_cols / 12288) / 64)
    reference[4, first], circuits[0][4, (first + block) % n_cols] = 40, 40
    measure = backends.backend_by_name(implementation).row_statistics
    for temperature in (2.0, 1.0):
        found = measure(circuits, reference, temperature)
        assert_rows_match(found, circuits, reference, temperature)
    alone = measure([c[1:2] for c in circuits], reference[1:2], 1.0)
    assert all(map(torch.equal, alone, (field[..., 1:2] for field in found)))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = measure(circuits, reference, 1.0)
    finally:
        torch.set_num_threads(n_threads)
    for field, other in zip(again, found, strict=True):
        assert torch.equal(field.nan_to_num(nan=123.0), other.nan_to_num(nan=123.0))


def test_statistics_look_at_each_logit_a_few_times(generator):
    """Each logit is in one maximum, without PyTorch's slow argmax, and in one exponential."""
    circuit, reference = make(generator, 4, 1000, 0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        row_statistics([circuit] * 5, reference, 1.0)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::exp"] == 6
    # One for each side, and one for the reference's entropy.
    assert calls["aten::sum"] == 7
    assert calls["aten::sub"] == 7
    assert not calls.keys() & {"aten::argmax", "aten::max", "aten::amax", "aten::amin"}


def test_no_rows():
    empty = torch.empty(0, 5)
    divergence, stats = fastkl.kl_div(empty, empty, reduction="none", return_stats=True)
    assert divergence.shape == stats.cross_entropy.shape == (0,)
    for function in (fastkl.kl_div, fastkl.js_div):
        assert function(empty, empty, mask=torch.empty(0, dtype=torch.bool)).isnan()
        assert function(empty, empty, weights=torch.empty(0)).isnan()


def test_another_default_device(generator):
    """Tensors that stand for numbers are created on the logits' device."""
    circuit, reference = make(generator, 4, 50, 0.5)
    arguments = {"mask": torch.ones(4, dtype=torch.bool), "weights": torch.ones(4)}
    plain = [
        fastkl.kl_div(circuit, reference, temperature=2, return_stats=True)[0],
        fastkl.kl_div(circuit, reference, direction="reverse"),
        fastkl.js_div(circuit, reference, **arguments),
    ]
    # Not set_default_device, which leaves a function mode behind even when it is reset.
    with torch.device("meta"):
        elsewhere = [
            fastkl.kl_div(circuit, reference, temperature=2, return_stats=True)[0],
            fastkl.kl_div(circuit, reference, direction="reverse"),
            fastkl.js_div(circuit, reference, **arguments),
        ]
    assert all(torch.equal(a, b) for a, b in zip(plain, elsewhere, strict=True))


def test_modules(generator):
    circuit, reference = make(generator, 4, 60, 0.5)
    mask = torch.tensor([True, True, False, True])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = fastkl.KLDivLoss(
        reduction="sum", direction="reverse", temperature=2.0, vocab_size=50, backend="eager"
    )
    expected = fastkl.kl_div(
        circuit[:, :50],
        reference[:, :50],
        reduction="sum",
        direction="reverse",
        temperature=2.0,
        mask=mask,
        weights=weights,
        backend="eager",
    )
    assert torch.equal(loss(circuit, reference, mask, weights), expected)
    assert repr(loss) == (
        "KLDivLoss(reduction='sum', direction='reverse', temperature=2.0, vocab_size=50, "
        "backend='eager')"
    )
    loss = fastkl.JSDivLoss(
        beta=0.2, reduction="sum", temperature=2.0, vocab_size=50, backend="eager"
    )
    expected = fastkl.js_div(
        circuit[:, :50],
        reference[:, :50],
        beta=0.2,
        reduction="sum",
        temperature=2.0,
        mask=mask,
        weights=weights,
        backend="eager",
    )
    assert torch.equal(loss(circuit, reference, mask, weights), expected)
    assert repr(loss) == (
        "JSDivLoss(beta=0.2, reduction='sum', temperature=2.0, vocab_size=50, backend='eager')"
    )


BAD = (
    ({"direction": "back"}, ValueError, "direction must be one of"),
    ({"temperature": 0}, ValueError, "positive and finite, got 0"),
    ({"temperature": NAN}, ValueError, "positive and finite, got nan"),
    ({"temperature": 10**400}, ValueError, "positive and finite, got 1000"),
    ({"temperature": "2"}, TypeError, "temperature must be a number, got str"),
    ({"mask": torch.ones(4)}, TypeError, "float32: pass mask.bool.*; fractions go into weights$"),
    ({"mask": torch.ones(4, dtype=torch.int64)}, TypeError, r"int64: pass mask.bool\(\)$"),
    ({"mask": [True]}, TypeError, "mask must be a torch.Tensor, got list"),
    ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"shape \(4,\).*got \(3,\)"),
    ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "meta and cpu"),
    ({"weights": torch.ones(4, dtype=torch.bool)}, TypeError, "bool; pass .* as mask$"),
    ({"weights": torch.ones(4, dtype=torch.int64)}, TypeError, "floating-point, got torch.int64$"),
    ({"weights": torch.ones(4, 1)}, ValueError, r"shape \(4,\).*got \(4, 1\)"),
    ({"vocab_size": 51}, ValueError, r"50, .* of reference with shape \(4, 50\); got 51"),
    ({"vocab_size": 0}, ValueError, "got 0"),
    ({"vocab_size": 5.0}, TypeError, "vocab_size must be an integer, got float"),
)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_errors(generator, arguments, error, message):
    circuit, reference = make(generator, 4, 50, 0.5)
    with pytest.raises(error, match=message):
        fastkl.kl_div(circuit, reference, **arguments)
    with pytest.raises(error, match=message):
        fastkl.kl_div_many([circuit], reference, **arguments)
    if "direction" not in arguments:
        with pytest.raises(error, match=message):
            fastkl.js_div(circuit, reference, **arguments)


def test_numbers_of_numpy(generator):
    circuit, reference = torch.randn(2, 4, 50, generator=generator)
    for two in (np.float32(2), np.float64(2), np.int64(2)):
        found = fastkl.kl_div(circuit, reference, temperature=two)
        assert torch.equal(found, fastkl.kl_div(circuit, reference, temperature=2))
    for forty in (np.int64(40), np.uint8(40)):
        found = fastkl.KLDivLoss(vocab_size=forty)(circuit, reference)
        assert torch.equal(found, fastkl.kl_div(circuit, reference, vocab_size=40))
    found = fastkl.js_div(circuit, reference, beta=np.float32(0.25))
    assert torch.equal(found, fastkl.js_div(circuit, reference, beta=0.25))


def test_the_fields_of_statistics_are_documented():
    """The class's docstring documents them: for a NamedTuple, `help` shows no other place."""
    attributes = fastkl.KLStatistics.__doc__.split("Attributes\n")[1]
    for field in fastkl.KLStatistics._fields:
        assert re.search(rf"^\s*{field} : Tensor", attributes, re.M)


def test_stacked_circuits_are_annotated():
    hints = typing.get_type_hints(fastkl.kl_div_many)
    assert set(typing.get_args(hints["circuits"])) == {torch.Tensor, Iterable[torch.Tensor]}
