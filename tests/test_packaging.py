"""Wheel, sdist and editable install: what they hold, and whether what they install runs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fastkl

ROOT = Path(__file__).parents[1]
# A stand-in for Hugging Face's package `kernels`: it and fastkl must not disturb each other.
FOREIGN_KERNELS = "mine = True\n"

SCRIPT = """
import importlib.util, pathlib, sys
import torch, fastkl
root = pathlib.Path(sys.argv[1])
assert pathlib.Path(fastkl.__file__).is_relative_to(root), fastkl.__file__
import kernels
assert kernels.mine
if importlib.util.find_spec("triton"):
    import fastkl._triton
    assert pathlib.Path(fastkl._triton.__file__).is_relative_to(root), fastkl._triton.__file__
rows = torch.randn(3, 100)
for name in fastkl.available_backends():
    if name != "triton":
        assert fastkl.kl_div(rows, rows, backend=name) == 0
print(fastkl.__version__)
"""


# Runs with neither a compiler nor anything else on the path.
USE = """
import sys
# Remove the finder of an editable install: it would provide the extension of this checkout.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import torch, fastkl
assert fastkl.__file__.startswith(sys.argv[1]), fastkl.__file__
print(fastkl.unavailable_backends().get("native"))
rows = torch.randn(3, 100)
assert fastkl.kl_div(rows, rows) == 0 < fastkl.kl_div(rows, -rows)
"""


def run(*command, **options):
    options = {"stderr": subprocess.PIPE, **options}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Copy the files that git does not ignore, so that a build leaves nothing in the checkout."""
    target = tmp_path_factory.mktemp("checkout")
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        names = listed.splitlines()
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory):
    """Return variables that make a build a quarter as long: a last -O0 stops all optimization."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        return {}
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script)}


@pytest.fixture(scope="module")
def built(checkout, quick_compiler, tmp_path_factory):
    """Build and return the sdist, and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out))
    run(*command, str(checkout), env={**os.environ, **quick_compiler})
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def environment(*paths):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def foreign_kernels(path):
    (path / "kernels").mkdir(parents=True)
    (path / "kernels" / "__init__.py").write_text(FOREIGN_KERNELS)
    return path


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastkl"}
    assert {"fastkl/py.typed", "fastkl/_triton/kernels.py", "fastkl/_triton/launch.py"} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {"pyproject.toml", "setup.py", "kernels/triton/kernels.py", "LICENSE"} <= names
    assert {
        "CHANGELOG.md",
        "README.md",
        "bench/README.md",
        "bench/results/cpu.json",
        "bench/results/cpu.png",
    } <= names
    for folder in ("kernels/cpu", "tests", "bench"):
        sources = {
            str(path.relative_to(ROOT))
            for pattern in ("*.py", "*.[ch]pp")
            for path in (ROOT / folder).rglob(pattern)
        }
        assert sources
        assert sources <= names


def test_wheel_and_sdist_say_the_version(built):
    stem = f"fastkl-{fastkl.__version__}"
    assert built[0].name == f"{stem}.tar.gz"
    with tarfile.open(built[0]) as sdist, zipfile.ZipFile(built[1]) as wheel:
        texts = (
            sdist.extractfile(f"{stem}/PKG-INFO").read(),
            wheel.read(f"{stem}.dist-info/METADATA"),
        )
    for text in texts:
        assert Parser().parsestr(text.decode())["Version"] == fastkl.__version__


def test_the_version_stands_in_one_file_and_is_read_without_torch(checkout, tmp_path):
    ignored = shutil.ignore_patterns("build", "*.egg-info")
    sources = shutil.copytree(checkout, tmp_path / "sources", ignore=ignored)
    package = sources / "fastkl" / "__init__.py"
    package.write_text(package.read_text().replace(fastkl.__version__, "9.8.7"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text("raise ImportError('no torch in a build')\n")
    metadata = (
        "from setuptools import build_meta\nprint(build_meta.prepare_metadata_for_build_wheel('.'))"
    )
    said = run(sys.executable, "-c", metadata, cwd=sources, env=environment(tmp_path / "site"))
    assert said.splitlines()[-1] == "fastkl-9.8.7.dist-info"


def test_tests_of_an_unpacked_sdist_are_collected(built, tmp_path):
    with tarfile.open(built[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    run(sys.executable, "-m", "pytest", "--collect-only", "-q", cwd=folder, env=environment(folder))


def test_wheel_runs_beside_a_package_called_kernels(built, tmp_path):
    target = foreign_kernels(tmp_path / "site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(built[1]))
    run(sys.executable, "-c", SCRIPT, str(target), cwd=tmp_path, env=environment(target))
    assert (target / "kernels" / "__init__.py").read_text() == FOREIGN_KERNELS


def used(wheel, site):
    """Unpack a wheel, and return what its package says of its native backend."""
    shutil.unpack_archive(wheel, site, "zip")
    found = {**environment(site), "PATH": str(site)}
    return run(sys.executable, "-c", USE, str(site), cwd=site, env=found).strip()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="no limited API")
def test_one_wheel_for_all_pythons(built, tmp_path):
    assert "-cp310-abi3-" in built[1].name
    assert used(built[1], tmp_path) == "None"
    assert [path.name for path in tmp_path.glob("fastkl/_native*")] == ["_native.abi3.so"]


def test_a_failed_build_leaves_a_working_package_and_one_warning(checkout, tmp_path):
    # Leave out what another build left behind, which would do in place of what fails to build.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "*.so")
    sources = shutil.copytree(checkout, tmp_path / "sources", ignore=ignored)
    command = ("wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    log = run(
        *(sys.executable, "-m", "pip", *command, str(sources)),
        env={**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"},
        stderr=subprocess.STDOUT,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert log.count("fastkl._native was not built") == 1
    assert "Install a C++17 compiler" in log
    assert "was not built" in used(wheel, tmp_path / "site")
    assert not list(tmp_path.glob("site/fastkl/_native*"))


def test_editable_install_runs(checkout, quick_compiler, tmp_path):
    """It runs from the checkout's folder too, where Python finds `fastkl` before the install."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    python = venv / "bin" / "python"
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"])
    command = ("install", "--no-deps", "--no-build-isolation", "--editable", str(checkout))
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, *command, env={**os.environ, **quick_compiler})
    other = foreign_kernels(tmp_path / "other")
    for folder in (tmp_path, checkout):
        run(str(python), "-c", SCRIPT, str(checkout), cwd=folder, env=environment(other))
