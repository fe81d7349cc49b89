"""Which backend is chosen, and what errors and warnings say of a backend that cannot run."""

import importlib
import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ON_GPU, where_it_runs

import fastkl
from fastkl import backends
from fastkl.backends import eager, native, triton

CPU = torch.device("cpu")
ROWS = torch.zeros(2, 5)


def chosen(name=None, device=CPU, dtype=torch.float32):
    return backends.choose(name, device, dtype).NAME


@pytest.fixture
def only_eager(monkeypatch):
    monkeypatch.delenv("FASTKL_BACKEND", raising=False)
    monkeypatch.setattr(native, "missing", lambda *_: "not built")
    monkeypatch.setattr(triton, "missing", lambda *_: "not installed")


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.delenv("FASTKL_BACKEND", raising=False)
    monkeypatch.setattr(native, "missing", lambda device=None, dtype=None: None)
    monkeypatch.setattr(triton, "missing", lambda device=None, dtype=None: None)


CALLS = {
    "kl_div": lambda **options: fastkl.kl_div(ROWS, ROWS, **options),
    "reverse": lambda **options: fastkl.kl_div(ROWS, ROWS, direction="reverse", **options),
    "kl_div_many": lambda **options: fastkl.kl_div_many([ROWS, ROWS], ROWS, **options),
    "js_div": lambda **options: fastkl.js_div(ROWS, ROWS, **options),
    "measure_kl_div": lambda **options: fastkl.measure_kl_div(
        type("Model", (), {"out_slice": slice(None), "__call__": lambda _, rows: rows})(),
        [SimpleNamespace(key=0, clean=ROWS, corrupt=ROWS)],
        {1: {0: ROWS}},
        **options,
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_asked_for_measures(monkeypatch, call):
    """Only the backend that is asked for runs; the results, alike for all, would not show this."""
    took = []

    def watched(module, function):
        def watching(*args):
            took.append(module.NAME)
            return function(*args)

        return watching

    for module in (eager, native):
        for name in ("kl_rows", "js_rows"):
            monkeypatch.setattr(module, name, watched(module, getattr(module, name)))
    for asked in set(fastkl.available_backends()) - {"triton"}:
        took.clear()
        CALLS[call](backend=asked)
        assert set(took) == {asked}


def test_by_device(everything):
    assert chosen() == "native"
    assert chosen(device=torch.device("cuda")) == "triton"


def test_argument_over_environment_over_device(everything, monkeypatch):
    monkeypatch.setenv("FASTKL_BACKEND", "eager")
    assert chosen() == "eager"
    assert chosen("triton") == "triton"
    monkeypatch.setenv("FASTKL_BACKEND", "")
    assert chosen() == "native"


def test_what_can_not_run_is_passed_over(only_eager):
    assert chosen() == "eager"


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("cuda", "triton cannot be used: not installed"),
        ("cpu", "native cannot be used: not built"),
    ],
)
def test_the_slow_way_is_told_once(only_eager, monkeypatch, device, text):
    backends._tell_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(device=torch.device(device), dtype=torch.float64) == "eager"
        monkeypatch.setenv("FASTKL_BACKEND", "eager")
        assert chosen(device=torch.device(device)) == "eager"
    monkeypatch.delenv("FASTKL_BACKEND")
    with pytest.warns(UserWarning, match=text) as told:
        assert [chosen(device=torch.device(device)) for _ in range(2)] == ["eager", "eager"]
    assert len(told) == 1


def test_the_slow_way_is_told_of_the_users_line(only_eager):
    backends._tell_once.cache_clear()
    with pytest.warns(UserWarning, match="cannot be used") as told:
        fastkl.kl_div(ROWS, ROWS)
    assert told[0].filename == __file__


def test_a_device_without_float64():
    text = (
        "no backend runs on mps:0: sums are kept in float64, which mps:0 does not support: move the "
        "logits"
    )
    for name in (None, "eager"):
        with pytest.raises(RuntimeError, match=text.split(": ", 1)[name is not None]):
            chosen(name, torch.device("mps:0"))


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "8.0, cuda:0 has 7.5"), ((8, 0), None)]
)
def test_cards_that_are_too_old(monkeypatch, capability, reason):
    if problem := triton.installation_problem():
        pytest.skip(problem)
    _triton = importlib.import_module("fastkl._triton")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    found = triton.missing(torch.device("cuda:0"), torch.float32)
    assert found == (reason and f"the kernels need compute capability {reason}")


def test_the_environment_reaches_the_call(monkeypatch):
    monkeypatch.setenv("FASTKL_BACKEND", "nonsense")
    text = "FASTKL_BACKEND must be one of triton, native, eager; got 'nonsense'"
    with pytest.raises(ValueError, match=text):
        fastkl.kl_div(ROWS, ROWS)


def test_an_extension_that_was_not_built_says_where(monkeypatch):
    """A clone's folder may hide the package that pip installed, and with it the extension."""
    monkeypatch.setattr(native, "_extension", ModuleNotFoundError)
    folder = Path(fastkl.__file__).parent
    text = f"fastkl._native is not in {folder}: .* Python.s headers.*, or .* a clone, imports"
    with pytest.raises(RuntimeError, match=text):
        fastkl.kl_div(ROWS, ROWS, backend="native")


def test_an_extension_that_can_not_be_loaded_says_why(monkeypatch):
    error = ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")
    monkeypatch.setattr(native, "_extension", lambda: error)
    with pytest.raises(RuntimeError, match=r"cannot be loaded: libstdc.*GLIBCXX_3.4.32' not found"):
        fastkl.kl_div(ROWS, ROWS, backend="native")


def test_kernels_that_are_elsewhere_are_missing(monkeypatch):
    """In a clone, the kernels lie in a folder that only an installation maps to fastkl._triton."""
    found = {"triton": True, "fastkl._triton": None}
    monkeypatch.setattr(triton.importlib.util, "find_spec", found.get)
    text = f"kernels fastkl._triton are not in {Path(fastkl.__file__).parent}: .* a clone, imports"
    assert re.search(text, fastkl.unavailable_backends().get("triton"))


def test_what_the_kernels_keep_is_what_the_backend_says():
    """The backend repeats the number, which is needed before it is known that Triton is there."""
    if problem := triton.installation_problem():
        pytest.skip(problem)
    assert triton.N_KEPT == importlib.import_module("fastkl._triton").N_KEPT


def test_unknown_name():
    with pytest.raises(
        ValueError, match="backend must be one of triton, native, eager; got 'cuda'"
    ):
        fastkl.kl_div(ROWS, ROWS, backend="cuda")


def test_unknown_name_before_the_model_runs():
    model = type("Model", (), {"out_slice": 0, "__call__": lambda *_: pytest.fail("was run")})()
    with pytest.raises(ValueError, match="got 'cuda'"):
        fastkl.measure_kl_div(model, [1], {1: {}}, backend="cuda")


def test_asking_for_what_is_missing(only_eager):
    text = "backend='triton' was requested but cannot be used here: not installed"
    with pytest.raises(RuntimeError, match=text):
        fastkl.kl_div(ROWS, ROWS, backend="triton")


def test_float64_needs_eager():
    rows = ROWS.double()
    for name in ("triton", "native"):
        if fastkl.unavailable_backends().get(name) is None:
            (placed,) = where_it_runs(name, rows)
            with pytest.raises(RuntimeError, match="float64"):
                fastkl.kl_div(placed, placed, backend=name)
    assert fastkl.kl_div(rows, rows).dtype == torch.float64


@pytest.mark.parametrize("version", ["3.2.0", "3.3.1+git1a2b3c4"])
def test_a_triton_that_is_too_old(monkeypatch, version):
    pytest.importorskip("triton")
    monkeypatch.setattr(triton, "version", lambda: version)
    text = f"triton {version} is too old: the kernels need 3.4 or newer"
    assert fastkl.unavailable_backends().get("triton") == text
    with pytest.raises(RuntimeError, match=re.escape(text)):
        fastkl.kl_div(ROWS, ROWS, backend="triton")
    for new in ("3.4.0", "3.10.0rc1", "4.0"):
        monkeypatch.setattr(triton, "version", lambda new=new: new)
        assert "too old" not in (triton.missing() or "")


def test_the_version_of_triton():
    package = pytest.importorskip("triton")
    assert triton.version() == package.__version__


def test_all_logits_choose():
    """A backend is refused if it takes the reference's dtype but not a circuit's."""
    if "native" not in fastkl.available_backends():
        pytest.skip("the native kernel was not built")
    for return_stats in (False, True):
        with pytest.raises(RuntimeError, match=r"got torch\.float64"):
            fastkl.kl_div(ROWS.double(), ROWS, backend="native", return_stats=return_stats)


@pytest.mark.parametrize("asked", ["eager", "native"])
def test_statistics_are_the_backends(monkeypatch, asked):
    if reason := fastkl.unavailable_backends().get(asked):
        pytest.skip(reason)
    calls = []
    for module in (eager, native):
        own = module.row_statistics
        monkeypatch.setattr(
            module, "row_statistics", lambda *a, f=own, m=module: calls.append(m.NAME) or f(*a)
        )
    fastkl.kl_div(ROWS, ROWS, backend=asked, return_stats=True)
    assert calls == [asked]


def test_states_of_no_circuits(backend):
    (rows,) = where_it_runs(backend, ROWS)
    states = backends.choose(backend, rows.device, torch.float32).row_states([], rows)
    assert all(field.shape == (0, 2) for field in states)


def test_available_backends():
    available, missing = fastkl.available_backends(), fastkl.unavailable_backends()
    assert sorted([*available, *missing]) == ["eager", "native", "triton"]
    assert available == tuple(name for name in ("triton", "native", "eager") if name in available)
    assert "eager" in available
    assert all(isinstance(reason, str) and reason for reason in missing.values())
    assert eager.missing(CPU, torch.float64) is None


MEASURE = """
import torch, fastkl
print(fastkl.unavailable_backends()["triton"])
rows = torch.zeros(2, 5)
print(float(fastkl.kl_div(rows, rows)))
try:
    fastkl.kl_div(rows, rows, backend="triton")
except RuntimeError as error:
    print(error)
"""

WITHOUT_TRITON = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None
"""

COMMAND = """
import fastkl.cli
print(fastkl.available_backends())
print(fastkl.cli.main(["backends"]))
"""

WITHOUT_INTERPRETER = """
import torch, fastkl
rows = torch.zeros(2, 5)
try:
    fastkl.kl_div(rows, rows, backend="triton")
except RuntimeError as error:
    print(error)
"""


def run(script, **variables):
    environment = {"PATH": "", "TRITON_INTERPRET": "0", "HOME": "/nonexistent"} | variables
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_without_triton():
    missing, value, error = run(WITHOUT_TRITON + MEASURE)
    if ON_GPU:
        assert missing == "the package triton is not installed (pip install triton)"
    else:
        assert missing.endswith("no CUDA or ROCm device, and the package triton is not installed")
    assert value == "0.0"
    assert error == f"backend='triton' was requested but cannot be used here: {missing}"


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_a_triton_that_can_not_be_imported(tmp_path, error):
    """Triton's own libraries may be missing or too new for the system: fastkl must not crash."""
    if not importlib.util.find_spec("fastkl._triton"):
        pytest.skip("fastkl was not installed by pip")
    text = "libLLVM.so.19: cannot open shared object file"
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(f"raise {error}({text!r})")
    (tmp_path / "triton-3.7.0.dist-info").mkdir()
    (tmp_path / "triton-3.7.0.dist-info/METADATA").write_text("Name: triton\nVersion: 3.7.0\n")
    said = run(MEASURE + COMMAND, PYTHONPATH=str(tmp_path))
    missing, value, refused, available, *told = said
    assert "eager" in available
    assert "triton" not in available
    assert missing == f"triton, or its kernels here, cannot be imported: {error}: {text}"
    assert value == "0.0"
    assert refused == f"backend='triton' was requested but cannot be used here: {missing}"
    # The command says so too, and runs to its end.
    assert any(missing in line for line in told)
    assert told[-1] == "0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_cpu_tensors_without_the_interpreter():
    if triton.missing():
        pytest.skip("triton is not installed")
    (error,) = run(WITHOUT_INTERPRETER)
    assert error.endswith("cannot be used here: PyTorch sees no CUDA or ROCm device")
