"""Execute the compiled kernels: values, edge cases, alignment and bytes, for two generations.

sm_80 and sm_90 get the same PTX; sm_100's uses packed arithmetic and maxima of three operands.
"""

import math
import mmap

import pytest
import torch
from conftest import assert_matches, oracle, vanishing_weights
from emulated import emulate, launch
from test_edge_cases import TRITON_TABLE, as_triton_reads

ARCHS = (80, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
NOISES = (0, 1e-5, 1e-3, 0.1, 1, 5)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a card: see test_gpu.py"
)


def make(generator, n_rows, n_cols, noises=(1.0,), dtype=torch.float32, scale=3):
    reference = torch.randn(n_rows, n_cols, generator=generator) * scale
    circuits = [
        (reference + noise * torch.randn(n_rows, n_cols, generator=generator)).to(dtype)
        for noise in noises
    ]
    return circuits, reference.to(dtype)


def check(circuits, reference, **options):
    divergence, session = emulate(circuits, reference, **options)
    assert_matches(divergence, torch.stack([oracle(c, reference) for c in circuits]))
    return divergence, session


@pytest.mark.parametrize("approx_ulp", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_parity(generator, arch, dtype, approx_ulp):
    """All noises, in a group of four and one of two; with and without error in ex2, lg2 and div."""
    circuits, reference = make(generator, 2, 2571, NOISES, dtype)
    divergence, _ = check(circuits, reference, arch=arch, approx_ulp=approx_ulp)
    assert (divergence[0] == 0).all()
    assert (divergence[1:] > 0)[oracle(circuits[1], reference).expand(5, -1) > 0].all()


def test_weights_that_vanish(generator):
    """Exponentials below 2^-126 flush to 0, where e^(-d) is still finite."""
    circuit, reference = vanishing_weights(generator, torch.linspace(84, 104, 11))
    check([circuit], reference, arch=80)


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((80, dtype) for dtype in DTYPES), (100, torch.float32)]
)
def test_edge_cases(generator, arch, dtype):
    """Every case of the table, at three places, in one launch: in a group of four and alone."""
    (circuit,), reference = make(generator, 3 * len(TRITON_TABLE), 601, (0.1,), dtype, scale=1)
    expected = []
    for i, (p_v, q_v, value) in enumerate(TRITON_TABLE.values()):
        for j, place in enumerate((0, 300, 600)):
            row = 3 * i + j
            reference[row, place], circuit[row, place] = p_v, q_v
            exact = oracle(circuit[row], as_triton_reads(reference[row])).item()
            # Half precision rounds a large finite mask to an infinite one.
            rounded = math.isfinite(p_v) and math.isinf(reference[row, place].item())
            expected.append(exact if value is None or rounded else value)
    expected = torch.tensor(expected, dtype=torch.float64)
    whole = torch.full_like(reference[:1], -torch.inf)
    circuit, reference = torch.cat([circuit, whole]), torch.cat([reference, whole])
    expected = torch.cat([expected, torch.tensor([torch.nan], dtype=torch.float64)])
    for circuits in ([circuit] * 4, [circuit]):
        divergence, _ = emulate(circuits, reference, arch=arch)
        for row in divergence:
            assert_matches(row, expected)


@pytest.mark.parametrize("n_cols", [1, 2, 31, 33, 511, 513, 1023, 1025, 16385, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies(generator, n_cols, dtype):
    circuits, reference = make(generator, 1, n_cols, (0.5,), dtype)
    check(circuits, reference, arch=80)


@pytest.mark.parametrize("n_circuits", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("arch", ARCHS)
def test_group_remainders(generator, arch, n_circuits):
    circuits, reference = make(generator, 2, 601, [0.1 * k for k in range(n_circuits)])
    check(circuits, reference, arch=arch)


def at(rows, lead, stride):
    """Copy rows to memory where the first starts `lead` elements after a multiple of 16 bytes."""
    n_rows, n_cols = rows.shape
    buffer = torch.empty(n_rows * stride + 16, dtype=rows.dtype)
    start = (lead - buffer.data_ptr() // rows.itemsize) % (16 // rows.itemsize)
    return buffer.as_strided((n_rows, n_cols), (stride, 1), start).copy_(rows)


@pytest.mark.parametrize("n_cols", [1301, 1304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_alignment(generator, dtype, n_cols):
    """Rows start at every alignment, in all tensors alike: no wide load is misaligned."""
    circuits, reference = make(generator, 3, n_cols, (0.1, 1.0), dtype)
    for lead in range(16 // reference.itemsize):
        for stride in (n_cols, n_cols + 3):
            placed = [at(c, lead, stride) for c in circuits]
            check(placed, at(reference, lead, stride), arch=80)


def test_circuits_that_lie_differently(generator):
    """Two circuits start like the reference, three do not, one has another stride: right order."""
    circuits, reference = make(generator, 3, 1301, (0.0, 0.1, 0.3, 1.0, 3.0))
    placed = [
        at(c, lead, stride)
        for c, lead, stride in zip(
            circuits, (0, 1, 0, 3, 2), (1301, 1301, 1301, 1301, 1310), strict=True
        )
    ]
    check(placed, at(reference, 0, 1301), arch=80)


def test_a_strided_reference_is_copied_once(generator, monkeypatch):
    """At auto_circuit's last position, the reference's rows lie S·V apart, the circuits' V."""
    circuits, reference = make(generator, 3, 1301, (0.1, 0.3, 1.0, 3.0))
    strided = at(reference, 0, 5 * 1301)
    placed = [at(c, 0, 1301) for c in circuits]
    _, session = check(placed, strided, arch=80)
    wide = session.total("partial_kernel")
    # One read per circuit, and a quarter of one for the reference: the group of four used the copy.
    assert bytes_of_logits(wide, 4, 4) == 5 * reference.nbytes
    # For a single circuit the reference is not copied.
    monkeypatch.setattr(launch, "_copy", None)
    _, session = check(placed[:1], strided, arch=80)
    assert bytes_of_logits(session.total("partial_kernel"), 1, 4) == 2 * reference.nbytes


def first_tokens(group, itemsize):
    """Return the bytes of a slice's first tokens, which are read before all else, then again."""
    return 32 * itemsize * (1 + group)


def bytes_of_logits(stats, group, itemsize):
    """Return the bytes loaded, without the table of pointers and the first tokens of each slice.

    All 32 threads load the same 16 bytes of the table, which come from one sector. Counted once per
    thread, they would be 6 % of a slice in half precision.
    """
    return stats.bytes_loaded - stats.ctas * (32 * 16 * group + first_tokens(group, itemsize))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_circuits", [1, 4])
def test_bytes_as_executed(generator, dtype, n_circuits):
    """With GPT-2's vocabulary, a pair takes (1 + 1/G) tensor reads, and not a byte more."""
    circuits, reference = make(generator, 3, 50257, [1.0] * n_circuits, dtype)
    _, session = check(circuits, reference, arch=80)
    stats = session.total("partial_kernel")
    logits = n_circuits * reference.nbytes * (1 + 1 / n_circuits)
    assert bytes_of_logits(stats, n_circuits, reference.itemsize) == logits
    # Divergences this large take no second look.
    assert session.total("finish_kernel").bytes_loaded < 0.02 * logits
    assert stats.ctas * first_tokens(n_circuits, reference.itemsize) < 0.01 * logits
    # Sectors: a circuit's entry in the table is in one, which is read twice. A load of 16 sectors
    # that begins within a sector touches 17; those of every other row do.
    extra = n_circuits * 2 + (1 + n_circuits) * (reference.itemsize + 1)
    assert 32 * (stats.sectors_loaded - stats.ctas * extra) <= (1 + 1 / 16) * logits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_common_rows_take_one_look(generator, dtype, temperature):
    """A second look would hide most faults of the first. Packed operations give the same bits."""
    noises = (1e-3, 0.01, 0.1, 0.3, 1, 3, 0.05)
    circuits, reference = make(generator, 2, 9001, noises, dtype, scale=1)
    found = []
    for arch in ARCHS:
        divergence, session = emulate(circuits, reference, arch=arch, temperature=temperature)
        assert session.accessed("partial_kernel", "row", "load")
        assert not session.accessed("finish_kernel", "row", "load")
        found.append(divergence)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_all_equal(generator, dtype):
    """Then all steps of a chain of additions round the same way, and so no chain may be long."""
    reference = torch.full((1, 151936), 1.3).to(dtype)
    signs = torch.randint(0, 2, reference.shape, generator=generator) * 2 - 1
    circuits = [(reference.float() + size * signs).to(dtype) for size in (0.05, 0.3, 1.0)]
    divergence, _ = emulate(circuits, reference, arch=100)
    expected = torch.stack([oracle(circuit, reference) for circuit in circuits])
    # A fifth of the tolerance.
    assert ((divergence.double() - expected).abs() <= 2e-6 * expected + 2e-9).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_identical_rows_and_noise_near_zero(generator, arch):
    for dtype in DTYPES:
        circuits, reference = make(generator, 2, 1531, (0.0, 1e-7, 1e-6, 1e-4, 1e-2), dtype)
        circuits.append(reference.clone())
        divergence, _ = check(circuits, reference, arch=arch, approx_ulp=2)
        assert (divergence[[0, -1]] == 0).all()
        assert (divergence >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHS)
def test_bits_do_not_depend_on_the_batch(generator, arch, dtype):
    circuits, reference = make(generator, 3, 16504, (0.01, 1.0), dtype)
    together, _ = emulate(circuits, reference, arch=arch)
    for row in range(3):
        alone, _ = emulate(
            [c[row : row + 1].clone() for c in circuits], reference[row : row + 1], arch=arch
        )
        assert torch.equal(alone[:, 0], together[:, row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_bits_do_not_depend_on_the_other_circuits(generator, arch, dtype):
    """A circuit has the same bits in a group of four, in one of two, and alone."""
    circuits, reference = make(generator, 2, 5001, (0.01, 0.1, 1, 3, 0.5, 0.2, 0.05), dtype)
    together, _ = emulate(circuits, reference, arch=arch)
    for circuit, expected in zip(circuits, together, strict=True):
        alone, _ = emulate([circuit], reference, arch=arch)
        assert torch.equal(alone[0], expected)


def test_a_confident_row_needs_a_second_look(generator):
    """The first tokens do not predict the one that has the mass: only its slice is summed again."""
    circuits, reference = make(generator, 2, 20000, (0.5,), scale=1)
    reference[:, 9000] = circuits[0][:, 9000] = 30.0
    divergence, session = check(circuits, reference, arch=80)
    one_slice = 2 * launch.SLICE * reference.itemsize
    assert 1 <= session.total("finish_kernel").bytes_loaded / (2 * one_slice) < 1.2
    assert (divergence >= 0).all()


def test_an_undefined_row_is_not_summed_again(generator):
    """The row is read once more, to find that it has no divergence."""
    circuits, reference = make(generator, 1, 20000, (0.5,))
    reference[0, 9000] = torch.nan
    divergence, session = emulate(circuits, reference, arch=80)
    assert divergence.isnan().all()
    read = 2 * reference.nbytes
    assert 1 <= session.total("finish_kernel").bytes_loaded / read < 1.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_second_look_where_none_is_needed(generator, dtype):
    for noise in (1e-4, 0.01, 0.3, 3.0):
        circuits, reference = make(generator, 1, 9000, (noise,) * 4, dtype)
        _, session = check(circuits, reference, arch=80)
        assert session.total("finish_kernel").bytes_loaded < 0.02 * reference.nbytes


@pytest.mark.parametrize("approx_ulp", [0, 2])
@pytest.mark.parametrize("arch", ARCHS)
def test_first_tokens_that_mislead(generator, arch, approx_ulp):
    """If bases are far from the rest of a slice, sums over- or underflow, and are taken again."""
    circuits, reference = make(generator, 8, 5000, (0.3, 0.0), scale=1)
    for row, (p_v, q_v) in enumerate(
        [
            (-200.0, -200.0),
            (200.0, 200.0),
            (-200.0, 200.0),
            (200.0, -200.0),
            (-INF, -INF),
            (-1e30, -1e30),
            (0.0, -1e9),
            (-INF, 80.0),
        ]
    ):
        reference[row, :40] = p_v
        for circuit in circuits:
            circuit[row, :40] = q_v
    divergence, _ = check(circuits, reference, arch=arch, approx_ulp=approx_ulp)
    same = (reference == circuits[1]).all(-1)
    assert same.sum() == 4
    assert (divergence[1, same] == 0).all()


@pytest.mark.parametrize("masked", ["p", "q", "both"])
def test_masked_first_tokens_of_logits_far_below_zero(generator, masked):
    """At a base of 0, weights of e^-120 underflow: such a slice is summed at the row's bases."""
    circuits, reference = make(generator, 2, 9000, (0.0, 0.3), scale=1)
    sides = [reference - 120, *(c - 120 for c in circuits)]
    n_slices, size = launch.slices(9000, 4)
    assert n_slices == 3
    for side in {"p": sides[:1], "q": sides[1:], "both": sides}[masked]:
        side[1, size : size + 40] = -INF
    check(sides[1:], sides[0], arch=80)


@pytest.mark.parametrize("level", [-82.0, -86.0, -91.0])
def test_masked_first_tokens_of_logits_barely_seen(generator, level):
    """At a base of 0, all of a slice's weights are tiny: that base does not become the row's."""
    (circuit,), reference = make(generator, 4, 9000, (0.3,), scale=1)
    reference, circuit = reference + level, circuit + level
    _, size = launch.slices(9000, 4)
    reference[0, size : size + 40] = -INF
    for side in (reference, circuit):
        side[1, size : size + 40] = -INF
        side[2, :40] = side[2, size : size + 40] = side[2, 2 * size : 2 * size + 40] = -INF
        # The other slices' bases are far lower.
        side[3, :40], side[3, size:] = -INF, side[3, size:] - 100
    check([circuit, reference.clone()], reference, arch=80)


@pytest.mark.parametrize("masked", [(0,), (1,), (0, 2)])
def test_slices_masked_as_a_whole(generator, masked):
    """The reference alone masks slices: its weights do not give the scale of the circuit's."""
    (circuit,), reference = make(generator, 2, 9000, (0.3,), scale=1)
    _, size = launch.slices(9000, 4)
    for part in masked:
        reference[:, part * size : (part + 1) * size] = -INF
    for shift in (-200, 0):
        check([circuit + shift], reference + shift, arch=80)


def test_a_confident_reference_and_a_circuit_that_does_not_know(generator):
    """A sum that is finite at the slices' own bases may overflow at the merged ones."""
    gaps = (44, 55, 60, 62, 64, 66, 68, 70)
    (circuit,), reference = make(generator, len(gaps), 5000, (0.0,), scale=1)
    circuit = torch.randn(circuit.shape, generator=generator)
    # The logits are on a grid, so that p - q is exact.
    circuit, reference = ((side * 64).round() / 64 for side in (circuit, reference))
    for row, gap in enumerate(gaps):
        reference[row, 400 * row + 300] = gap
    divergence, _ = check([circuit], reference, arch=80)
    assert divergence.isfinite().all()


@pytest.mark.parametrize("gap", [10, 15, 20, 30])
def test_likely_tokens_far_above_the_first_ones(generator, gap):
    """Weights far from 1 have larger rounding errors in their exponents, and nearly cancel."""
    (circuit,), reference = make(generator, 150, 200, (0.0,), scale=1)
    for token in (100, 150):
        reference[:, token] = gap + torch.rand(150, generator=generator)
        circuit[:, token] = reference[:, token]
    circuit[:, 100] += 0.45 + 0.5 * torch.rand(150, generator=generator)
    check([circuit], reference, arch=80)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_slices_cover_the_vocabulary(itemsize):
    """No slice is empty, except that a row's first tokens may leave none for the last slice."""
    for n_cols in (1, 4097, 12289, 50257, 128256, 151936, 262208, 1000003):
        n_slices, size = launch.slices(n_cols, itemsize)
        assert n_slices <= launch.SLICES
        assert (n_slices - 1) * size < n_cols <= n_slices * size


def test_an_empty_slice_needs_no_second_look(generator):
    """In 3 of 4 rows, three slices of 4096 and up to 3 tokens before them hold all 12289 tokens."""
    executed = []
    for n_cols in (12289, 12288):
        circuits, reference = make(generator, 4, n_cols, (0.3,), scale=1)
        _, session = check(circuits, reference, arch=80)
        executed.append(sum(session.total("finish_kernel").threads.values()))
    assert executed[0] == executed[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shift", [30.0, -100.0, 1000.0, -1e4])
def test_sides_far_apart(generator, shift, temperature):
    """One side is shifted, off any grid: rounding errors of p - q and of pivots would show."""
    circuits, reference = make(generator, 2, 5000, (2e-4, 0.01, 0.1, 0.5, 2.0))
    for moved, still in (
        ([c + shift for c in circuits], reference),
        (circuits, reference + shift),
    ):
        divergence, _ = emulate(moved, still, arch=80, approx_ulp=2, temperature=temperature)
        assert_matches(
            divergence,
            torch.stack(
                [oracle(c.double() / temperature, still.double() / temperature) for c in moved]
            ),
        )


def test_sides_apart_are_summed_twice_only_where_it_matters(generator):
    """Not if p - q is exact anyway, nor if its rounding error is small next to the divergence."""
    executed = []
    for shift, place, noise in ((0, 0, 0.3), (40, 0, 0.3), (40, -200, 0.3), (40, 0, 3.0)):
        circuits, reference = make(generator, 4, 4000, (noise,), scale=1)
        circuits = [c + (place + shift) for c in circuits]
        _, session = check(circuits, reference + place, arch=80)
        executed.append(sum(session.total("finish_kernel").threads.values()))
    plain, apart, exact, large = executed
    assert apart > 3 * plain
    assert exact < 1.1 * plain
    assert large < 1.1 * plain


def test_offsets_beyond_31_bits(generator):
    """Reference and circuit rows more than 2^31 elements apart are addressed in 64 bits."""
    n_cols, far = 600, 2**31 + 64
    # The memory is only reserved; nothing but two rows of each side is touched.
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 2048)), dtype=torch.bfloat16)
    (circuit,), reference = make(generator, 2, n_cols, (0.5,), torch.bfloat16)
    rows = [memory.as_strided((2, n_cols), (far, 1), start) for start in (0, 1024)]
    check([rows[0].copy_(circuit)], rows[1].copy_(reference), arch=80)
