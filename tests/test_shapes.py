"""Shapes and strides, each with its reason."""

import pytest
import torch
from conftest import assert_matches, kl_rows, oracle

# 1 and 2: hardly a distribution. 31 to 33: around a warp. 511 to 513, 1023 to 1025: around Triton's
# tiles of float32 and of half precision. 16385: one token more than four of its slices.
VOCABULARIES = (1, 2, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 16385)


def make(generator, n_rows, n_cols, dtype=torch.float32):
    reference = torch.randn(n_rows, n_cols, generator=generator)
    circuit = reference + 0.5 * torch.randn(n_rows, n_cols, generator=generator)
    return circuit.to(dtype), reference.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_cols", VOCABULARIES)
def test_vocabularies(backend, generator, n_cols, dtype):
    circuit, reference = make(generator, 2, n_cols, dtype)
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_circuits", [1, 2, 3, 4, 5, 7, 8])
def test_group_remainders(backend, generator, n_circuits):
    _, reference = make(generator, 2, 700)
    circuits = [
        reference + (k + 1) * 0.1 * torch.randn(reference.shape, generator=generator)
        for k in range(n_circuits)
    ]
    expected = torch.stack([oracle(circuit, reference) for circuit in circuits])
    assert_matches(kl_rows(circuits, reference, backend), expected)


def test_no_rows(backend):
    empty = torch.empty(0, 100)
    assert kl_rows([empty, empty], empty, backend).shape == (2, 0)


def test_no_circuits(backend, generator):
    _, reference = make(generator, 3, 100)
    assert kl_rows([], reference, backend).shape == (0, 3)


def last_position(t):
    """auto_circuit's out_slice: rows of a (B, S, V) output, S·V apart."""
    return t.reshape(2, 3, -1)[:, -1]


def not_first_position(t):
    return t.reshape(2, 3, -1)[:, 1:]


def sliced_vocabulary(t):
    """A padded vocabulary cut to its real size: the stride is not V."""
    return t[:, :-3]


def offset_storage(t):
    """A slice of the vocabulary: rows start anywhere."""
    return t[:, 1:]


def expanded(t):
    """One row for all: stride 0."""
    return t[:1].expand(3, -1)


def transposed(t):
    """The vocabulary is not the contiguous dimension."""
    return t[:2].t().contiguous().t()


def every_other_row(t):
    return t[::2]


VIEWS = (
    last_position,
    not_first_position,
    sliced_vocabulary,
    offset_storage,
    expanded,
    transposed,
    every_other_row,
)


@pytest.mark.parametrize("n_cols", [525, 528])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("which", ["reference", "circuit", "both"])
def test_views(backend, generator, view, which, n_cols):
    """A view gives what its copy gives, whichever side is a view."""
    circuit, reference = make(generator, 6, n_cols)
    circuit, reference = view(circuit), view(reference)
    expected = oracle(circuit, reference).flatten()
    if which == "reference":
        circuit = circuit.contiguous()
    elif which == "circuit":
        reference = reference.contiguous()
    divergence = kl_rows([circuit], reference, backend)[0]
    assert_matches(divergence, expected)


def test_circuits_that_lie_differently(backend, generator):
    """One call takes circuits at every alignment, none of them laid out like the reference."""
    _, reference = make(generator, 3, 1300)
    circuits = []
    for lead in range(6):
        buffer = torch.empty(3, 1310)
        circuit = buffer[:, lead : lead + 1300]
        circuit.copy_(reference + 0.2 * torch.randn(3, 1300, generator=generator))
        circuits.append(circuit)
    expected = torch.stack([oracle(circuit, reference) for circuit in circuits])
    assert_matches(kl_rows(circuits, reference, backend), expected)
