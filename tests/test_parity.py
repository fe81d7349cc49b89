"""Every backend against the float64 oracle, on random logits over the range of divergences."""

import pytest
import torch
from conftest import assert_matches, interpreted, kl_rows, oracle, vanishing_weights

NOISES = (0, 1e-5, 1e-3, 0.1, 1, 5)


def logits(generator, n_rows, n_cols, scale, noise, dtype=torch.float32):
    reference = torch.randn(n_rows, n_cols, generator=generator) * scale
    circuit = reference + noise * torch.randn(n_rows, n_cols, generator=generator)
    return circuit.to(dtype), reference.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 3])
def test_all_noises(backend, largest_vocabulary, generator, dtype, scale):
    # One circuit per noise: six circuits make a group of four and a group of two.
    reference = (torch.randn(2, largest_vocabulary, generator=generator) * scale).to(dtype)
    circuits = [
        (reference + noise * torch.randn(reference.shape, generator=generator)).to(dtype)
        for noise in NOISES
    ]
    divergence = kl_rows(circuits, reference, backend)
    expected = torch.stack([oracle(circuit, reference) for circuit in circuits])
    assert_matches(divergence, expected)
    assert (divergence[0] == 0).all()
    assert (divergence[1:] > 0)[expected[1:] > 0].all()


@pytest.mark.parametrize("noise", NOISES)
def test_single_circuit(backend, largest_vocabulary, generator, noise):
    circuit, reference = logits(generator, 2, largest_vocabulary, 3, noise)
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


@pytest.mark.parametrize("noise", NOISES)
def test_float64(generator, noise):
    reference = torch.randn(4, 50257, generator=generator, dtype=torch.float64) * 3
    circuit = reference + noise * torch.randn(
        reference.shape, generator=generator, dtype=torch.float64
    )
    divergence = kl_rows([circuit], reference, "eager")
    assert divergence.dtype == torch.float64
    assert_matches(divergence[0], oracle(circuit, reference))


def test_gpt2_vocabulary(backend, generator):
    """Every backend takes the real vocabulary: several slices, and an odd number of tokens."""
    n_rows = 1 if interpreted(backend) else 2
    circuit, reference = logits(generator, n_rows, 50257, 3, 0.1)
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_cols", [128256, 151936])
def test_large_vocabularies(backend, generator, n_cols):
    if interpreted(backend) and n_cols == 128256:
        pytest.skip("the interpreter is slow, and has the larger one")
    n_rows = 1 if backend == "triton" else 4
    circuit, reference = logits(generator, n_rows, n_cols, 3, 0.5)
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


def test_confident_rows(backend, generator):
    """One token holds nearly all mass and only the tails differ.

    First-order errors would drown the result.
    """
    reference = torch.randn(4, 2000, generator=generator)
    reference[torch.arange(4), torch.tensor([0, 3, 700, 1999])] = 25.0
    tails = torch.randn(4, 2000, generator=generator)
    circuits = [reference + size * tails for size in (1e-3, 0.5, 2)]
    for circuit in circuits:
        top = reference == 25.0
        circuit[top] = 25.0
    divergence = kl_rows(circuits, reference, backend)
    assert_matches(divergence, torch.stack([oracle(c, reference) for c in circuits]))


@pytest.mark.parametrize("boost", [14.0, 40.0])
def test_circuits_too_sure_of_a_token(backend, generator, boost):
    """A base or pivot taken from other tokens is off by as much as the boost.

    Little is then left of large sums, and it is rounded.
    """
    reference = torch.randn(40, 300, generator=generator)
    circuit = reference + 0.03 * torch.randn(40, 300, generator=generator)
    rest = torch.linspace(0.05, 0.6, 40) / boost
    reference[:, 123] = reference.logsumexp(-1) + torch.log(1 / rest - 1)
    circuit[:, 123] = reference[:, 123] + boost + torch.rand(40, generator=generator)
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


@pytest.mark.parametrize("level", [-100.0, 40.0])
def test_few_likely_tokens_of_logits_far_from_zero(backend, generator, level):
    """GPT-2's logits are that far from zero.

    Few terms do not average out the rounding error of a pivot or a base there.
    """
    n_rows = 100 if interpreted(backend) else 400
    reference = torch.randn(n_rows, 4, generator=generator) + level
    circuit = reference + 0.6 * torch.randn(n_rows, 4, generator=generator)
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


def test_disjoint_peaks(backend):
    """The distributions live on different tokens: e^(q - p) overflows, the divergence does not."""
    reference = torch.zeros(2, 1500)
    circuit = torch.zeros(2, 1500)
    reference[:, 7] = 300.0
    circuit[:, 1203] = 300.0
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


def test_circuit_mass_where_the_references_vanishes_in_float32(backend, generator):
    circuit, reference = vanishing_weights(generator, torch.linspace(84, 110, 27))
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


def test_circuit_mass_where_the_reference_has_none(backend, generator):
    """The circuit's e^10000 overflows in a masked prefix that is longer than any slice."""
    reference = torch.randn(1, 40000 if backend == "native" else 9000, generator=generator)
    circuit = reference + 0.1 * torch.randn(reference.shape, generator=generator)
    reference[:, : reference.shape[1] - 500] = -torch.inf
    circuit[0, 5] = 1e4
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


def test_mixed_dtypes(backend, generator):
    """A half-precision circuit and a float32 reference: neither is rounded to the other's dtype."""
    reference = torch.randn(3, 700, generator=generator)
    circuits = [reference.half(), reference.bfloat16(), reference]
    divergence = kl_rows(circuits, reference, backend)
    assert_matches(divergence, torch.stack([oracle(c, reference) for c in circuits]))
