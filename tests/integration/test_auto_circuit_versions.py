"""patch() where auto_circuit is missing, or another version: it swaps all sites or changes nothing.

These tests do not need auto_circuit: a package of that name, written here, stands in for it.
"""

import subprocess
import sys

import pytest

import fastkl.auto_circuit

KL_DIV = "auto_circuit.metrics.prune_metrics.kl_div"
TENSOR_OPS = "auto_circuit.utils.tensor_ops"
PRUNE_METRICS = "auto_circuit.metrics.prune_metrics.prune_metrics"

KL_DIV_SOURCE = """
def measure_kl_div(model, dataloader, circuit_outs, compare_to_clean=True):
    return []
"""
TENSOR_OPS_SOURCE = """
def multibatch_kl_div(input_logprobs, target_logprobs):
    return 0.0
"""
PRUNE_METRICS_SOURCE = f"""
from dataclasses import dataclass
from functools import partial
from {KL_DIV} import measure_kl_div

@dataclass(frozen=True)
class PruneMetric:
    metric_func: object

CLEAN_KL_DIV_METRIC = PruneMetric(partial(measure_kl_div, compare_to_clean=True))
CORRUPT_KL_DIV_METRIC = PruneMetric(partial(measure_kl_div, compare_to_clean=False))
"""


@pytest.fixture
def no_auto_circuit(monkeypatch):
    """Remove auto_circuit's modules from sys.modules until the test is over."""
    fastkl.auto_circuit.unpatch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "auto_circuit"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def other_version(no_auto_circuit, monkeypatch, tmp_path):
    """Return a function that installs a stand-in auto_circuit 9.9, made of the given modules."""

    def install(
        kl_div=KL_DIV_SOURCE, prune_metrics=PRUNE_METRICS_SOURCE, tensor_ops=TENSOR_OPS_SOURCE
    ):
        metadata = tmp_path / "auto_circuit-9.9.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: auto-circuit\nVersion: 9.9\n")
        folder = tmp_path / "auto_circuit" / "metrics" / "prune_metrics"
        folder.mkdir(parents=True)
        (tmp_path / "auto_circuit" / "__init__.py").touch()
        utils = tmp_path / "auto_circuit" / "utils"
        utils.mkdir()
        for path, source in (
            (folder / "kl_div.py", kl_div),
            (folder / "prune_metrics.py", prune_metrics),
            (utils / "tensor_ops.py", tensor_ops),
        ):
            if source is not None:
                path.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    fastkl.auto_circuit.unpatch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "auto_circuit"]:
        del sys.modules[name]


def snapshot():
    """Return every object that a module of auto_circuit, or a metric in it, holds."""
    held = {}
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "auto_circuit":
            for attribute, value in vars(module).items():
                held[name, attribute] = value
                held[name, attribute, "metric_func"] = getattr(value, "metric_func", None)
    return held


def test_importing_needs_no_auto_circuit():
    code = """
import sys
sys.modules["auto_circuit"] = None
import fastkl.auto_circuit
heavy = {"transformer_lens", "plotly", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, heavy
assert fastkl.auto_circuit.unpatch() == ()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_auto_circuit_is_an_import_error_that_says_what_to_do(
    no_auto_circuit, monkeypatch
):
    monkeypatch.setitem(sys.modules, "auto_circuit", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[auto-circuit\]"') as caught:
        fastkl.auto_circuit.patch()
    assert caught.value.name == "auto_circuit"
    assert fastkl.auto_circuit.unpatch() == ()


def test_a_missing_dependency_of_auto_circuit_is_named(other_version):
    other_version(kl_div="import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        fastkl.auto_circuit.patch()


def test_another_version_with_the_same_sites_is_patched(other_version):
    other_version()
    with fastkl.auto_circuit.patch() as patched:
        before_exit = snapshot()
        assert "auto_circuit 9.9 " in repr(patched)
        assert len(patched.sites) == 5
    assert snapshot() != before_exit


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ({"kl_div": ""}, [f"{KL_DIV}.measure_kl_div is missing"]),
        ({"kl_div": None}, [f"{KL_DIV} is missing"]),
        ({"prune_metrics": None}, [f"{PRUNE_METRICS} is missing"]),
        (
            {"kl_div": KL_DIV_SOURCE.replace("compare_to_clean", "direction")},
            [f"{KL_DIV}.measure_kl_div takes (model, dataloader, circuit_outs, direction)"],
        ),
        (
            {"kl_div": KL_DIV_SOURCE.replace("=True)", "=True, *, per_token=False)")},
            [
                f"{KL_DIV}.measure_kl_div takes "
                "(model, dataloader, circuit_outs, compare_to_clean, per_token)"
            ],
        ),
        ({"tensor_ops": ""}, [f"{TENSOR_OPS}.multibatch_kl_div is missing"]),
        ({"tensor_ops": None}, [f"{TENSOR_OPS} is missing"]),
        (
            {"tensor_ops": TENSOR_OPS_SOURCE.replace("target_logprobs", "target")},
            [f"{TENSOR_OPS}.multibatch_kl_div takes (input_logprobs, target)"],
        ),
        (
            {"prune_metrics": PRUNE_METRICS_SOURCE + "del measure_kl_div"},
            [f"{PRUNE_METRICS}.measure_kl_div is missing"],
        ),
        (
            {"prune_metrics": PRUNE_METRICS_SOURCE + "measure_kl_div = print"},
            [f"{PRUNE_METRICS}.measure_kl_div does not hold {KL_DIV}.measure_kl_div"],
        ),
        (
            {"prune_metrics": PRUNE_METRICS_SOURCE + "del CLEAN_KL_DIV_METRIC"},
            [f"{PRUNE_METRICS}.CLEAN_KL_DIV_METRIC is missing"],
        ),
        (
            {"prune_metrics": PRUNE_METRICS_SOURCE + "CORRUPT_KL_DIV_METRIC = PruneMetric(print)"},
            [f"{PRUNE_METRICS}.CORRUPT_KL_DIV_METRIC does not hold {KL_DIV}.measure_kl_div"],
        ),
        (
            {
                "prune_metrics": PRUNE_METRICS_SOURCE
                + "del CLEAN_KL_DIV_METRIC, CORRUPT_KL_DIV_METRIC, measure_kl_div"
            },
            [
                f"{PRUNE_METRICS}.measure_kl_div is missing",
                f"{PRUNE_METRICS}.CLEAN_KL_DIV_METRIC is missing",
                f"{PRUNE_METRICS}.CORRUPT_KL_DIV_METRIC is missing",
            ],
        ),
    ],
)
def test_a_missing_site_is_named_and_nothing_is_changed(other_version, sources, named):
    if sources.get("kl_div") in ("", None) and "kl_div" in sources:
        sources = {**sources, "prune_metrics": ""}
    other_version(**sources)
    with pytest.raises(RuntimeError) as caught:
        fastkl.auto_circuit.patch()
    message = str(caught.value)
    assert message.startswith(
        "cannot patch auto_circuit 9.9 (fastkl is tested with 1.0.1), nothing was changed: "
    )
    assert message.endswith(": " + "; ".join(named))
    assert "fastkl" not in repr(snapshot())
    assert fastkl.auto_circuit.unpatch() == ()
