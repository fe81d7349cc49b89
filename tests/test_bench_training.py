"""Test the benchmark of a loss and its gradients: what it measures, refuses and prints."""

import functools
import json

import pytest
import torch

import fastkl
from bench import report, training

CASE = training.Training(4, 60)


@pytest.fixture
def quick(monkeypatch):
    """Leave out compilation and extra processes; return the names of fastkl's peers."""
    own = [name for name in ("native", "eager") if fastkl.unavailable_backends().get(name) is None]

    def losses(_, js=False, temperature=1.0):
        textbook = training.js_definition if js else training.definition
        ours = {f"fastkl {name}": training._fastkl(name, js, temperature) for name in own}
        return {"eager torch": functools.partial(textbook, temperature=temperature), **ours}

    monkeypatch.setattr(training, "losses", losses)
    monkeypatch.setattr(training, "_peak", lambda *_: 2**20)
    return [f"fastkl {name}" for name in own]


def test_a_card_has_results_of_its_own(quick, monkeypatch, tmp_path):
    """The CPU's results are not overwritten."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "FAKE, for a test")
    monkeypatch.setattr(training, "run_case", lambda case, *_: {"peers": {}})
    monkeypatch.setattr(training, "markdown", lambda document: document["device"])
    assert training.main(["--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["training_gpu.json"]
    (tmp_path / "training.json").write_text('{"device": "a CPU"}')
    for name, device in (("training", "a CPU"), ("training_gpu", "FAKE, for a test")):
        assert report.render(name, tmp_path) == device


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("js", [False, True])
def test_gradients_are_checked_against_float64(quick, js, temperature):
    leaves = training.replace(CASE, both=True).logits("cpu")
    for loss in training.losses("cpu", js, temperature).values():
        training.step(loss, leaves)()
        assert training.errors(leaves, js, temperature) < 1e-5
    leaves[0].grad *= 1.01
    assert training.errors(leaves, js, temperature) == pytest.approx(0.01, rel=0.01)
    leaves[0].grad = None
    leaves[1].grad *= 0.9
    assert training.errors(leaves, js, temperature) == pytest.approx(0.1, rel=0.01)


def test_a_wrong_gradient_is_not_timed(quick, monkeypatch):
    def wrong(student, teacher):
        return 1.001 * fastkl.kl_div(student, teacher)

    losses = training.losses("cpu")
    monkeypatch.setattr(training, "losses", lambda *_: {**losses, "fastkl wrong": wrong})
    peers = training.run_case(CASE, "cpu", 0.01)["peers"]
    assert "1.0e-03" in peers["fastkl wrong"]["wrong"]
    assert "ms" not in peers["fastkl wrong"]
    assert all("ms" in entry for name, entry in peers.items() if name != "fastkl wrong")


def test_a_peer_that_fails_ends_nothing(quick, monkeypatch, tmp_path, capsys):
    """Not even if it is the first one, with which the others are compared."""

    def failing(*_):
        raise RuntimeError("no C++ compiler")

    losses = training.losses("cpu")
    monkeypatch.setattr(training, "QUICK_GRID", (CASE, CASE))
    monkeypatch.setattr(
        training, "losses", lambda *_: {"torch.compile": failing, **dict(list(losses.items())[1:])}
    )
    assert training.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "FAILED: torch.compile: RuntimeError" in capsys.readouterr().err
    document = json.loads((tmp_path / "training.json").read_text())
    peers = document["cases"][0]["peers"]
    assert "no C++ compiler" in peers["torch.compile"]["failed"]
    assert all(peers[name]["times_faster"] is None for name in quick)
    table = training.markdown(document)
    assert "| failed |" in table
    assert "relative to torch.compile in the first row: not known." in table.replace("\n", " ")


def test_a_full_run_measures_everyones_memory(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "GRID", (CASE, CASE))
    monkeypatch.setattr(training, "_SECONDS", 0.01)
    assert training.main(["--out", str(tmp_path)]) == 0
    for case in json.loads((tmp_path / "training.json").read_text())["cases"]:
        assert len(case["peers"]) == 1 + len(quick)
        assert {entry["peak_bytes"] for entry in case["peers"].values()} == {2**20}


def test_the_command(quick, tmp_path, capsys):
    assert training.main(["--quick", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "training.json").read_text())
    assert document["command"] == "python -m bench.training --quick"
    for name, entry in document["cases"][0]["peers"].items():
        assert entry["peak_bytes"] == (2**20 if name in quick else None)
    table = training.markdown(document)
    assert table in capsys.readouterr().out
    assert all(name in table for name in ("eager torch", *quick))
    assert document["versions"]["torch"] == torch.__version__
    assert [case["both"] for case in document["cases"]] == [False, True, False]
    assert "Jensen-Shannon" in table


def test_the_student_and_the_teacher_are_what_the_case_says():
    student, teacher = training.Training(8, 5000, "bfloat16", 0.5).logits("cpu")
    assert student.shape == teacher.shape == (8, 5000)
    assert student.dtype == teacher.dtype == torch.bfloat16
    assert student.requires_grad
    assert not teacher.requires_grad
    noise = (student.detach().double() - teacher.double()).std().item()
    assert noise == pytest.approx(0.5, rel=0.02)
