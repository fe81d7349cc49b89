"""Which module may import which, what an import loads, and whether documented examples run."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastkl"

# A module imports only lower layers: measure → functional → backends → (state, fastkl._triton).
LAYERS = {
    "errors": 0,
    "first_calls": 0,
    "state": 0,
    "rows": 0,
    "reductions": 0,
    "views": 0,
    "registration": 0,
    "backends.eager_blocks": 0,
    "_triton": 0,
    "_native": 0,
    "gradient": 1,
    "jensen_shannon": 1,
    "summaries": 1,
    "backends.eager_formulas": 1,
    "backends.eager_states": 1,
    "backends.eager_workspace": 2,
    "backends.native": 2,
    "backends.eager": 3,
    # It falls back to eager for what it cannot do itself.
    "backends.triton": 4,
    "backends": 5,
    "custom_ops": 6,
    "kl_statistics": 6,
    "functional": 7,
    "measure": 8,
    "modules": 8,
    "": 9,
    "auto_circuit": 10,
    "plot": 10,
    "demo_model": 10,
    "demo": 11,
    "cli": 12,
    "__main__": 13,
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path):
    """Yield the name of every module that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if known(name) else node.module for name in names)


def known(name):
    return name.removeprefix("fastkl").removeprefix(".") in LAYERS


def files():
    return sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer():
    assert {module_name(path) for path in files()} <= LAYERS.keys()


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_imports_run_one_way(path):
    layer = LAYERS[module_name(path)]
    for name in imports(path):
        if name.split(".")[0] == "fastkl":
            target = name.removeprefix("fastkl").removeprefix(".")
            assert LAYERS[target] < layer, f"{module_name(path)} imports {target}"
        assert name.split(".")[0] != "triton", f"{path}: only device code imports triton"


def test_device_code_never_imports_fastkl():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not any(name.split(".")[0] == "fastkl" for name in names), path


def test_only_device_functions_beside_the_launcher():
    """A file of kernels holds @triton.jit functions and constants, nothing that launches."""
    for path in (ROOT / "kernels/triton").glob("*.py"):
        if path.name in ("__init__.py", "launch.py", "gradient_launch.py"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                assert any("triton.jit" in ast.unparse(d) for d in node.decorator_list), node.name


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


LIGHT = """
import sys
import torch, numpy, tqdm
before = set(sys.modules)
import fastkl
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_fastkl_is_light():
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True
    )
    brought = set(result.stdout.split())
    assert "fastkl" in brought
    assert not brought & {"triton", "matplotlib", "rich", "auto_circuit", "hypothesis", "scipy"}


@pytest.mark.parametrize("name", ["functional", "measure", "modules", "backends", "auto_circuit"])
def test_examples_in_docstrings(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    module = importlib.import_module(f"fastkl.{name}")
    result = doctest.testmod(module, optionflags=flags)
    assert result.failed == 0
    if name != "auto_circuit":
        assert result.attempted > 0


def test_the_readmes_examples_run():
    """Run them one after another with embeddings as models; auto_circuit's has tests of its own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 6
    full, student = torch.nn.Embedding(50, 70), torch.nn.Embedding(50, 70)
    inputs, mask = torch.randint(50, (3, 4)), torch.rand(3, 4) < 0.8
    models = {"full": full, "quantized": student, "teacher": full, "student": student}
    batches = [(inputs, mask), (inputs[:1], mask[:1])]
    names = {}
    for example in examples:
        names |= models | {"batches": batches, "inputs": inputs, "attention_mask": mask, "T": 2.0}
        if "fastkl.auto_circuit" not in example:
            exec(compile(example, "README.md", "exec"), names)
    assert full.weight.grad is None
    assert student.weight.grad.isfinite().all()
    whole = fastkl.kl_div(student(inputs), full(inputs), mask=mask, reduction="sum")
    first = fastkl.kl_div(student(inputs[:1]), full(inputs[:1]), mask=mask[:1], reduction="sum")
    torch.testing.assert_close(names["total"], (whole + first).double(), rtol=1e-6, atol=0)
    assert names["count"] == mask.sum() + mask[:1].sum()


def test_public_names():
    assert sorted(fastkl.__all__) == [
        "JSDivLoss",
        "KLDivLoss",
        "KLStatistics",
        "__version__",
        "available_backends",
        "js_div",
        "kl_div",
        "kl_div_many",
        "measure_kl_div",
        "unavailable_backends",
    ]


_FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
called = set()
class Log(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            called.add(f"{function._schema.name} {result.dtype} {result.device}")
        return result
torch.set_default_device("meta")
with Log():
    import fastkl
print(*sorted(called), sep="\\n")
"""


def test_functions_are_called_before_threads_call_them():
    """Otherwise oneMKL may choose code of low accuracy: see fastkl.first_calls."""
    found = subprocess.run(
        [sys.executable, "-c", _FIRST_CALLS], capture_output=True, text=True, check=True
    )
    elementwise = re.compile(r"(?<!np)\.(exp|exp2|expm1|log|log1p|log2|sqrt|tanh|sigmoid)_?\(")
    on_tensors = {
        name
        for path in files()
        # The accuracy of a first call does not matter to the demo, which trains its model.
        if not path.name.startswith("demo")
        for name in elementwise.findall(path.read_text().replace("math.log", ""))
    }
    assert on_tensors >= {"exp", "log"}
    for name in on_tensors:
        for dtype in ("float32", "float64"):
            assert f"aten::{name} torch.{dtype} cpu" in found.stdout.splitlines()
