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
    """The reference is P: as torch's kl_div of log-probabilities, and not the other way round."""
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
    """bf16 logits mean the numbers they hold: the result is that of their float32 copies."""
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


def test_sums_are_accumulated_in_float64():
    """2^24 + 1 rows of equal divergence would stop growing in float32; here a few show the like."""
    reference = torch.zeros(3, 2)
    circuit = torch.tensor([[3e4, 0.0], [1.0, 0.0], [1.0, 0.0]])
    total = fastkl.kl_div(circuit, reference, reduction="sum").double()
    exact = oracle(circuit, reference).sum()
    assert abs(total - exact) <= exact * 2**-24


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
