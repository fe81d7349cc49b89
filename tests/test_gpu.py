"""Tests on a card: values, edge cases, bits, graphs, synchronization, memory, offsets beyond 2^31.

Without a card, other tests check the same kernels in the interpreter and by executing their PTX.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_matches, oracle, oracle_gradients
from test_edge_cases import TRITON_TABLE, as_triton_reads
from test_gradient import BOUND, error

import fastkl
from fastkl import gradient
from fastkl.backends import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm card"),
]

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The noise of identical rows, of rounding, of a small circuit, and of a bad one.
NOISES = (0.0, 1e-3, 0.1, 5.0)


def make(n_circuits, n_rows, n_cols, dtype=torch.float32):
    """Return logits on the card; the circuits' noise cycles through NOISES."""
    generator = torch.Generator(DEVICE).manual_seed(20261123)

    def randn():
        return torch.randn(n_rows, n_cols, generator=generator, device=DEVICE)

    reference = (3 * randn()).to(dtype)
    levels = itertools.islice(itertools.cycle(NOISES), n_circuits)
    return [(reference + level * randn()).to(dtype) for level in levels], reference


def measure(circuits, reference):
    return fastkl.kl_div_many(circuits, reference, reduction="none", backend="triton")


def assert_right(circuits, reference):
    divergence = measure(circuits, reference)
    assert_matches(divergence, torch.stack([oracle(c, reference) for c in circuits]).cpu())
    return divergence


@pytest.mark.parametrize("n_circuits", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n_cols", [1, 31, 1000, 50257, 128256, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype, n_cols, n_circuits):
    """All group sizes and remainders; odd vocabularies start rows at every alignment."""
    circuits, reference = make(n_circuits, 17, n_cols, dtype)
    divergence = assert_right(circuits, reference)
    assert (divergence[0] == 0).all()


@pytest.mark.parametrize("n_rows", [1, 16, 2560])
def test_rows(n_rows):
    assert_right(*make(4, n_rows, 50257, torch.bfloat16))


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments(dtype, offset):
    """Storage that starts anywhere; circuits aligned unlike the reference and each other."""
    circuits, reference = make(3, 5, 3001, dtype)

    def moved(rows, by):
        storage = torch.zeros(rows.numel() + by, dtype=dtype, device=DEVICE)
        view = storage[by:].view(rows.shape)
        return view.copy_(rows)

    assert_right([moved(c, offset) for c in circuits], moved(reference, offset))
    assert_right([moved(c, offset + k) for k, c in enumerate(circuits)], reference)
    assert_right([moved(c, offset) for c in circuits], reference)


def test_strided_rows():
    """auto_circuit's last position of a prompt, and a padded vocabulary: views, not copies."""
    circuits, reference = make(5, 24, 5001)
    last = [t.view(8, 3, 5001)[:, -1] for t in (*circuits, reference)]
    assert_right(last[:-1], last[-1])
    cut = [t[:, :4001] for t in (*circuits, reference)]
    assert_right(cut[:-1], cut[-1])


@pytest.mark.parametrize("n_circuits", [1, 4])
@pytest.mark.parametrize("place", [0, 300, 1099])
@pytest.mark.parametrize("case", TRITON_TABLE)
def test_edge_cases(case, place, n_circuits):
    p_v, q_v, expected = TRITON_TABLE[case]
    circuits, reference = make(n_circuits, 3, 1100)
    reference[1, place] = p_v
    for circuit in circuits:
        circuit[1, place] = q_v
    wanted = torch.stack([oracle(c, as_triton_reads(reference)) for c in circuits]).cpu()
    if expected is not None:
        wanted[:, 1] = expected
    assert_matches(measure(circuits, reference), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_batch(dtype):
    """A row has the same bits alone, in a batch, and in a repeated call."""
    circuits, reference = make(4, 64, 50257, dtype)
    together = measure(circuits, reference)
    assert torch.equal(together, measure(circuits, reference))
    for row in (0, 1, 33, 63):
        # These are views: the tensors start elsewhere, but each row keeps its alignment.
        rows = slice(row, row + 1)
        alone = measure([c[rows] for c in circuits], reference[rows])
        assert torch.equal(alone, together[:, rows])


def test_graph():
    """A call is captured once, and replayed on other logits at the same addresses."""
    circuits, reference = make(5, 16, 50257)
    later = [torch.randn_like(t) for t in (*circuits, reference)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        measure(circuits, reference)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = measure(circuits, reference)
    for tensor, new in zip((*circuits, reference), later, strict=True):
        tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, measure(circuits, reference))
    assert_matches(captured, torch.stack([oracle(c, reference) for c in circuits]).cpu())


def test_no_synchronization():
    """The host never waits for the card: neither for the table of addresses nor for a result."""
    circuits, reference = make(11, 16, 50257, torch.bfloat16)
    strided = [t.view(8, 2, 50257)[:, -1] for t in (*circuits, reference)]
    measure(circuits, reference)
    measure(strided[:-1], strided[-1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Check that the mode is enforced: otherwise this test would detect nothing.
        with pytest.raises(RuntimeError, match="synchroniz"):
            reference[0, 0].item()
        measure(circuits, reference)
        measure(strided[:-1], strided[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_circuits", [1, 40])
def test_peak_memory(n_circuits):
    """A call allocates the states of a few slices per row, and the result. It copies nothing."""
    circuits, reference = make(n_circuits, 64, 50257)
    measure(circuits, reference)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measure(circuits, reference)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    logits = sum(t.numel() * t.itemsize for t in (*circuits, reference))
    assert 0 < peak < 0.002 * logits


def differentiate(circuits, reference, grad, reference_wanted=True):
    """Return the gradients of a training step: forward, keeping row states, then backward."""
    leaves = [c.detach().requires_grad_() for c in circuits]
    teacher = reference.detach().requires_grad_(reference_wanted)
    fastkl.kl_div_many(leaves, teacher, reduction="none", backend="triton").backward(grad)
    return [leaf.grad for leaf in leaves], teacher.grad


@pytest.mark.parametrize("n_cols", [2, 33, 1000, 50257, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_parity(dtype, n_cols):
    """Compare float32 with float64, and half precision with PyTorch's gradients by float32."""
    circuits, reference = make(4, 9, n_cols, dtype)
    circuits = circuits[1:]
    grad = torch.rand(3, 9, device=DEVICE) + 0.5
    grad[1, 2] = 0
    dqs, dp = differentiate(circuits, reference, grad)
    if dtype == torch.float32:
        exact = [oracle_gradients(c, reference, g) for c, g in zip(circuits, grad, strict=True)]
        # One of two tokens may have nearly all mass; the rest of it is only as exact as 1 is.
        room = 5e-7 if n_cols == 2 else 1e-12
        for dq, (wanted, _) in zip(dqs, exact, strict=True):
            off = (dq.double() - wanted).norm(dim=-1)
            assert (off <= BOUND * wanted.norm(dim=-1) + room).all()
        total = sum(wanted for _, wanted in exact)
        assert ((dp.double() - total).norm(dim=-1) <= BOUND * total.norm(dim=-1) + 1e-7).all()
        return
    found = gradient.gradients(grad, circuits, reference, [True] * 3, True)
    for ours, wanted in zip((*dqs, dp), (*found[0], found[1]), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, wanted, rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_alignments(dtype, offset):
    """Logits start anywhere, aligned otherwise than their gradients: no fault, and right."""
    circuits, reference = make(3, 5, 3001, dtype)
    expected = gradient.gradients(
        torch.ones(3, 5, device=DEVICE), circuits, reference, [True] * 3, True
    )
    placed = []
    for k, rows in enumerate((reference, *circuits)):
        storage = torch.zeros(rows.numel() + 32, dtype=dtype, device=DEVICE)
        placed.append(storage[offset + k :][: rows.numel()].view(rows.shape).copy_(rows))
    dqs, dp = differentiate(placed[1:], placed[0], torch.ones(3, 5, device=DEVICE))
    for ours, wanted in zip((*dqs, dp), (*expected[0], expected[1]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradient_edge_cases():
    """Masked and undefined rows, and rows with a grad of 0, match PyTorch's gradients."""
    values = (-torch.inf, torch.inf, torch.nan, 0.5)
    cases = list(itertools.product(values, values))
    _, reference = make(1, 2 * len(cases), 1101)
    circuit = reference + 0.1 * torch.randn_like(reference)
    for row, (p_v, q_v) in enumerate(cases):
        for i, place in enumerate((300, 1100)):
            reference[2 * row + i, place], circuit[2 * row + i, place] = p_v, q_v
    for grad in (1.0, 0.0):
        grads = torch.full((1, len(reference)), grad, device=DEVICE)
        (dq,), dp = differentiate([circuit], reference, grads)
        (wanted,), wanted_p = gradient.gradients(grads, [circuit], reference, [True], True)
        for ours, eager in ((dq, wanted), (dp, wanted_p)):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-8, equal_nan=True)


def test_gradients_in_a_graph_without_synchronization():
    """A step is captured, replayed on other logits, and never waits for the card."""
    circuits, reference = make(5, 16, 50257, torch.bfloat16)
    grad = torch.rand(5, 16, device=DEVICE)
    arguments = (grad, circuits, reference, [True] * 5, True)

    def step():
        _, kept = triton.kl_rows_kept(circuits, reference)
        return triton.gradients(*arguments, kept=kept)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_p = step()
    for tensor in (*circuits, reference):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dqs, dp = step()
        differentiate(circuits, reference, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, again in zip((*captured, captured_p), (*dqs, dp), strict=True):
        assert torch.equal(ours, again)
    assert error(dqs[0], oracle_gradients(circuits[0], reference, grad[0])[0]) <= 2**-8


@pytest.mark.parametrize("n_circuits", [1, 10])
def test_gradient_peak_memory(n_circuits):
    """Beyond the gradients, a step allocates a few numbers per row and slice."""
    circuits, reference = make(n_circuits, 64, 50257)
    grad = torch.rand(n_circuits, 64, device=DEVICE)
    differentiate(circuits, reference, grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = differentiate(circuits, reference, grad)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    written = sum(t.nbytes for t in (*gradients[0], gradients[1]))
    assert written <= peak < 1.01 * written + 2**20


def needs(n_bytes):
    if torch.cuda.mem_get_info()[0] < n_bytes:
        pytest.skip(f"needs {n_bytes / 1e9:.0f} GB of free memory on the card")


def test_more_than_2_31_elements():
    """Rows at the end of tensors of more than 2^31 elements are read at the right address."""
    n_rows, n_cols = 43008, 50257
    needs(5 * n_rows * n_cols)
    assert n_rows * n_cols > 2**31
    (circuit,), reference = make(1, 64, n_cols, torch.bfloat16)
    circuit = circuit + torch.randn_like(circuit)
    expected = measure([circuit], reference)
    repeats = n_rows // 64
    divergence = measure([circuit.repeat(repeats, 1)], reference.repeat(repeats, 1))
    assert torch.equal(divergence, expected.repeat(1, repeats))


def test_row_stride_of_2_31_elements():
    n_cols = 50257
    needs(2 * 2 * (2**31 + n_cols))
    (circuit,), reference = make(1, 2, n_cols, torch.bfloat16)
    circuit = circuit + torch.randn_like(circuit)
    far = []
    for rows in (circuit, reference):
        storage = torch.zeros(2**31 + n_cols, dtype=rows.dtype, device=DEVICE)
        far.append(storage.as_strided((2, n_cols), (2**31, 1)).copy_(rows))
    assert_right([far[0]], far[1])


def cpu(t):
    """Return the same logits on the CPU, in float64."""
    return t.detach().double().cpu()


WHAT = {
    "mean": fastkl.kl_div_many,
    "weights": lambda c, r, **k: fastkl.kl_div_many(c, r, weights=r[:, 0].abs(), **k),
    "mask": lambda c, r, **k: fastkl.kl_div_many(c, r, mask=r[:, 0] > 0, reduction="sum", **k),
    "reverse": lambda c, r, **k: fastkl.kl_div_many(c, r, direction="reverse", **k),
    "divided": lambda c, r, **k: fastkl.kl_div_many(c, r, temperature=1.7, **k),
    "heated": lambda c, r, **k: fastkl.kl_div_many(c, r, temperature=0.3, **k),
    "vocab_size": lambda c, r, **k: fastkl.kl_div_many(c, r, vocab_size=1000, **k),
    "statistics": lambda c, r, **k: torch.stack(
        [field.double() for field in fastkl.kl_div_many(c, r, return_stats=True, **k)[1]]
    ),
}


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("what", WHAT)
def test_options(what, backend):
    """Results match the CPU's in float64."""
    circuits, reference = make(5, 24, 5003)
    found = WHAT[what](circuits, reference, backend=backend)
    assert found.device == reference.device
    expected = WHAT[what]([cpu(c) for c in circuits], cpu(reference), backend="eager")
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_eager(dtype):
    """PyTorch's own operations are right, also over several blocks, and never wait for the card."""
    circuits, reference = make(4, 300, 50257, dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = fastkl.kl_div_many(circuits, reference, reduction="none", backend="eager")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_matches(found, torch.stack([oracle(c, reference) for c in circuits]).cpu())


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jensen_shannon(beta):
    (_, circuit, *_), reference = make(3, 16, 5003)
    leaves = [t.clone().requires_grad_() for t in (circuit, reference)]
    wide = [cpu(t).requires_grad_() for t in leaves]
    found, expected = (fastkl.js_div(*t, beta=beta, reduction="sum") for t in (leaves, wide))
    assert abs(found.item() - expected.item()) <= 1e-5 * expected.item()
    found.backward()
    expected.backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        assert (leaf.grad.cpu() - exact.grad).norm() <= 1e-5 * exact.grad.norm()


@pytest.mark.parametrize("picked", [(slice(None), -1), (slice(None), slice(1, None))])
def test_measure_kl_div(picked):
    """The drop-in replacement takes views with gaps: last positions, and all but the first."""
    circuits, reference = make(6, 24, 5003)
    prompts = reference.view(4, 6, 5003)
    outs = {k: {0: c.view(4, 6, 5003)[picked]} for k, c in enumerate(circuits)}
    model = type("Model", (), {"out_slice": picked, "__call__": lambda _, prompts: prompts})()
    loader = [SimpleNamespace(key=0, clean=prompts, corrupt=None)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = fastkl.measure_kl_div(model, loader, outs, progress=False)
    assert torch.cuda.max_memory_allocated() - before < reference.nbytes
    for (k, kl), circuit in zip(found, circuits, strict=True):
        expected = oracle(circuit.view(4, 6, 5003)[picked], prompts[picked]).mean().item()
        assert k in outs
        assert abs(kl - expected) <= 1e-5 * expected + 1e-8


def test_another_stream():
    """Kernels run on the current stream, so they read logits after that stream has written them."""
    circuits, reference = make(5, 64, 50257)
    expected = measure(circuits, reference)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(c) for c in circuits]
        torch.cuda._sleep(10**8)
        for to, circuit in zip(late, circuits, strict=True):
            to.copy_(circuit)
        found = measure(late, reference)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_another_card():
    """Results are on the logits' card, even if it is not the current one."""
    circuits, reference = make(5, 16, 50257)
    moved = [t.to("cuda:1") for t in (*circuits, reference)]
    found = measure(moved[:-1], moved[-1])
    assert found.device == moved[-1].device
    assert torch.equal(found.to(reference.device), measure(circuits, reference))
    with pytest.raises(ValueError, match="same device, got cuda:0 and cuda:1"):
        measure(circuits, moved[-1])


def test_compiled_by_inductor():
    """PyTorch's compiler for cards compiles forward and backward."""
    (circuit,), reference = make(1, 16, 5003)
    circuit = circuit + torch.randn_like(circuit)

    def loss(circuit, reference):
        return fastkl.kl_div(circuit * 2, reference)

    leaves = [circuit.clone().requires_grad_() for _ in range(2)]
    for f, leaf in zip((torch.compile(loss, fullgraph=True), loss), leaves, strict=True):
        f(leaf, reference).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
