"""The eager backend's formula, at its limits and on blocks of rows of all kinds."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import assert_matches, kl_rows, oracle

from fastkl import unavailable_backends
from fastkl.backends import eager_blocks as blocks
from fastkl.backends import eager_formulas as formulas
from fastkl.backends import eager_workspace

N_COLS = 4099


def pair(generator, reach, n_rows=1):
    """Return rows whose logits rise and fall by up to `reach`, except the likeliest token's."""
    reference = torch.randn(n_rows, N_COLS, generator=generator) * 3
    rise = (torch.rand(n_rows, N_COLS, generator=generator) * 2 - 1) * reach
    rise[:, 7], rise[:, 11] = reach, -reach
    rise.scatter_(-1, reference.argmax(-1, keepdim=True), 0.0)
    return reference + rise, reference


def good(circuit, reference):
    """Return whether the formula was good for each row, and whether any row was measured again."""
    workspace = eager_workspace.Workspace(blocks.Layout(*reference.shape))
    workspace.read(reference)
    again = []

    def rows(k, some):
        again.append(some)
        return circuit if some is None else circuit[some]

    fine = workspace.kl(rows, 1)[1][0]
    return fine.tolist(), len(again) > 1


@pytest.mark.parametrize("side", [0.98, 1.02], ids=["within", "beyond"])
@pytest.mark.parametrize(
    ("depth", "limit", "expected"),
    [
        # Where e^x is the largest float32, and the smallest one that has all its digits.
        (60, 128 * math.log(2), (True, False)),
        (60, formulas.LEAST_EXPONENT * math.log(2), (True, False)),
        # How far a token may rise in a row too deep for its weights; other rows have no such limit.
        (70, formulas._TOO_HIGH * math.log(2), (True, False)),
        (60, formulas._TOO_HIGH * math.log(2), (True, True)),
    ],
)
def test_far_moves(generator, depth, limit, expected, side):
    """A deep token rises, or another one falls, by a little less or a little more than a limit."""
    circuit, reference = pair(generator, 1.0, 2)
    token = 9 if limit > 0 else 7
    reference[:, 9] = reference.amax(-1) - depth
    circuit[:, 9] = reference[:, 9]
    circuit[:, token] = reference[:, token] + limit * side
    assert good(circuit, reference)[0] == [expected[side > 1]] * 2
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("depth", [10.0, 17.0])
def test_falls_below_float32s_normal_numbers(generator, depth):
    """An exponential that small has few digits, and its logarithm is off by up to a third."""
    circuit, reference = pair(generator, 0.0, 200)
    reference[:, 9] = reference.amax(-1) - depth
    circuit = reference.clone()
    circuit[:, 9] -= torch.linspace(86, 106, 200)
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


def test_a_rise_far_above_float32s_digits(generator):
    """P e^x is then off by 1e-5 of itself, and it is most of KL."""
    depth = torch.linspace(30, 87, 400)[:, None]
    share = torch.linspace(-4, -1, 7)[:, None]
    noise = torch.rand(400, 1, generator=generator)
    reference = torch.cat([noise, noise - depth], 1)
    for more in share:
        circuit = torch.cat([noise * 3, noise * 3 + more], 1)
        assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("above", [5.0, 20.0])
@pytest.mark.parametrize("depth", [80.0, 95.0, 120.0])
def test_a_token_without_reference_mass_that_the_circuit_prefers(generator, depth, above):
    """e^x overflows in float32, or the token's weight underflows."""
    circuit, reference = pair(generator, 1.0, 2)
    reference[:, 9] = reference.amax(-1) - depth
    circuit[:, 9] = circuit.amax(-1) + above
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


def test_a_weight_of_few_digits(generator):
    """The weight is below float32's normal numbers, but its token rises so far that it counts."""
    circuit, reference = pair(generator, 0.05, 2)
    reference[:, 9] = reference.amax(-1) - 103
    circuit[:, 9] = reference[:, 9] + torch.tensor([87.0, 88.0])
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


def test_each_rows_bits_are_its_own(generator):
    """A row has the same bits alone and in a block with rows of all kinds."""
    reaches = [0.0, 0.01, 0.03, 0.2, 0.5, 3.0, 20.0, 70.0]
    pairs = [pair(generator, reach) for reach in reaches]
    circuit, reference = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    circuit = torch.cat([circuit, circuit[:2]])
    reference = torch.cat([reference, reference[:2]])
    circuit[-2, 5], circuit[-1, 5] = torch.nan, -torch.inf
    together = kl_rows([circuit], reference, "eager")[0]
    alone = torch.cat(
        [kl_rows([circuit[i : i + 1]], reference[i : i + 1], "eager")[0] for i in range(10)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=0, equal_nan=True)
    assert_matches(together, oracle(circuit, reference))


def test_bits_beside_a_row_that_lies_deep(generator):
    """A deep row does not change the bits of the rows beside it."""
    circuit, reference = pair(generator, 1.0, 40)
    reference[:, 9] = reference.amax(-1) - torch.linspace(60, 80, 40)
    circuit[:, 9] = reference.amax(-1) + torch.linspace(-1, 7, 40)
    # Rows that are not quite deep, with a rise that would count in deep ones. It must not count
    # beside deep rows either, because it is not computed in a block without them.
    reference[20:] = 0
    reference[20:, 9] = -38
    circuit[20:] = 0.1 * torch.randn(20, N_COLS, generator=generator)
    circuit[20:, 9] = reference[20:, 9] + torch.linspace(45, 48, 20)
    deep = reference[:3].clone()
    deep[0, 5], deep[1, 5], deep[2, 5] = -torch.inf, torch.nan, deep[2].amax() - 100
    alone = torch.cat(
        [kl_rows([q[None]], p[None], "eager")[0] for q, p in zip(circuit, reference, strict=True)]
    )
    beside = kl_rows([torch.cat([deep, circuit])], torch.cat([deep, reference]), "eager")[0, 3:]
    assert torch.equal(alone, beside)
    assert_matches(alone, oracle(circuit, reference))


def test_bits_of_a_long_row_alone(generator):
    """PyTorch splits a single row's sum over threads. The masked token requires `eager_states`."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    reference = torch.randn(12, 100_003, generator=generator) * 3
    reference[:, 5] = -torch.inf
    circuit = reference + 0.3 * torch.randn(12, 100_003, generator=generator)
    circuit[:, 5] = 0
    try:
        together = kl_rows([circuit], reference, "eager")[0]
        alone = [kl_rows([circuit[i : i + 1]], reference[i : i + 1], "eager")[0] for i in range(12)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))
    assert_matches(together, oracle(circuit, reference))


def far_but_small(generator, n_rows, level=0.005):
    """Return rows whose unlikely tokens move far and likely ones hardly, as in real models."""
    reference = torch.randn(n_rows, 5003, generator=generator) * 3
    below = reference.amax(-1, keepdim=True) - reference
    noise = torch.randn(n_rows, 5003, generator=generator)
    return reference + level * noise * (1 + below**2), reference


@pytest.mark.parametrize("apart", [0.0, 1000.0])
def test_bits_among_rows_measured_again(generator, apart):
    """Whether few or many rows of a block are measured again does not change a row's bits."""
    rows = []
    for n_few, n_many in ((1, 4), (3, 2)):
        for few in (0.1, 0.8, 3.0, None):
            for many in (0.1, 0.8, 3.0, None):
                for n, reach in ((n_few, few), (n_many, many)):
                    circuit, reference = far_but_small(generator, n)
                    if reach is not None:
                        noise = torch.rand(n, 5003, generator=generator) * 2 - 1
                        circuit = reference + reach * noise
                    rows.append((circuit, reference))
    circuit, reference = (torch.cat(some) for some in zip(*rows, strict=True))
    circuit[::3] += apart
    alone = torch.cat(
        [kl_rows([q[None]], p[None], "eager")[0] for q, p in zip(circuit, reference, strict=True)]
    )
    # Five rows at a time, and all at once.
    for n_rows in (5, len(circuit)):
        found = [
            kl_rows(
                [circuit[i : i + n_rows], circuit.flip(0)[:n_rows]],
                reference[i : i + n_rows],
                "eager",
            )[0]
            for i in range(0, len(circuit), n_rows)
        ]
        assert torch.equal(torch.cat(found), alone)
    assert_matches(alone, oracle(circuit, reference))


@pytest.fixture(params=[1, 2, 3, 5])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_cols", [2, 3, 9, 67, 127, 200, 2500])
@pytest.mark.parametrize("reach", [0.1, 0.9, 2.0, 30.0])
def test_bits_do_not_depend_on_the_place_in_a_block(generator, n_threads, n_cols, reach):
    """PyTorch computes the last elements of a thread's share in another loop than the others."""
    reference = torch.randn(n_cols, generator=generator)
    circuit = reference + (torch.rand(n_cols, generator=generator) * 2 - 1) * reach
    circuit[0] = reference[0] + reach
    rows = [t.repeat(2500 if n_cols < 200 else 250, 1) for t in (circuit, reference)]
    found = set(kl_rows(rows[:1], rows[1], "eager")[0].tolist())
    torch.set_num_threads(1)
    assert found == {kl_rows([circuit[None]], reference[None], "eager").item()}


@pytest.mark.parametrize("n", [1, 31, 32, 1000, 32768, 32769, 70_001, 98_304, 524_288, 600_000])
def test_threads_share_whole_vectors(n_threads, n):
    even = blocks._even(n)
    threads = min(n_threads, -(-even // 32768))
    assert even >= n
    assert even % (32 * threads) == 0
    assert even - n < 64 * n_threads


@pytest.mark.parametrize("n_cols", [1, 128, 129, 256, 257, 2048, 2049, 50257, 600_000])
def test_rows_are_padded_with_zeros(n_cols):
    layout = blocks.Layout(7, n_cols)
    (memory,) = layout.memory(1)
    block = layout.block(memory, layout.rows_per_block)
    assert block.rows.shape == (layout.rows_per_block, n_cols)
    assert not block.padded[:, n_cols:].any()
    part = block.parts.shape[2]
    assert block.padded.shape[1] - n_cols < 16 * block.parts.shape[1]
    assert part == n_cols or (part <= 128 and part % 16 == 0)
    block.rows.fill_(1)
    assert block.sums().sum() == layout.rows_per_block * n_cols


@pytest.mark.parametrize("level", [0.003, 0.005, 0.008])
def test_few_tokens_far_and_a_small_divergence(generator, level):
    """Such rows are measured only once, although unlikely tokens move far."""
    circuit, reference = far_but_small(generator, 8, level)
    assert good(circuit, reference) == ([True] * 8, False)
    divergence = kl_rows([circuit], reference, "eager")[0]
    assert divergence.max() < 0.15
    assert (circuit - reference).abs().max() > 1
    assert_matches(divergence, oracle(circuit, reference))


@pytest.mark.parametrize("n_cols", [2, 10, 33, 100, 1000])
@pytest.mark.parametrize("height", [0.0, 2.0, 5.0])
def test_only_the_likeliest_token_moved(n_cols, height):
    """Only the other tokens are summed. They do not move, so that their x is c."""
    reference = torch.zeros(1201, n_cols)
    reference[:, 0] = height + 1e-3
    circuit = reference.clone()
    circuit[:, 0] += torch.linspace(-1.2, 1.2, 1201)
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize(
    ("n_cols", "height", "moved"),
    [
        (914, 4.408248424530029, -1.3485432863235474),
        (1878, 4.637124061584473, -1.5877864360809326),
        (609, 3.000575065612793, -2.027707815170288),
        (455, 2.718919038772583, -2.0056638717651367),
        # Means far larger than the divergence: their float32 sums are off by more than it may be.
        (512, 0.125, 76.6875),
        (512, 0.1119380, 74.8051),
    ],
)
def test_all_but_the_likeliest_token_moved_alike(n_cols, height, moved):
    """A search found these: the tokens' rounding errors are alike too, and all have one sign."""
    reference = torch.zeros(1, n_cols)
    reference[0, 0] = height
    circuit = reference + moved
    circuit[0, 0] = height
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("apart", [2.0**19, 2.0**30, 2.0**39])
def test_sides_further_apart_than_float64_has_digits_for(generator, apart):
    reference = 0.01 * torch.randn(3, 100, generator=generator)
    circuit = torch.full((3, 100), apart)
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_cols", [512, 1000])
@pytest.mark.parametrize(("height", "moved"), [(0.0, 23.0), (4.7, -1.3), (4.7, 1.3), (5.5, 0.24)])
def test_sums_of_many_alike(n_cols, height, moved):
    """Every addition rounds in the same direction, both in sums and in means."""
    reference = torch.zeros(400, n_cols)
    reference[:, 0] = height
    circuit = reference + torch.linspace(0.7, 1.0, 400)[:, None] * moved
    circuit[:, 0] = reference[:, 0]
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize(
    ("n_cols", "heavy_ones", "far", "heavy", "top"),
    [
        # Found when parts had 255 elements.
        (
            510,
            slice(0, None, 255),
            (-13.322858810424805, -14.367197036743164),
            (-1.1294914484024048, -3.4423813819885254),
            (32, -0.436829149723053, -1.7046159505844116),
        ),
        (
            2295,
            slice(0, None, 255),
            (-9.999709129333496, -10.25346565246582),
            (-0.30040204524993896, -2.685586929321289),
            (-1, 0.36200302839279175, -0.07460425794124603),
        ),
        # For parts of 128 elements.
        (
            1152,
            slice(40, None, 128),
            (-11.38968, -12.243846),
            (0.3093437, -2.740719),
            (318, 0.973971, -0.03815389),
        ),
    ],
)
def test_one_heavy_token_a_part(n_cols, heavy_ones, far, heavy, top):
    """Searches found these: every tiny term added to a heavy one rounds in the same direction."""
    place, *top_logits = top
    reference, circuit = (torch.full((1, n_cols), logit) for logit in far)
    for rows, logit, top_logit in zip((reference, circuit), heavy, top_logits, strict=True):
        rows[0, heavy_ones] = logit
        rows[0, place] = top_logit
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize(
    "groups",
    [
        # Each group is a number of tokens, and their logits in the reference and in the circuit.
        # Large moves of few tokens.
        [(1013, -3.8955534, 5.241186), (1, 7.4244723, 7.9097123), (10, 7.0979681, 53.387157)],
        [(497, -6.8024640, -4.2882686), (1, 2.4290981, 1.2695265), (14, 1.8343037, 29.920029)],
        [(386, -5.298099, 3.3587451), (1, 3.936584, 8.7335806), (13, 3.349494, 37.045696)],
        # Deep tokens that rise by 64 powers of two or more.
        [(56, -84.167374, -4.2227187), (7, 0.2569641, 0.8926468), (1, 1.1581306, 1.791928)],
        [(1, -75.431488, 0.5900172), (1, 3.3552706, 0.82018214), (1, 5.756794, 3.231745)],
        [
            (1, 11.525197982788086, 15.520599365234375),
            (1, -51.99245071411133, 12.490348815917969),
        ],
        [
            (1, 13.523138046264648, 10.40821647644043),
            (120, 11.981294631958008, 8.974784851074219),
            (6, -46.82106399536133, 8.970723152160645),
        ],
        # Means and sums far larger than the divergence.
        [(1, 1.0, 1.0), (94, 0.0, 11.9375)],
        [(1, 1.25, 1.25), (110, 0.0, 7.5625)],
        [
            (1, 1.2859605550765991, 1.1061842441558838),
            (87, 0.7051631212234497, 4.186460971832275),
            (40, -2.820948362350464, -3.0187888145446777),
        ],
        [(1, 0.25, 0.25), (99, 0.0, 21.625)],
        [(1, 0.25, 0.25), (127, 0.0, 24.625)],
        [
            (1, 1.8202508687973022, 4.304504871368408),
            (27, 1.817151427268982, 4.427113056182861),
            (68, -7.363504886627197, -4.464905261993408),
        ],
        [
            (1, 5.527501583099365, 6.921565055847168),
            (95, 4.141061782836914, 5.661302089691162),
        ],
        # Sides about 4 apart, and much further apart.
        [
            (1, -6.56177282333374, -2.577105760574341),
            (65, -7.232758045196533, -3.1192829608917236),
            (61, -6.991868495941162, -2.9821832180023193),
        ],
        [
            (1, 2.5903406143188477, 6.570758819580078),
            (34, 2.547245740890503, 6.5487141609191895),
            (61, 1.9142563343048096, 6.02134370803833),
        ],
        [(1, 0.0, 2560.0), (1, -4.000120639801025, 2568.0)],
    ],
)
def test_groups_of_tokens_alike(generator, groups):
    """Searches found these groups of identical tokens, which round alike."""
    reference, circuit = (
        torch.cat([torch.full((1, n), logits[i]) for n, *logits in groups], 1) for i in (0, 1)
    )
    n_cols = reference.shape[1]
    shuffled = [torch.randperm(n_cols, generator=generator) for _ in range(50)]
    order = torch.stack([torch.arange(n_cols), *shuffled])
    rows = circuit[0, order], reference[0, order]
    assert_matches(kl_rows([rows[0]], rows[1], "eager")[0], oracle(*rows))


@pytest.mark.parametrize("moved", [76.6875, 40.0, -1.5])
@pytest.mark.parametrize("n_cols", range(3000, 5000, 250))
def test_all_but_a_likely_token_of_each_stretch_moved_alike(n_cols, moved):
    reference = torch.zeros(1, n_cols)
    reference[0, :: -(-n_cols // 8)] = 0.125
    circuit = reference + moved * (reference == 0)
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_parts", [1, 4, 16, 40])
@pytest.mark.parametrize(("heavy", "rise", "tiny_rise"), [(0.51, 0.5, 0.45), (0.51, -2.0, -1.8)])
def test_tiny_tokens_added_to_heavy_ones(n_parts, heavy, rise, tiny_rise):
    """PyTorch adds one tiny term after another to a heavy one, and each is rounded away."""
    stride = 128
    reference, move = torch.full((n_parts, stride), -60.0), torch.zeros(n_parts, stride)
    reference[:, 0], move[:, 0] = math.log(heavy), rise
    added = [*range(1, 9), 16, 24, 32, 64, 96]
    for factor in torch.linspace(0.7, 1.3, 13).tolist():
        reference[:, added], move[:, added] = math.log(factor * 2.0**-25), tiny_rise
        reference[0, 17] = move[0, 17] = 0
        rows = (reference + move).view(1, -1), reference.view(1, -1)
        assert_matches(kl_rows([rows[0]], rows[1], "eager")[0], oracle(*rows))


@pytest.mark.parametrize("heavy", [2, 11])
def test_many_tiny_terms_beside_few_large_ones(generator, heavy):
    """Every term that is added to a large one loses digits."""
    reference = -torch.linspace(4, 16, 300)[:, None].repeat(1, 120)
    reference[:, ::10][:, :heavy] = torch.rand(300, heavy, generator=generator) * 1e-3
    circuit = reference.clone()
    moved = torch.linspace(0.01, 0.9, 300)[:, None] * torch.randn(300, heavy, generator=generator)
    circuit[:, ::10][:, :heavy] += moved
    circuit[:, 5] += 3
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


def test_states_of_many_tokens_just_beyond_the_series(generator):
    """One token falls too far for the formula; the others move to the end of the states' series."""
    reference = torch.zeros(300, 400)
    reference[:, 0], reference[:, 1] = torch.linspace(4, 10, 300), -60.0
    circuit = reference + torch.linspace(-0.7, 0.7, 300)[:, None]
    circuit[:, 0] = reference[:, 0]
    circuit[:, 1] -= 90
    assert not any(good(circuit, reference)[0])
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize(
    ("reference", "circuit"),
    [
        ([5.998123645782471, 5.99313497543335], [-5.443721771240234, -5.539163589477539]),
        (
            [2.0883612632751465, 5.892886638641357, 5.837714195251465],
            [-5.921059608459473, -2.204273223876953, -2.167781352996826],
        ),
        ([0.0008616447448730469, 0.06974649429321289], [15.743414878845215, 15.72089672088623]),
        ([-31.91993522644043, -31.92222023010254], [-38.707481384277344, -38.800689697265625]),
    ],
)
def test_sides_apart(reference, circuit):
    """A search found these: differences are rounded at that size, and little is left of them."""
    circuit, reference = torch.tensor([circuit]), torch.tensor([reference])
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_cols", [10, 606, 50257])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_circuit_that_is_sure_of_the_likeliest_token(generator, spread, n_cols):
    """All other tokens fall together, and next to nothing is left of Σ P e^x."""
    rises = torch.linspace(1, 40, 40)
    reference = spread * torch.randn(40, n_cols, generator=generator)
    circuit = reference + 0.6 * spread * torch.randn(40, n_cols, generator=generator)
    circuit.scatter_add_(-1, reference.argmax(-1, keepdim=True), rises[:, None])
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("n_cols", [150, 1000])
def test_a_circuit_that_dropped_the_likeliest_token(generator, n_cols):
    """Σ P x is of the size of the fall, and the divergence a hundredth of it."""
    reference = 0.1 * torch.randn(50, n_cols, generator=generator)
    circuit = reference + 0.01 * torch.randn(50, n_cols, generator=generator)
    circuit.scatter_add_(
        -1, reference.argmax(-1, keepdim=True), -torch.linspace(3, 14, 50)[:, None]
    )
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


@pytest.mark.parametrize("share", [0.0215, 0.0225])
@pytest.mark.parametrize("n_cols", [294, 3650])
def test_a_divergence_small_beside_the_mean(generator, share, n_cols):
    """When the likeliest token falls, all other tokens rise alike and round alike."""
    reference = torch.zeros(400, n_cols)
    reference[:, 0] = math.log(share * (n_cols - 1) / (1 - share))
    reference += 3 * torch.rand(400, 1, generator=generator)
    circuit = reference.clone()
    circuit[:, 0] -= torch.linspace(5, 14, 400)
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


def test_circuits_in_groups(generator, monkeypatch):
    reference = torch.randn(9, 20, generator=generator)
    circuits = [reference + 0.3 * torch.randn(9, 20, generator=generator) for _ in range(5)]
    together = kl_rows(circuits, reference, "eager")
    monkeypatch.setattr(eager_workspace, "_KEPT_SUMS", 18)
    assert eager_workspace.Workspace(blocks.Layout(9, 20)).n_circuits == 2
    assert torch.equal(kl_rows(circuits, reference, "eager"), together)


@pytest.mark.parametrize("level", [1e-7, 1e-6, 1e-5])
def test_one_token_far_off_and_the_rest_close(generator, level):
    """First-order sums are of the size of one token's rounding; second-order sums survive it."""
    circuit, reference = pair(generator, level, 30)
    reference[:, 7] = circuit[:, 7] = -25.0
    circuit[:15, 7] += 5
    circuit[15:, 7] -= 5
    assert good(circuit, reference) == ([True] * 30, False)
    divergence = kl_rows([circuit], reference, "eager")[0]
    assert_matches(divergence, oracle(circuit, reference))
    assert (divergence >= 0).all()


@pytest.mark.parametrize("n_cols", [2, 3, 10, 1000])
def test_rows_a_few_units_in_the_last_place_apart(generator, n_cols):
    """Rounding may make their second-order sums 0 or negative, where first-order sums are not."""
    reference = torch.randn(300, n_cols, generator=generator)
    units = torch.randint(-2, 3, (300, n_cols), generator=generator, dtype=torch.int32)
    circuit = (reference.view(torch.int32) + units).view(torch.float32)
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


def test_a_row_that_is_nan_does_not_hide_one_that_is_apart(generator):
    circuit, reference = pair(generator, 0.01, 2)
    circuit = torch.round(circuit * 128) / 128 + 1000
    alone = kl_rows([circuit[1:]], reference[1:], "eager")[0]
    circuit[0] = torch.nan
    together = kl_rows([circuit], reference, "eager")[0]
    assert together[0].isnan()
    assert together[1] == alone[0]
    assert_matches(alone, oracle(circuit[1:], reference[1:]))


@pytest.mark.parametrize("pivot", [2.0, 40.0, -1000.0, 3e4])
def test_pivots(generator, pivot):
    """An offset of a circuit changes its divergence only by rounding errors."""
    circuit, reference = pair(generator, 0.4, 3)
    # Seven binary places, so that adding the offset is exact.
    circuit, reference = (torch.round(rows * 128) / 128 for rows in (circuit, reference))
    moved = kl_rows([circuit + pivot], reference, "eager")[0]
    assert_matches(moved, oracle(circuit, reference))
    far = abs(pivot) > formulas._LARGE_PIVOT
    assert good(circuit + pivot, reference) == ([True] * 3, far)


def test_the_likeliest_token_far_from_the_middle(generator):
    """Everything moves except the likeliest token, which has nearly all the mass."""
    circuit, reference = pair(generator, 0.01, 2)
    likeliest = reference.argmax(-1, keepdim=True)
    for rows in (circuit, reference):
        rows.scatter_add_(-1, likeliest, torch.full((2, 1), 20.0))
    circuit -= 14
    circuit.scatter_add_(-1, likeliest, torch.full((2, 1), 14.0))
    assert_matches(kl_rows([circuit], reference, "eager")[0], oracle(circuit, reference))


_DEFAULTS = """
import sys
import torch
circuit, reference = torch.load(sys.argv[1])
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
import fastkl
for backend in sys.argv[2:]:
    rows = fastkl.kl_div(circuit, reference, reduction="none", backend=backend)
    assert rows.device.type == "cpu" and rows.dtype == torch.float32, rows
    print(*rows.tolist())
"""


def test_defaults_of_the_process_change_nothing(generator, tmp_path):
    """Even if they are set before fastkl is imported, tables and results stay with the logits."""
    circuit, reference = pair(generator, 1.0, 6)
    circuit = reference + (circuit - reference) * torch.tensor(
        [[0], [0.01], [0.1], [0.2], [1], [30]]
    )
    circuit[5, 0] = -torch.inf
    torch.save((circuit, reference), tmp_path / "rows.pt")
    backends = [name for name in ("eager", "native") if unavailable_backends().get(name) is None]
    found = subprocess.run(
        [sys.executable, "-c", _DEFAULTS, str(tmp_path / "rows.pt"), *backends],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    rows = [kl_rows([circuit], reference, backend)[0].tolist() for backend in backends]
    assert found.stdout.splitlines() == [" ".join(map(str, values)) for values in rows]
