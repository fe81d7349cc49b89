"""The command line: what it prints, writes and returns; what it refuses before it trains."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl import backends, cli, demo
from fastkl.backends import native, triton
from fastkl.demo_model import NotLearnedError, Shape, Task, Training

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def no_training(monkeypatch):
    """Make the test fail if the training begins."""

    def begun(*_args, **_keywords):
        pytest.fail("the training was begun")

    monkeypatch.delenv("FASTKL_BACKEND", raising=False)
    monkeypatch.setattr(demo, "run", begun)


@pytest.fixture
def trained(monkeypatch):
    """Replace the training with a result that one might have given."""
    result = demo.Result(
        seed=0,
        backend="eager",
        device="cpu",
        n_vocab=32,
        training=Training(100, 1.0, 2.5),
        heads=[demo.Head(1, 0, 0.5, 0.9, 0.0), demo.Head(0, 0, 0.25, 0.0, 0.9)],
        layers=[(1, 0.5), (0, 0.25)],
        sizes=[0, 1, 2],
        kl=[2.0, 1e-4, 0.0],
        agreement=[0.0, 0.5, 1.0],
        rows=40,
    )
    monkeypatch.setattr(demo, "run", lambda *_args, **_keywords: result)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastkl {fastkl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: command"),
        (["sing"], "invalid choice: 'sing'"),
        (
            ["demo", "--seed", "one"],
            "argument --seed: must be an integer from 0 to 2^63 - 1, got one",
        ),
        (
            ["demo", "--seed", "-1"],
            "argument --seed: must be an integer from 0 to 2^63 - 1, got -1",
        ),
        (["demo", "--out", ""], "argument --out: must name a folder, got an empty text"),
    ],
)
def test_bad_usage_exits_with_2(arguments, complaint, capsys, no_training):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_backends_lists_what_can_run_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(backends, "NAMES", ("quick", "slow"))
    monkeypatch.setattr(fastkl, "unavailable_backends", lambda: {"slow": "no card"})
    assert cli.main(["backends"]) == 0
    assert capsys.readouterr().out.startswith("quick  can run here\nslow   no card\n\n")


def chosen(capsys, code=0):
    """Run the command; return what it says about each device."""
    assert cli.main(["backends"]) == code
    _, lines = capsys.readouterr().out.split("\n\n")
    return dict(line.split(": ", 1) for line in lines.splitlines())


def test_backends_says_which_is_chosen(capsys, monkeypatch):
    monkeypatch.delenv("FASTKL_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "missing", lambda *_: None)
    assert chosen(capsys) == {"CPU tensors": "native"}
    monkeypatch.setattr(native, "missing", lambda *_: "not built")
    assert chosen(capsys) == {"CPU tensors": "eager"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "missing", lambda *_: None)
    assert chosen(capsys) == {"CPU tensors": "eager", "CUDA tensors": "triton"}


def test_backends_honors_the_environment(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTKL_BACKEND", "eager")
    assert chosen(capsys) == {"CPU tensors": "eager (FASTKL_BACKEND)"}
    monkeypatch.setattr(triton, "missing", lambda *_: "no card")
    monkeypatch.setenv("FASTKL_BACKEND", "triton")
    refusal = "none: FASTKL_BACKEND='triton' was requested but cannot be used here: no card"
    assert chosen(capsys, code=1) == {"CPU tensors": refusal}
    monkeypatch.setenv("FASTKL_BACKEND", "abacus")
    assert "FASTKL_BACKEND must be one of" in chosen(capsys, code=1)["CPU tensors"]


def test_a_backend_for_cards_alone_is_no_mistake_where_there_is_one(capsys, monkeypatch):
    def missing(device=None, _dtype=None):
        return "no card's tensors" if device == torch.device("cpu") else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "missing", missing)
    monkeypatch.setenv("FASTKL_BACKEND", "triton")
    assert chosen(capsys) == {
        "CPU tensors": (
            "none: FASTKL_BACKEND='triton' was requested but cannot be used here: no card's tensors"
        ),
        "CUDA tensors": "triton (FASTKL_BACKEND)",
    }


def test_the_package_runs_as_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastkl", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fastkl.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"fastkl {fastkl.__version__}\n"


def test_backends_lists_the_real_ones(capsys):
    assert cli.main(["backends"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(backends.NAMES)
    assert re.search(r"^eager +can run here$", "\n".join(lines), re.MULTILINE)


def test_unknown_backend_is_refused_before_training(tmp_path, capsys, no_training):
    assert cli.main(["demo", "--backend", "abacus", "--out", str(tmp_path / "new")]) == 2
    assert re.search(r"^fastkl: error: backend must be one of .*'abacus'", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_unknown_backend_in_the_environment_is_refused_too(
    tmp_path, capsys, monkeypatch, no_training
):
    monkeypatch.setenv("FASTKL_BACKEND", "abacus")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "FASTKL_BACKEND must be one of" in capsys.readouterr().err


def test_unwritable_folder_is_refused_before_training(tmp_path, capsys, no_training):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "below"
    assert cli.main(["demo", "--out", str(folder), "--backend", "eager"]) == 2
    reason = f"--out: cannot create the folder {folder}: {os.strerror(errno.ENOTDIR)}\n"
    assert capsys.readouterr().err == f"fastkl: error: {reason}"


def test_a_file_is_no_folder(tmp_path, capsys, no_training):
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["demo", "--out", str(tmp_path / "file"), "--backend", "eager"]) == 2
    assert f"must be a folder: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_read_only_folder_is_refused_before_training(tmp_path, capsys, monkeypatch, no_training):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    # Not by chmod: root may write anywhere.
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", refuse)
    assert cli.main(["demo", "--out", str(tmp_path), "--backend", "eager"]) == 2
    reason = f"--out: cannot write to the folder {tmp_path}: Permission denied\n"
    assert capsys.readouterr().err == f"fastkl: error: {reason}"


def test_without_the_extra_demo_says_what_to_install_and_backends_works(tmp_path):
    """Run in a process of its own, in which neither rich nor matplotlib can be imported."""
    program = (
        "import sys; sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from fastkl.cli import main\n"
        "print(main(['backends']), main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(fastkl.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 2"
    assert done.stderr == (
        "fastkl: error: fastkl demo needs rich and matplotlib: "
        'from a clone, pip install -e ".[demo]"\n'
    )
    assert list(tmp_path.iterdir()) == []


def test_not_learning_returns_1_and_writes_nothing(tmp_path, capsys, monkeypatch):
    def give_up(*_args, **_keywords):
        raise NotLearnedError("the model did not learn to copy: 4.0%")

    monkeypatch.setattr(demo, "run", give_up)
    assert cli.main(["demo", "--out", str(tmp_path), "--backend", "eager"]) == 1
    assert "fastkl: error: the model did not learn to copy: 4.0%" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_can_not_be_encoded_is_replaced(encoding, tmp_path, monkeypatch, trained):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    # Neither encoding has ‖, or the folder's Ω.
    out = tmp_path / "Ω"
    assert cli.main(["demo", "--backend", "eager", "--out", str(out)]) == 0
    printed = shown.getvalue().decode(encoding)
    assert "KL(full model ? circuit), a mean over 40 predictions" in printed
    assert f"Wrote {tmp_path / '?' / 'kl_curve.png'}" in printed
    assert '"kl_nats"' in (out / "kl_curve.json").read_text()


def test_results_are_written_before_they_are_shown(tmp_path, capsys, monkeypatch, trained):
    reading, writing = os.pipe()
    run = demo.run

    def close_and_run(*arguments):
        os.close(reading)
        return run(*arguments)

    monkeypatch.setattr(demo, "run", close_and_run)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        # Versions of rich differ in whether they raise SystemExit themselves.
        with pytest.raises(SystemExit) as stop:
            sys.exit(cli.main(["demo", "--backend", "eager", "--out", str(tmp_path)]))
    assert stop.value.code == 1
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl_curve.json", "kl_curve.png"]


def test_results_that_can_not_be_written_are_an_error(tmp_path, capsys, monkeypatch, trained):
    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_write_files", fail)
    assert cli.main(["demo", "--backend", "eager", "--out", str(tmp_path)]) == 1
    reason = f"cannot write to the folder {tmp_path}: No space left on device\n"
    assert capsys.readouterr().err == f"fastkl: error: {reason}"


def test_an_interruption_returns_130(tmp_path, capsys, monkeypatch):
    def interrupt(*_args, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo", "--backend", "eager", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""


def ended(stdout, *arguments, **options):
    """Run the command in a process of its own; return its exit code and its stderr."""
    found = {"PYTHONPATH": str(Path(fastkl.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-m", "fastkl", *arguments],
        env=os.environ | found,
        stdout=stdout,
        check=False,
        **{"stderr": subprocess.PIPE, "text": True, **options},
    )
    return done.returncode, done.stderr


@pytest.fixture
def closed_pipe():
    """Yield the write end of a pipe whose read end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("arguments", [["backends"], ["--version"]])
def test_a_closed_pipe_ends_it_without_a_word(arguments, closed_pipe):
    assert ended(closed_pipe, *arguments) == (1, "")


def test_an_error_that_nobody_reads_still_has_its_code(closed_pipe):
    arguments = ("demo", "--backend", "abacus")
    assert ended(closed_pipe, *arguments, stderr=closed_pipe) == (2, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_has_no_room_is_one_line_of_error():
    with open("/dev/full", "w") as full:
        assert ended(full, "backends") == (1, "fastkl: error: [Errno 28] No space left on device\n")


def test_demo_prints_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    run, results = demo.run, []

    def run_small(seed, place):
        task, shape = Task(n_vocab=32, n_passage=12, n_filler=3), Shape(2, 2, 32)
        results.append(run(seed, place, task=task, shape=shape, n_prompts=40))
        return results[0]

    monkeypatch.setattr(demo, "run", run_small)
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "a" / "[b]"
    assert cli.main(["demo", "--seed", "2", "--backend", "eager", "--out", str(out)]) == 0
    (result,) = results
    printed = capsys.readouterr().out

    assert sorted(path.name for path in out.iterdir()) == ["kl_curve.json", "kl_curve.png"]
    facts = json.loads((out / "kl_curve.json").read_text())
    assert (facts["seed"], facts["backend"], facts["kl_nats"]) == (2, "eager", result.kl)
    assert (out / "kl_curve.png").read_bytes().startswith(PNG_SIGNATURE)

    # The table of circuits has a row per size; the last has no divergence.
    for size, kl, share in zip(result.sizes, result.kl, result.agreement, strict=True):
        shown = "0 exactly" if size == 4 else f"{kl:.4f}" if kl >= 1e-3 else f"{kl:.1e}"
        row = rf"│ +{size} │ +{re.escape(shown)} │ +{share:.1%} │"
        assert re.search(row, printed), (row, printed)
    for head in result.heads:
        assert f"{head.induction:.2f}" in printed
    named = [f"{h.name} ({h.induction:.2f})" for h in result.heads if h.role == "induction"]
    assert named
    assert f"Induction heads: {', '.join(named)}\n" in printed
    assert f"Wrote {out / 'kl_curve.png'} and {out / 'kl_curve.json'}" in printed


class TestPlot:
    """What the picture shows."""

    @pytest.fixture
    def draw(self):
        pytest.importorskip("matplotlib")
        from fastkl.plot import kl_curve  # noqa: PLC0415

        def draw(kl):
            sizes = list(range(len(kl)))
            added = [f"L0H{i}" for i in sizes[1:]]
            return kl_curve(sizes, kl, [0.5] * len(kl), added=added, title="a title")

        return draw

    @staticmethod
    def markers(axes):
        return {
            line.get_markerfacecolor(): list(zip(*line.get_data(), strict=True))
            for line in axes.lines
            if line.get_marker() == "o"
        }

    def test_zeros_stand_below_the_last_decade_and_are_marked(self, draw):
        figure = draw([9.3, 0.5, 2e-4, 0.0])
        top, bottom = figure.axes
        markers = self.markers(top)
        assert markers["white"] == [(3, 0.0)]
        assert [x for x, _ in markers["tab:blue"]] == [0, 1, 2]
        assert [text.get_text() for text in top.texts] == ["exactly 0"]
        figure.canvas.draw()
        ticks = [tick.get_text() for tick in top.get_yticklabels()]
        assert ticks == ["0", "0.0001", "0.001", "0.01", "0.1", "1", "10"]
        # Every point lies inside the axes, and zero is the lowest.
        low, high = top.get_ylim()
        assert low <= 0
        assert high > 9.3
        to_pixels = top.transData.transform
        assert to_pixels((3, 0.0))[1] + 10 < to_pixels((2, 2e-4))[1]
        assert bottom.get_ylabel() == "top-1 agreement"
        assert top.get_ylabel() == "KL(full model ‖ circuit), nats"
        assert top.get_title() == "a title"

    def test_without_zeros_the_axis_is_logarithmic(self, draw):
        top, _ = draw([9.3, 0.5]).axes
        assert top.get_yscale() == "log"
        assert self.markers(top)["tab:blue"] == [(0, 9.3), (1, 0.5)]
        assert not top.texts

    def test_zeros_alone_can_be_drawn(self, draw, tmp_path):
        figure = draw([0.0, 0.0])
        figure.savefig(tmp_path / "zeros.png")
        assert self.markers(figure.axes[0])["white"] == [(0, 0.0), (1, 0.0)]
        assert (tmp_path / "zeros.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_place_is_a_gpu_only_if_there_is_one(monkeypatch):
    monkeypatch.delenv("FASTKL_BACKEND", raising=False)
    device, backend = demo.pick_place("eager")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert backend == "eager"
