"""The gradients against float64 autograd of the definition, and what unusual rows give."""

import math
import sys

import pytest
import torch
from conftest import LEVELS, ON_GPU, oracle_gradients, use

from fastkl.backends import eager, native, triton

INF, NAN = math.inf, math.nan
NOISES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 5)
# For each row, norm-wise: |dq - dq64| <= BOUND |dq64|. This allows a few float32 rounding errors;
# 4e-7 was the most seen.
BOUND = 2e-6


def make(generator, n_rows, n_cols, noise, scale=3, dtype=torch.float32):
    reference = torch.randn(n_rows, n_cols, generator=generator) * scale
    circuit = reference + noise * torch.randn(n_rows, n_cols, generator=generator)
    return circuit.to(dtype), reference.to(dtype)


@pytest.fixture(params=["eager", *LEVELS, "triton"])
def gradients(request, monkeypatch):
    """Return each backend's function: native's at each level, Triton's in its interpreter."""
    if request.param == "triton":
        if ON_GPU or (reason := triton.missing()):
            pytest.skip("there is a card: see test_gpu.py" if ON_GPU else reason)
        return triton.gradients
    return {"eager": eager, "native": native}[use(request.param, monkeypatch)].gradients


@pytest.fixture
def one(gradients):
    """Return a function that returns the gradients (dq, dp) of one circuit's rows."""

    def function(circuit, reference, grad=None, temperature=1.0):
        if grad is None:
            grad = torch.ones(circuit.shape[:1])
        (dq,), dp = gradients(grad[None], [circuit], reference, [True], True, temperature)
        return dq, dp

    return function


@pytest.fixture
def ordinary(gradients):
    """Return the shape of an ordinary test's rows, smaller for Triton's slow interpreter."""
    return (2, 1100) if gradients is triton.gradients else (4, 5000)


def eagerly(circuit, reference):
    (dq,), dp = eager.gradients(torch.ones(1, len(circuit)), [circuit], reference, [True], True)
    return dq, dp


def error(found, expected):
    """Return the largest relative error of any row, norm-wise."""
    norms = expected.double().norm(dim=-1)
    return ((found.double() - expected).norm(dim=-1) / norms).max().item()


@pytest.mark.parametrize("n_cols", [33, 50257])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("noise", NOISES)
def test_relative_error(gradients, one, generator, noise, scale, n_cols):
    # test_compiled_gradients.py tests Triton on large vocabularies.
    n_cols = 1600 if gradients is triton.gradients and n_cols > 1600 else n_cols
    n_rows = 1 if gradients is triton.gradients else 4
    circuit, reference = make(generator, n_rows, n_cols, noise, scale)
    grad = torch.rand(n_rows, generator=generator) + 0.5
    found, expected = one(circuit, reference, grad), oracle_gradients(circuit, reference, grad)
    for ours, exact in zip(found, expected, strict=True):
        assert error(ours, exact) <= BOUND
    # Check each element too, allowing for the rounding of what all tokens share: x, and d's mean.
    bounds = [shared * reference.double().softmax(-1) * grad[:, None] for shared in (1e-6, 1e-5)]
    for ours, exact, bound in zip(found, expected, bounds, strict=True):
        assert ((ours - exact).abs() <= 1e-5 * exact.abs() + min(noise, 1) * bound + 1e-12).all()


@pytest.mark.parametrize("shift", [64.0, -1000.0])
@pytest.mark.parametrize("side", [0, 1])
def test_shifts_change_nothing(one, generator, ordinary, side, shift):
    rows = list(make(generator, *ordinary, 0.1))
    rows[side] = rows[side] + shift
    for ours, exact in zip(one(*rows), oracle_gradients(*rows), strict=True):
        assert error(ours, exact) <= BOUND


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shift", [1.0, 16.0, -64.0, 256.0])
def test_sides_on_either_side_of_0(gradients, one, generator, shift, temperature):
    """Whichever side is moved to the other, likely tokens' last digits do not fit into float32."""
    shape = (1, 300) if gradients is triton.gradients else (2, 1500)
    p = torch.randn(shape, generator=generator) * 0.3 + (shift / 2 - 0.25)
    q = p - shift + 1e-3 * torch.randn(shape, generator=generator)
    exact = oracle_gradients(q.double() / temperature, p.double() / temperature)
    for ours, wide in zip(one(q, p, temperature=temperature), exact, strict=True):
        assert error(ours, wide / temperature) <= BOUND


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -3e38])
@pytest.mark.parametrize("side", [0, 1])
def test_masks_that_overflow_when_they_are_divided(gradients, one, generator, side, mask):
    """A token without mass contributes nothing, and not 0 times inf."""
    if gradients is triton.gradients:
        pytest.skip("in Triton logits below -1e38 count as masked: see README, Limits")
    rows = list(make(generator, 2, 40, 0.1))
    rows[0][:, 3], rows[1][:, 3] = -500, -500
    rows[side][:, 3] = mask
    exact = oracle_gradients(*(t.double() / 0.5 for t in rows))
    for ours, wide in zip(one(*rows, temperature=0.5), exact, strict=True):
        assert error(ours, wide / 0.5) <= BOUND


@pytest.mark.parametrize("huge", [1e8, -1e9])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_of_one_huge_logit_is_uniform(gradients, one, generator, side, huge):
    """Floats that large are multiples of 8 or more: in p - q the other side's logits round away."""
    if gradients is triton.gradients:
        pytest.skip("Triton's sides are not to be 1e5 apart: see README, Limits")
    ordinary = torch.randn(3, 5003, generator=generator) * 0.3
    rows, near = [ordinary, ordinary], [ordinary, ordinary]
    rows[side], near[side] = torch.full_like(ordinary, huge), torch.zeros_like(ordinary)
    for ours, exact in zip(one(*rows), oracle_gradients(*near), strict=True):
        assert error(ours, exact) <= BOUND


@pytest.mark.parametrize("temperature", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("others", [-INF, 0.0])
def test_one_token_of_a_huge_logit(gradients, one, others, temperature):
    """The token has all mass on both sides, 4e35 apart there: no gradient, however that rounds."""
    if gradients is triton.gradients:
        pytest.skip("a logit above 2e38 makes its row NaN in Triton: see README, Limits")
    reference, circuit = torch.full((2, 700), others), torch.full((2, 700), others)
    reference[:, 333], circuit[:, 333] = 3e38, 3.004e38
    for ours in one(circuit, reference, torch.tensor([0.56, -1.05]), temperature):
        assert (ours == 0).all()


def test_logits_on_a_coarse_grid(gradients, one):
    """At 8e12 floats are 524288 apart: what rounding takes from a maximum must not get lost."""
    if gradients is triton.gradients:
        pytest.skip("Triton's sides are not to be 1e5 apart: see README, Limits")
    reference, circuit = torch.full((2, 3100), 8e12), torch.full((2, 3100), 8e12 - 2**20)
    reference[:, 5] -= 2**20
    # The reference's gradient is 0 except for rounding errors.
    assert error(one(circuit, reference)[0], oracle_gradients(circuit, reference)[0]) <= BOUND


def test_both_rows_far_from_zero(one, generator, ordinary):
    """Logits are about -60, as GPT-2's are: p - q is exact, so that nothing is lost."""
    circuit, reference = make(generator, *ordinary, 0, 1)
    reference -= 60
    circuit = reference + 1e-3 * torch.randn(ordinary, generator=generator)
    found, expected = one(circuit, reference), oracle_gradients(circuit, reference)
    for ours, exact in zip(found, expected, strict=True):
        assert error(ours, exact) <= BOUND


def test_identical_rows_have_no_gradient(one, generator, ordinary):
    _, reference = make(generator, *ordinary, 0)
    for ours in one(reference.clone(), reference):
        assert (ours == 0).all()


def test_disjoint_peaks(one):
    """Tokens with mass on one side have gradient Q - P, if e^(q - p) overflows and if P is 0."""
    reference, circuit = torch.zeros(2, 1500), torch.zeros(2, 1500)
    reference[:, 7] = circuit[:, 1203] = 300.0
    found, expected = one(circuit, reference), oracle_gradients(circuit, reference)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("rest", [0.5, 1e-2, 1e-4, 1e-7])
def test_confident_rows(one, generator, rest):
    """One token has all mass but for `rest`: its own gradient is as small as that of the others."""
    circuit, reference = make(generator, 4, 700, 0.3, 1)
    top = reference.double().exp().sum(-1).log() - math.log(rest)
    reference[:, 123] = circuit[:, 123] = top
    found, expected = one(circuit, reference), oracle_gradients(circuit, reference)
    for ours, exact in zip(found, expected, strict=True):
        assert error(ours, exact) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(gradients, one, generator, ordinary, dtype):
    """Gradients are computed in float32 from the logits as they are, and rounded once."""
    circuit, reference = make(generator, *ordinary, 0.1, dtype=dtype)
    half = one(circuit, reference)
    whole = one(circuit.float(), reference.float())
    for ours, single in zip(half, whole, strict=True):
        assert ours.dtype == dtype
        if gradients is triton.gradients:
            # The interpreter truncates; compiled code rounds (test_compiled_gradients.py). Besides,
            # tiles of another shape round sums differently.
            info = torch.finfo(dtype)
            spacing = info.eps * single.abs().clamp(min=info.smallest_normal)
            assert ((ours.float() - single).abs() <= spacing).all()
        else:
            assert torch.equal(ours, single.to(dtype))


def test_float64(generator):
    circuit, reference = make(generator, 4, 5000, 1e-5, dtype=torch.float64)
    found, expected = eagerly(circuit, reference), oracle_gradients(circuit, reference)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        # At such small gradients, float64 autograd of the definition is itself off by this much.
        assert error(ours, exact) <= 1e-9


def test_mixed_dtypes(generator):
    circuit, reference = make(generator, 4, 500, 0.1)
    dq, dp = eagerly(circuit.bfloat16(), reference.double())
    assert (dq.dtype, dp.dtype) == (torch.bfloat16, torch.float64)
    expected = oracle_gradients(circuit.bfloat16(), reference)
    assert error(dp, expected[1]) <= 1e-12
    assert error(dq, expected[0]) <= 2**-8


def test_only_what_is_wanted(gradients, generator):
    n_rows = 1 if gradients is triton.gradients else 3
    circuit, reference = make(generator, n_rows, 500, 0.1)
    circuits = [circuit, circuit * 1.1, circuit * 0.9]
    grad = torch.randn(3, n_rows, generator=generator)
    every, dp = gradients(grad, circuits, reference, [True] * 3, True)
    some, none = gradients(grad, circuits, reference, [False, True, False], False)
    assert some[0] is some[2] is none is None
    assert torch.equal(some[1], every[1])
    _, alone = gradients(grad, circuits, reference, [False] * 3, True)
    assert torch.equal(alone, dp)
    # The reference's gradient is the sum over circuits.
    expected = sum(
        oracle_gradients(c, reference, g)[1] for c, g in zip(circuits, grad, strict=True)
    )
    assert error(dp, expected) <= BOUND


def test_rows_do_not_depend_on_the_batch(gradients, one, generator):
    """They do not depend on where the blocks of rows are cut either."""
    # 4100 tokens are just above what Triton's forward takes as one slice.
    n_rows, n_cols = (2, 4100) if gradients is triton.gradients else (9, 40000)
    circuit, reference = make(generator, n_rows, n_cols, 0.1)
    together = one(circuit, reference)
    for row in range(n_rows):
        alone = one(circuit[row : row + 1].clone(), reference[row : row + 1])
        for ours, whole in zip(alone, together, strict=True):
            assert torch.equal(ours[0], whole[row])


def test_a_slice_of_the_circuit_alone(one, generator, monkeypatch):
    """KL is 1300, by the sum for small KL: the error allowed in KL does not bound its masses'."""
    # With slices of another size this test would show nothing.
    if launch := sys.modules.get("fastkl._triton.launch"):
        monkeypatch.setattr(launch, "slices", lambda n_cols, itemsize: (n_cols // 128, 128))
    reference = torch.full((1, 512), -430.0)
    circuit = reference.clone()
    circuit[:, 256:287] += 1395 + torch.randn(1, 31, generator=generator)
    circuit[:, :256] += 3
    exact = oracle_gradients(circuit, reference)
    for ours, wanted in zip(one(circuit, reference), exact, strict=True):
        assert error(ours, wanted) <= BOUND


@pytest.mark.parametrize("side", ["p", "q", "both"])
def test_masked_tokens(one, generator, side):
    """A logit of -inf has gradient 0. Where only the reference is masked, the circuit's is Q."""
    circuit, reference = make(generator, 3, 700, 0.1)
    masked = torch.rand(3, 700, generator=generator) < 0.5
    masked[2] = False
    grad = torch.tensor([1.0, 0.3, 2.0])
    if side != "q":
        reference[masked] = -INF
    if side != "p":
        circuit[masked] = -INF
    dq, dp = one(circuit, reference, grad)
    assert (dp[masked] == 0).all()
    if side == "p":
        assert (dq[masked] > 0).all()
    else:
        assert (dq[masked] == 0).all()
    if side != "q":
        for ours, exact in zip((dq, dp), oracle_gradients(circuit, reference, grad), strict=True):
            assert error(ours, exact) <= BOUND
        return
    # The divergence of the first two rows is infinite: dq is Q - P, and dp is NaN.
    difference = (circuit.double().softmax(-1) - reference.double().softmax(-1)) * grad[:, None]
    assert error(dq, difference.masked_fill(masked, 0)) <= BOUND
    assert dp[:2][~masked[:2]].isnan().all()
    assert error(dp[2:], oracle_gradients(circuit[2:], reference[2:], grad[2:])[1]) <= BOUND


def test_masked_tokens_where_the_incoming_gradient_is_infinite(one, generator):
    """A loss scaler may make it infinite for a step: a -inf logit has gradient 0 even then."""
    circuit, reference = make(generator, 3, 700, 0.1)
    circuit[:, 5] = reference[:, 5] = -INF
    dq, dp = one(circuit, reference, torch.full((3,), INF))
    assert (dq[:, 5] == 0).all()
    assert (dp[:, 5] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_infinite_rows_where_one_token_has_all_mass(one, generator, ordinary, temperature):
    """Other finite logits have gradient NaN, not 0, though their probability is 0 in float32."""
    circuit, reference = make(generator, 3, ordinary[1], 1, 1)
    reference[:, 7] = torch.tensor([88.0, 1e4, 65504.0])
    reference[:, 11] = -1e30
    circuit[:, 7] = reference[:, 9] = -INF
    dq, dp = one(circuit, reference, temperature=temperature)
    assert (dp[:, [7, 9]] == 0).all()
    dp[:, [7, 9]] = NAN
    assert dp.isnan().all()
    # dq is Q where P is 0.
    assert error(dq, (circuit.double() / temperature).softmax(-1) / temperature) <= BOUND


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_finite_masks_and_large_gradients(one, generator, temperature):
    """A token without mass has no gradient, although the factor of its mass overflows."""
    circuit, reference = make(generator, 2, 700, 0.1)
    reference[:, 5] = -1e30
    reference[:, 9] = circuit[:, 9] = -1e30
    grad = torch.tensor([1e9, -1e12])
    scaled = [t.double() / temperature for t in (circuit, reference)]
    exact = oracle_gradients(*scaled, grad / temperature)
    for ours, wide in zip(one(circuit, reference, grad, temperature), exact, strict=True):
        assert error(ours, wide) <= BOUND


def test_a_mask_that_a_low_temperature_makes_infinite(gradients, one, generator):
    """A token without mass contributes nothing, although the difference of its logits overflows."""
    circuit, reference = make(generator, 2, 700, 0.1)
    reference[:, 5] = -1e37
    dq, dp = one(circuit, reference, temperature=0.01)
    assert (dp[:, 5] == 0).all()
    assert dq.isfinite().all()
    # Triton's dp may be NaN elsewhere: see README, Limits.
    assert dp.isfinite().all() or gradients is triton.gradients


@pytest.mark.parametrize("p_v", [NAN, INF, 0.5])
@pytest.mark.parametrize("q_v", [NAN, INF, 0.5])
def test_undefined_rows(one, generator, p_v, q_v):
    """Only a row whose divergence is NaN has NaN gradients, at its masked tokens too."""
    circuit, reference = make(generator, 3, 300, 0.1)
    clean = one(circuit, reference)
    reference[1, 5], circuit[1, 5] = p_v, q_v
    circuit[1, 9] = reference[1, 9] = -INF
    for ours, before in zip(one(circuit, reference), clean, strict=True):
        assert ours[1].isnan().all() == (p_v != 0.5 or q_v != 0.5)
        assert torch.equal(ours[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("which", ["p", "q", "both"])
def test_rows_without_any_mass(one, generator, which):
    circuit, reference = make(generator, 3, 700, 0.1)
    if which != "q":
        reference[1] = -INF
    if which != "p":
        circuit[1] = -INF
    for ours in one(circuit, reference):
        assert ours[1].isnan().all()
        assert ours[[0, 2]].isfinite().all()


def test_rows_no_one_asks_for(one, generator):
    """A loss that leaves out rows without a divergence is not spoiled by 0 · NaN."""
    circuit, reference = make(generator, 4, 700, 0.1)
    reference[0] = circuit[0] = -INF
    circuit[1, 3] = NAN
    circuit[2, 3] = -INF
    for ours in one(circuit, reference, torch.tensor([0.0, 0.0, 0.0, 1.0])):
        assert (ours[:3] == 0).all()
        assert (ours[3] != 0).any()


@pytest.mark.parametrize("n_cols", [1, 2, 15, 16, 17, 31, 33, 1000])
def test_vocabularies(one, generator, n_cols):
    circuit, reference = make(generator, 5, n_cols, 0.3)
    grad = torch.rand(5, generator=generator)
    for ours, exact in zip(
        one(circuit, reference, grad), oracle_gradients(circuit, reference, grad), strict=True
    ):
        assert ((ours - exact).norm(dim=-1) <= BOUND * exact.norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_rows_anywhere_in_memory(gradients, generator, dtype):
    """Rows lie in a wider tensor and start at odd addresses; the incoming gradient has stride 0."""
    circuit, reference = make(generator, 5, 701, 0.3, dtype=dtype)
    strided = []
    for rows, width in ((circuit, 1003), (reference, 811)):
        wide = torch.full((5, width), NAN, dtype=dtype)
        wide[:, 3:704] = rows
        strided.append(wide[:, 3:704])
    grad = torch.tensor(0.5).expand(1, 5)
    (dq,), dp = gradients(grad, [strided[0]], strided[1], [True], True)
    (dense,), dense_p = gradients(grad.contiguous(), [circuit], reference, [True], True)
    for ours, whole in ((dq, dense), (dp, dense_p)):
        # Triton's bits depend on where rows lie.
        if gradients is triton.gradients:
            assert error(ours, whole) <= (
                BOUND if dtype == torch.float32 else torch.finfo(dtype).eps
            )
        else:
            assert torch.equal(ours, whole)
    assert dq.is_contiguous()
    assert dp.is_contiguous()


@pytest.mark.parametrize("offset", [0.0, -100.0])
@pytest.mark.parametrize("noise", [1e-3, 0.1])
@pytest.mark.parametrize("temperature", [0.5, 0.7, 3.0])
def test_temperature(one, generator, ordinary, temperature, noise, offset):
    """Logits are subtracted before they are divided: the rounding of quotients would show."""
    circuit, reference = (t + offset for t in make(generator, *ordinary, noise))
    scaled = [t.double() / temperature for t in (circuit, reference)]
    exact = oracle_gradients(*scaled, torch.full((len(circuit),), 1 / temperature))
    for ours, wide in zip(one(circuit, reference, None, temperature), exact, strict=True):
        assert error(ours, wide) <= BOUND


def test_a_gradient_that_is_nan(one, generator):
    circuit, reference = make(generator, 3, 700, 0.1)
    circuit[1, 4] = reference[1, 5] = -INF
    for ours in one(circuit, reference, torch.tensor([1.0, NAN, 1.0])):
        assert ours[1].isnan().all()
        assert ours[[0, 2]].isfinite().all()


def test_threads_change_no_bit(gradients, generator):
    if gradients is triton.gradients:
        pytest.skip("the interpreter has one thread")
    circuit, reference = make(generator, 9, 5000, 0.1)
    grad = torch.rand(2, 9, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            dqs, dp = gradients(grad, [circuit, 2 * circuit], reference, [True, True], True)
            results.append((*dqs, dp))
    finally:
        torch.set_num_threads(threads)
    for ours, others in zip(*results, strict=True):
        assert torch.equal(ours, others)


def test_no_rows(gradients):
    empty = torch.empty(0, 7)
    (dq,), dp = gradients(torch.empty(1, 0), [empty], empty, [True], True)
    assert dq.shape == dp.shape == (0, 7)
    _, alone = gradients(torch.empty(0, 2), [], torch.zeros(2, 7), [], True)
    assert (alone == 0).all()
