"""The peers under pytest-benchmark, on the main case of `python -m bench.cpu`.

    pytest bench/bench_kl_div.py --benchmark-enable

Without --benchmark-enable each peer is only checked. Unlike in `python -m bench.cpu`, all peers run
in one process, which keeps freed memory.
"""

from dataclasses import asdict

import pytest

from bench import reads
from bench.cases import Case, Inputs
from bench.peers import all_peers
from bench.timing import keep_freed_memory

CASES = (Case(), Case(dtype="bfloat16"))
ROUNDS = 9


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_is_kept():
    keep_freed_memory()


@pytest.fixture(scope="module", params=CASES, ids=str)
def inputs(request):
    return Inputs(request.param)


def timed(benchmark, function, n_bytes, case):
    """Time a function after a warm-up, and record the bytes that it has to read."""
    benchmark.group = str(case)
    benchmark.extra_info.update(asdict(case), bytes=n_bytes)
    result = benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["gb_s"] = n_bytes / benchmark.stats.stats.median / 1e9
    return result


@pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.name)
def test_peer(benchmark, inputs, peer):
    if reason := peer.missing(inputs.case):
        pytest.skip(reason)
    measure = peer.prepare(inputs)
    # Raises ValueError if the result is wrong.
    absolute, relative = peer.error(measure(), inputs)
    benchmark.extra_info.update(error_nats=absolute, error_relative=relative)
    again = timed(benchmark, measure, inputs.case.bytes_read, inputs.case)
    peer.error(again, inputs)


@pytest.mark.parametrize("way", reads.WAYS)
def test_one_read(benchmark, inputs, way):
    timed(benchmark, reads.WAYS[way](inputs), inputs.case.bytes_circuits, inputs.case)
