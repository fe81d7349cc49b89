"""kl_div as a PyTorch operator: its gradients, and how it compiles, exports and batches."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ON_GPU, oracle, oracle_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils._pytree import tree_map

import fastkl
from bench import memory
from fastkl import backends, custom_ops
from fastkl.backends import triton
from fastkl.views import with_gaps

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TORCH_2_13 = torch.__version__.startswith("2.13.")


@pytest.fixture
def pair(generator):
    reference = torch.randn(4, 6, 50, generator=generator) * 3
    return reference + torch.randn(4, 6, 50, generator=generator) * 0.3, reference


def definition(circuit, reference):
    """Return the mean divergence by PyTorch's own functions."""
    log_p, log_q = reference.log_softmax(-1), circuit.log_softmax(-1)
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(pair, dtype, wanted):
    circuit, reference = (
        t.to(dtype)[0].requires_grad_(want) for t, want in zip(pair, wanted, strict=True)
    )
    other = (circuit.detach() * 2).requires_grad_(wanted[0])
    torch.library.opcheck(custom_ops.kl_div, ([circuit, other], reference, 2.0, None, True))
    grad, kept = torch.ones(1, 6), torch.empty(1, 6, 0)
    torch.library.opcheck(
        custom_ops.kl_div_backward,
        (grad, [circuit.detach()], reference.detach(), kept, [True], True, 2.0, None),
    )


@pytest.fixture
def few(pair):
    """Return fewer rows, (2, 2, 50), because Triton's interpreter is slow."""
    return [t[:2, :2].contiguous() for t in pair]


@pytest.fixture
def triton_kernels():
    """Return the package of Triton's kernels, which run in the interpreter on CPU tensors."""
    if ON_GPU or (reason := triton.missing()):
        pytest.skip("there is a card: see test_gpu.py" if ON_GPU else reason)
    from fastkl import _triton  # noqa: PLC0415

    return _triton


@pytest.mark.parametrize("wanted", [(True, False), (True, True)])
def test_opcheck_of_what_is_kept(few, triton_kernels, wanted):
    circuit, reference = (
        t[0].clone().requires_grad_(want) for t, want in zip(few, wanted, strict=True)
    )
    torch.library.opcheck(custom_ops.kl_div, ([circuit], reference, 2.0, "triton", True))
    _, kept = custom_ops.kl_div([circuit.detach()], reference.detach(), 2.0, "triton", True)
    assert kept.shape == (1, 2, triton_kernels.N_KEPT)
    rows = [circuit.detach()], reference.detach(), kept
    torch.library.opcheck(
        custom_ops.kl_div_backward, (torch.ones(1, 2), *rows, [True], True, 2.0, "triton")
    )


@pytest.mark.parametrize(
    ("then", "now"), [("native", "eager"), ("eager", "native"), ("native", "triton")]
)
def test_another_backend_differentiates(pair, monkeypatch, then, now):
    """A backend does not use what another kept, if FASTKL_BACKEND changes before the backward."""
    for name in (then, now):
        if reason := fastkl.unavailable_backends().get(name):
            pytest.skip(reason)
    if ON_GPU and now == "triton":
        pytest.skip("no tensors are measured by both")
    exact = oracle_gradients(*(t.flatten(0, 1) for t in pair), torch.full((24,), 1 / 24))
    leaves = [t.clone().requires_grad_() for t in pair]
    monkeypatch.setenv("FASTKL_BACKEND", then)
    divergence = fastkl.kl_div(*leaves)
    monkeypatch.setenv("FASTKL_BACKEND", now)
    divergence.backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-8)


def test_what_is_kept_has_no_nan(generator):
    """Tools that look for NaN also look at what is kept."""
    rows = torch.randn(2, 2000, 7, generator=generator)
    _, kept = custom_ops.kl_div([rows[0]], rows[1], 1.0, None, True)
    assert kept.isfinite().all()


def test_a_step_measures_once(few, triton_kernels, monkeypatch):
    """The backward pass uses what the forward pass kept; without a gradient nothing is kept."""
    kept = []
    launch = triton_kernels.launch

    def counting(*args, keep=None):
        kept.append(keep)
        return launch(*args, keep=keep)

    monkeypatch.setattr(triton_kernels, "launch", counting)
    circuits = [t.clone().requires_grad_() for t in (few[0], 2 * few[0])]
    grad = torch.rand(2, 2, 2)
    divergence = fastkl.kl_div_many(circuits, few[1], reduction="none", backend="triton")
    divergence.backward(grad)
    assert kept == [True]
    for circuit, g in zip(circuits, grad, strict=True):
        exact, _ = oracle_gradients(*(t.flatten(0, 1) for t in (circuit, few[1])), g.reshape(-1))
        off = (circuit.grad.flatten(0, 1).double() - exact).norm(dim=-1)
        assert (off <= 1e-5 * exact.norm(dim=-1)).all()
    with torch.no_grad():
        fastkl.kl_div_many(circuits, few[1], backend="triton")
    fastkl.kl_div(*few, backend="triton")
    assert kept[1:] == [None, None]


def test_what_is_kept_is_batched(few, triton_kernels):
    """The rule for vmap batches it, and it is computed again where a caller kept nothing."""
    del triton_kernels
    inputs = [t.clone().requires_grad_() for t in few]
    torch.vmap(lambda c, r: fastkl.kl_div(c, r, backend="triton"))(*inputs).sum().backward()
    rows = [t.flatten(0, 1) for t in few]
    grad = torch.full((4,), 1 / 2, dtype=torch.float64)
    for leaf, exact in zip(inputs, oracle_gradients(*rows, grad), strict=True):
        torch.testing.assert_close(leaf.grad.flatten(0, 1).double(), exact, rtol=1e-5, atol=1e-7)
    leaf = rows[0].clone().requires_grad_()
    divergence, kept = custom_ops.kl_div([leaf], rows[1], 1.0, "triton", False)
    assert kept.shape == (1, 4, 0)
    divergence.backward(grad[None].float())
    torch.testing.assert_close(leaf.grad, inputs[0].grad.flatten(0, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_what_is_kept_of_one_row(few, backend):
    """A vmap batch of output gradients repeats what is kept of a single row, as a view."""
    if reason := fastkl.unavailable_backends().get(backend):
        pytest.skip(reason)
    leaf, reference = few[0][0, :1].clone().requires_grad_(), few[1][0, :1]
    divergence, _ = custom_ops.kl_div([leaf], reference, 1.0, backend, True)
    grads = torch.tensor([1.0, 2.0, -0.5])[:, None, None]
    found = torch.vmap(lambda g: torch.autograd.grad(divergence, leaf, g, retain_graph=True)[0])(
        grads
    )
    exact, _ = oracle_gradients(leaf.detach(), reference, torch.ones(1))
    torch.testing.assert_close(found.double(), grads * exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_what_is_kept_of_rows_between_gaps(few, backend):
    """The operator measures the gaps' rows too: what is kept of the others is a view."""
    if reason := fastkl.unavailable_backends().get(backend):
        pytest.skip(reason)
    circuit, reference = (t[:, :1] for t in few)
    leaf = few[0].clone().requires_grad_()
    divergence, _ = custom_ops.kl_div([leaf[:, :1]], reference, 1.0, backend, True)
    divergence.sum().backward()
    exact, _ = oracle_gradients(circuit[:, 0], reference[:, 0], torch.ones(2))
    torch.testing.assert_close(leaf.grad[:, 0].double(), exact, rtol=1e-5, atol=1e-8)
    assert (leaf.grad[:, 1] == 0).all()


def test_what_is_kept_compiles(few, triton_kernels):
    del triton_kernels
    circuit = few[0].clone().requires_grad_()

    def loss(circuit, reference):
        return fastkl.kl_div(circuit * 2, reference, backend="triton").exp()

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(circuit, few[1]).backward()
    found, circuit.grad = circuit.grad, None
    loss(circuit, few[1]).backward()
    assert torch.equal(found, circuit.grad)


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.1, 1.0, 5.0])
def test_gradients_against_float64(generator, noise):
    reference = torch.randn(3, 5003, generator=generator) * 3
    circuit = reference + noise * torch.randn(3, 5003, generator=generator)
    grad = torch.rand(3, generator=generator)
    inputs = circuit.clone().requires_grad_(), reference.clone().requires_grad_()
    fastkl.kl_div(*inputs, reduction="none").backward(grad)
    for leaf, exact in zip(inputs, oracle_gradients(circuit, reference, grad), strict=True):
        assert ((leaf.grad.double() - exact).norm(dim=-1) <= 1e-5 * exact.norm(dim=-1)).all()


def test_gradcheck(generator):
    reference = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    circuits = [torch.randn(3, 7, dtype=torch.float64, generator=generator) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (*circuits, reference)]

    def many(first, second, reference):
        return fastkl.kl_div_many([first, second], reference, reduction="none")

    assert torch.autograd.gradcheck(many, leaves)
    assert torch.autograd.gradcheck(fastkl.kl_div, leaves[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(pair, reduction):
    """The reductions' gradients reach the operator expanded, with stride 0."""
    circuit, reference = pair[0].clone().requires_grad_(), pair[1]
    fastkl.kl_div(circuit, reference, reduction=reduction).backward()
    rows = 24 if reduction == "mean" else 1
    grad = torch.full((24,), 1 / rows, dtype=torch.float64)
    exact, _ = oracle_gradients(circuit.flatten(0, 1), reference.flatten(0, 1), grad)
    torch.testing.assert_close(circuit.grad.flatten(0, 1).double(), exact, rtol=1e-5, atol=1e-8)


def test_odd_strides(pair):
    """A transposed circuit, and a gradient that is not contiguous."""
    circuit, reference = pair
    leaf = circuit.transpose(0, 1).contiguous().requires_grad_()
    grad = torch.rand(6, 4).t()
    fastkl.kl_div(leaf.transpose(0, 1), reference, reduction="none").backward(grad)
    exact, _ = oracle_gradients(circuit.flatten(0, 1), reference.flatten(0, 1), grad.reshape(-1))
    found = leaf.grad.transpose(0, 1).flatten(0, 1).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)


def test_a_teacher_under_inference_mode(pair):
    circuit = pair[0].clone().requires_grad_()
    with torch.inference_mode():
        teacher = pair[1].clone()
    fastkl.kl_div(circuit, teacher).backward()
    expected = pair[0].clone().requires_grad_()
    fastkl.kl_div(expected, pair[1]).backward()
    assert torch.equal(circuit.grad, expected.grad)


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
def test_a_teachers_buffer_that_is_used_again(pair, function):
    """Inference mode counts no versions: the gradient is that of the buffer before it changed."""
    expected, circuit = (pair[0].clone().requires_grad_() for _ in range(2))
    function(expected, pair[1]).backward()
    with torch.inference_mode():
        buffer = pair[1].clone()
    divergence = function(circuit, buffer)
    with torch.inference_mode():
        buffer.copy_(pair[0].flip(-1))
    divergence.backward()
    assert torch.equal(circuit.grad, expected.grad)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("temperature", [1, 2.0])
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_gradients_of_no_rows(backend, temperature, leading):
    if reason := fastkl.unavailable_backends().get(backend):
        pytest.skip(reason)
    options = {"temperature": temperature, "backend": backend}
    for reduction in ("none", "sum", "mean"):
        leaves = [torch.zeros(*leading, 10, requires_grad=True) for _ in range(2)]
        fastkl.kl_div(*leaves, reduction=reduction, **options).sum().backward()
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    reference = torch.randn(3, 10, requires_grad=True)
    fastkl.kl_div_many([], reference, reduction="sum", **options).sum().backward()
    assert reference.grad is None or (reference.grad == 0).all()


def test_inputs_are_left_alone(pair):
    inputs = [t.clone().requires_grad_() for t in pair]
    fastkl.kl_div(*inputs).backward()
    for leaf, before in zip(inputs, pair, strict=True):
        assert torch.equal(leaf.detach(), before)


def test_a_second_derivative_is_refused(pair):
    circuit, reference = pair[0].clone().requires_grad_(), pair[1]
    (first,) = torch.autograd.grad(fastkl.kl_div(circuit, reference), circuit, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        first.sum().backward()


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
def test_batches_of_gradients_are_refused(pair, function):
    """`torch.autograd` refuses them; `torch.vmap`, to which the error points, takes them."""
    circuit = pair[0].clone().requires_grad_()
    rows = function(circuit, pair[1], reduction="none").flatten()
    ones = torch.eye(len(rows))
    with pytest.raises(RuntimeError, match=r"use torch\.vmap of torch\.autograd\.grad"):
        torch.autograd.grad(rows, circuit, ones, is_grads_batched=True, retain_graph=True)
    found = torch.vmap(lambda v: torch.autograd.grad(rows, circuit, v, retain_graph=True)[0])(ones)
    (expected,) = torch.autograd.grad(rows.sum(), circuit)
    assert torch.equal(found.sum(0), expected)


FIRST_CALL = """
import sys, torch, fastkl
leaf = torch.randn(3, 5, requires_grad=True)
for function in (fastkl.kl_div, fastkl.js_div):
    function(leaf, torch.randn(3, 5)).backward()
fastkl.kl_div(leaf, leaf, return_stats=True)
print("torch._dynamo" in sys.modules)
"""


def test_a_first_call_does_not_import_a_compiler():
    """Importing a compiler takes a second or two, in every process."""
    command = [sys.executable, "-c", FIRST_CALL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _dual(f, t):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)))


DIVERGENCES = {
    "kl_div": fastkl.kl_div,
    "kl_div_many": lambda c, r: fastkl.kl_div_many([c, r], r).sum(),
    "js_div": fastkl.js_div,
    "KLDivLoss": fastkl.KLDivLoss(direction="reverse"),
    "JSDivLoss": fastkl.JSDivLoss(),
}
FORWARD_MODE = {
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,)),
    "jacfwd": lambda f, t: torch.func.jacfwd(f)(t),
    "forward_ad": _dual,
    "jvp of vmap": lambda f, t: torch.func.jvp(
        torch.vmap(f), (t.expand(2, *t.shape),), (t.expand(2, *t.shape),)
    ),
}
REVERSE_MODE = {
    "grad": lambda f, t: torch.func.grad(f)(t),
    "vjp": torch.func.vjp,
    "jacrev": lambda f, t: torch.func.jacrev(f)(t),
    "hessian": lambda f, t: torch.func.hessian(f)(t),
    "grad of vmap": lambda f, t: torch.func.grad(lambda t: torch.vmap(f)(t).sum())(t[None]),
}


@pytest.mark.parametrize("side", [0, 1], ids=["circuit", "reference"])
@pytest.mark.parametrize("transform", [*FORWARD_MODE, *REVERSE_MODE])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_other_derivatives_are_refused(pair, name, transform, side, monkeypatch):
    """They are refused before any work: without a rule, forward mode would silently give 0."""
    monkeypatch.setattr(backends, "choose_for", lambda *_: pytest.fail("something was measured"))

    def divergence(t):
        inputs = [*pair]
        inputs[side] = t
        return DIVERGENCES[name](*inputs)

    mode = "forward mode" if transform in FORWARD_MODE else "torch.func"
    with pytest.raises(RuntimeError, match=rf"fastkl's gradients are for .* not for {mode} \("):
        (FORWARD_MODE | REVERSE_MODE)[transform](divergence, pair[side])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_forward_mode_is_refused_where_it_is_compiled(pair, name):
    """The divergence is compiled within forward mode, and before it."""
    # Other versions of PyTorch refuse it themselves, or only say that there was an error.
    refused = "not for forward mode" + "|Observed exception|dual tensor" * (not TORCH_2_13)

    def divergence(t):
        return DIVERGENCES[name](t, pair[1])

    torch._dynamo.reset()
    jvp = torch.compile(lambda t: torch.func.jvp(divergence, (t,), (t,)), backend="eager")
    with pytest.raises(RuntimeError, match=refused):
        jvp(pair[0])
    torch._dynamo.reset()
    compiled = torch.compile(divergence, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pair[0]), divergence(pair[0]))
    with pytest.raises(RuntimeError, match=refused):
        _dual(compiled, pair[0])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_constants_within_other_derivatives(pair, name):
    """torch.func works where the divergence is a constant, with no derivative to take."""
    x, expected = pair[0][0, 0, 0], DIVERGENCES[name](*pair)
    for scaled in (
        lambda x: x * DIVERGENCES[name](*pair),
        lambda x: x * DIVERGENCES[name](pair[0] + 0 * x.detach(), pair[1]),
    ):
        assert torch.equal(torch.func.grad(scaled)(x), expected)
        assert torch.equal(torch.func.jvp(scaled, (x,), (torch.ones(()),))[1], expected)


def misplaced(rows):
    """Return rows whose vocabulary is not contiguous."""
    return rows.t().contiguous().t()


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_operators_take_any_strides(pair, backend):
    """A compiler may pass the rows with other strides than they had."""
    if reason := fastkl.unavailable_backends().get(backend):
        pytest.skip(reason)
    rows = [t[0] for t in pair]
    odd = [misplaced(t) for t in rows]
    expected, kept = custom_ops.kl_div(rows[:1], rows[1], 1.0, backend, True)
    found = custom_ops.kl_div(odd[:1], odd[1], 1.0, backend, True)[0]
    assert torch.equal(found, expected)
    grad = torch.rand(1, 6)
    gradients = [
        custom_ops.kl_div_backward(grad, [q], p, kept, [True], True, 1.0, backend)
        for q, p in (rows, odd)
    ]
    assert all(map(torch.equal, *gradients))
    assert torch.equal(*(custom_ops.js_div(q, p, 0.5, 1.0, backend) for q, p in (rows, odd)))
    gradients = [
        custom_ops.js_div_backward(grad[0], q, p, 0.5, 1.0, True, True, backend)
        for q, p in (rows, odd)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("circuit", "reference", "message"),
    [
        ((2, 9), (3, 9), "same shape, got (2, 9) and (3, 9)"),
        ((3, 8), (3, 9), "got 8 tokens in shape (3, 8) and 9 in (3, 9)"),
        ((9,), (9,), "must be rows (R, V), or (B, S, V), of at least one token; got (9,)"),
        ((3, 0), (3, 0), "of at least one token; got (3, 0)"),
    ],
)
def test_the_operators_take_rows_of_one_another_alone(circuit, reference, message):
    """The operators refuse rows that do not match, so that nothing is read out of bounds."""
    circuit, reference = torch.zeros(circuit), torch.zeros(reference)
    grad, kept = torch.ones(1, 3), torch.empty(0, 1, 3)
    for call in (
        lambda: custom_ops.kl_div([circuit], reference, 1.0, None, False),
        lambda: custom_ops.kl_div_backward(
            grad, [circuit], reference, kept, [True], True, 1.0, None
        ),
        lambda: custom_ops.js_div(circuit, reference, 0.5, 1.0, None),
        lambda: custom_ops.js_div_backward(grad[0], circuit, reference, 0.5, 1.0, True, True, None),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_the_operators_refuse_other_rows_numbers(pair):
    circuit, reference = (t[0] for t in pair)
    grad, kept = torch.ones(1, 6), torch.empty(10, 1, 5)
    with pytest.raises(ValueError, match=r"divergences' shape \(1, 6\), got \(1, 5\)"):
        custom_ops.kl_div_backward(
            grad[:, :5], [circuit], reference, kept[:0], [True], True, 1.0, None
        )
    with pytest.raises(ValueError, match=r"the divergences \(1, 6\) were .* got \(10, 1, 5\)"):
        custom_ops.kl_div_backward(grad, [circuit], reference, kept, [True], True, 1.0, None)
    with pytest.raises(ValueError, match=r"divergences' shape \(1, 6\), got \(1, 5\)"):
        custom_ops.js_div_backward(grad[0, :5], circuit, reference, 0.5, 1.0, True, True, None)


def rest_of_prompts(t):
    return t[:, 1:]


@pytest.mark.parametrize("view", [rest_of_prompts, lambda t: t[:, :-1], lambda t: t[:, 1:4, 2:]])
@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
def test_views_with_gaps(pair, function, view):
    """Views such as all positions but the first give what copies do; autograd saves the views."""
    saved = []
    leaves = [t.clone().requires_grad_() for t in pair]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*map(view, leaves), reduction="none").sum().backward()
    copies = [view(t).contiguous().requires_grad_() for t in pair]
    function(*copies, reduction="none").sum().backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        assert torch.equal(view(leaf.grad), copy.grad)
        assert leaf.data_ptr() in {t.untyped_storage().data_ptr() for t in saved}
    with torch.no_grad():
        found, expected = (function(*t, reduction="none") for t in (map(view, pair), copies))
    assert torch.equal(found, expected)
    stacked = [torch.stack([t, t.flip(1)]) for t in pair]
    found = function(*(t[:, :, 1:] for t in stacked), reduction="none")
    expected = function(*(t[:, :, 1:].contiguous() for t in stacked), reduction="none")
    assert torch.equal(found, expected)


def test_views_with_gaps_that_are_padded_differently(pair):
    """Shifted logits of vocabularies that are padded to different sizes are not copied."""
    (n_prompts, n_positions, n_cols), wide = pair[0].shape, []
    for t, padding in zip(pair, (3, 8), strict=True):
        padded = torch.full((n_prompts, n_positions, n_cols + padding), torch.nan)
        padded[..., :n_cols] = t
        wide.append(padded[:, :-1])
    found = fastkl.kl_div(*wide, vocab_size=n_cols, reduction="none")
    expected = fastkl.kl_div(*(t[:, :-1].contiguous() for t in pair), reduction="none")
    assert torch.equal(found, expected)
    taken, window = with_gaps([t[..., :n_cols] for t in wide])
    assert window == (n_positions - 1, n_positions)
    assert [t.data_ptr() for t in taken] == [t.data_ptr() for t in wide]
    # Gaps of different lengths cannot be measured together.
    assert with_gaps([pair[0][:, :-1], pair[1][:, :-1].contiguous()])[1] is None


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., ::2],
        # The prompts are not a whole number of rows apart.
        lambda t: t.flatten(1)[:, :290].unfold(1, 50, 55),
        lambda t: t[:, :1].expand(-1, 5, -1),
        lambda t: t[:1, :-1].expand(4, -1, -1),
    ],
    ids=["every other token", "between rows", "one row", "one prompt"],
)
def test_views_that_have_no_gaps(pair, view):
    """These views are copied, because their gaps are not whole rows like their own."""
    views = [view(t) for t in pair]
    assert with_gaps(views)[1] is None
    found = fastkl.kl_div(*views, reduction="none")
    assert torch.equal(found, fastkl.kl_div(*(t.contiguous() for t in views), reduction="none"))


def test_rows_in_the_gaps_do_not_count(pair):
    circuit, reference = (t.clone() for t in pair)
    circuit[:, 0] = torch.nan
    reference[:, 0] = torch.inf
    found = fastkl.kl_div_many([circuit[:, 1:], reference[:, 1:]], reference[:, 1:])
    expected = oracle(pair[0][:, 1:], pair[1][:, 1:]).mean()
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0)
    assert found[1] == 0


def crossed(circuit, reference):
    """Return a sum that takes both directions, and statistics."""
    options = {"reduction": "none", "direction": "reverse", "return_stats": True}
    divergence, found = fastkl.kl_div(circuit, reference, **options)
    return divergence + found.cross_entropy


def test_statistics_of_what_is_traced_or_has_no_memory(pair):
    expected = crossed(*pair)
    assert torch.equal(torch.func.functionalize(crossed)(*pair), expected)
    torch._dynamo.reset()
    compiled = torch.compile(crossed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*pair), expected)
    traced = make_fx(crossed)(*pair)
    assert torch.equal(traced(*reversed(pair)), crossed(*reversed(pair)))
    assert torch.equal(torch.vmap(crossed)(*pair), expected)
    alone = torch.vmap(crossed, (0, None))(pair[0], pair[1][0])
    assert torch.equal(alone, crossed(pair[0], pair[1][:1].expand(pair[0].shape)))
    with FakeTensorMode() as mode:
        assert crossed(*map(mode.from_tensor, pair)).shape == expected.shape

    class Crossed(torch.nn.Module):
        def forward(self, circuit, reference):
            return crossed(circuit, reference)

    assert torch.equal(torch.export.export(Crossed(), pair).module()(*pair), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_statistics(pair, dtype):
    circuit, reference = (t.to(dtype)[0] for t in pair)
    arguments = ([circuit, 2 * circuit], reference, 2.0, None)
    # PyTorch 2.6's opcheck takes no tolerances.
    known = inspect.signature(torch.library.opcheck).parameters
    exactly = {name: 0 for name in ("atol", "rtol") if name in known}
    torch.library.opcheck(torch.ops.fastkl.statistics, arguments, **exactly)
    lse, entropy, agreement = torch.ops.fastkl.statistics([], reference, 2.0, None)
    assert (lse.shape, entropy.shape, agreement.shape) == ((1, 6), (6,), (0, 6))
    with pytest.raises(ValueError, match=r"circuits\[0\].*\(6, 49\)"):
        torch.ops.fastkl.statistics([circuit[:, 1:]], reference, 2.0, None)


@pytest.mark.parametrize("dims", [(0, 0), (None, 0), (0, None), (1, 0), (2, 1)])
def test_statistics_of_a_batch(pair, dims):
    """A batch along any dimension, of both sides or one, has the statistics of each member."""

    def fields(circuit, reference):
        found = fastkl.kl_div_many([circuit, reference], reference, return_stats=True)[1]
        return torch.stack([field.double() for field in found])

    sides = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(pair, dims, strict=True)]
    members = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(sides, dims, strict=True)]
        for i in range(4)
    ]
    expected = torch.stack([fields(*member) for member in members])
    torch.testing.assert_close(torch.vmap(fields, dims)(*sides), expected, rtol=1e-6, atol=1e-6)
    assert 0 < expected[:, -1, 0].sum() < 24


def test_compiled_statistics_have_no_gradient(pair):
    """They compile in one graph for any number of rows; the divergence does have a gradient."""

    def both(circuit, reference):
        return fastkl.kl_div(circuit, reference, reduction="none", return_stats=True)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 3):
        leaf, reference = pair[0][:n].clone().requires_grad_(), pair[1][:n]
        divergence, found = compiled(leaf, reference)
        assert divergence.requires_grad
        assert not any(field.requires_grad for field in found)
        for field, expected in zip(found, both(leaf, reference)[1], strict=True):
            assert torch.equal(field, expected)


class Wrapped(torch.Tensor):
    """A tensor whose logits lie elsewhere, as those of quantized tensors do."""

    @staticmethod
    def __new__(cls, logits):
        return torch.Tensor._make_wrapper_subclass(cls, logits.shape, dtype=logits.dtype)

    def __init__(self, logits):
        self.logits = logits

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.logits if isinstance(value, cls) else value

        return function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


@pytest.mark.parametrize("kind", ["wrapped", "negated"])
def test_tensors_that_are_not_what_lies_in_memory(pair, kind):
    def other(t):
        # PyTorch keeps the imaginary part of a conjugate as a view with its negative bit set.
        return Wrapped(t) if kind == "wrapped" else torch.complex(t, -t).conj().imag

    circuit, reference = (t[:, 0] for t in pair)
    model = type("Model", (), {"out_slice": ..., "__call__": lambda _, prompts: prompts})()
    loader = [SimpleNamespace(key=0, clean=reference, corrupt=None)]
    expected = fastkl.measure_kl_div(model, loader, {1: {0: circuit}})
    assert fastkl.measure_kl_div(model, loader, {1: {0: other(circuit)}}) == expected
    for function in (fastkl.kl_div, fastkl.js_div, crossed):
        assert torch.equal(function(other(circuit), reference), function(circuit, reference))


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_gradients_in_batches(pair, function, backend):
    """`torch.vmap` takes a Jacobian's rows all at once."""
    if reason := fastkl.unavailable_backends().get(backend):
        pytest.skip(reason)
    leaves = [t[:2].clone().requires_grad_() for t in pair]
    for view in (lambda t: t, rest_of_prompts):
        divergence = function(*map(view, leaves), reduction="none", backend=backend)
        grads = torch.rand(3, *divergence.shape)

        def gradients(grad, divergence=divergence):
            return torch.autograd.grad(divergence, leaves, grad, retain_graph=True)

        at_once = torch.vmap(gradients)(grads)
        one_by_one = map(gradients, grads)
        for found, expected in zip(at_once, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor finds no g++")
def test_inductor(pair):
    """The compiler itself produces the logits, transposed and with gaps, forward and backward."""

    def loss(circuit, reference):
        transposed = (circuit * 2).transpose(0, 1)[1:].transpose(0, 1)
        return fastkl.kl_div((transposed.mT + 1).mT, reference[:, 1:])

    torch._dynamo.reset()
    leaves = [[t.clone().requires_grad_() for t in pair] for _ in range(2)]
    values = [f(*t) for f, t in zip((torch.compile(loss), loss), leaves, strict=True)]
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    for found, expected in zip(*leaves, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_compile(pair):
    """It compiles in one graph, forward and backward, and not again for other sizes."""
    compilations = 0

    def counting(graph, _):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def loss(circuit, reference):
        return fastkl.kl_div(circuit * 2, reference, reduction="none").exp().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    traced = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_rows in (4, 3, 2):
        circuit, reference = (t[:n_rows].clone().requires_grad_() for t in pair)
        assert torch.equal(compiled(circuit, reference), loss(circuit, reference))
        loss(circuit, reference).backward()
        expected, circuit.grad = circuit.grad, None
        traced(circuit, reference).backward()
        torch.testing.assert_close(circuit.grad, expected)
    assert compilations == 1


def test_export(pair):
    class Divergence(torch.nn.Module):
        def forward(self, circuit, reference):
            return fastkl.kl_div(circuit, reference)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Divergence(), pair, dynamic_shapes=({0: rows}, {0: rows}), strict=True
    )
    smaller = [t[:3] for t in pair]
    assert torch.equal(program.module()(*smaller), fastkl.kl_div(*smaller))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 1), (0, None), (None, 0)])
def test_vmap(pair, in_dims):
    inputs = [t if dim is not None else t[0] for t, dim in zip(pair, in_dims, strict=True)]
    if in_dims == (1, 1):
        inputs = [t.transpose(0, 1) for t in pair]
    found = torch.vmap(fastkl.kl_div, in_dims)(*inputs)
    whole = [
        t if dim is not None else t.expand(4, 6, 50) for t, dim in zip(inputs, in_dims, strict=True)
    ]
    whole = [t.transpose(0, 1) if in_dims == (1, 1) else t for t in whole]
    expected = oracle(*whole).mean(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("function", [fastkl.kl_div, fastkl.js_div])
@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 0, 9)])
def test_vmap_of_nothing(function, shape):
    empty = torch.empty(shape)
    reduced = torch.vmap(lambda c, r: function(c, r, reduction="none"))(empty, empty)
    assert reduced.shape == shape[:2]


def test_gradients_through_vmap(pair):
    inputs = [t.clone().requires_grad_() for t in pair]
    torch.vmap(fastkl.kl_div)(*inputs).sum().backward()
    grad = torch.full((24,), 1 / 6, dtype=torch.float64)
    exact = oracle_gradients(*(t.flatten(0, 1) for t in pair), grad)
    for leaf, expected in zip(inputs, exact, strict=True):
        torch.testing.assert_close(leaf.grad.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-7)


def test_autocast_and_determinism(pair):
    """Neither changes anything: all is computed in float32 and in a fixed order already."""
    expected = fastkl.kl_div(*pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastkl.kl_div(*pair), expected)
    torch.use_deterministic_algorithms(True)
    try:
        circuit = pair[0].clone().requires_grad_()
        fastkl.kl_div(circuit, pair[1]).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert circuit.grad.isfinite().all()


def test_meta_tensors_have_shapes(pair):
    circuit, reference = (t.to("meta") for t in pair)
    assert fastkl.kl_div(circuit, reference, reduction="none").shape == (4, 6)


def test_distillation(generator):
    """A student learns from a teacher, step by step as it does with PyTorch's own functions."""
    inputs = torch.randn(64, 8, generator=generator)
    teacher = inputs @ torch.randn(8, 300, generator=generator)
    curves = []
    for loss in (fastkl.kl_div, definition):
        student = torch.nn.Linear(8, 300, bias=False)
        torch.nn.init.zeros_(student.weight)
        optimizer = torch.optim.SGD(student.parameters(), lr=3.0)
        curve = []
        for _ in range(60):
            value = loss(student(inputs), teacher)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0] / 5
    torch.testing.assert_close(*curves, rtol=1e-5, atol=1e-5)


PEAK = """
import torch, fastkl
from bench.memory import peak
inputs = [torch.randn(40, 50257).requires_grad_() for _ in range(2)]
def step():
    for leaf in inputs:
        leaf.grad = None
    fastkl.kl_div(*inputs).backward()
step()
for leaf in inputs:
    leaf.grad = None
print(peak(step) - sum(leaf.nbytes for leaf in inputs))
"""


@pytest.mark.skipif(memory.missing() is not None, reason=f"memory: {memory.missing()}")
def test_peak_memory():
    """Forward and backward take the gradients and less than 8 MiB, for any number of rows."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 2**20
