"""Test the benchmark of a call's options: what it measures, refuses and prints."""

import json

import pytest
import torch

import fastkl
from bench import options, report

SIZE = options.Size(2, 3, 40)

pytestmark = pytest.mark.skipif(
    bool(fastkl.unavailable_backends().get("native")), reason="the native kernel was not built"
)


def test_all_ways_are_right_and_timed():
    case = options.run_size(SIZE, 0.01)
    assert case["n_circuits"] == 2
    for name, entry in case["ways"].items():
        assert entry["ms"] > 0, name
        assert entry["error_relative"] <= options._TEXTBOOK, name
    assert case["ways"]["kl_div_many"]["times_as_long"] == 1


def test_ways_differ():
    """Each option does what its name says: no two measure the same by mistake."""
    ways = options.ways(options.Inputs(SIZE))
    means = {name: tuple(way.call().tolist()) for name, way in ways.items()}
    changed = {means[name] for name in ("kl_div_many", "temperature=2", "mask")}
    assert len(changed | {means['direction="reverse"']}) == 4
    assert means["return_stats=True"] == means["kl_div_many"]
    halves = {means[f"{dtype} logits"] for dtype in ("bfloat16", "float16")}
    assert len(halves | changed) == len(changed) + 2


@pytest.mark.parametrize("off", [1e-3, float("nan")])
def test_what_is_wrong_is_not_timed(monkeypatch, off):
    good = options.ways

    def ways(inputs):
        plain = good(inputs)["kl_div_many"]
        bad = options.Way(lambda: plain.call() + off, plain.expected)
        return {"kl_div_many": plain, "bad": bad}

    monkeypatch.setattr(options, "ways", ways)
    entries = options.run_size(SIZE, 0.01)["ways"]
    assert "relative error" in entries["bad"]["wrong"]
    assert "ms" not in entries["bad"]
    assert options._cell(entries["bad"]) == "wrong"


def test_without_the_first_one_there_are_no_ratios(monkeypatch):
    good = options.ways

    def ways(inputs):
        plain, other, *_ = good(inputs).values()
        return {"plain": options.Way(plain.call, plain.expected + 1), "other": other}

    monkeypatch.setattr(options, "ways", ways)
    entry = options.run_size(SIZE, 0.01)["ways"]["other"]
    assert entry["times_as_long"] is None
    assert options._cell(entry) == f"{entry['ms']:.3f}"


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(options, "_QUICK_SECONDS", 0.01)
    assert options.main(["--quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "options.json").read_text())
    assert document["command"] == "python -m bench.options --quick"
    assert document["versions"]["torch"] == torch.__version__
    table = report.render("options", tmp_path)
    assert table in capsys.readouterr().out
    assert all(str(size) in table for size in options.QUICK_SIZES)


def test_without_the_native_kernel_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastkl, "unavailable_backends", lambda: {"native": "not built"})
    assert options.main(["--quick", "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
    assert "nothing timed: native: not built" in capsys.readouterr().err
