"""The benchmarks: peers measure what they claim to, clocks count right, tables are fresh."""

import json
import sys
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import conftest
import pytest
import torch

ROOT = Path(__file__).parents[1]
# Last, so that the fastkl under test stays the installed one.
sys.path.append(str(ROOT))

from bench import cases, cpu, cpu_report, memory, peers, report, timing  # noqa: E402

SMALL = cases.Case(4, 5, 1000)


def linear_rise(start=0.0):
    """A clock that goes on by a second each time it is looked at."""
    ticks = count(start)
    return lambda: float(next(ticks))


# Inputs.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_inputs_are_what_the_case_says(kind, dtype):
    case = replace(SMALL, dtype=dtype, divergences=kind)
    inputs = cases.Inputs(case)
    assert len(inputs.circuits) == case.n_circuits
    for logits in (inputs.reference, *inputs.circuits):
        assert logits.shape == (case.n_rows, case.n_vocabulary)
        assert logits.dtype == getattr(torch, dtype)
        assert logits.is_contiguous()
    total = sum(q.nbytes for q in inputs.circuits)
    assert case.bytes_circuits == total
    assert case.bytes_read == total + inputs.reference.nbytes


def test_a_seed_makes_the_same_logits_and_another_one_others():
    first, again, other = (cases.Inputs(SMALL, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first.circuits, again.circuits))
    assert not any(map(torch.equal, first.circuits, other.circuits))


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("mixed", 0, 20), ("small", 0, 0.1), ("large", 0.1, 60)]
)
def test_divergences_are_of_the_magnitudes_that_the_kind_promises(kind, low, high):
    rows = cases.Inputs(cases.Case(20, 16, 5000, divergences=kind)).rows64
    assert rows.min() > low
    assert rows.max() < high
    if kind == "mixed":
        assert rows.min() < 1e-6
        assert rows.max() > 3


@pytest.mark.parametrize("kind", cases.KINDS)
def test_float64_of_the_benchmarks_agrees_with_the_oracle(kind):
    inputs = cases.Inputs(replace(SMALL, divergences=kind))
    for q, rows in zip(inputs.circuits, inputs.rows64, strict=True):
        expected = conftest.oracle(q, inputs.reference)
        torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-13)


# Peers.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", peers.all_peers(), ids=lambda peer: peer.name)
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_peers_agree_with_the_oracle(peer, dtype):
    case = replace(SMALL, dtype=dtype)
    if reason := peer.missing(case):
        pytest.skip(f"{peer.name}: {reason}")
    inputs = cases.Inputs(case)
    before = [q.clone() for q in (*inputs.circuits, inputs.reference)]
    measure = peer.prepare(inputs)
    relative, absolute = peer.tolerance(case)
    # The second time as the first.
    for values in (measure(), measure()):
        assert all(type(value) is float for value in values)
        expected = [conftest.oracle(q, inputs.reference).mean() for q in inputs.circuits]
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.float64),
            torch.stack(expected),
            rtol=relative,
            atol=absolute,
        )
    assert all(map(torch.equal, before, (*inputs.circuits, inputs.reference)))


def test_the_arithmetic_of_auto_circuit_agrees_with_the_oracle_where_the_package_is_there_too():
    inputs = cases.Inputs(SMALL)
    values = peers._auto_circuit_arithmetic(inputs)()
    assert values == pytest.approx(inputs.expected, rel=1e-4, abs=1e-5)


def constant_peer(name, change):
    """A peer that knows float64's answer, and changes it."""
    return peers.Peer(
        name,
        "for the test",
        lambda inputs: lambda: change(inputs.expected),
        lambda _: None,
        lambda _: (1e-5, 1e-8),
    )


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_a_wrong_result_is_refused(wrong):
    inputs = cases.Inputs(SMALL)
    values = inputs.expected
    peer = constant_peer("p", None)
    assert peer.error(values, inputs) == (0, 0)
    values[2] += wrong
    with pytest.raises(ValueError, match=r"^p: circuit 2 of K=4 R=5 V=1000 float32 mixed measured"):
        peer.error(values, inputs)


# Clocks.


def test_interleaving_calls_everyone_once_a_round_and_times_each_call(monkeypatch):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    monkeypatch.setattr(timing.time, "perf_counter", linear_rise())
    times = timing.interleave(functions, seconds=0, seed=3)
    n = timing.FEWEST_ROUNDS
    assert times == {name: [1.0] * n for name in "abc"}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    # The first one warms up.
    assert len(rounds) == n + 1
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_interleaving_takes_the_time_it_may(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", linear_rise())
    # By this clock a round without calls takes a second.
    assert len(timing.interleave({"a": int}, seconds=21)["a"]) == 20
    assert len(timing.interleave({"a": int}, seconds=1e6)["a"]) == timing.MOST_ROUNDS


def test_ratios_are_medians_of_rounds_not_ratios_of_medians():
    assert timing.ratio([2, 20, 9], [1, 10, 1]) == 2
    assert timing.summarize([0.001, 0.004, 0.002]) == {
        "ms": pytest.approx(2),
        "quartiles_ms": pytest.approx([1, 4]),
    }


@pytest.mark.parametrize("n_circuits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_read_reads_every_byte(n_circuits, dtype):
    tensors = [torch.zeros(2, 3, dtype=dtype) for _ in range(n_circuits)]
    reader = timing.Reader(tensors)
    ways = reader.ways()
    assert [read() for read in ways.values()] == [0, 0]
    for tensor in tensors:
        for i in range(tensor.numel()):
            tensor.view(-1)[i] = 1.0
            assert [read() > 0 for read in ways.values()] == [True, True]
            tensor.zero_()
    reader.close()


@pytest.mark.skipif(memory.missing() is not None, reason=str(memory.missing()))
def test_memory_that_is_freed_before_the_return_is_seen():
    size = 64 * 2**20

    def take_and_free():
        torch.ones(size, dtype=torch.int8)

    take_and_free()
    assert memory.peak(take_and_free) == pytest.approx(size, rel=0.05)
    assert memory.peak(int) < 2**20


@pytest.mark.skipif(memory.missing() is not None, reason=str(memory.missing()))
def test_memory_of_a_peer_is_measured_in_a_process_of_its_own():
    case = cases.Case(2, 64, 50257)
    one = case.bytes_circuits // 2
    # Two log-probabilities, and within F.kl_div exp, difference and product; not the inputs.
    assert memory.peak_of("eager torch", case, 0, 1) == pytest.approx(5 * one, abs=one)
    assert memory.peak_of("fastkl eager", case, 0, 1) < one


# The command and what it writes.


@pytest.fixture(scope="module")
def document():
    """A run of a tiny grid by two peers, a wrong one, and one that is missing."""
    chosen = [
        next(peer for peer in peers.all_peers() if peer.name == "eager torch"),
        next(peer for peer in peers.all_peers() if peer.name == "fastkl eager"),
        constant_peer("fastkl wrong", lambda values: [2 * value for value in values]),
        replace(constant_peer("absent", None), missing=lambda _: "not installed"),
    ]
    grid = (SMALL, replace(SMALL, n_rows=10), replace(SMALL, divergences="small"))
    result = cpu.run(grid, chosen, 0.01, remember=lambda name: name == "fastkl eager")
    # As it comes out of the file.
    return json.loads(json.dumps(result))


def test_the_document_says_everything_about_each_peer(document):
    assert document["baseline"] == "eager torch"
    assert document["seed"] == cases.SEED
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    for case in document["cases"]:
        assert case["rounds"] >= timing.FEWEST_ROUNDS
        assert case["read"]["ms"] > 0
        for name in ("eager torch", "fastkl eager"):
            entry = case["peers"][name]
            assert entry["ms"] > 0
            assert entry["gb_s"] == pytest.approx(case["bytes_read"] / entry["ms"] / 1e6)
            assert 0 <= entry["error_nats"] < 1e-5
        assert case["peers"]["eager torch"]["times_faster"] == 1
        assert case["peers"]["fastkl wrong"].keys() == {"wrong"}
        assert case["peers"]["absent"] == {"skipped": "not installed"}
    first = document["cases"][0]
    assert first | asdict(SMALL) == first
    assert ("peak_bytes" in first["peers"]["fastkl eager"]) == (memory.missing() is None)
    assert document["cases"][2]["rows_below_0.1"] == 1


def test_tables_keep_those_who_lost_and_those_who_could_not(document):
    text = cpu_report.markdown(document)
    for name in document["peers"]:
        assert f"\n| {name} |" in text
    assert "\n| absent | not installed |" in text
    assert "\n| fastkl wrong | wrong |" in text
    assert text.count("\n| 4, ") == len(document["cases"])
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (9, 5)


def test_the_plot_is_drawn(document, tmp_path):
    cpu_report.plot(document, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_cases_on_the_plot_differ_in_one_size_only(document):
    along = cpu_report._along(document["cases"], "n_rows")
    assert [(case["n_rows"], case["divergences"]) for case in along] == [
        (5, "mixed"),
        (10, "mixed"),
    ]


def test_the_command_fails_where_fastkl_is_wrong(document, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "run", lambda *_, **__: document)
    # For the whole process, which goes on.
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: True)
    assert cpu.main(["--quick", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("WRONG: fastkl wrong: circuit 0 of K=4") == 3
    assert json.loads((tmp_path / "cpu.json").read_text()) == document
    for case in document["cases"]:
        case["peers"].pop("fastkl wrong")
    document["peers"].pop("fastkl wrong")
    assert cpu.main(["--quick", "--out", str(tmp_path)]) == 0


def test_the_grid_changes_one_thing_at_a_time():
    main, *others = cpu.GRID
    for case in others:
        changed = [key for key, value in asdict(case).items() if value != asdict(main)[key]]
        assert len(changed) == 1, case
    assert len(set(cpu.GRID)) == len(cpu.GRID)


# The README.


@pytest.fixture
def readme(tmp_path, document):
    (tmp_path / "cpu.json").write_text(json.dumps(document))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n")
    return path


def test_report_rewrites_what_is_between_the_markers_alone(readme, document):
    arguments = ["--readme", str(readme), "--results", str(readme.parent)]
    stale = readme.read_text()
    assert report.main([*arguments, "--check"]) == 1
    assert readme.read_text() == stale
    assert report.main(arguments) == 0
    assert readme.read_text() == (
        f"before\n<!-- bench:cpu -->\n\n{cpu_report.markdown(document)}\n\n"
        "<!-- /bench:cpu -->\nafter\n"
    )
    assert report.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<!-- bench:cpu -->\n",
        "<!-- /bench:cpu -->\n",
        "<!-- bench:cpu -->\n<!-- /bench:gpu -->\n",
        "<!-- bench:cpu -->\n<!-- bench:cpu -->\n<!-- /bench:cpu -->\n",
    ],
)
def test_a_marker_without_a_partner_is_refused(text, readme):
    with pytest.raises(ValueError, match="markers without a partner"):
        report.update(text, readme.parent)


def test_bars_in_cells_are_escaped():
    assert report.table([["a|b", "c"], ["1", "2"]]) == "| a\\|b | c |\n| :-- | --: |\n| 1 | 2 |"


def test_the_readme_is_not_stale():
    text = report.README.read_text(encoding="utf-8")
    assert "<!-- bench:cpu -->" in text
    assert report.update(text) == text
