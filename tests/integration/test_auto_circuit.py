"""The real auto_circuit: what patch() swaps, and what the swapped function measures."""

import contextlib
import itertools
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import fastkl
import fastkl.auto_circuit

pytestmark = pytest.mark.integration

KL_DIV = "auto_circuit.metrics.prune_metrics.kl_div"
PRUNE_METRICS = "auto_circuit.metrics.prune_metrics.prune_metrics"
SITES = (
    f"{KL_DIV}.measure_kl_div",
    f"{PRUNE_METRICS}.measure_kl_div",
    f"{PRUNE_METRICS}.CLEAN_KL_DIV_METRIC.metric_func",
    f"{PRUNE_METRICS}.CORRUPT_KL_DIV_METRIC.metric_func",
)
MULTIBATCH = "multibatch_kl_div"
SLICES = pytest.mark.parametrize("slice_output", ["last_seq", "not_first_seq", None])
CASES = list(
    itertools.product(
        ["last_seq", "not_first_seq", None],
        ["EDGE_PATCH", "TREE_PATCH"],
        ["RESAMPLE", "ZERO", "TOKENWISE_MEAN_CORRUPT"],
    )
)
INPUTS = pytest.mark.parametrize("compare_to_clean", [True, False], ids=["clean", "corrupt"])


def oracle(run, compare_to_clean):
    """Return (KL, bound) of each circuit: KL in float64 from the same logits, and float32's error.

    KL is the sum of P φ(log P - log Q), φ(d) = exp(-d) - 1 + d. Every term is positive, so that
    nothing cancels.

    The bound is on the error of two float32 log-softmaxes and a sum, which is what auto_circuit
    computes. For all but one sum in a thousand, a sum of n terms is off by at most 4 sqrt(n) units
    of rounding, relative to the sum of the terms' sizes (Higham and Mary, 2019). This holds for
    both normalizations and for the last sum. Besides, each log-probability is rounded twice.
    """
    unit = 2.0**-24
    rows = 0
    sums = {edge_count: torch.zeros(2, dtype=torch.float64) for edge_count in run.outs}
    for batch in run.loader:
        with torch.inference_mode():
            output = run.model(batch.clean if compare_to_clean else batch.corrupt)
        reference = output[run.model.out_slice]
        log_p = reference.double().log_softmax(-1)
        p = log_p.exp()
        rows += p[..., 0].numel()
        for edge_count, circuit_out in run.outs.items():
            log_q = circuit_out[batch.key].double().log_softmax(-1)
            d = log_p - log_q
            kl = (p * (torch.expm1(-d) + d)).sum()
            weighted = p * (1 + d.abs())
            added = 4 * p.shape[-1] ** 0.5 * unit * 2 * weighted.sum()
            rounded = 2 * unit * (weighted * (log_p + log_q).abs()).sum()
            sums[edge_count] += torch.stack([kl, added + rounded])
    return [tuple((total / rows).tolist()) for total in sums.values()]


def assert_exact(measurements, run, compare_to_clean=True):
    """Assert that measurements keep fastkl's promise, and return what :func:`oracle` returns.

    The promise is to be within 1e-5 of the float64 value, relative to it, plus 1e-8 nats.
    """
    truths = oracle(run, compare_to_clean)
    assert [edge_count for edge_count, _ in measurements] == list(run.outs)
    for (edge_count, kl), (truth, _) in zip(measurements, truths, strict=True):
        assert type(kl) is float
        assert abs(kl - truth) <= 1e-5 * truth + 1e-8, f"{edge_count} edges: {kl} for {truth}"
    return truths


def measuring(sites):
    """Return the sites of measure_kl_div; multibatch_kl_div's depend on what has been imported."""
    return tuple(site for site in sites if not site.endswith(f".{MULTIBATCH}"))


def recorder(monkeypatch):
    """Record the calls that reach fastkl's function, and let them through."""
    calls = []

    def record(*args, **kwargs):
        calls.append(SimpleNamespace(args=args, **kwargs))
        return fastkl.measure_kl_div(*args, **kwargs)

    monkeypatch.setattr(fastkl.auto_circuit, "measure_kl_div", record)
    return calls


def held(ac):
    """Return what every patched attribute holds now."""
    return (
        ac.kl_div.measure_kl_div,
        ac.prune_metrics.measure_kl_div,
        ac.prune_metrics.CLEAN_KL_DIV_METRIC.metric_func,
        ac.prune_metrics.CORRUPT_KL_DIV_METRIC.metric_func,
    )


def same_objects(some, others):
    return all(one is other for one, other in zip(some, others, strict=True))


@INPUTS
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_both_functions_agree_with_float64(ac, circuits, case, compare_to_clean):
    run = circuits(*case)
    theirs = ac.kl_div.measure_kl_div(*run, compare_to_clean)
    fastkl.auto_circuit.patch()
    ours = ac.kl_div.measure_kl_div(*run, compare_to_clean)

    truths = assert_exact(ours, run, compare_to_clean)
    for (edge_count, kl), (their_count, their_kl), (truth, noise) in zip(
        ours, theirs, truths, strict=True
    ):
        assert edge_count == their_count
        assert abs(their_kl - truth) <= noise
        assert abs(their_kl - kl) <= noise + 1e-5 * truth + 1e-8
    # If all values were about 0, any function would pass.
    assert max(truth for truth, _ in truths) > 0.1


@pytest.mark.parametrize(
    ("slice_output", "shape"),
    [("last_seq", (2, 50257)), ("not_first_seq", (2, 4, 50257)), (None, (2, 5, 50257))],
)
def test_slices_have_the_shapes_that_fastkl_is_told(circuits, slice_output, shape):
    run = circuits(slice_output)
    assert list(run.outs) == [20, 0, run.model.n_edges, 5, 1]
    for outputs in run.outs.values():
        assert list(outputs) == [batch.key for batch in run.loader]
        assert all(tuple(logits.shape) == shape for logits in outputs.values())


@SLICES
@pytest.mark.parametrize(
    ("patch_type", "compare_to_clean"), [("TREE_PATCH", True), ("EDGE_PATCH", False)]
)
def test_a_circuit_that_is_the_model_measures_exactly_zero(
    ac, circuits, slice_output, patch_type, compare_to_clean
):
    # Ablating nothing adds 0 times a difference to every activation: the logits keep their bits.
    run = circuits(slice_output, patch_type)
    unablated = run.model.n_edges if patch_type == "TREE_PATCH" else 0
    for batch in run.loader:
        with torch.inference_mode():
            output = run.model(batch.clean if compare_to_clean else batch.corrupt)
        assert torch.equal(run.outs[unablated][batch.key], output[run.model.out_slice])
    fastkl.auto_circuit.patch()
    measured = dict(ac.kl_div.measure_kl_div(*run, compare_to_clean))
    assert measured.pop(unablated) == 0.0
    assert min(measured.values()) > 0


def test_rows_count_alike_when_the_last_batch_is_smaller(ac, build_model, dataset, run_circuits):
    # PromptDataLoader always drops a smaller last batch; run_circuits takes any loader of batches.
    loader = DataLoader(dataset, batch_size=3, collate_fn=ac.data.collate_fn)
    run = run_circuits(build_model(None), loader)
    assert [len(logits) for logits in run.outs[0].values()] == [3, 3, 1]
    fastkl.auto_circuit.patch()
    assert_exact(ac.kl_div.measure_kl_div(*run), run)


def test_circuits_of_single_positions(ac, build_model, loader, run_circuits):
    run = run_circuits(build_model("last_seq", seq_len=5), loader)
    fastkl.auto_circuit.patch()
    assert_exact(ac.kl_div.measure_kl_div(*run), run)


@INPUTS
def test_arguments_go_by_position_and_by_name(ac, circuits, monkeypatch, compare_to_clean):
    calls = recorder(monkeypatch)
    model, loader, outs = run = circuits()
    fastkl.auto_circuit.patch()
    by_position = ac.kl_div.measure_kl_div(*run, compare_to_clean)
    by_name = ac.kl_div.measure_kl_div(
        model=model, dataloader=loader, circuit_outs=outs, compare_to_clean=compare_to_clean
    )
    assert by_position == by_name
    assert [call.args for call in calls] == [(*run, compare_to_clean)] * 2


def test_the_default_compares_to_clean(ac, circuits):
    run = circuits()
    fastkl.auto_circuit.patch()
    measured = ac.kl_div.measure_kl_div(*run)
    assert measured == ac.kl_div.measure_kl_div(*run, True)
    assert measured != ac.kl_div.measure_kl_div(*run, False)


def test_no_circuits(ac, circuits):
    model, loader, _ = circuits()
    fastkl.auto_circuit.patch()
    assert ac.kl_div.measure_kl_div(model, loader, {}) == []


def test_a_shuffling_loader_is_named_as_the_cause(ac, build_model, dataset, run_circuits):
    loader = ac.data.PromptDataLoader(
        dataset,
        seq_len=5,
        diverge_idx=0,
        batch_size=2,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )
    run = run_circuits(build_model("last_seq"), loader)
    fastkl.auto_circuit.patch()
    with pytest.raises(KeyError, match=r"has no output for batch key .* shuffle=True"):
        ac.kl_div.measure_kl_div(*run)


def test_every_site_leads_to_fastkl_and_back(ac, circuits, monkeypatch):
    calls = recorder(monkeypatch)
    before = held(ac)
    clean, corrupt = ac.prune_metrics.CLEAN_KL_DIV_METRIC, ac.prune_metrics.CORRUPT_KL_DIV_METRIC
    run = circuits()

    patched = fastkl.auto_circuit.patch()
    assert measuring(patched.sites) == SITES
    assert ac.kl_div.measure_kl_div is ac.prune_metrics.measure_kl_div
    for site, measure in zip(SITES, held(ac), strict=True):
        calls.clear()
        # As measure_prune_metrics calls it.
        measured = measure(*run)
        assert len(calls) == 1, f"{site} did not call fastkl"
        compare_to_clean = "CORRUPT" not in site
        assert calls[0].args[3] is compare_to_clean
        assert_exact(measured, run, compare_to_clean)

    assert ac.prune_metrics.CLEAN_KL_DIV_METRIC is clean
    assert ac.prune_metrics.CORRUPT_KL_DIV_METRIC is corrupt
    assert ac.prune_metrics.PRUNE_METRIC_DICT["Clean KL Div"] is clean
    assert ac.prune_metrics.PRUNE_METRIC_DICT["Corrupt KL Div"] is corrupt
    assert any(metric is clean for metric in ac.prune_metrics.PRUNE_METRICS)
    assert any(metric is corrupt for metric in ac.prune_metrics.PRUNE_METRICS)

    assert measuring(fastkl.auto_circuit.unpatch()) == SITES
    assert same_objects(held(ac), before)
    calls.clear()
    for measure in held(ac):
        measure(*run)
    assert calls == []


def test_every_metric_works_while_patched_and_the_others_are_unchanged(ac, circuits, monkeypatch):
    run = circuits()
    metrics = ac.prune_metrics.PRUNE_METRIC_DICT
    before = {key: metric.metric_func(*run) for key, metric in metrics.items()}
    calls = recorder(monkeypatch)
    fastkl.auto_circuit.patch()
    after = {key: metric.metric_func(*run) for key, metric in metrics.items()}

    assert len(calls) == 2
    assert_exact(after.pop("Clean KL Div"), run, compare_to_clean=True)
    assert_exact(after.pop("Corrupt KL Div"), run, compare_to_clean=False)
    assert len(after) == 12
    assert after == {key: before[key] for key in after}


def test_measure_prune_metrics(ac, circuits, prune_scores, monkeypatch):
    from auto_circuit.metrics.prune_metrics import measure_prune_metrics  # noqa: PLC0415

    model, loader, outs = run = circuits("last_seq", "TREE_PATCH", "RESAMPLE")
    task = SimpleNamespace(
        key="A task", name="A task", model=model, test_loader=loader, true_edge_count=None
    )
    monkeypatch.setitem(measure_prune_metrics.TASK_DICT, task.key, task)
    calls = recorder(monkeypatch)
    resample = ac.types.AblationType.RESAMPLE
    with fastkl.auto_circuit.patch():
        measured = measure_prune_metrics.measure_prune_metrics(
            [resample],
            [ac.prune_metrics.CLEAN_KL_DIV_METRIC, ac.prune_metrics.CORRUPT_KL_DIV_METRIC],
            {task.key: {"Random": prune_scores(model)}},
            ac.types.PatchType.TREE_PATCH,
            test_edge_counts=list(outs),
        )
    assert len(calls) == 2
    clean = measured[resample]["Clean KL Div"][task.key]["Random"]
    corrupt = measured[resample]["Corrupt KL Div"][task.key]["Random"]
    assert_exact(clean, run, compare_to_clean=True)
    assert_exact(corrupt, run, compare_to_clean=False)


def test_the_backend_and_the_progress_bar_are_passed_on(ac, circuits, monkeypatch):
    calls = recorder(monkeypatch)
    run = circuits()
    outer = fastkl.auto_circuit.patch()
    with fastkl.auto_circuit.patch(backend="eager", progress=False) as inner:
        ac.kl_div.measure_kl_div(*run)
    ac.kl_div.measure_kl_div(*run)
    assert [(call.backend, call.progress) for call in calls] == [("eager", False), (None, True)]
    assert (outer.backend, inner.backend) == (None, "eager")


def test_an_unknown_backend_is_refused_at_once(ac):
    before = held(ac)
    with pytest.raises(ValueError, match="'eagre'"):
        fastkl.auto_circuit.patch(backend="eagre")
    with pytest.raises(
        TypeError, match="backend must be a string such as 'native', or None; got int"
    ):
        fastkl.auto_circuit.patch(backend=3)
    assert same_objects(held(ac), before)
    assert fastkl.auto_circuit.unpatch() == ()


def test_a_with_block_restores_on_exit(ac):
    before = held(ac)
    with fastkl.auto_circuit.patch() as patched:
        assert not any(one is other for one, other in zip(held(ac), before, strict=True))
        assert "(active, backend: chosen at each call)" in repr(patched)
    assert same_objects(held(ac), before)
    assert repr(patched).splitlines() == [
        "fastkl's patch of auto_circuit 1.0.1 (undone, backend: chosen at each call)",
        *(f"  {site}" for site in patched.sites),
    ]


def test_a_with_block_restores_on_an_exception_and_lets_it_through(ac):
    before = held(ac)
    with pytest.raises(KeyboardInterrupt), fastkl.auto_circuit.patch():
        raise KeyboardInterrupt
    assert same_objects(held(ac), before)


def test_threads_that_patch_at_the_same_time(ac):
    before = held(ac)
    failed = []

    def again_and_again():
        try:
            for _ in range(50):
                with fastkl.auto_circuit.patch(), contextlib.suppress(RuntimeError):
                    pass
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=again_and_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert same_objects(held(ac), before)


def test_leaving_a_nested_block_restores_the_outer_patch(ac):
    before = held(ac)
    with fastkl.auto_circuit.patch():
        outer = held(ac)
        with fastkl.auto_circuit.patch() as inner:
            assert measuring(inner.sites) == SITES
            assert not any(one is other for one, other in zip(held(ac), outer, strict=True))
        assert same_objects(held(ac), outer)
    assert same_objects(held(ac), before)


def test_leaving_the_outer_patch_first_undoes_both(ac):
    before = held(ac)
    outer, inner = fastkl.auto_circuit.patch(), fastkl.auto_circuit.patch()
    with outer:
        pass
    assert same_objects(held(ac), before)
    with pytest.raises(RuntimeError, match="has been undone"), inner:
        pytest.fail("an undone patch was entered")


def test_patching_twice_takes_one_unpatch(ac):
    before = held(ac)
    fastkl.auto_circuit.patch()
    fastkl.auto_circuit.patch(backend="eager")
    assert measuring(fastkl.auto_circuit.unpatch()) == SITES
    assert same_objects(held(ac), before)
    assert fastkl.auto_circuit.unpatch() == ()


def test_unpatch_inside_a_block_holds(ac):
    before = held(ac)
    with fastkl.auto_circuit.patch(), fastkl.auto_circuit.patch():
        fastkl.auto_circuit.unpatch()
        assert same_objects(held(ac), before)
    assert same_objects(held(ac), before)


def test_copies_in_auto_circuit_are_swapped_and_elsewhere_are_not(ac, monkeypatch):
    original = ac.kl_div.measure_kl_div
    modules = [ModuleType("auto_circuit.copy"), ModuleType("auto_circuitry"), ModuleType("mine")]
    for module in modules:
        module.measure = original
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # A None in sys.modules tells import that there is no such module.
    monkeypatch.setitem(sys.modules, "auto_circuit.none", None)

    patched = fastkl.auto_circuit.patch()
    assert set(measuring(patched.sites)) == {*SITES, "auto_circuit.copy.measure"}
    assert modules[0].measure is ac.kl_div.measure_kl_div is not original
    assert modules[1].measure is modules[2].measure is original
    assert set(fastkl.auto_circuit.unpatch()) == set(patched.sites)
    assert modules[0].measure is original


def test_a_copy_taken_while_patched_is_restored(ac, monkeypatch):
    original = ac.kl_div.measure_kl_div
    late = ModuleType("auto_circuit.late")
    fastkl.auto_circuit.patch()
    with fastkl.auto_circuit.patch():
        late.measure = ac.kl_div.measure_kl_div
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert late.measure is ac.kl_div.measure_kl_div is not original
    restored = measuring(fastkl.auto_circuit.unpatch())
    assert set(restored) == {*SITES, "auto_circuit.late.measure"}
    assert late.measure is original


def test_multibatch_kl_div_is_swapped_where_it_is_used(ac):
    from auto_circuit.metrics.completeness_metrics import (  # noqa: PLC0415
        same_under_knockouts,
        train_same_under_knockouts,
    )
    from auto_circuit.prune_algos import ACDC, subnetwork_probing  # noqa: PLC0415

    modules = [
        *(ac.tensor_ops, ac.kl_div, ACDC, subnetwork_probing),
        *(same_under_knockouts, train_same_under_knockouts),
    ]
    before = ac.tensor_ops.multibatch_kl_div
    with fastkl.auto_circuit.patch() as patched:
        functions = {module.multibatch_kl_div for module in modules}
        assert len(functions) == 1
        assert before not in functions
        assert {f"{module.__name__}.{MULTIBATCH}" for module in modules} <= set(patched.sites)
    assert all(module.multibatch_kl_div is before for module in modules)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_multibatch_kl_div_of_log_probabilities(ac, noise):
    """Compare the value, and the gradient at the logits, with auto_circuit's own in float64."""
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(2, 3, 5000, generator=generator) * 3
    logits = reference + noise * torch.randn(2, 3, 5000, generator=generator)

    def measured(dtype):
        leaf = logits.to(dtype).requires_grad_()
        divergence = ac.tensor_ops.multibatch_kl_div(
            leaf.log_softmax(-1), reference.to(dtype).log_softmax(-1)
        )
        return (divergence.detach().double(), *torch.autograd.grad(divergence, leaf))

    exact, exact_gradient = measured(torch.float64)
    with fastkl.auto_circuit.patch():
        ours, gradient = measured(torch.float32)
    # The inputs are two log-softmaxes in float32, whose rounding error is 5e-7 per token.
    assert abs(ours - exact) <= 1e-5 * exact + 1e-6 * noise + 1e-8
    difference = (gradient.double() - exact_gradient).norm()
    assert difference <= 1e-5 * exact_gradient.norm() * max(1, 0.1 / noise)


@pytest.mark.parametrize("mask_fn", [None, "hard_concrete"])
def test_subnetwork_probing(ac, build_model, loader, mask_fn, monkeypatch):
    """A few training steps give the same losses and masks with the patch and without it."""
    from auto_circuit.prune_algos import subnetwork_probing  # noqa: PLC0415

    # auto_circuit uses torch.optim.adam, a module that newer versions of PyTorch do not expose.
    monkeypatch.setattr(torch.optim, "adam", SimpleNamespace(Adam=torch.optim.Adam), raising=False)

    # Both runs use one model: the order of its modules decides which mask gets which random number.
    model = build_model("last_seq")

    def probe():
        torch.manual_seed(5)
        losses = []
        original = subnetwork_probing.multibatch_kl_div

        def recording(*log_probabilities):
            losses.append(original(*log_probabilities))
            return losses[-1]

        monkeypatch.setattr(subnetwork_probing, MULTIBATCH, recording)
        scores = subnetwork_probing.subnetwork_probing_prune_scores(
            model, loader, None, epochs=3, mask_fn=mask_fn, tree_optimisation=True
        )
        monkeypatch.setattr(subnetwork_probing, MULTIBATCH, original)
        names = sorted(scores)
        return torch.stack(losses).detach(), torch.cat([scores[n].flatten() for n in names])

    losses, masks = probe()
    with fastkl.auto_circuit.patch():
        our_losses, our_masks = probe()
    assert len(our_losses) == 9
    assert losses.std() > 0
    torch.testing.assert_close(our_losses, losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(our_masks, masks, rtol=1e-3, atol=1e-3)
