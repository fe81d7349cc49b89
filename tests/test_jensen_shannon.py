"""The Jensen-Shannon divergence and its gradients, by each backend and at each level of native."""

import functools
import math

import pytest
import torch
from conftest import ABSOLUTE, LEVELS, RELATIVE, where_it_runs

import fastkl
from fastkl import backends, custom_ops, jensen_shannon
from fastkl.backends import native

NAN, INF = math.nan, math.inf
NOISES = (1e-5, 1e-3, 0.1, 1, 5)
# For tests that demand more than is asked of PyTorch's operations in float32.
natively = pytest.mark.parametrize("implementation", LEVELS, indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(generator, n_rows, n_cols, noise, dtype=torch.float32):
    reference = torch.randn(n_rows, n_cols, generator=generator) * 3
    circuit = reference + noise * torch.randn(n_rows, n_cols, generator=generator)
    return circuit.to(dtype), reference.to(dtype)


def definition(circuit, reference, beta):
    """Return the divergence of rows in float64; its terms cancel, down to errors of about 1e-16."""
    p, q = reference.double().softmax(-1), circuit.double().softmax(-1)
    mixture = beta * p + (1 - beta) * q
    terms = [torch.where(x > 0, x * (x / mixture).log(), 0.0).sum(-1) for x in (p, q)]
    return beta * terms[0] + (1 - beta) * terms[1]


@pytest.fixture
def js_rows(implementation):
    """Return a function that returns the divergences of rows."""

    def function(circuit, reference, beta=0.5, temperature=1.0):
        return fastkl.js_div(
            circuit,
            reference,
            beta=beta,
            temperature=temperature,
            reduction="none",
            backend=implementation,
        )

    return function


@pytest.fixture
def gradients(implementation):
    """Return a function that returns the gradients (dq, dp) of rows."""
    functions = {"eager": jensen_shannon, "native": native}[implementation]

    def function(circuit, reference, beta=0.5, temperature=1.0, grad=None):
        if grad is None:
            grad = torch.ones(circuit.shape[:1])
        return functions.js_gradients(grad, circuit, reference, beta, temperature, True, True)

    return function


@functools.cache
def large(noise, beta):
    """Return rows of a large vocabulary, and two float64 divergences: by definition, by js_div."""
    circuit, reference = make(torch.Generator().manual_seed(20261123), 3, 50257, noise)
    exact = definition(circuit, reference, beta)
    wide = fastkl.js_div(circuit.double(), reference.double(), beta=beta, reduction="none")
    return circuit, reference, exact, wide


@pytest.mark.parametrize("noise", [*NOISES, 40])
@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
def test_against_float64(js_rows, noise, beta):
    circuit, reference, exact, wide = large(noise, beta)
    found = js_rows(circuit, reference, beta)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() <= RELATIVE * exact + ABSOLUTE).all()
    # Where the float64 definition is itself off by as much, js_div in float64 is a better measure.
    assert ((wide - exact).abs() <= 1e-12 * exact + 1e-14).all()
    assert ((found - wide).abs() <= RELATIVE * wide + 1e-12).all()


def of_little_weight(circuit, reference, beta):
    """Return the float64 divergence for a small beta: β KL(P ‖ Q) - KL(M ‖ Q), term by term."""
    log_p, log_q = (t.double().log_softmax(-1) for t in (reference, circuit))
    d = log_p - log_q
    rise = beta * torch.expm1(d)
    mixed = log_q.exp() * ((1 + rise) * torch.log1p(rise) - rise)
    return (beta * log_p.exp() * d - mixed).sum(-1)


@pytest.mark.parametrize("beta", [1e-20, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, 1 - 1e-3, 1 - 1e-5])
def test_a_side_of_little_weight(js_rows, gradients, generator, beta):
    """The other side's terms nearly cancel: what is left of them is of the size of the weight."""
    for noise in (0.1, 0.3, 1, 3, 10):
        circuit, reference = make(generator, 24, 500, noise)
        sides = circuit.double(), reference.double()
        wide = jensen_shannon.js_rows(*sides, beta, 1.0)
        swapped = reversed(sides) if beta > 0.5 else sides
        exact = of_little_weight(*swapped, min(beta, 1 - beta))
        assert ((wide - exact).abs() <= 1e-10 * exact).all()
        found = js_rows(circuit, reference, beta)
        assert ((found - wide).abs() <= RELATIVE * wide + ABSOLUTE * min(beta, 1 - beta)).all()
        expected = jensen_shannon.js_gradients(torch.ones(24), *sides, beta, 1.0, True, True)
        for ours, theirs in zip(gradients(circuit, reference, beta), expected, strict=True):
            assert ((ours.double() - theirs).norm(dim=-1) <= 1e-5 * theirs.norm(dim=-1)).all()


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.9])
def test_gradients_in_float64(generator, beta):
    """Gradients in float64 are those of the definition, however far apart the sides are."""
    for noise in (0.3, 3, 10):
        leaves = [t.double().requires_grad_() for t in make(generator, 24, 500, noise)]
        expected = torch.autograd.grad(definition(*leaves, beta).sum(), leaves)
        rows = [leaf.detach() for leaf in leaves]
        found = jensen_shannon.js_gradients(torch.ones(24), *rows, beta, 1.0, True, True)
        for ours, theirs in zip(found, expected, strict=True):
            assert ((ours - theirs).norm(dim=-1) <= 1e-9 * theirs.norm(dim=-1)).all()


@pytest.mark.parametrize("beta", [1e-30, 1e-39, 1e-300])
def test_next_to_no_weight(js_rows, gradients, generator, beta):
    """A weight below 1e-30 counts as 1e-30: results are finite, with or without masked tokens."""
    circuit, reference = make(generator, 4, 300, 3)
    circuit[0, 5] = reference[1, 6] = -INF
    circuit[2, 7], reference[2, 7] = -300, 20
    found = js_rows(circuit, reference, beta)
    wide = jensen_shannon.js_rows(circuit.double(), reference.double(), 1e-30, 1.0)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=0)
    assert (found > 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(circuit, reference, beta))


@pytest.mark.parametrize("n_cols", [1, 2, 15, 16, 17, 33, 513, 12289])
def test_vocabularies(js_rows, generator, n_cols):
    """The sizes lie around whole groups of 16 tokens and whole blocks of 12288."""
    for noise in (1e-3, 0.3, 3):
        circuit, reference = make(generator, 4, n_cols, noise)
        wide = jensen_shannon.js_rows(circuit.double(), reference.double(), 0.3, 1.0)
        found = js_rows(circuit, reference, 0.3)
        assert ((found - wide).abs() <= RELATIVE * wide + 1e-12).all()


def test_laws(js_rows, generator):
    circuit, reference = make(generator, 3, 5000, 0.5)
    there, back = js_rows(circuit, reference, 0.3), js_rows(reference, circuit, 0.7)
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-8)
    disjoint = torch.zeros(2, 5000)
    disjoint[0, 3] = disjoint[1, 4] = 500.0
    bound = js_rows(disjoint[:1], disjoint[1:])[0]
    torch.testing.assert_close(bound, torch.tensor(math.log(2)))
    divided = js_rows(circuit, reference, temperature=2)
    torch.testing.assert_close(
        divided.double(), definition(circuit.double() / 2, reference.double() / 2, 0.5)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1, 0.7])
@pytest.mark.parametrize("beta", [1e-3, 0.5, 0.8])
def test_identical_rows_are_0(js_rows, gradients, generator, beta, temperature, dtype):
    """They are exactly 0, and so are their gradients; rows that differ in one logit are not."""
    _, reference = make(generator, 5, 5001, 0, dtype)
    reference[1] -= 60
    reference[2, :4000] = -INF
    assert (js_rows(reference.clone(), reference, beta, temperature) == 0).all()
    for gradient in gradients(reference.clone(), reference, beta, temperature):
        assert (gradient == 0).all()
    circuit = reference.clone()
    circuit[:, 4500] += 0.125
    assert (js_rows(circuit, reference, beta, temperature) > 0).all()


def test_many_terms_of_one_size(js_rows):
    """A sum's rounding error does not grow with the vocabulary: its parts go to float64 in time."""
    for a in torch.linspace(0.3, 3, 10).tolist():
        reference, circuit = torch.zeros(1, 8192), torch.zeros(1, 8192)
        circuit[:, ::2] = a
        exact = definition(circuit, reference, 0.5)
        # Terms of few values round alike, which adds to the polynomial's own 1.1e-6, but not more.
        torch.testing.assert_close(js_rows(circuit, reference).double(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("beta", [1e-12, 1e-6, 0.2, 0.5, 1 - 1e-6, 1 - 1e-8])
def test_never_negative(js_rows, generator, beta):
    for scale in (1e-7, 1e-4, 0.1, 1, 10):
        for n_cols in (2, 6, 33, 1000):
            circuit, reference = make(generator, 50, n_cols, scale)
            assert (js_rows(circuit, reference, beta) >= 0).all()


@pytest.mark.parametrize("p_v", [NAN, INF, -INF, 0.5])
@pytest.mark.parametrize("q_v", [NAN, INF, -INF, 0.5])
def test_odd_tokens(implementation, generator, p_v, q_v):
    """A token masked on one side adds a finite term; a NaN or +inf makes only its own row NaN."""
    circuit, reference = make(generator, 3, 50, 0.5)
    reference[1, 5], circuit[1, 5] = p_v, q_v
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    found = fastkl.js_div(*leaves, beta=0.3, reduction="none", backend=implementation)
    exact = definition(circuit, reference, 0.3)
    odd = any(math.isnan(v) or v == INF for v in (p_v, q_v))
    exact[1] = NAN if odd else exact[1]
    assert exact[[0, 2]].isfinite().all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-8, equal_nan=True)
    found.sum().backward()
    for leaf, value in zip(leaves, (q_v, p_v), strict=True):
        assert leaf.grad[1].isnan().all() == odd
        assert leaf.grad[[0, 2]].isfinite().all()
        if not odd and value == -INF:
            assert leaf.grad[1, 5] == 0


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_masked_halves(js_rows, gradients, generator, beta):
    """Many tokens are masked on one side or both, among them whole vectors and whole blocks."""
    circuit, reference = make(generator, 4, 30001, 0.5)
    circuit[0, :11000], reference[1, 11000:] = -INF, -INF
    circuit[2, ::2], reference[2, 1::2] = -INF, -INF
    circuit[3, :15000], reference[3, :11000] = -INF, -INF
    found = js_rows(circuit, reference, beta).double()
    torch.testing.assert_close(
        found, definition(circuit, reference, beta), rtol=RELATIVE, atol=ABSOLUTE
    )
    wide = jensen_shannon.js_gradients(
        torch.ones(4), circuit.double(), reference.double(), beta, 1.0, True, True
    )
    for ours, exact in zip(gradients(circuit, reference, beta), wide, strict=True):
        assert ours.isfinite().all()
        # The sides of row 2 have no token in common, and every token of a side is worth the same.
        assert ((ours - exact).norm(dim=-1) <= 1e-5 * exact.norm(dim=-1) + 1e-9).all()


def test_no_mass(js_rows, gradients, generator):
    circuit, reference = make(generator, 3, 50, 0.5)
    circuit[0], reference[1] = -INF, -INF
    assert js_rows(circuit, reference).isnan().tolist() == [True, True, False]
    for gradient in gradients(circuit, reference):
        assert gradient.isnan().all(-1).tolist() == [True, True, False]


@pytest.mark.parametrize("temperature", [1, 2.5])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.1, 1, 5, 40])
def test_gradient(implementation, generator, noise, beta, temperature):
    circuit, reference = make(generator, 3, 5003, noise)
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    grad = torch.tensor([1.0, 0.0, 2.0])
    fastkl.js_div(
        *leaves, beta=beta, temperature=temperature, reduction="none", backend=implementation
    ).backward(grad)
    wide = [t.double().clone().requires_grad_() for t in (circuit, reference)]
    definition(*(t / temperature for t in wide), beta).backward(grad.double())
    for ours, exact in zip(leaves, wide, strict=True):
        error = (ours.grad - exact.grad).norm(dim=-1)
        # Where logits are 150 apart, rounding their difference changes a token's weight.
        bound = 1e-4 if noise == 40 else 1e-5
        assert (error <= bound * exact.grad.norm(dim=-1)).all()
        assert (ours.grad[1] == 0).all()


@pytest.mark.parametrize("shift", [30.0, -100.0, 1e4])
@pytest.mark.parametrize("side", [0, 1])
def test_sides_an_offset_apart(implementation, generator, side, shift):
    """Differences that are rounded at the size of the offset would show at once."""
    rows = list(make(generator, 24, 700, 0.1))
    rows[side] = rows[side] + shift
    found = fastkl.js_div(*rows, reduction="none", backend=implementation)
    expected = definition(*(t.double() for t in rows), 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


def _against_float64(implementation, circuit, reference, beta=0.5, temperature=1.0):
    """Assert that rows' divergences and, norm-wise, their gradients agree with float64's."""
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    found = fastkl.js_div(
        *leaves, beta=beta, temperature=temperature, reduction="none", backend=implementation
    )
    # Unscaled, most gradients of a small divergence would be below float16's normal numbers.
    scale = 2.0**10
    (scale * found.sum()).backward()
    wide = [t.double().requires_grad_() for t in (circuit, reference)]
    # Subtract the maxima: even float64 rounds a large quotient by more than similar rows differ.
    divided = ((t - t.detach().amax(-1, keepdim=True)) / temperature for t in wide)
    exact = definition(*divided, beta)
    (scale * exact.sum()).backward()
    assert ((found - exact).abs() <= RELATIVE * exact + ABSOLUTE).all()
    for ours, theirs in zip(leaves, wide, strict=True):
        # Take norms in float64: in float32 the norm of gradients below 1e-23 is 0.
        error = (ours.grad.double() - theirs.grad).norm(dim=-1)
        # The gradients of 16-bit logits are rounded to 16 bits.
        bound = max(1e-5, torch.finfo(ours.dtype).eps)
        assert (error <= bound * theirs.grad.norm(dim=-1)).all()


@pytest.mark.parametrize("shift", [5, 8, 16, -31, 64, -255, 1000, 1e5])
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("middle", [0, -0.5])
def test_gradients_of_sides_an_offset_apart(implementation, generator, middle, noise, shift):
    """A difference as large as the offset is rounded by more than similar sides differ.

    The sides lie on one side of 0, the nearer side's logits on a finer grid, or on both sides of 0.
    """
    for temperature, beta in ((1, 0.5), (8, 0.1), (0.3, 0.5)):
        circuit, reference = (
            t * temperature + middle * shift for t in make(generator, 3, 1000, noise)
        )
        _against_float64(implementation, circuit + shift, reference, beta, temperature)
        _against_float64(implementation, circuit, reference + shift, beta, temperature)


@natively
@pytest.mark.parametrize("shift", [0.1, 0.5, -1, 2, -3, 3.9])
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_gradients_of_sides_a_little_apart(implementation, generator, noise, shift):
    """One side's likeliest logits are near 0, on a finer grid than that of a small offset."""
    for temperature in (1, 8):
        reference = torch.randn(8, 1000, generator=generator) * 3 * temperature
        reference -= reference.amax(-1, keepdim=True)
        circuit = reference + noise * temperature * torch.randn(8, 1000, generator=generator)
        _against_float64(implementation, circuit + shift, reference, 0.5, temperature)
        _against_float64(implementation, reference + shift, circuit, 0.2, temperature)


@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_gradients_of_sides_an_offset_apart_by_dtype(implementation, generator, q_dtype):
    for shift in (16, -31, 255):
        circuit, reference = make(generator, 3, 1000, 1e-3)
        _against_float64(implementation, (circuit + shift).to(q_dtype), reference)


def test_two_tokens_an_offset_apart(implementation):
    """The divergence is 1e-15; its gradients were once off by seven times their size."""
    reference = torch.tensor([[-3.5498819, -3.4717090]])
    circuit = torch.tensor([[28.173254, 28.251427]])
    _against_float64(implementation, circuit, reference, 0.1)
    _against_float64(implementation, reference, circuit, 0.9)


@pytest.mark.parametrize("shift", [2.0, 16.0, -32.0, 1024.0])
def test_an_exact_offset_changes_nothing(implementation, js_rows, gradients, generator, shift):
    """Logits on a grid that both sides share give exactly 0, also with tokens masked on both."""
    reference = (torch.randn(3, 5001, generator=generator) * 3 * 256).round() / 256
    reference[1, :4000] = -INF
    for rows in ((reference + shift, reference), (reference, reference + shift)):
        assert (js_rows(*rows, 0.3) == 0).all()
        for gradient in gradients(*rows, 0.3):
            assert (gradient == 0).all()


@natively
def test_masks_of_sides_an_offset_apart(implementation, generator):
    """Tokens are masked on one side, on the other, on both, and by about the lowest float32."""
    circuit, reference = make(generator, 4, 700, 1e-3)
    circuit[0, 5] = reference[0, 6] = circuit[0, 7] = reference[0, 7] = -INF
    circuit[1, 5] = reference[1, 6] = -3.4e38
    circuit[2, ::2] = reference[2, ::2] = -INF
    for shift in (16.0, -128.0):
        leaves = [t.requires_grad_() for t in (circuit + shift, reference.clone())]
        found = fastkl.js_div(*leaves, beta=0.3, reduction="none", backend=implementation)
        found.sum().backward()
        wide = [t.detach().double() for t in leaves]
        exact = definition(*wide, 0.3)
        assert ((found - exact).abs() <= RELATIVE * exact + ABSOLUTE).all()
        expected = jensen_shannon.js_gradients(torch.ones(4), *wide, 0.3, 1.0, True, True)
        for leaf, theirs in zip(leaves, expected, strict=True):
            error = (leaf.grad.double() - theirs).norm(dim=-1)
            assert (error <= 1e-5 * theirs.norm(dim=-1)).all()


@natively
@pytest.mark.parametrize("beta", [1e-4, 0.25, 0.5, 0.99])
def test_gradient_of_each_token(gradients, generator, beta):
    """Check small elements too, allowing for the rounding of what all tokens of a side share."""
    circuit, reference = make(generator, 3, 3001, 0.7)
    wide = jensen_shannon.js_gradients(
        torch.ones(3), circuit.double(), reference.double(), beta, 1.0, True, True
    )
    sides = (circuit.double().softmax(-1), reference.double().softmax(-1))
    for ours, exact, mass in zip(gradients(circuit, reference, beta), wide, sides, strict=True):
        room = 1e-6 * mass * min(beta, 1 - beta)
        assert ((ours - exact).abs() <= 1e-5 * exact.abs() + room).all()


@natively
def test_gradient_where_all_worths_are_alike(gradients, generator):
    """Where a side has mass it is nearly all of the mixture: a common log 2 must cost no digits."""
    circuit, reference = make(generator, 8, 5003, 40)
    wide = jensen_shannon.js_gradients(
        torch.ones(8), circuit.double(), reference.double(), 0.5, 1.0, True, True
    )
    for ours, exact in zip(gradients(circuit, reference), wide, strict=True):
        assert ((ours - exact).norm(dim=-1) <= 1e-4 * exact.norm(dim=-1) + 1e-12).all()


def test_a_gradient_that_is_no_number(gradients, generator):
    circuit, reference = make(generator, 4, 700, 0.3)
    circuit[1, 4] = reference[1, 5] = circuit[3, 3] = -INF
    grad = torch.tensor([1.0, NAN, 0.0, INF])
    reference[2, 7] = NAN
    for gradient in gradients(circuit, reference, grad=grad):
        assert gradient[1].isnan().all()
        assert (gradient[2] == 0).all()
        assert gradient[0].isfinite().all()
    assert gradients(circuit, reference, grad=grad)[0][3, 3] == 0


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("beta", [0.25, 0.5, 0.75])
def test_one_gradient_alone(implementation, generator, beta, side):
    functions = {"eager": jensen_shannon, "native": native}[implementation]
    rows = make(generator, 3, 5003, 0.3)
    both = functions.js_gradients(torch.ones(3), *rows, beta, 1.0, True, True)
    (one,) = functions.js_gradients(torch.ones(3), *rows, beta, 1.0, side == 0, side == 1)
    assert torch.equal(one, both[side])
    assert functions.js_gradients(torch.ones(3), *rows, beta, 1.0, False, False) == []


def test_rows_do_not_depend_on_the_batch_or_on_threads(js_rows, gradients, generator):
    circuit, reference = make(generator, 9, 20003, 0.5)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            both = gradients(circuit, reference, 0.3)
            results.append((js_rows(circuit, reference, 0.3), *both))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
    alone = circuit[4:5], reference[4:5]
    for whole, row in zip(results[0], (js_rows(*alone, 0.3), *gradients(*alone, 0.3)), strict=True):
        assert torch.equal(whole[4:5], row)


@pytest.mark.parametrize("p_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_dtypes_and_strides(js_rows, gradients, generator, q_dtype, p_dtype):
    """Rows of wider tensors, at odd addresses, equal float32 copies; gradients are rounded once."""
    circuit, reference = make(generator, 5, 701, 0.3)
    circuit, reference = circuit.to(q_dtype), reference.to(p_dtype)
    strided = []
    for rows, width in ((circuit, 1003), (reference, 811)):
        wide = torch.full((5, width), NAN, dtype=rows.dtype)
        wide[:, 3:704] = rows
        strided.append(wide[:, 3:704])
    single = circuit.float(), reference.float()
    assert torch.equal(js_rows(*strided, 0.3), js_rows(*single, 0.3))
    for ours, whole, like in zip(
        gradients(*strided, 0.3), gradients(*single, 0.3), (circuit, reference), strict=True
    ):
        assert ours.dtype == like.dtype
        assert ours.is_contiguous()
        assert torch.equal(ours, whole.to(like.dtype))
    # A row that is expanded to all rows, and an incoming gradient with stride 0.
    expanded = single[1][:1].expand(5, -1)
    one = torch.ones(1).expand(5)
    assert torch.equal(js_rows(single[0], expanded), js_rows(single[0], expanded.contiguous()))
    for ours, dense in zip(
        gradients(single[0], expanded, grad=one),
        gradients(single[0], expanded.contiguous()),
        strict=True,
    ):
        assert torch.equal(ours, dense)


@natively
def test_logits_near_the_limits_of_float32(js_rows, gradients, generator):
    """The differences of whole rows, and of tokens in a row, are beyond float32."""
    circuit, reference = make(generator, 5, 700, 0.5)
    huge, half = 3e38, math.log(2) / 2
    reference[0], circuit[0] = huge, -huge
    reference[1, 3] = circuit[1, 4] = huge
    reference[2, 3:], circuit[2, 7:] = -huge, -huge
    circuit[3] = circuit[3] + 1e4
    reference[4], circuit[4] = -huge, huge
    reference[4, :350] = circuit[4, 175:525] = -INF
    expected = definition(circuit.double(), reference.double(), 0.5)
    expected[4] = half
    found = js_rows(circuit, reference)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)
    for gradient in gradients(circuit, reference):
        assert gradient.isfinite().all()
        assert gradient.double().sum(-1).abs().max() < 1e-6


@natively
def test_weights_and_temperatures_of_any_size(js_rows, gradients, generator):
    """Nothing is NaN where float32 cannot hold a weight, or the inverse of a temperature."""
    circuit, reference = make(generator, 3, 700, 2)
    circuit[0, 5] = reference[1, 6] = -INF
    reference[2, 3] = circuit[2, 4] = 300.0
    for beta in (1e-10, 1 - 1e-10):
        wide = fastkl.js_div(circuit[2:].double(), reference[2:].double(), beta=beta)
        torch.testing.assert_close(js_rows(circuit[2:], reference[2:], beta)[0].double(), wide)
    for beta in (1e-300, 1e-40, 1e-20, 1 - 2**-53):
        found = js_rows(circuit, reference, beta)
        assert ((found >= 0) & (found < 1e-12)).all()
        assert all(gradient.isfinite().all() for gradient in gradients(circuit, reference, beta))
    for temperature in (1e-300, 1e-39, 1e-3, 1e38, 1e300):
        found = js_rows(circuit, reference, temperature=temperature)
        assert ((found >= 0) & (found <= 0.6932)).all()
    # The rows become flat, except for one masked token of 700 on one side.
    flat = js_rows(circuit[:1], reference[:1], temperature=1e300).double()
    masked = definition(torch.where(circuit == -INF, -INF, 0.0)[:1], torch.zeros(1, 700), 0.5)
    torch.testing.assert_close(flat, masked, rtol=1e-5, atol=1e-8)


@natively
def test_sides_swap(js_rows, gradients, generator):
    circuit, reference = make(generator, 3, 700, 0.5)
    there, back = js_rows(circuit, reference, 0.25), js_rows(reference, circuit, 0.75)
    assert torch.equal(there, back)
    dq, dp = gradients(circuit, reference, 0.25)
    swapped_dp, swapped_dq = gradients(reference, circuit, 0.75)
    assert torch.equal(dq, swapped_dq)
    assert torch.equal(dp, swapped_dp)


def test_the_rule_of_choice(generator, monkeypatch):
    """js_div chooses as kl_div does: by the argument, the environment, the device and the dtype."""
    if reason := native.missing():
        pytest.skip(reason)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    rows = make(generator, 3, 700, 0.5)
    by_name = {
        name: fastkl.js_div(*rows, backend=name, reduction="none") for name in ("eager", "native")
    }
    # The backends differ in the last bits of rows, which a mean may round away.
    assert not torch.equal(*by_name.values())
    assert torch.equal(fastkl.js_div(*rows, reduction="none"), by_name["native"])
    loss = fastkl.JSDivLoss(backend="eager", reduction="none")
    assert torch.equal(loss(*rows), by_name["eager"])
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "eager")
    assert torch.equal(fastkl.js_div(*rows, reduction="none"), by_name["eager"])
    found = fastkl.js_div(*rows, backend="native", reduction="none")
    assert torch.equal(found, by_name["native"])
    leaf = rows[0].clone().requires_grad_()
    fastkl.js_div(leaf, rows[1]).backward()
    (expected,) = jensen_shannon.js_gradients(torch.full((3,), 1 / 3), *rows, 0.5, 1.0, True, False)
    assert torch.equal(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="float64"):
        fastkl.js_div(rows[0].double(), rows[1], backend="native")
    with pytest.raises(ValueError, match="mmx"):
        fastkl.js_div(*rows, backend="mmx")
    with pytest.raises(ValueError, match="mmx"):
        fastkl.js_div(rows[0][:0], rows[1][:0], backend="mmx")
    with pytest.raises(TypeError, match="backend must be a string"):
        fastkl.js_div(*rows, backend=3)


def test_triton_has_it_from_pytorch(generator):
    if reason := fastkl.unavailable_backends().get("triton"):
        pytest.skip(reason)
    rows = where_it_runs("triton", *make(generator, 3, 700, 0.5))
    leaves = [t.requires_grad_() for t in rows]
    found = {}
    for backend in ("triton", "eager"):
        divergence = fastkl.js_div(*leaves, backend=backend)
        found[backend] = (divergence.detach(), *torch.autograd.grad(divergence, leaves))
    for ours, theirs in zip(*found.values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_as_an_operator(generator, dtype):
    """The eager backend runs in float64, and the device's usual one in float32."""
    circuit, reference = make(generator, 3, 20, 0.5, dtype)
    leaves = [t.requires_grad_() for t in (circuit, reference)]
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda q, p: fastkl.js_div(q, p, beta=0.3), leaves)
    torch.library.opcheck(custom_ops.js_div, (*leaves, 0.3, 1.0, None))
    detached = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(
        custom_ops.js_div_backward, (torch.ones(3), *detached, 0.3, 1.0, True, True, None)
    )
    compiled = torch.compile(fastkl.js_div, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), fastkl.js_div(*leaves))
    batch = torch.vmap(lambda q: fastkl.js_div(q, reference.detach()))(
        torch.stack([circuit.detach(), 2 * circuit.detach()])
    )
    alone = [fastkl.js_div(t.detach(), reference.detach()) for t in (circuit, 2 * circuit)]
    assert torch.equal(batch, torch.stack(alone))
    (first,) = torch.autograd.grad(fastkl.js_div(*leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("beta", "error"), [(0, ValueError), (1.0, ValueError), (NAN, ValueError), ("a", TypeError)]
)
def test_errors_of_beta(generator, beta, error):
    circuit, reference = make(generator, 4, 50, 0.5)
    with pytest.raises(error, match=f"beta must.*{'str' if beta == 'a' else beta}"):
        fastkl.js_div(circuit, reference, beta=beta)
    with pytest.raises(error, match="beta must"):
        fastkl.JSDivLoss(beta=beta)
