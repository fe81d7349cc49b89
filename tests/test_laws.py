"""Laws that hold whatever the numbers are."""

import pytest
import torch
from conftest import ABSOLUTE, RELATIVE, assert_matches, kl_rows, oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOGIT = st.one_of(
    st.floats(-60, 60, width=32),
    st.sampled_from([0.0, -torch.inf, -1e9, torch.finfo(torch.float32).min, 1e4, -1e4]),
)
relaxed = settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def rows(draw):
    """Draw a circuit and a reference of up to 40 tokens: ordinary, masked, huge or nearly equal."""
    n_cols = draw(st.integers(1, 40))
    reference = draw(st.lists(LOGIT, min_size=n_cols, max_size=n_cols))
    same = draw(st.booleans())
    noise = st.floats(-(2.0**-10), 2.0**-10, width=32)
    circuit = [
        p + draw(noise) if same and abs(p) < 100 else p if same else draw(LOGIT) for p in reference
    ]
    return torch.tensor([circuit]), torch.tensor([reference])


def apart(circuit, reference):
    """Return how far apart the log-sum-exps lie."""
    return (circuit.double().logsumexp(-1) - reference.double().logsumexp(-1)).abs()


def reliable(circuit, reference):
    """Return whether the Triton kernels can be relied on for a row: see README, Limits."""
    return apart(circuit, reference) <= 1e5 and min(circuit.max(), reference.max()) > -1e38


@relaxed
@given(rows())
def test_any_row(backend, pair):
    circuit, reference = pair
    divergence = kl_rows([circuit], reference, backend)[0]
    expected = oracle(circuit, reference)
    if expected.isnan().any():
        assert divergence.isnan().all()
        return
    if backend == "triton" and not reliable(circuit, reference):
        assert not (divergence < 0).any()
        return
    largest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    if expected * reference.numel() > largest and divergence == torch.inf:
        # Sums overflow before they are divided.
        return
    # A probability below float32's smallest may count as 0, which shows if multiplied by finfo.min.
    log_p, log_q = reference.double().log_softmax(-1), circuit.double().log_softmax(-1)
    lost = (log_p.exp() * (log_p - log_q).abs())[(log_p.exp() < tiny) & (log_p > -torch.inf)]
    # For sides further apart than float64 can tell, native keeps the plain result, good to 1e-7.
    plain = backend == "native" and apart(circuit, reference) > 1e12
    atol = (1e-7 if plain else ABSOLUTE) + lost.sum().item()
    torch.testing.assert_close(
        divergence.double(), expected.float().double(), rtol=RELATIVE, atol=atol
    )
    assert (divergence >= 0).all()


@relaxed
@given(rows())
def test_identical_rows_measure_exactly_zero(backend, pair):
    _, reference = pair
    masked = -1e38 if backend == "triton" else -torch.inf
    if (reference > masked).any():
        assert kl_rows([reference.clone()], reference, backend)[0].tolist() == [0.0]


@pytest.mark.parametrize("n_cols", [3, 100, 1001, 5003])
def test_identical_rows_with_masked_tokens_measure_exactly_zero(backend, generator, n_cols):
    n_rows = 3 if backend == "triton" else 30
    reference = 3 * torch.randn(n_rows, n_cols, generator=generator)
    reference[:, 1] = -torch.inf
    assert kl_rows([reference.clone()], reference, backend)[0].tolist() == [0.0] * n_rows


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("power", [4, 6, 8, 12, 16])
def test_sides_on_both_sides_of_a_power_of_two(backend, power, masked):
    """The likeliest token lies above the power, the others below it, on a grid twice as fine."""
    apart = 2.0**power
    circuit = torch.linspace(-4.2, -3.2, 20)[None] + apart
    reference = torch.linspace(-3.8, -4.7, 20)[None] - apart
    circuit[0, 0], reference[0, 0] = apart + 0.3, -apart - 0.2
    if masked:
        circuit[0, 5] = reference[0, 5] = -torch.inf
    assert_matches(kl_rows([circuit], reference, backend)[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_circuits", [1, 3, 9])
@pytest.mark.parametrize("scale", [30, 100, 1000])
def test_identical_rows_of_any_size_measure_exactly_zero(
    generator, implementation, scale, n_circuits
):
    """Row 0's first tokens lie so far below the others that their weights nearly vanish."""
    reference = torch.randn(12, 13001, generator=generator) * scale
    reference[0] = torch.linspace(0, 1, 13001)
    reference[0, :512] = torch.linspace(-89, -86, 512)
    divergence = kl_rows([reference.clone() for _ in range(n_circuits)], reference, implementation)
    assert (divergence == 0).all()


def make(generator, noise, n_rows=2, n_cols=1531):
    reference = torch.randn(n_rows, n_cols, generator=generator) * 2
    return reference + noise * torch.randn(n_rows, n_cols, generator=generator), reference


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2])
def test_never_negative(backend, generator, noise):
    circuits, reference = [], torch.randn(3, 1200, generator=generator) * 4
    for _ in range(4):
        circuits.append(reference + noise * torch.randn(3, 1200, generator=generator))
    divergence = kl_rows(circuits, reference, backend)
    assert (divergence >= 0).all()
    assert (divergence == 0).all() or noise > 0


def test_never_negative_in_float64(generator):
    """Hardly more than the pivot's rounding error is left of these divergences."""
    for n_cols in range(1, 30):
        reference = torch.randn(40, n_cols, generator=generator, dtype=torch.float64) * 3
        shift = 1000 * torch.randn(1, generator=generator, dtype=torch.float64)
        assert (kl_rows([reference + shift], reference, "eager") >= 0).all()


@pytest.mark.parametrize("shift", [-7.0, 1.0, 100.0])
def test_a_constant_changes_nothing(backend, generator, shift):
    circuit, reference = make(generator, 0.05)
    for moved, still in ((circuit + shift, reference), (circuit, reference + shift)):
        assert_matches(kl_rows([moved], still, backend)[0], oracle(moved, still))
        # The shifted logits are rounded by half an ulp of the shift, which is of first order in d.
        torch.testing.assert_close(
            oracle(moved, still), oracle(circuit, reference), rtol=1e-3, atol=1e-8
        )


@pytest.mark.parametrize("shift", [30.0, -100.0, 1e3, -1e4])
@pytest.mark.parametrize("n_cols", [128, 5003])
def test_sides_an_offset_apart(backend, generator, largest_vocabulary, n_cols, shift):
    """The logits share no grid: differences rounded at the offset's size would show at once."""
    n_rows, n_cols = 2 if backend == "triton" else 24, min(n_cols, largest_vocabulary)
    reference = torch.randn(n_rows, n_cols, generator=generator) * 5
    circuit = reference + 0.1 * torch.randn(n_rows, n_cols, generator=generator)
    for moved, still in ((circuit + shift, reference), (circuit, reference + shift)):
        assert_matches(kl_rows([moved], still, backend)[0], oracle(moved, still))


@pytest.mark.parametrize("huge", [1e8, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("peak", [0.0, 56.0])
def test_a_row_of_one_huge_logit_is_uniform(implementation, generator, peak, side, huge):
    """Floats that large are multiples of 8 or more: in p - q the other side's logits round away."""
    ordinary = torch.randn(3, 13011, generator=generator) * 0.3
    ordinary[:, 7] += peak
    flat, zero = torch.full_like(ordinary, huge), torch.zeros_like(ordinary)
    circuit, reference = (flat, ordinary) if side == 0 else (ordinary, flat)
    expected = oracle(*((zero, ordinary) if side == 0 else (ordinary, zero)))
    divergence = kl_rows([circuit], reference, implementation)[0]
    assert_matches(divergence, expected)


@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_the_order_of_tokens_changes_nothing(backend, generator, noise):
    circuit, reference = make(generator, noise)
    order = torch.randperm(reference.shape[1], generator=generator)
    straight = kl_rows([circuit], reference, backend)
    permuted = kl_rows([circuit[:, order]], reference[:, order], backend)
    torch.testing.assert_close(permuted, straight, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(backend, largest_vocabulary, generator, dtype):
    """A row has the same bits alone and among quite different rows.

    The number of columns makes every row start at a multiple of 16 bytes, so that all lie alike.
    """
    n_cols = largest_vocabulary // 8 * 8
    reference = torch.randn(5, n_cols, generator=generator) * 2
    noise = torch.tensor([0.0, 1e-3, 0.05, 1.0, 5.0])[:, None]
    circuit = reference + noise * torch.randn(reference.shape, generator=generator)
    circuit, reference = circuit.to(dtype), reference.to(dtype)
    together = kl_rows([circuit], reference, backend)[0]
    for row in range(5):
        alone = kl_rows([circuit[row : row + 1].clone()], reference[row : row + 1], backend)[0]
        assert torch.equal(alone, together[row : row + 1])


def test_bits_do_not_depend_on_the_neighbors_among_circuits(backend, generator):
    circuit, reference = make(generator, 0.3)
    others = [reference, circuit * 5, -reference]
    together = kl_rows([circuit, *others], reference, backend)
    again = kl_rows([circuit, *others[::-1]], reference, backend)
    assert torch.equal(together[0], again[0])


def test_inputs_are_left_alone(backend, generator):
    circuit, reference = make(generator, 1.0)
    before = circuit.clone(), reference.clone()
    versions = circuit._version, reference._version
    kl_rows([circuit], reference, backend)
    assert torch.equal(circuit, before[0])
    assert torch.equal(reference, before[1])
    assert (circuit._version, reference._version) == versions
