"""The algebra of states: slices of a vocabulary merge to what the whole gives, in any order."""

import functools
from fractions import Fraction

import pytest
import torch
from conftest import interpreted, oracle

from fastkl import backends, state


def states(backend, circuits, reference, cuts):
    """Return a backend's states (K, R) of the slices between the cuts."""
    parts = zip((0, *cuts), (*cuts, reference.shape[1]), strict=True)
    compute = backends.choose(backend, reference.device, reference.dtype).row_states
    return [compute([c[:, a:b] for c in circuits], reference[:, a:b]) for a, b in parts]


@pytest.fixture(autouse=True)
def _on_the_cpu(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the tensors of these tests are on the CPU")


@pytest.mark.parametrize("cuts", [(), (700,), (1, 2, 699), (350, 351)])
def test_slices_merge(backend, generator, cuts):
    n_rows = 1 if interpreted(backend) else 2
    reference = torch.randn(n_rows, 700 + 500, generator=generator) * 3
    noise = torch.tensor([0, 1e-5, 1e-3, 0.1, 1, 5])[:, None, None]
    circuits = reference + noise * torch.randn(6, *reference.shape, generator=generator)
    merged = functools.reduce(state.merge, states(backend, circuits, reference, cuts))
    divergence, expected = state.finalize(merged), oracle(circuits, reference)
    torch.testing.assert_close(divergence, expected, rtol=1e-5, atol=1e-8)
    assert (divergence[0] == 0).all()


def test_merging_is_associative_and_commutative(backend, generator):
    reference = torch.randn(2, 900, generator=generator)
    circuit = reference + 0.3 * torch.randn(2, 900, generator=generator)
    a, b, c = states(backend, [circuit], reference, (300, 600))
    left = state.merge(state.merge(a, b), c)
    right = state.merge(a, state.merge(c, b))
    for name, x, y in zip(state.RowState._fields, left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("offset", [0, -1000])
def test_masked_slices(backend, generator, offset):
    """Slices without any mass on one side or on both, and a slice of infinite divergence."""
    # Even in float64, e^-1000 is 0: a slice without mass must not set what exponents are relative to.
    reference = offset + torch.randn(4, 600, generator=generator)
    circuit = reference + 0.1 * torch.randn(4, 600, generator=generator)
    reference[0, :300] = circuit[0, :300] = -torch.inf
    reference[1, 300:] = -torch.inf
    circuit[2, :300] = -torch.inf
    reference[3] = -torch.inf
    expected = oracle(circuit, reference)
    assert expected.isinf().tolist() == [False, False, True, False]
    first, second = states(backend, [circuit], reference, (300,))
    for merged in (state.merge(first, second), state.merge(second, first)):
        torch.testing.assert_close(
            state.finalize(merged)[0], expected, rtol=1e-5, atol=1e-8, equal_nan=True
        )


def test_phi():
    """Check φ against the exact series, on both sides of the switch and in both precisions."""
    x = torch.cat([-torch.logspace(-9, 1.2, 200), torch.logspace(-9, 1.2, 200), torch.zeros(1)])
    exact = torch.tensor([phi_exact(float(v)) for v in x.double()], dtype=torch.float64)
    torch.testing.assert_close(state.phi(x.double()), exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(state.phi(x).double(), exact, rtol=2e-6, atol=0)


def phi_exact(x):
    """Return e^(-x) - 1 + x by the series, in rational arithmetic."""
    total, term = Fraction(0), Fraction(1)
    for n in range(1, 120):
        term *= Fraction(-x) / n
        if n > 1:
            total += term
    return float(total)
