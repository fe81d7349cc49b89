"""Execute the compiled gradients: values, edge cases, alignment and bytes, for two generations.

test_gradient.py tests, in Triton's interpreter, the laws that they share with other backends.
"""

import math
import mmap

import pytest
import torch
from conftest import oracle_gradients
from emulated import compilations, emulate_gradients, emulation, gradient_launch, launch
from test_compiled import ARCHS, DTYPES, at
from test_gradient import BOUND, NOISES, error

from fastkl import gradient

INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a card: see test_gpu.py"
)


def make(generator, noises, n_cols, dtype=torch.float32, scale=3, n_rows=1):
    """Return a circuit and a reference, with `n_rows` rows of each noise."""
    noise = torch.tensor(noises).repeat_interleave(n_rows)[:, None]
    reference = torch.randn(len(noise), n_cols, generator=generator) * scale
    circuit = reference + noise * torch.randn(len(noise), n_cols, generator=generator)
    return circuit.to(dtype), reference.to(dtype)


def one(circuit, reference, grad=None, **options):
    """Return the gradients (dq, dp) of one circuit's rows, and the session."""
    if grad is None:
        grad = torch.ones(circuit.shape[:1])
    (dq,), dp, session = emulate_gradients(
        grad[None], [circuit], reference, [True], True, **options
    )
    return dq, dp, session


def assert_right(found, expected, dtype=torch.float32):
    """Assert that gradients match float64 within BOUND per row, rounded once to their dtype."""
    for ours, exact in zip(found, expected, strict=True):
        if dtype == torch.float32:
            assert error(ours, exact) <= BOUND
            continue
        info = torch.finfo(dtype)
        rounding = info.eps / 2 * exact.abs().clamp(min=info.smallest_normal)
        off = (ours.double() - exact).abs() - (1 + 1e-3) * rounding
        assert off.max() <= BOUND * exact.norm(dim=-1).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_parity(generator, arch, dtype):
    """All noises, on logits of two scales, with errors of 2 ulp in ex2, lg2 and div."""
    for scale in (1, 3):
        circuit, reference = make(generator, NOISES, 2571, dtype, scale)
        grad = torch.rand(len(circuit), generator=generator) + 0.5
        *found, _ = one(circuit, reference, grad, arch=arch, approx_ulp=2)
        assert_right(found, oracle_gradients(circuit, reference, grad), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary(generator, dtype):
    circuit, reference = make(generator, (1e-5, 1e-2, 1.0), 50257, dtype)
    *found, _ = one(circuit, reference, arch=80)
    assert_right(found, oracle_gradients(circuit, reference), dtype)


@pytest.mark.parametrize("rest", [0.5, 1e-2, 1e-4, 1e-7])
def test_confident_rows(generator, rest):
    circuit, reference = make(generator, (0.3,) * 3, 1701, scale=1)
    top = reference.double().exp().sum(-1).log() - math.log(rest)
    reference[:, 1234] = circuit[:, 1234] = top
    *found, _ = one(circuit, reference, arch=80)
    assert_right(found, oracle_gradients(circuit, reference))


@pytest.mark.parametrize("n_cols", [700, 3000])
def test_large_divergences(generator, n_cols):
    """At 10 nats, a circuit's mass as the difference of larger sums would be off by 2e-6."""
    circuit, reference = make(generator, (5.0,), n_cols, n_rows=12)
    *found, _ = one(circuit, reference, arch=80)
    assert_right(found, oracle_gradients(circuit, reference))


def test_circuits_share_what_the_reference_is_counted_from(generator):
    """One circuit's row is summed again at its maxima; the other's, and one with a NaN, are not."""
    reference = torch.randn(3, 700, generator=generator)
    circuits = [reference + 0.1 * torch.randn(3, 700, generator=generator) for _ in range(2)]
    circuits[0][1, :40] = -200.0
    circuits[0][2, 5] = NAN
    dqs, _, _ = emulate_gradients(
        torch.ones(2, 3), circuits, reference, [True, True], False, arch=80
    )
    for k, row in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        exact, _ = oracle_gradients(circuits[k][row : row + 1], reference[row : row + 1])
        assert error(dqs[k][row : row + 1], exact) <= BOUND
    assert dqs[0][2].isnan().all()


def test_circuits_stacked_in_memory(generator):
    """(K, R, V) with an odd V: alignments differ, but all slices are cut at the same tokens."""
    reference = torch.randn(3, 5001, generator=generator) * 3
    noise = torch.randn(3, 3, 5001, generator=generator)
    circuits = list(reference + 0.1 * noise)
    assert len({launch.layout_of(circuit) for circuit in circuits}) == 3
    dqs, dp, _ = emulate_gradients(torch.ones(3, 3), circuits, reference, [True] * 3, True, arch=80)
    expected = [oracle_gradients(circuit, reference) for circuit in circuits]
    for dq, (exact, _) in zip(dqs, expected, strict=True):
        assert error(dq, exact) <= BOUND
    assert error(dp, sum(exact for _, exact in expected)) <= BOUND


def test_circuits_counted_from_other_bases(generator):
    """A circuit's kept numbers may have another base of the reference than the first circuit's."""
    reference = torch.randn(2, 700, generator=generator) * 3
    circuits = [reference + noise * torch.randn(2, 700, generator=generator) for noise in (0.1, 1)]
    dqs = [torch.empty(2, 700) for _ in circuits]
    dp = torch.empty(2, 700)
    with emulation(80) as session:
        session.circuits = circuits
        kept = launch.launch(circuits, reference, keep=True)
        for field in (1, 3):
            kept[1, :, field] += torch.tensor([5.0, -9.5])
        # Where z_p and s are kept.
        for field in (2, 6):
            kept[1, :, field] *= 2 ** torch.tensor([-5.0, 9.5])
        session.written = [*dqs, dp]
        gradient_launch.launch_gradients(torch.ones(2, 2), circuits, reference, kept, dqs, dp, 1.0)
    expected = [oracle_gradients(circuit, reference) for circuit in circuits]
    for dq, (exact, _) in zip(dqs, expected, strict=True):
        assert error(dq, exact) <= BOUND
    assert error(dp, sum(exact for _, exact in expected)) <= BOUND


@pytest.mark.parametrize("gap", [10, 30, 50, 80])
def test_likely_tokens_far_above_the_first_ones(generator, gap):
    """One circuit agrees on these tokens, so its divergence alone needs no second look."""
    reference = torch.randn(12, 300, generator=generator)
    for token in (100, 150):
        reference[:, token] = gap + torch.rand(12, generator=generator)
    circuits = [reference.clone(), torch.randn(12, 300, generator=generator)]
    circuits[0][:, 100] += 0.45 + 0.5 * torch.rand(12, generator=generator)
    dqs, _, _ = emulate_gradients(
        torch.ones(2, 12), circuits, reference, [True, True], False, arch=80
    )
    for circuit, dq in zip(circuits, dqs, strict=True):
        assert error(dq, oracle_gradients(circuit, reference)[0]) <= BOUND


@pytest.mark.parametrize("arch", ARCHS)
def test_identical_rows_have_no_gradient(generator, arch):
    for dtype in DTYPES:
        _, reference = make(generator, (0.0,) * 2, 1531, dtype)
        dq, dp, _ = one(reference.clone(), reference, arch=arch, approx_ulp=2)
        assert (dq == 0).all()
        assert (dp == 0).all()


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((80, dtype) for dtype in DTYPES), (100, torch.float32)]
)
def test_edge_cases(generator, arch, dtype):
    """Masked, infinite and NaN tokens in the body and in the tail, and rows with a grad of 0.

    fastkl.gradient, which test_gradient.py tests, gives the expected values.
    """
    cases = [(p, q) for p in (-INF, INF, NAN, 0.5) for q in (-INF, INF, NAN, 0.5)]
    circuit, reference = make(generator, (0.1,), 1101, dtype, 1, n_rows=2 * len(cases) + 3)
    for row, (p_v, q_v) in enumerate(cases):
        for i, place in enumerate((300, 1100)):
            reference[2 * row + i, place], circuit[2 * row + i, place] = p_v, q_v
    reference[-1], circuit[-2] = -INF, -INF
    reference[-3, :600] = circuit[-3, :600] = -INF
    grad = torch.ones(len(circuit))
    for asked in (True, False):
        grad[: None if not asked else 0] = 0
        dq, dp, _ = one(circuit, reference, grad, arch=arch)
        (wanted,), wanted_p = gradient.gradients(grad[None], [circuit], reference, [True], True)
        for ours, eager in ((dq, wanted), (dp, wanted_p)):
            info = torch.finfo(dtype)
            atol = max(1e-8, info.smallest_normal * info.eps)
            torch.testing.assert_close(ours, eager, rtol=2 * info.eps, atol=atol, equal_nan=True)
            assert (ours[eager == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("n_circuits", [1, 4])
@pytest.mark.parametrize(
    ("arch", "dtype"), [*((80, dtype) for dtype in DTYPES), (100, torch.float32)]
)
def test_infinite_rows_where_one_token_has_all_mass(
    generator, arch, dtype, n_circuits, temperature
):
    """The reference's gradient at finite logits without mass in float32 is NaN, not 0.

    In a tile and in the tail, with an infinite divergence of one of several circuits.
    """
    reference = torch.randn(3, 1101, generator=generator)
    circuits = [reference + torch.randn(3, 1101, generator=generator) for _ in range(n_circuits)]
    reference[:, 7] = torch.tensor([88.0, 1e4, 65000.0])
    reference[:, 11] = -60000
    circuits[-1][:, 7] = reference[:, [9, 1100]] = -INF
    circuits, reference = [c.to(dtype) for c in circuits], reference.to(dtype)
    wanted = [False] * (n_circuits - 1) + [True]
    dqs, dp, _ = emulate_gradients(
        torch.ones(n_circuits, 3),
        circuits,
        reference,
        wanted,
        True,
        arch=arch,
        temperature=temperature,
    )
    assert dp[:, 7].isfinite().all() if n_circuits > 1 else (dp[:, 7] == 0).all()
    assert (dp[:, [9, 1100]] == 0).all()
    dp[:, [7, 9, 1100]] = NAN
    assert dp.isnan().all()
    # The circuit's gradient is Q, where P is 0.
    exact = (circuits[-1].double() / temperature).softmax(-1) / temperature
    assert_right([dqs[-1]], [exact], dtype)


@pytest.mark.parametrize("grad", [NAN, 1e-30])
def test_odd_gradients(generator, grad):
    circuit, reference = make(generator, (0.1,) * 3, 700)
    circuit[1, 4] = -INF
    grads = torch.tensor([1.0, grad, 0.0])
    dq, dp, _ = one(circuit, reference, grads, arch=80)
    (wanted,), wanted_p = gradient.gradients(grads[None], [circuit], reference, [True], True)
    for ours, eager in ((dq, wanted), (dp, wanted_p)):
        assert torch.equal(ours.isnan(), eager.isnan())
        assert (ours[2] == 0).all()
        for row in range(2):
            if eager[row].isfinite().all():
                # Scaled to a grad of 1.
                scale = 1 / grads[row].double()
                assert error(ours[row] * scale, eager[row] * scale) <= BOUND


@pytest.mark.parametrize("n_cols", [1, 2, 31, 33, 511, 1023, 1024, 1025, 1031, 2047, 2052, 16405])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies(generator, n_cols, dtype):
    """Tails of all lengths, rows without a whole tile, and rows that end where a tile does."""
    circuit, reference = make(generator, (0.5,) * 2, n_cols, dtype)
    *found, _ = one(circuit, reference, arch=80)
    if n_cols > 1:
        assert_right(found, oracle_gradients(circuit, reference), dtype)
    else:
        # Nothing but the pivot's error: a part of 1e-11.
        assert all((ours.abs() <= 1e-10).all() for ours in found)


@pytest.mark.parametrize("n_cols", [2301, 2304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_alignment(generator, dtype, n_cols):
    """At every alignment, no access is wider than its address allows, and gradients are right."""
    circuit, reference = make(generator, (0.1, 1.0), n_cols, dtype)
    expected = oracle_gradients(circuit, reference)
    for lead in range(16 // reference.itemsize):
        for stride in (n_cols, n_cols + 3):
            placed = [at(t, lead, stride) for t in (circuit, reference)]
            *found, session = one(*placed, arch=80)
            assert_right(found, expected, dtype)
            # Only rows aligned like their gradients, which are contiguous, have whole tiles.
            widths = session.accessed("gradient_kernel", "gradient", "store").keys()
            assert (16 in widths) == (lead == 0 and stride == n_cols)


def test_circuits_that_lie_differently(generator):
    """Circuits, some of them wanted, with other alignments and strides than the reference."""
    noises = (1e-3, 0.1, 0.3, 1.0, 3.0)
    reference = torch.randn(3, 1301, generator=generator)
    # A confident row, which is summed once more for the reference's gradient.
    reference[1, 700] = 12
    circuits = [reference + n * torch.randn(3, 1301, generator=generator) for n in noises]
    grad = torch.randn(5, 3, generator=generator)
    grad[2, 1] = 0
    expected = [oracle_gradients(c, reference, g) for c, g in zip(circuits, grad, strict=True)]
    total = sum(dp for _, dp in expected)
    leads, strides = (0, 1, 0, 3, 2), (1301, 1301, 1301, 1301, 1310)
    placed = [at(*where) for where in zip(circuits, leads, strides, strict=True)]
    wanted = [True, False, True, True, False]
    for rows in (placed, circuits):
        for reference_wanted in (True, False):
            # The incoming gradient may have any strides.
            dqs, dp, _ = emulate_gradients(
                grad.t().contiguous().t(), rows, reference, wanted, reference_wanted, arch=80
            )
            assert [dq is not None for dq in dqs] == wanted
            for dq, (exact, _) in zip(dqs, expected, strict=True):
                if dq is not None:
                    norm = exact.norm(dim=-1)
                    assert ((dq - exact).norm(dim=-1) <= BOUND * norm).all()
            assert (dqs[2][1] == 0).all()
            assert (dp is not None) == reference_wanted
            if dp is not None:
                assert error(dp, total) <= BOUND


def test_a_gradient_of_stride_0(generator):
    circuit, reference = make(generator, (0.1, 1.0), 1301)
    *found, _ = one(circuit, reference, torch.tensor(0.5).expand(2), arch=80)
    assert_right(found, oracle_gradients(circuit, reference, torch.tensor([0.5, 0.5])))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(generator, temperature):
    circuit, reference = make(generator, (0.1, 1.0), 2301)
    *found, _ = one(circuit, reference, arch=100, temperature=temperature)
    scaled = [t.double() / temperature for t in (circuit, reference)]
    expected = oracle_gradients(*scaled, torch.full((2,), 1 / temperature))
    for ours, exact in zip(found, expected, strict=True):
        assert error(ours, exact) <= 1e-5


@pytest.mark.parametrize(
    ("shift", "temperature"), [(30.0, 1.0), (1000.0, 1.0), (-1e4, 1.0), (-30.0, 0.7)]
)
def test_sides_far_apart(generator, shift, temperature):
    """One side is shifted, off any grid; in some rows one token has a mass of 0.999."""
    circuit, reference = make(generator, (0.05, 0.5), 3000, n_rows=2)
    top = ((reference[::2] / temperature).logsumexp(-1) + 7) * temperature
    reference[::2, 1234] = circuit[::2, 1234] = top
    for moved, still in ((circuit + shift, reference), (circuit, reference + shift)):
        *found, _ = one(moved, still, arch=80, temperature=temperature)
        expected = oracle_gradients(moved.double() / temperature, still.double() / temperature)
        for ours, exact in zip(found, expected, strict=True):
            assert error(ours, exact / temperature) <= (BOUND if temperature == 1 else 1e-5)


def test_sides_on_either_side_of_0(generator):
    """Neither side can be moved to the other without losing the last digits of likely tokens.

    Nor can the lost digits be added to the fractional rest of the offset.
    """
    offsets = torch.tensor([0.3, 0.45, 1.0, 4.5, 16.0, 100.49, 256.0])[:, None]
    p = torch.randn(7, 1500, generator=generator) * 0.3 + (offsets / 2 - 0.25)
    q = p - offsets + 1e-4 * torch.randn(7, 1500, generator=generator)
    *found, _ = one(q, p, arch=100)
    assert_right(found, oracle_gradients(q, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(generator, dtype):
    circuit, reference = make(generator, (0.01, 1.0), 2504, dtype)
    together = one(circuit, reference, arch=80)
    for row in range(2):
        alone = one(circuit[row : row + 1].clone(), reference[row : row + 1], arch=80)
        for ours, whole in zip(alone[:2], together[:2], strict=True):
            assert torch.equal(ours[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_circuits", "reference_wanted"), [(1, False), (1, True), (4, False)])
def test_bytes_as_executed(generator, dtype, n_circuits, reference_wanted):
    """With GPT-2's vocabulary, each logit is read once and each gradient written once, no more."""
    circuit, reference = make(generator, (1.0,) * 2, 50257, dtype)
    circuits = [circuit.clone() for _ in range(n_circuits)]
    *_, session = emulate_gradients(
        torch.ones(n_circuits, 2),
        circuits,
        reference,
        [True] * n_circuits,
        reference_wanted,
        arch=80,
    )
    stats = session.total("gradient_kernel")
    assert stats.bytes_stored == (n_circuits + reference_wanted) * reference.nbytes
    loads = session.accessed("gradient_kernel", "row", "load")
    stores = session.accessed("gradient_kernel", "gradient", "store")
    assert sum(loads.values()) == (n_circuits + 1) * reference.nbytes
    assert sum(stores.values()) == stats.bytes_stored
    # 128 bits at a time, except for less than a tile per row.
    for accessed in (loads, stores):
        assert accessed.keys() == {16, reference.itemsize}
        assert accessed[16] >= 0.97 * sum(accessed.values())
    # A warp stores 512 bytes at a multiple of 16 bytes, which lie in 16 or 17 sectors.
    assert 32 * stats.sectors_stored <= 17 / 16 * stats.bytes_stored
    assert stats.barriers == stats.shuffles == 0
    # Rows in which no token has nearly all mass are not read again for the reference's gradient.
    assert session.total("top_kernel").bytes_loaded < 0.05 * reference.nbytes


def test_offsets_beyond_31_bits(generator):
    """Rows more than 2^31 elements apart are addressed in 64 bits, by all three kernels."""
    n_cols, far = 600, 2**31 + 64
    # The memory is only reserved; nothing but two rows of each side is touched.
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 2048)), dtype=torch.bfloat16)
    circuit, reference = make(generator, (0.5,) * 2, n_cols, torch.bfloat16, 1)
    # A row that is summed once more for the reference's gradient: one token has nearly all mass,
    # and the pivot is not 0.
    reference[1, 7], circuit[1, 7] = 15, 18
    rows = [memory.as_strided((2, n_cols), (far, 1), start) for start in (0, 1024)]
    placed = rows[0].copy_(circuit), rows[1].copy_(reference)
    *found, session = one(*placed, arch=80)
    assert_right(found, oracle_gradients(circuit, reference), torch.bfloat16)
    assert session.accessed("top_kernel", "row", "load")


def test_sizes_do_not_recompile(generator):
    def step(reference, n_circuits):
        n_rows, start = len(reference), reference.storage_offset()
        grad = torch.ones(start + n_circuits * n_rows)[start:].view(n_circuits, n_rows)
        circuits = [reference.clone() for _ in range(n_circuits)]
        emulate_gradients(grad, circuits, reference, [True] * n_circuits, True, arch=80)

    # The first size compiles the forward pass's two kernels, the gradients' two, and the table's.
    assert compilations(generator, step, longest=3000) == [5] * 6
