"""Test `python -m bench.gpu`, with a made-up card in place of the calls that need a card."""

import json

import pytest
import torch

import fastkl
from bench import facts, gpu

CASE = gpu.Case(n_rows=3, n_cols=500, dtype="float32", n_circuits=4)
MIB = 2**20


class MadeUpCard:
    """A stand-in for `gpu.Cuda`, which computes on the CPU; its times mean nothing."""

    device = torch.device("cpu")
    cache_bytes = 3 * CASE.needed_bytes
    free = 64 * MIB

    def __init__(self):
        self.timed = []

    def free_bytes(self):
        return self.free

    def copy_bandwidth(self):
        return 1e12

    def describe(self):
        return {"name": "FAKE, for a test", "driver": None, "cache_bytes": self.cache_bytes}

    def time(self, measure, inputs):
        self.timed.append(len(inputs))
        for circuits, reference in inputs:
            measure(circuits, reference)
        return gpu.Timing(1e-6, fastest=0.9e-6, slowest=2e-6, call_seconds=3e-6, peak_bytes=10)


def peer(name="textbook", prepare=lambda: gpu.textbook, reason=None, tolerance=(1e-3, 1e-5)):
    return gpu.Peer(name, "for a test", prepare, lambda: reason, 4, *tolerance)


def fastkl_on_the_cpu(circuits, reference):
    return fastkl.kl_div_many(circuits, reference, backend="eager")


def wrong(circuits, reference):
    return gpu.textbook(circuits, reference) + 1e-2


def not_a_number(circuits, reference):
    return gpu.textbook(circuits, reference) * torch.nan


def test_grid_is_what_is_promised():
    cases = gpu.grid()
    assert len(cases) == len(set(cases)) == 6 * 4 * 2 * 3
    assert gpu.Case(20480, 256000, "bfloat16", 40) in cases
    assert gpu.grid([1], [7], ["float16"], [2]) == [gpu.Case(1, 7, "float16", 2)]


def test_bytes():
    assert gpu.Case(16, 50257, "float32", 1).needed_bytes == 2 * 16 * 50257 * 4
    assert gpu.Case(16, 50257, "bfloat16", 40).needed_bytes == 41 * 16 * 50257 * 2


def test_copies_outlast_the_cache():
    for cache in (6 * MIB, 50 * MIB, 256 * MIB):
        for case in gpu.grid():
            copies = case.copies(cache)
            assert copies >= 1
            assert copies * case.needed_bytes >= gpu.CACHE_TURNOVER * cache
            # No more copies than necessary.
            assert copies == 1 or (copies - 1) * case.needed_bytes < gpu.CACHE_TURNOVER * cache


def test_what_does_not_fit():
    large = gpu.Case(20480, 256000, "float32", 40)
    reason = gpu.too_large(large, peer(), free_bytes=80 * 10**9, cache_bytes=50 * MIB)
    # 41 tensors and 4 temporaries of 20480 · 256000 · 4 bytes.
    assert reason == "needs about 943.7 GB, 72.0 GB may be used"
    small = gpu.Case(16, 50257, "float32", 40)
    assert gpu.too_large(small, peer(), free_bytes=80 * 10**9, cache_bytes=50 * MIB) is None
    # All copies count: one input would fit, but not as many as outlast the cache.
    tiny = gpu.Case(1, 50257, "float32", 1)
    assert gpu.too_large(tiny, peer(), free_bytes=100 * MIB, cache_bytes=50 * MIB)


def test_datasheet():
    assert gpu.datasheet_bandwidth("NVIDIA H100 80GB HBM3") == 3.35e12
    assert gpu.datasheet_bandwidth("NVIDIA A100-SXM4-80GB") == 2.039e12
    assert gpu.datasheet_bandwidth("NVIDIA GeForce RTX 3090") == 0.936e12
    assert gpu.datasheet_bandwidth("NVIDIA GeForce RTX 3090 Ti") is None
    assert gpu.datasheet_bandwidth("NVIDIA H200") == 4.8e12
    assert gpu.datasheet_bandwidth("NVIDIA GH200 480GB") is None


def test_inputs_are_seeded_and_differ():
    circuits, reference = gpu.make_inputs(CASE, "cpu")
    again, _ = gpu.make_inputs(CASE, "cpu")
    assert len(circuits) == 4
    assert all(c.shape == reference.shape == (3, 500) for c in circuits)
    assert all(torch.equal(a, b) for a, b in zip(circuits, again, strict=True))
    exact = gpu.exact(circuits, reference)
    assert (exact.diff() > 0).all()
    # The block size changes nothing.
    torch.testing.assert_close(gpu.exact(circuits, reference, block=2), exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_the_peers_agree(dtype):
    case = gpu.Case(3, 500, dtype, 4)
    circuits, reference = gpu.make_inputs(case, "cpu")
    expected = gpu.exact(circuits, reference)
    for measure in (gpu.textbook, fastkl_on_the_cpu):
        absolute, relative = gpu.check(peer(), case, measure(circuits, reference), expected)
        assert 0 <= absolute < 1e-5
        assert 0 <= relative < 1e-3


@pytest.mark.parametrize("measure", [wrong, not_a_number])
def test_a_wrong_peer_is_not_timed(measure):
    card = MadeUpCard()
    bad = peer("bad", lambda: measure)
    ((case, who, outcome),) = gpu.measure_cases([CASE], [bad], card)
    assert (case, who) == (CASE, bad)
    assert outcome.startswith("wrong, so not timed: bad is off by up to")
    assert card.timed == []


def test_what_is_skipped_says_why():
    card = MadeUpCard()
    card.free = 100
    absent = peer("absent", reason="absent is not installed")
    outcomes = [o for _, _, o in gpu.measure_cases([CASE], [peer(), absent], card)]
    assert outcomes[0].startswith("needs about")
    assert outcomes[1] == "absent is not installed"
    assert card.timed == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out.\nAnd much more."), "out of memory: CUDA out."),
        (RuntimeError("no such kernel\nat all"), "failed: RuntimeError: no such kernel"),
        (AssertionError(), "failed: AssertionError: "),
    ],
)
@pytest.mark.parametrize("when", ["prepared", "called"])
def test_an_error_ends_one_peer_alone(error, said, when):
    def fails(*_):
        raise error

    peers = [peer("bad", fails if when == "prepared" else lambda: fails), peer("good")]
    first, second = [o for _, _, o in gpu.measure_cases([CASE], peers, MadeUpCard())]
    assert first == said
    assert second["peer"] == "good"


def test_a_quick_run_is_a_few_cases():
    args = gpu._arguments(["--quick"])
    assert (args.rows, args.vocabularies) == (gpu.QUICK_ROWS, (50257,))
    assert args.peers == ("fastkl", "eager")
    assert gpu._arguments(["--quick", "--rows", "7"]).rows == [7]
    args = gpu._arguments([])
    assert (args.rows, args.vocabularies) == (gpu.ROWS, gpu.VOCABULARIES)
    assert args.peers == [peer.name for peer in gpu.PEERS]


@pytest.fixture
def made_up_card(monkeypatch):
    monkeypatch.setattr(gpu, "Cuda", MadeUpCard)
    monkeypatch.setattr(gpu, "missing_card", lambda: None)


def run(tmp_path):
    sizes = ["--rows", "1", "3", "--vocabularies", "50257", "--circuits", "1", "4"]
    return gpu.main([*sizes, "--dtypes", "float32", "--out", str(tmp_path)])


def test_a_quick_run_is_not_written_over_the_results(made_up_card, monkeypatch):
    """A quick run writes nothing unless it is told where to."""
    monkeypatch.setattr(gpu, "PEERS", (peer("eager"),))
    monkeypatch.setattr(gpu, "write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(gpu, "plot", lambda *_: pytest.fail("drawn"))
    sizes = ["--rows", "1", "--circuits", "1", "--dtypes", "float32"]
    assert gpu.main(["--quick", *sizes]) == 0


def test_a_whole_run(made_up_card, monkeypatch, tmp_path, capsys):
    peers = (
        peer("fastkl", lambda: fastkl_on_the_cpu, tolerance=(1e-5, 1e-8)),
        peer("eager"),
        peer("compile", lambda: wrong),
        peer("liger", reason="liger_kernel is not installed"),
    )
    monkeypatch.setattr(gpu, "PEERS", peers)
    assert run(tmp_path) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["format"] == gpu.FORMAT
    assert document["device"]["name"] == "FAKE, for a test"
    assert document["command"].startswith("python -m bench.gpu --rows 1 3")
    assert document["versions"]["torch"] == torch.__version__
    assert document["copy_gb_per_s"] == 1000
    assert document["datasheet_gb_per_s"] is None
    assert [r["peer"] for r in document["results"]] == ["fastkl", "eager"] * 4
    assert {s["reason"].split(":")[0] for s in document["skipped"]} == {
        "wrong, so not timed",
        "liger_kernel is not installed",
    }
    first = document["results"][0]
    assert first["needed_bytes"] == 2 * 50257 * 4
    # Each timing is a microsecond.
    assert first["gb_per_s"] == pytest.approx(2 * 50257 * 4 / 1e-6 / 1e9)
    assert first["share_of_copy"] == pytest.approx(first["gb_per_s"] / 1000)
    assert first["share_of_datasheet"] is None
    assert first["max_absolute_error"] <= 1e-5
    assert first["peak_bytes"] == 10
    assert first["call_microseconds"] == pytest.approx(3)
    assert document["commit"] == facts.commit()
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"
    assert "skipped: liger_kernel is not installed" in capsys.readouterr().out
    table = gpu.markdown(document)
    assert table.count("\n| fastkl |") == table.count("\n| eager |") == 4
    assert "FAKE, for a test" in table
    assert "8 skipped" in table


def fails(circuits, reference):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("bad", [wrong, fails])
def test_a_run_fails_if_fastkl_does(made_up_card, monkeypatch, tmp_path, capsys, bad):
    """The document keeps what the others measured, and also lists what was wrong."""
    monkeypatch.setattr(gpu, "PEERS", (peer("fastkl", lambda: bad), peer("eager")))
    assert run(tmp_path) == 1
    assert "fastkl is wrong, or fails" in capsys.readouterr().err
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert {r["peer"] for r in document["results"]} == {"eager"}
    assert {s["peer"] for s in document["skipped"]} == {"fastkl"}


def test_what_is_measured_is_written_at_once(made_up_card, monkeypatch, tmp_path):
    calls = []

    def interrupted(circuits, reference):
        calls.append(len(reference))
        if len(reference) == 3:
            raise KeyboardInterrupt
        return gpu.textbook(circuits, reference)

    monkeypatch.setattr(gpu, "PEERS", (peer("eager", lambda: interrupted),))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert [r["n_rows"] for r in document["results"]] == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_written(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert "nothing timed, nothing written" in error
    assert gpu.missing_card() in error
