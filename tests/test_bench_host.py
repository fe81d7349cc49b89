"""Test the benchmark of the host's time: its counts and output, with an idle driver."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Run in a process of its own: its driver is permanent, and its kernels are not interpreted."""
    out = tmp_path_factory.mktemp("host")
    done = subprocess.run(
        [sys.executable, "-m", "bench.host", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "host.json").read_text())
    return found | {"printed": done.stdout}


def test_launches_are_few(document):
    """One launch per 32 circuits for the table, one per group size, and one to finish."""
    launches = {case["n_circuits"]: case["launches"] for case in document["cases"]}
    assert launches == {1: 3, 4: 3, 20: 3, 200: 9}


def test_times(document):
    for case in document["cases"]:
        assert 0 < case["us"] < case["us_with_backward"]
    # Many circuits in a call cost more than one, and less than as many calls.
    one, *_, many = document["cases"]
    assert one["us"] < many["us"] < 100 * one["us"]
    # 20 circuits in groups of four read 25 tensors: the reference once per group.
    assert document["cases"][2]["us_of_memory"] == pytest.approx(
        25 * 64 * 50257 * 4 / 3.35e12 * 1e6
    )


def test_the_table(document):
    assert document["command"] == "python -m bench.host --quick"
    for text in ("| 20 | 3 | ", "launches nothing; no card was used", "H100 SXM", "triton 3."):
        assert text in document["printed"]
