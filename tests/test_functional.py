"""kl_div and kl_div_many: shapes, reductions, dtypes."""

import pytest
import torch
from conftest import oracle

import fastkl


@pytest.fixture
def pair(generator):
    reference = torch.randn(2, 3, 50, generator=generator)
    return reference + torch.randn(2, 3, 50, generator=generator), reference


def test_reductions(pair):
    circuit, reference = pair
    expected = oracle(circuit, reference)
    none = fastkl.kl_div(circuit, reference, reduction="none")
    assert none.shape == (2, 3)
    torch.testing.assert_close(none, expected.float())
    torch.testing.assert_close(
        fastkl.kl_div(circuit, reference, reduction="sum"), expected.sum().float()
    )
    torch.testing.assert_close(fastkl.kl_div(circuit, reference), expected.mean().float())


def test_direction(pair):
    """P is the reference, as in torch's kl_div of log-probabilities, and not the circuit."""
    circuit, reference = pair
    theirs = torch.nn.functional.kl_div(
        circuit.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(fastkl.kl_div(circuit, reference, reduction="sum"), theirs)
    swapped = fastkl.kl_div(reference, circuit, reduction="sum")
    assert abs(swapped - theirs) > 0.1


def test_one_row(pair):
    circuit, reference = pair
    divergence = fastkl.kl_div(circuit[0, 0], reference[0, 0], reduction="none")
    assert divergence.shape == ()
    torch.testing.assert_close(divergence, oracle(circuit, reference)[0, 0].float())


def test_many(pair, generator):
    circuit, reference = pair
    circuits = [circuit, reference, circuit * 2]
    expected = torch.stack([oracle(c, reference) for c in circuits])
    none = fastkl.kl_div_many(circuits, reference, reduction="none")
    assert none.shape == (3, 2, 3)
    torch.testing.assert_close(none, expected.float())
    torch.testing.assert_close(
        fastkl.kl_div_many(circuits, reference), expected.mean((1, 2)).float()
    )
    torch.testing.assert_close(
        fastkl.kl_div_many(torch.stack(circuits), reference, reduction="sum"),
        expected.sum((1, 2)).float(),
    )
    assert fastkl.kl_div_many([], reference).shape == (0,)
    assert fastkl.kl_div_many([], reference, reduction="none").shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("circuit_dtype", "reference_dtype", "result"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes(pair, circuit_dtype, reference_dtype, result):
    circuit, reference = pair[0].to(circuit_dtype), pair[1].to(reference_dtype)
    divergence = fastkl.kl_div(circuit, reference)
    assert divergence.dtype == result
    torch.testing.assert_close(
        divergence.double(), oracle(circuit, reference).mean(), rtol=1e-5, atol=0
    )


def test_half_precision_is_not_rounded_first(generator):
    """bf16 logits are taken as the numbers they hold: float32 copies give the same result."""
    reference = (torch.randn(4, 3000, generator=generator) * 3).bfloat16()
    circuit = (reference.float() + 0.1 * torch.randn(4, 3000, generator=generator)).bfloat16()
    half = fastkl.kl_div(circuit, reference, reduction="none")
    assert torch.equal(half, fastkl.kl_div(circuit.float(), reference.float(), reduction="none"))


def test_no_rows_have_no_mean():
    empty = torch.empty(0, 5)
    assert fastkl.kl_div(empty, empty).isnan()
    assert fastkl.kl_div(empty, empty, reduction="sum") == 0
    assert fastkl.kl_div(empty, empty, reduction="none").shape == (0,)
    assert fastkl.kl_div_many([empty], empty, reduction="none").shape == (1, 0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("rows", ["all", "masked", "weighted"])
def test_sums_are_accumulated_in_float64(reduction, rows):
    """In float32, the first row would leave the 3999 others few digits; the sum is rounded once."""
    reference, circuit = torch.zeros(4000, 2), torch.zeros(4000, 2)
    circuit[:, 0] = torch.linspace(0.5, 2, 4000)
    circuit[0, 0] = 3e6
    weights = torch.ones(4000)
    if rows != "all":
        weights[1::7] = 0.0
    if rows == "weighted":
        weights[::3] *= 0.7
    keywords = {"masked": {"mask": weights > 0}, "weighted": {"weights": weights}}.get(rows, {})
    each = fastkl.kl_div(circuit, reference, reduction="none").double() * weights.double()
    over = {"sum": 1, "mean": weights.double().sum(), "batchmean": 4000}[reduction]
    found = fastkl.kl_div(circuit, reference, reduction=reduction, **keywords)
    assert torch.equal(found, (each.sum() / over).float())


def test_generators_are_circuits(pair):
    circuit, reference = pair
    found = fastkl.kl_div_many((c for c in [circuit, reference]), reference)
    assert torch.equal(found, fastkl.kl_div_many([circuit, reference], reference))


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("incoming", [1.0, 0.0])
def test_gradients_at_the_edges(backend, direction, incoming):
    """Check the special cases that kl_div's docstring lists, on one row each."""
    if fastkl.unavailable_backends().get(backend):
        pytest.skip("not built")
    inf, nan = torch.inf, torch.nan
    p = torch.tensor([[0.0, -inf, 0.3], [0.0, -inf, 0.3], [0.0, 1.0, -inf], [0.0, -inf, nan]])
    q = torch.tensor([[1.0, -inf, 0.5], [1.0, 2.0, 0.5], [1.0, -inf, 0.5], [1.0, -inf, 0.5]])
    p, q = p.requires_grad_(), q.requires_grad_()
    forward = direction == "forward"
    sides = (q, p) if forward else (p, q)
    divergence = fastkl.kl_div(*sides, reduction="none", direction=direction, backend=backend)
    dp, dq = torch.autograd.grad(divergence, (p, q), torch.full((4,), incoming))
    if incoming == 0:
        assert not dp.any()
        assert not dq.any()
        return
    masses = q.detach().softmax(-1), p.detach().softmax(-1)
    expected = masses[0] - masses[1]
    assert dq[0, 1] == dp[0, 1] == dp[1, 1] == 0
    torch.testing.assert_close(dq[1, 1], masses[0][1, 1])
    assert divergence[2] == inf
    assert dq[2, 1] == dp[2, 1] == dp[2, 2] == 0
    assert dp[2, 0].isnan()
    torch.testing.assert_close(dq[2, ::2], expected[2, ::2])
    assert divergence[3].isnan()
    assert dp[3].isnan().all()
    assert dq[3].isnan().all()


@pytest.mark.parametrize("none", [torch.empty(0, 5), torch.ones(2, 5)])
def test_the_mean_of_none_has_gradient_0(none):
    circuit, reference = none.clone().requires_grad_(), none.clone().requires_grad_()
    mask = torch.zeros(len(none), dtype=torch.bool)
    divergence = fastkl.kl_div(circuit, reference, mask=mask)
    assert divergence.isnan()
    divergence.backward()
    assert not circuit.grad.any()
    assert not reference.grad.any()


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
def test_the_mean_of_weights_that_add_up_to_0_has_gradient_0(weights):
    """A batch of nothing but padding must not make the model's parameters NaN."""
    leaves = [*torch.randn(2, 2, 5).unbind(0), torch.tensor(weights)]
    for leaf in leaves:
        leaf.requires_grad_()
    divergence = fastkl.kl_div(*leaves[:2], weights=leaves[2])
    assert divergence.isnan()
    divergence.backward()
    assert not any(leaf.grad.any() for leaf in leaves)


def test_inference_tensors_and_no_grad(pair):
    circuit, reference = pair
    expected = fastkl.kl_div(circuit, reference)
    with torch.inference_mode():
        inside = fastkl.kl_div(circuit.clone(), reference.clone())
    assert torch.equal(inside, expected)
    with torch.no_grad():
        assert torch.equal(fastkl.kl_div(circuit.clone().requires_grad_(), reference), expected)
    assert torch.equal(
        fastkl.kl_div(circuit.clone().requires_grad_().detach(), reference), expected
    )
