"""Test the benchmarks: peers measure what they claim to, timing is right, tables are fresh."""

import json
import pickle
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import bench_tasks
import conftest
import pytest
import torch

ROOT = Path(__file__).parents[1]
# Not needed under this repository's pytest configuration, whose pythonpath puts the clone first.
sys.path.append(str(ROOT))

from bench import cases, cpu, cpu_report, facts, memory, peers, reads, report, timing  # noqa: E402
from bench.worker import KEEP_FREED_MEMORY, Worker, WorkerError, call  # noqa: E402

SMALL = cases.Case(4, 5, 1000)
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.fixture(scope="module", autouse=True)
def _workers_find_their_tasks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        yield


def linear_rise(start=0.0):
    """Return a clock that advances by a second at each reading."""
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
    ("kind", "low", "high"),
    [("mixed", 0, 20), ("small", 0, 0.1), ("large", 0.1, 60), ("unlikely", 0, 0.2)],
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


def everything(inputs):
    return [inputs.reference, *inputs.circuits]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_inputs_are_those_that_are_made(dtype):
    case = replace(SMALL, dtype=dtype)
    made = everything(cases.Inputs(case, 5))
    with cases.shared(case, 5) as file:
        mapped, again = (everything(cases.Inputs(case, file=file)) for _ in range(2))
        assert all(map(torch.equal, made, mapped))
        assert {(t.dtype, t.shape, t.stride()) for t in mapped} == {
            (t.dtype, t.shape, t.stride()) for t in made
        }
        # PyTorch allocates at this alignment, and zero-copy libraries require it.
        assert {t.data_ptr() % 64 for t in mapped} == {0}
        for t in mapped:
            t.zero_()
        assert all(map(torch.equal, made, again))
        assert all(map(torch.equal, made, everything(cases.Inputs(case, file=file))))
    assert not file.parent.exists()


def test_shared_inputs_lie_on_the_disk_where_memory_has_no_room(monkeypatch):
    usage = shutil.disk_usage(tempfile.gettempdir())._replace(free=SMALL.bytes_read)
    monkeypatch.setattr(cases.shutil, "disk_usage", lambda _: usage)
    with cases.shared(SMALL) as file:
        assert file.parents[1] == Path(tempfile.gettempdir())


def test_a_worker_maps_the_shared_inputs():
    with cases.shared(SMALL) as file:
        task = partial(peers.prepared, bench_tasks.seen, SMALL, file, 1)
        with Worker(task) as worker:
            reference, circuits, n_threads = worker.ask(call)
    assert all(map(torch.equal, [reference, *circuits], everything(cases.Inputs(SMALL))))
    assert n_threads == 1


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
    # The second call is right too.
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


@pytest.mark.parametrize("peer", peers.all_peers(), ids=lambda peer: peer.name)
def test_peers_can_be_sent_to_a_worker(peer):
    again = pickle.loads(pickle.dumps(peer.prepare))
    assert pickle.dumps(again) == pickle.dumps(peer.prepare)


def peer_that(prepare, name):
    return peers.Peer(name, "for the test", prepare, lambda _: None, lambda _: (1e-5, 1e-8))


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_a_wrong_result_is_refused(wrong):
    inputs = cases.Inputs(SMALL)
    values = inputs.expected
    peer = peer_that(None, "p")
    assert peer.error(values, inputs) == (0, 0)
    values[2] += wrong
    with pytest.raises(ValueError, match=r"^p: circuit 2 of K=4 R=5 V=1000 float32 mixed measured"):
        peer.error(values, inputs)


# Clocks.


def test_interleaving_calls_everyone_once_a_round():
    calls = []
    turns = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    times = timing.interleave(turns, seconds=0, seed=3)
    n = timing.FEWEST_ROUNDS
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    # The first round is a warm-up.
    assert len(rounds) == n + 1
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    # What a turn reports is stored at the index of its round.
    for name in "abc":
        assert times[name] == [4 + 3 * i + rounds[i + 1].index(name) for i in range(n)]


def test_interleaving_takes_the_time_it_may(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", linear_rise())
    # By this clock a round without calls takes a second.
    assert len(timing.interleave({"a": float}, seconds=21)["a"]) == 20
    assert len(timing.interleave({"a": float}, seconds=1e6)["a"]) == timing.MOST_ROUNDS


def test_calls_after_a_pause_do_not_count_until_the_cores_are_awake(monkeypatch):
    now = [0.0]
    a_part = timing._WAKING_SECONDS * 0.4
    took = iter((100.0, 1.0, *(a_part,) * 3, 2.0))
    slept = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    assert timing.seconds_once_awake(lambda: now.append(now.pop() + next(took))) == 1
    assert timing.seconds_after_pause(lambda: now.append(now.pop() + next(took))) == 2
    assert slept == [timing.PAUSE_SECONDS]


@pytest.mark.parametrize(("long", "slow"), [(10.0, 0), (1e-6, 1)])
def test_only_short_functions_are_called_more_than_once_a_turn(monkeypatch, long, slow):
    monkeypatch.setattr(timing, "_LONG_SECONDS", long)
    _, times = timing.take_turns({"a": partial(bench_tasks.slow_first, 0.05)}, {}, 0)
    # With several calls a turn, the one that counts is always of the same kind, here the short one.
    assert len({t > 0.04 for t in times["a"]}) == 1 + slow


def test_functions_take_turns_in_processes_and_go_on_without_those_that_fail():
    n = timing.FEWEST_ROUNDS
    tasks = {
        "good": partial(bench_tasks.constant, 1.0),
        "unprepared": bench_tasks.unprepared,
        "raises": partial(bench_tasks.after, 5, bench_tasks.boom),
        "dies": partial(bench_tasks.after, 2 * n, bench_tasks.die),
        "wrong": partial(bench_tasks.constant, 2.0),
        "also good": partial(bench_tasks.constant, 0.0),
    }

    def check(value):
        if value > 1:
            raise ValueError(f"{value} is too large")
        return {"value": value}

    checks = {name: check for name in tasks if name != "also good"}
    entries, times = timing.take_turns(tasks, checks, 0)
    assert entries == {
        "good": {"value": 1},
        "unprepared": {"failed": "ValueError: not today"},
        "raises": {"failed": "RuntimeError: boom"},
        "dies": {"failed": "the process died with exit status 3"},
        "wrong": {"wrong": "2.0 is too large"},
        "also good": {},
    }
    assert list(times) == ["good", "also good"]
    for seconds in times.values():
        assert len(seconds) == n
        assert all(0 < t < 0.1 for t in seconds)


@pytest.mark.parametrize(
    ("commit", "quoted"),
    [
        ("0123456789abcdef", "0123456789ab"),
        ("0123456789abcdef + changes", "0123456789ab + changes"),
        (None, "unknown"),
    ],
)
def test_tables_say_if_files_differed_from_the_commit(commit, quoted):
    assert facts.short_commit({"commit": commit}) == quoted


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
    ways = [prepare(SimpleNamespace(circuits=tensors)) for prepare in reads.WAYS.values()]
    assert [read() for read in ways] == [0, 0]
    for tensor in tensors:
        for i in range(tensor.numel()):
            tensor.view(-1)[i] = 1.0
            assert [read() > 0 for read in ways] == [True, True]
            tensor.zero_()


# Workers.


def test_a_worker_answers_whatever_its_function_prints():
    with Worker(bench_tasks.talk) as worker:
        assert [worker.ask(call), worker.ask(callable)] == ["answer", True]


@pytest.mark.parametrize(
    ("task", "error"),
    [
        (bench_tasks.unprepared, "^ValueError: not today$"),
        (bench_tasks.unsendable, "local object"),
        (partial(bench_tasks.after, 1, bench_tasks.boom), "^RuntimeError: boom$"),
        (partial(bench_tasks.after, 1, bench_tasks.die), "^the process died with exit status 3$"),
        (bench_tasks.die, "^the process died with exit status 3$"),
    ],
)
def test_a_worker_that_fails_says_so(task, error):
    with Worker(task) as worker, pytest.raises(WorkerError, match=error):
        worker.ask(call)
    assert worker._process.returncode is not None


def test_a_worker_has_its_own_environment(monkeypatch):
    monkeypatch.setenv("FASTKL_TEST", "outside")
    task = partial(bench_tasks.variable, "FASTKL_TEST")
    with Worker(task) as outside, Worker(task, {"FASTKL_TEST": "inside"}) as inside:
        assert [outside.ask(call), inside.ask(call)] == ["outside", "inside"]


@pytest.mark.skipif(not GLIBC, reason="the variables are glibc's")
def test_freed_memory_is_kept_where_it_is_asked_for():
    n_pages = 64 * 2**20 // 4096
    with (
        Worker(bench_tasks.faults) as gives,
        Worker(bench_tasks.faults, KEEP_FREED_MEMORY) as keeps,
    ):
        assert [worker.ask(call) > n_pages * 0.9 for worker in (gives, keeps)] == [True, True]
        assert gives.ask(call) > n_pages * 0.9
        assert keeps.ask(call) < n_pages * 0.1


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
    prepares = {peer.name: peer.prepare for peer in peers.all_peers()}
    with cases.shared(case) as file:
        tasks = {n: partial(peers.prepared, p, case, file, 1) for n, p in prepares.items()}
        # Two log-probabilities, and F.kl_div's exp, difference and product; not the inputs.
        assert memory.peak_of(tasks["eager torch"]) == pytest.approx(5 * one, abs=one)
        assert memory.peak_of(tasks["fastkl eager"]) < one


# The command and what it writes.


@pytest.fixture(scope="module")
def document():
    """Run a tiny grid with two peers, a wrong one, one that breaks, and one that is missing."""
    chosen = [
        next(peer for peer in peers.all_peers() if peer.name == "eager torch"),
        next(peer for peer in peers.all_peers() if peer.name == "fastkl eager"),
        peer_that(partial(bench_tasks.scaled, 2), "fastkl wrong"),
        peer_that(bench_tasks.broken, "fastkl broken"),
        replace(peer_that(None, "absent"), missing=lambda _: "not installed"),
    ]
    result = cpu.run(
        (SMALL, replace(SMALL, divergences="small")),
        chosen,
        0.01,
        n_processes=1,
        remember=lambda name: name == "fastkl eager",
    )
    # A copy, since another case would take ten seconds.
    result["cases"].insert(1, result["cases"][1] | {"n_rows": 10, "divergences": "mixed"})
    # As it is read from the file.
    return json.loads(json.dumps(result))


def test_the_document_says_everything_about_each_peer(document):
    assert document["baseline"] == "eager torch"
    assert document["seed"] == cases.SEED
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    main = document["cases"][0]
    assert ("freed_memory_kept" in main) == GLIBC
    for case in [*document["cases"], *([main["freed_memory_kept"]] if GLIBC else [])]:
        assert case["rounds"] >= timing.FEWEST_ROUNDS
        assert case["read"]["ms"] > 0
        for name in ("eager torch", "fastkl eager"):
            entry = case["peers"][name]
            assert entry["ms"] > 0
            assert entry["times_read"] > 0
            assert 0 <= entry["error_nats"] < 1e-5
        assert case["peers"]["eager torch"]["times_faster"] == 1
        assert case["peers"]["fastkl wrong"].keys() == {"wrong"}
        assert case["peers"]["fastkl broken"] == {"failed": "RuntimeError: boom"}
    for case in document["cases"]:
        for entry in case["peers"].values():
            if "ms" in entry:
                assert entry["gb_s"] == pytest.approx(case["bytes_read"] / entry["ms"] / 1e6)
        assert case["peers"]["absent"] == {"skipped": "not installed"}
    assert main | asdict(SMALL) == main
    remembered = {name for name, entry in main["peers"].items() if "peak_bytes" in entry}
    assert remembered == ({"fastkl eager"} if memory.missing() is None else set())
    assert document["cases"][2]["rows_below_0.1"] == 1


def test_who_fails_in_one_process_is_not_started_again(monkeypatch):
    started = []

    def take_turns(tasks, checks, seconds, *, seed, environment):
        started.append((list(tasks), seed))
        times = {name: [float(len(started)), 10.0 * len(started)] for name in tasks}
        if len(started) == 2:
            del times["b"]
        failed = {"failed": "at last"}
        return {name: {} if name in times else failed for name in tasks}, times

    monkeypatch.setattr(cpu, "take_turns", take_turns)
    tasks = dict.fromkeys(["a", "b", *reads.WAYS])
    result = cpu._in_turns(tasks, {"a": None, "b": None}, "a", 3, 1.0, 7, {})
    assert started == [(list(tasks), 7), (list(tasks), 8), (["a", *reads.WAYS], 9)]
    assert result["peers"]["b"] == {"failed": "at last"}
    assert result["peers"]["a"]["ms"] == 1e3 * 6.5
    assert result["rounds"] == 6


def test_tables_keep_those_who_lost_and_those_who_could_not(document):
    text = cpu_report.markdown(document)
    for name in document["peers"]:
        assert f"\n| {name} |" in text
    assert "\n| absent | not installed |" in text
    assert "\n| fastkl wrong | wrong |" in text
    assert "\n| fastkl broken | failed |" in text
    assert text.count("\n| 4, ") == len(document["cases"])
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (11 if GLIBC else 9, 5)


def test_the_main_table_shows_both_ways_of_malloc_or_the_one_that_there_is(document):
    document = json.loads(json.dumps(document))
    main = document["cases"][0]
    main["freed_memory_kept"] = {
        "read": {"ms": 12.25},
        "peers": {"eager torch": {"ms": 345.0, "times_faster": 1.0}}
        | {"fastkl eager": {"ms": 123.0, "times_faster": 67.0}},
    }
    one_read, _, ours = (
        next(
            line.split(" | ")
            for line in cpu_report.markdown(document).splitlines()
            if start in line
        )
        for start in ("| one read | ", "| eager torch | ", "| fastkl eager | ")
    )
    assert one_read[2] == "12.2"
    assert ours[1:3] == [cpu_report._ms(main["peers"]["fastkl eager"]["ms"]), "123"]
    assert ours[6] == "67.0"
    assert "MALLOC_TRIM_THRESHOLD_=-1" in cpu_report.markdown(document)
    del main["freed_memory_kept"]
    text = cpu_report.markdown(document)
    assert "kept" not in text
    assert "MALLOC" not in text


def test_a_peak_that_could_not_be_measured_is_said(document, monkeypatch):
    def fail(_):
        raise WorkerError("no memory left")

    monkeypatch.setattr(memory, "peak_of", fail)
    assert cpu._peak(None) == {"peak_failed": "no memory left"}
    document = json.loads(json.dumps(document))
    document["cases"][0]["peers"]["eager torch"]["peak_failed"] = "no memory left"
    assert " | failed | " in cpu_report.markdown(document)


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
    assert cpu.main(["--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.count("WRONG: fastkl wrong: circuit 0 of K=4") == 3 + GLIBC
    assert printed.count("FAILED: fastkl broken: RuntimeError: boom\n") == 3 + GLIBC
    assert json.loads((tmp_path / "cpu.json").read_text()) == document
    settings = [*document["cases"]]
    settings += [case["freed_memory_kept"] for case in settings if "freed_memory_kept" in case]
    for name, status in (("fastkl wrong", 1), ("fastkl broken", 0)):
        for setting in settings:
            setting["peers"].pop(name)
        document["peers"].pop(name)
        assert cpu.main(["--quick", "--out", str(tmp_path)]) == status


def test_the_grid_changes_one_thing_at_a_time():
    main, *others = cpu.GRID
    for case in others:
        changed = [key for key, value in asdict(case).items() if value != asdict(main)[key]]
        assert len(changed) == 1, case
    assert len(set(cpu.GRID)) == len(cpu.GRID)


# The pages.


@pytest.fixture
def readme(tmp_path, document):
    (tmp_path / "cpu.json").write_text(json.dumps(document))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n")
    return path


def test_report_rewrites_what_is_between_the_markers_alone(readme, document):
    arguments = ["--pages", str(readme), "--results", str(readme.parent)]
    stale = readme.read_text()
    assert report.main([*arguments, "--check"]) == 1
    assert readme.read_text() == stale
    assert report.main(arguments) == 0
    assert readme.read_text() == (
        f"before\n<!-- bench:cpu -->\n\n{cpu_report.markdown(document)}\n\n"
        "<!-- /bench:cpu -->\nafter\n"
    )
    assert report.main([*arguments, "--check"]) == 0


def test_report_writes_no_page_unless_it_can_write_all(readme, tmp_path, monkeypatch, capsys):
    (tmp_path / "roofline.json").write_text("{}")
    other = tmp_path / "other.md"
    other.write_text("<!-- bench:roofline -->\n<!-- /bench:roofline -->\n")
    monkeypatch.setitem(sys.modules, "bench.roofline", None)
    stale = readme.read_text()
    assert report.main(["--pages", str(readme), str(other), "--results", str(tmp_path)]) == 2
    assert "nothing written: the tables need bench.roofline" in capsys.readouterr().err
    assert readme.read_text() == stale


def test_report_shows_another_machine_beside(tmp_path, document):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cpu.json").write_text(json.dumps(document))
    text = "".join(f"<!-- bench:{n} -->\n<!-- /bench:{n} -->\n" for n in ("cpu", "other/cpu"))
    assert report.update(text, tmp_path) == (
        "<!-- bench:cpu -->\n\nNot measured yet.\n\n<!-- /bench:cpu -->\n"
        f"<!-- bench:other/cpu -->\n\n{cpu_report.markdown(document)}\n\n<!-- /bench:other/cpu -->\n"
    )


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


@pytest.mark.parametrize("page", report.PAGES, ids=lambda path: path.parent.name or "root")
def test_no_page_is_stale(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- bench:" in text
    assert report.update(text) == text


def test_every_result_is_on_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    for path in report.RESULTS.rglob("*.json"):
        name = path.relative_to(report.RESULTS).with_suffix("").as_posix()
        assert f"<!-- bench:{name} -->" in pages
