"""The compiled kernel: its levels, its threads, its exponential, interruption and memory."""

import ctypes
import functools
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_matches, oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastkl
from fastkl import backends
from fastkl.backends import native

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REASON = native.missing()
LEVELS = native._extension().levels() if REASON is None else []

needs_native = pytest.mark.skipif(REASON is not None, reason=f"native: {REASON}")
each_level = pytest.mark.parametrize(
    "level", LEVELS or [pytest.param("none", marks=pytest.mark.skip(reason=f"native: {REASON}"))]
)


def python(*arguments, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
        env={**os.environ, **environment},
    )


@needs_native
def test_it_is_the_default_on_the_cpu(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends.triton, "missing", lambda *_: "not wanted")
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.choose(None, cpu, dtype) is native
    assert backends.choose(None, cpu, torch.float64).NAME == "eager"
    assert "float64" in native.missing(cpu, torch.float64)
    assert "cuda" in native.missing(torch.device("cuda"), torch.float32)


@each_level
def test_differences_beyond_float32(monkeypatch, level):
    """Differences of finite logits may be infinite: in identical rows, weight 0 takes them out."""
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    rows = torch.randn(3, 137)
    rows[:, 81], rows[:, 89], rows[:, 126] = 3e38, -3e38, -1e4
    assert (
        fastkl.kl_div(rows.clone(), rows, reduction="none", backend="native").tolist() == [0.0] * 3
    )


@needs_native
def test_levels_are_named_in_any_case(monkeypatch):
    monkeypatch.setenv(native.LEVEL_VARIABLE, "BASELINE")
    assert "native" in fastkl.available_backends()
    rows = torch.zeros(1, 3)
    assert fastkl.kl_div(rows, rows, backend="native") == 0


@needs_native
def test_an_unknown_level_is_an_error_and_no_fallback(monkeypatch):
    monkeypatch.setenv(native.LEVEL_VARIABLE, "mmx")
    message = f"{native.LEVEL_VARIABLE} asks for the instruction-set level 'mmx'"
    assert message in fastkl.unavailable_backends().get("native")
    rows = torch.zeros(1, 3)
    with pytest.raises(RuntimeError, match=message):
        fastkl.kl_div(rows, rows, backend="native")
    monkeypatch.setattr(backends.triton, "missing", lambda *_: "not wanted")
    with pytest.raises(RuntimeError, match=message):
        fastkl.kl_div(rows, rows)
    assert fastkl.kl_div(rows, rows, backend="eager") == 0


@pytest.mark.parametrize(
    "level",
    LEVELS[1:]
    or [pytest.param("none", marks=pytest.mark.skip(reason=REASON or "one level alone here"))],
)
def test_the_suite_at_the_other_levels(level):
    """Run parity, laws, edge cases and shapes again, which otherwise run at the best level."""
    files = [f"tests/test_{name}.py" for name in ("parity", "laws", "edge_cases", "shapes")]
    options = ("-q", "-x", "-k", "native", "-p", "no:cacheprovider")
    result = python("-m", "pytest", *options, *files, **{native.LEVEL_VARIABLE: level})
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 20
    assert "skipped" not in result.stdout


@each_level
def test_exponential_is_within_its_bound(level):
    """Check the bound in functions.hpp on every 97th float32 of the range, of both signs."""

    def bits(x):
        return int(torch.tensor(x).view(torch.int32))

    for sign, largest in ((-1, 87.0), (1, 88.0)):
        x = torch.arange(bits(1e-12), bits(largest), 97, dtype=torch.int32)
        x = sign * x[: len(x) // 16 * 16].view(torch.float32)
        y = torch.empty_like(x)
        native._extension().exponential(level, x.data_ptr(), y.data_ptr(), len(x))
        exact = x.double().exp()
        error = (y.double() - exact).abs() / exact
        assert error.max() < 4.2e-7
        assert error[x.abs() < 16].max() < 2.2e-7
    one = torch.zeros(16)
    native._extension().exponential(level, one.data_ptr(), one.data_ptr(), 16)
    assert (one == 1).all()


@each_level
def test_logarithm_is_within_its_bound(level):
    """Check the bound in functions.hpp on every 997th float32, for x and for a precise x - 1."""

    def bits(x):
        return int(torch.tensor(x).view(torch.int32))

    def error(x, rest, exact):
        x, rest = (t[: len(t) // 16 * 16] for t in (x, rest))
        y = torch.empty_like(x)
        addresses = (t.data_ptr() for t in (x, rest, y))
        native._extension().logarithm(level, *addresses, len(x))
        exact = exact[: len(x)]
        return ((y.double() - exact).abs() / exact.abs().clamp(min=1e-37)).max()

    x = torch.arange(bits(1.2e-38), bits(3.4e38), 997, dtype=torch.int32).view(torch.float32)
    assert error(x, x - 1, x.double().log()) < 1.5e-7
    for sign, largest in ((-1, 0.999), (1, 1.0)):
        rest = sign * torch.arange(bits(1e-30), bits(largest), 997, dtype=torch.int32).view(
            torch.float32
        )
        # From √½ to √2 the logarithm is that of 1 + rest; beyond, it is that of the rounded sum.
        near = rest[(rest > -0.2928) & (rest < 0.4142)]
        assert error(1 + near, near, near.double().log1p()) < 1.5e-7
        far = rest[(rest < -0.2930) | (rest > 0.4143)]
        assert error(1 + far, far, (1 + far).double().log()) < 1.5e-7
    one, zero = torch.ones(16), torch.zeros(16)
    assert error(one, zero, torch.zeros(16, dtype=torch.float64)) == 0


@each_level
@pytest.mark.parametrize(("wide", "reach"), [(False, 0.5), (True, 3.0)])
def test_series_of_phi_is_within_its_bound(level, wide, reach):
    """Check the bound in functions.hpp between -reach and reach."""
    d = torch.linspace(-reach, reach, 1_000_001)[1:-1][:999_984]
    y = torch.empty_like(d)
    native._extension().phi_over_square(level, d.data_ptr(), y.data_ptr(), len(d), wide)
    x = d.double()
    by_definition = (torch.expm1(-x) + x) / x**2
    near_0 = 1 / 2 - x / 6 + x**2 / 24 - x**3 / 120 + x**4 / 720 - x**5 / 5040
    exact = torch.where(x.abs() < 1e-2, near_0, by_definition)
    assert ((y.double() - exact).abs() / exact).max() < 9.1e-7


@needs_native
@pytest.mark.parametrize(
    ("n_circuits", "n_rows", "n_cols"), [(3, 1, 151936), (2, 5, 70001), (4, 40, 33000), (1, 1, 7)]
)
def test_bits_do_not_depend_on_threads(generator, n_circuits, n_rows, n_cols):
    reference = torch.randn(n_rows, n_cols, generator=generator) * 3
    circuits = [
        reference + noise * torch.randn(reference.shape, generator=generator)
        for noise in (0.01, 0.4, 3, 1e-4)[:n_circuits]
    ]
    before = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            results.append(native.kl_rows(circuits, reference))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    # Other rows and circuits do not change them either: threads share a row alone in another way.
    alone = native.kl_rows([circuits[-1][-1:]], reference[-1:])
    assert torch.equal(alone, results[0][-1:, -1:])


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_look(monkeypatch, generator, level, dtype):
    """No, few or many tokens lie beyond each polynomial's reach; every look follows every other."""
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    reference = torch.randn(2, 50257, generator=generator) * 3
    noises = [0.1, 0.17, 0.25, 0.5, 0.75, 1.0]
    steps = torch.tensor(noises)[torch.randint(6, (14, 2, 13), generator=generator)]
    noise = torch.randn(50, 2, 50257, generator=generator)
    # The same noise all along; tails as heavy as those of Student's t with 3 degrees of freedom;
    # another noise in each piece.
    noise[:6] *= torch.tensor(noises)[:, None, None]
    chi = torch.randn(3, 30, 2, 50257, generator=generator).square().mean(0).sqrt()
    noise[6:36] *= torch.logspace(-2, 0, 30)[:, None, None] / chi
    noise[36:] *= steps.repeat_interleave(4000, -1)[..., :50257]
    circuits = (reference + noise).to(dtype)
    reference = reference.to(dtype)
    found = native.kl_rows(list(circuits), reference)
    for k, circuit in enumerate(circuits):
        expected = oracle(circuit, reference)
        assert ((found[k] - expected).abs() <= 0.3 * (1e-5 * expected + 1e-8)).all()


@each_level
@pytest.mark.parametrize("seed", [182, 559])
def test_terms_of_few_kinds(monkeypatch, level, seed):
    """Their rounding errors add up.

    Float32 sums take 16 exponentials a lane; with 32, one row had 0.58 of the tolerance.
    """
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.rand(3, 64, 1, generator=generator) * 5 - 2.5
    share = torch.rand(64, 1, generator=generator) ** 3
    high = torch.rand(64, 1, generator=generator) * 6
    u, v = torch.rand(2, 64, 10850, generator=generator)
    reference = torch.where(v < 0.01, high, 0.0)
    circuit = reference - kinds[0].where(u < share, kinds[1].where(u < 0.97, kinds[2]))
    found, expected = native.kl_rows([circuit], reference)[0], oracle(circuit, reference)
    assert ((found - expected).abs() <= 0.35 * (1e-5 * expected + 1e-8)).all()


@each_level
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_bits_do_not_depend_on_who_shares_a_look(monkeypatch, generator, level, temperature):
    """Circuits that need the same look share it; a circuit's bits are the same in any group."""
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    reference = torch.randn(2, 20011, generator=generator) * 3
    noises = (0.2, 0.2, 0.25, 0.2, 0.3, 1e-3, 1e-3, 3.0, 0.0, 1e-3, 3.0, 3.0, 4.0, 3.0, 3.0, 0.2)
    circuits = [
        reference + noise * torch.randn(reference.shape, generator=generator) for noise in noises
    ]
    circuits[4] = circuits[4].bfloat16()
    circuits[6] += 10
    circuits[15] += 10
    together = native.kl_rows(circuits, reference, temperature)
    for n in (1, 2, 3):
        for k in range(len(circuits) - n + 1):
            some = native.kl_rows(circuits[k : k + n], reference, temperature)
            assert torch.equal(some, together[k : k + n])
    order = torch.randperm(len(circuits), generator=generator).tolist()
    shuffled = native.kl_rows([circuits[k] for k in order], reference, temperature)
    assert torch.equal(shuffled, together[order])


@needs_native
def test_logits_near_the_limits_of_float32(generator):
    """The lowest finite logit masks tokens on one side or both, over whole slices of a row."""
    lowest = torch.finfo(torch.float32).min
    reference = torch.randn(6, 70000, generator=generator)
    circuit = reference + torch.randn(reference.shape, generator=generator)
    reference[0, 7:] = lowest
    reference[1, :-7] = circuit[1, :-9] = lowest
    reference[2] = 1e38
    reference[3] *= 1e30
    circuit[4, 5:] = -1e4
    circuit[5, 65000] = -1e36

    def exact(p, q):
        # Unlike the oracle, subtract the maxima first: next to 1e38 a log-sum-exp keeps no sum.
        log_p, log_q = (
            (x - x.amax(-1, keepdim=True)) - (x - x.amax(-1, keepdim=True)).logsumexp(-1, True)
            for x in (p.double(), q.double())
        )
        return torch.where(log_p > -700, log_p.exp() * (log_p - log_q), 0.0).sum(-1)

    for q, p in ((circuit, reference), (reference[2:], circuit[2:])):
        divergence = native.kl_rows([q], p)[0]
        torch.testing.assert_close(divergence.double(), exact(p, q), rtol=1e-5, atol=1e-8)


@needs_native
@pytest.mark.parametrize("n_cols", [322, 5003])
def test_a_huge_logit_in_the_last_tokens(generator, n_cols):
    """The last tokens are padded: their exponential is clamped, so its sum is large but finite."""
    reference = torch.randn(1, n_cols, generator=generator)
    circuit = reference.clone()
    circuit[0, -1] = 1e34
    others = reference.double().softmax(-1)[:, :-1].sum(-1)
    divergence = native.kl_rows([circuit], reference)[0].double()
    torch.testing.assert_close(divergence, others * 1e34, rtol=1e-5, atol=0.0)


@needs_native
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32),
    n_rows=st.integers(1, 4),
    n_cols=st.one_of(
        st.integers(1, 70),
        st.integers(71, 3000),
        st.sampled_from([12288, 12289, 14336, 14337, 32769]),
    ),
    scale=st.sampled_from([1.0, 3.0]),
    noises=st.lists(st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 1.0, 5.0]), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    gaps=st.lists(st.integers(0, 33), min_size=5, max_size=5),
    offsets=st.lists(st.integers(0, 33), min_size=5, max_size=5),
    specials=st.lists(
        st.sampled_from(["both", "p", "q", "nan p", "nan q", "inf p", "inf q"]), max_size=3
    ),
)
def test_fuzz(seed, n_rows, n_cols, scale, noises, dtypes, gaps, offsets, specials):
    """Strides, offsets, sizes, dtypes, -inf, NaN and inf, against the float64 oracle."""
    generator = torch.Generator().manual_seed(seed)

    def placed(rows, i):
        storage = torch.full((offsets[i] + n_rows * (n_cols + gaps[i]),), math.nan, dtype=dtypes[i])
        view = storage[offsets[i] :].as_strided((n_rows, n_cols), (n_cols + gaps[i], 1))
        return view.copy_(rows)

    def some():
        row = int(torch.randint(n_rows, (), generator=generator))
        return row, torch.rand(n_cols, generator=generator) < 0.3

    p = torch.randn(n_rows, n_cols, generator=generator) * scale
    qs = [p + noise * torch.randn(p.shape, generator=generator) for noise in noises]
    for special in specials:
        row, tokens = some()
        value = {"nan": math.nan, "inf": math.inf}.get(special.split()[0], -math.inf)
        if special.endswith("p") or special == "both":
            p[row, tokens] = value
        if special.endswith("q") or special == "both":
            for q in qs:
                q[row, tokens] = value
    reference = placed(p, 4)
    circuits = [placed(q, i) for i, q in enumerate(qs)]
    before = [t.clone() for t in (reference, *circuits)]

    divergence = native.kl_rows(circuits, reference)
    for k, circuit in enumerate(circuits):
        assert_matches(divergence[k], oracle(circuit, reference))
        same = (circuit.float() == reference.float()).all(-1) & divergence[k].isfinite()
        assert (divergence[k][same] == 0).all()
    for tensor, copy in zip((reference, *circuits), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))


LONG_CALL = """
import gc, signal, sys, threading, time, torch
from fastkl.backends import native
# A garbage collection over 100,000 circuits' addresses would take longer than the test waits.
gc.disable()
# SIGINT is ignored if a shell without job control started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
rows = torch.randn({rows}, 151936)
# About ten seconds of work on two cores, whatever the number of rows.
circuits = [rows] * (200_000 // {rows})
ticks = 0
def tick():
    global ticks
    while True:
        time.sleep(0.005)
        ticks += 1
threading.Thread(target=tick, daemon=True).start()
time.sleep(0.05)
before = ticks
print("ready", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", ticks - before, flush=True)
else:
    print("finished", flush=True)
"""


@needs_native
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("n_rows", "call"),
    [
        (2, "native.kl_rows(circuits, rows)"),
        (200, "native.kl_rows(circuits, rows)"),
        (20, "native.js_rows(rows[:1].expand(100_000, -1), rows[1:2].expand(100_000, -1), 0.5, 1)"),
    ],
)
def test_ctrl_c_stops_it_and_other_threads_run(n_rows, call):
    """Interrupt slices of few rows, many rows, and rows of Jensen-Shannon divergences."""
    command = [sys.executable, "-c", LONG_CALL.format(rows=n_rows, call=call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            word, ticks = process.stdout.readline().split()
            assert word == "interrupted"
            assert time.monotonic() - sent < 5
            # The GIL was free: another Python thread went on counting.
            assert int(ticks) > 5
        finally:
            process.kill()


@each_level
@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_differences_beyond_float32_that_are_divided(monkeypatch, level, temperature):
    """Divided by a temperature, a finite logit stays finite, wherever the largest one lies."""
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    reference = torch.tensor([[3e38, -3e38, 0.0], [3e38, 3e38, -3e38]])
    circuit = torch.tensor([[3e38, -2e38, 3e38], [3e38, 3e38, -3e38]])
    identical, other = native.kl_rows([reference.clone(), circuit], reference, temperature)
    assert (identical == 0).all()
    assert other.tolist() == pytest.approx([math.log(2), 0])


@each_level
@pytest.mark.parametrize("temperature", [8e37, 8.6e37, 1e38, 3.3e38, 1e39])
def test_temperatures_whose_inverse_is_no_normal_number(monkeypatch, level, temperature):
    """At such temperatures only masks are left of the logits.

    A temperature beyond float32's largest number counts as that number.
    """
    monkeypatch.setenv(native.LEVEL_VARIABLE, level)
    reference = torch.tensor([[0.0, -3.4e38, 1.0], [3e38, 0.0, 1e38]])
    circuit = torch.tensor([[0.0, -3.2e38, -3e38], [2e38, 1e38, 0.0]])
    limited = min(temperature, torch.finfo(torch.float32).max)
    expected = oracle(circuit.double() / limited, reference.double() / limited)
    assert_matches(native.kl_rows([circuit], reference, temperature)[0], expected)


THREADS = """
import os, threading, torch, fastkl
torch.set_num_threads(3)
rows = torch.randn(64, 50257)
def measure():
    rows.exp()
    return fastkl.kl_div(rows.flip(0), rows, reduction="none", backend="native")
measure()
running = lambda: set(os.listdir("/proc/self/task"))
seen, done = set(), threading.Event()
def watch():
    while not done.is_set():
        seen.update(running())
watcher = threading.Thread(target=watch)
watcher.start()
before = running()
for _ in range(50):
    measure()
done.set()
watcher.join()
print(len(before), len(seen - before))
"""


@needs_native
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="no OpenMP is shared")
def test_it_works_on_pytorchs_threads():
    """It starts no threads of its own, beside which PyTorch's threads would busy-wait."""
    result = python("-c", THREADS)
    assert result.returncode == 0, result.stderr
    n_before, n_new = map(int, result.stdout.split())
    # The main thread, the watching one, and PyTorch's.
    assert n_before >= 4
    assert n_new == 0


FORKED = """
import os, signal, sys, torch
torch.set_num_threads(2)
rows = torch.randn(64, 50257)
circuit = rows.flip(0)
# Start PyTorch's threads and let them work.
rows.exp()

def measure():
    import fastkl
    return fastkl.kl_div(circuit, rows, reduction="none", backend="native")

{parent}
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if measure().isfinite().all() else 2)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("parent", ["measure()", "import fastkl", "pass"])
def test_a_forked_process_does_not_wait_for_threads_it_has_not(parent):
    """This holds whether the parent has measured, only imported fastkl, or not even that."""
    result = python("-c", FORKED.format(parent=parent))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0"]


PEAK = """
import resource, torch, fastkl
p = torch.randn(8, 8, 50257)
qs = [torch.randn(8, 8, 50257) for _ in range(5)] * 4
def measure(index):
    fastkl.kl_div_many([q[index] for q in qs], p[index], backend="native")
measure((slice(1), slice(1)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for index in (..., (slice(None), slice(1, None)), (..., slice(1, 40000))):
    measure(index)
print(peak() - before)
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_peak_memory():
    """Measure whole tensors, all positions but the first, and a part of the vocabulary."""
    result = python("-c", PEAK)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 8 * 1024


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_each_file_compiles_by_itself(tmp_path, compiler):
    """A header includes what it uses, so that no order of includes matters to either compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    folder = ROOT / "kernels" / "cpu"
    sources = [tmp_path / f"{header.name}.cpp" for header in folder.glob("*.hpp")]
    for source in sources:
        source.write_text(f'#include "{source.stem}"\n')
    if compiler == "clang++":
        # Check the sources with Clang too: most installations compile them with GCC.
        sources += set(folder.glob("*.cpp")) - {folder / "module.cpp"}
    command = [compiler, "-std=c++17", "-fsyntax-only", "-I", folder, *sources]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert sources
    assert result.returncode == 0, result.stderr


reads_machine_code = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="reads x86-64 machine code, as objdump prints it",
)


@functools.cache
def machine_code():
    command = ["objdump", "-d", "--no-show-raw-insn", native._extension().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loops(circuits):
    """Yield the machine code of short loops that prefetch for so many circuits."""
    lines = machine_code().splitlines()
    where = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r" *([0-9a-f]+):\t", line))}
    for i, line in enumerate(lines):
        jump = re.match(r" *[0-9a-f]+:\tj\w+ +([0-9a-f]+)", line)
        start = where.get(jump[1], i) if jump else i
        if i - 120 < start < i:
            loop = "\n".join(lines[start : i + 1])
            if loop.count("prefetch") == circuits:
                yield loop


@needs_native
@reads_machine_code
def test_vectors_are_not_put_together_in_general_registers():
    """GCC does this with vectors longer than the level's own: once 1716 times in float64 sums."""
    assert machine_code().count("vaddpd") > 100
    # A few may assemble pointers.
    assert machine_code().count("vpinsrq") < 100


@needs_native
@reads_machine_code
@pytest.mark.parametrize(
    ("register", "circuits", "step"), [("ymm", 1, 2), ("zmm", 1, 1), ("zmm", 4, 4)]
)
def test_inner_loops_are_vectors(register, circuits, step):
    """Exponentials are inlined in vector registers: 8 FMA a vector with the sum, no call, no spill.

    This holds for one circuit and for as many as share a look.
    """
    # A loop of exponentials takes 2^n by a shift into the exponent or by one instruction, and
    # prefetches what each circuit reads next.
    power = {"ymm": r"vpslld +\$0x17,", "zmm": "vscalefps "}[register]
    exponential = [
        loop
        for loop in inner_loops(circuits)
        if len(re.findall(rf"{power}.*%{register}", loop)) == step
        and len(re.findall(rf"vfn?madd\w+ps .*%{register}", loop)) == 8 * step
    ]
    assert exponential
    shortest = min(exponential, key=len)
    assert "call" not in shortest
    assert not re.search(rf"vmov\w+ +%{register}\d+,.*\(", shortest)
    assert shortest.count("\n") < 26 * step + 8


@needs_native
@reads_machine_code
@pytest.mark.parametrize(("degree", "bits"), [(4, 32), (9, 32), (4, 16), (9, 16)])
def test_polynomials_take_few_instructions(degree, bits):
    """Each of four circuits takes a polynomial and two sums, and all share one branch.

    The longer polynomial may leave no register for one of the sums. Float16 is like bfloat16 and is
    left out.
    """
    loops = [
        loop
        for loop in inner_loops(4)
        if len(re.findall(r"vfn?madd\w+ps .*%zmm", loop)) == 4 * (degree + 2)
        and loop.count("vpmovzxwd") == (4 if bits == 16 else 0)
        and "vcvtph2ps" not in loop
    ]
    assert loops
    shortest = min(loops, key=len)
    assert len(re.findall(r"vcmp\w+ .*%zmm", shortest)) == 4
    assert len(re.findall(r"\tj\w+ ", shortest)) == 2
    assert len(re.findall(r"vmov\w+ +%zmm\d+,.*\(", shortest)) <= (degree > 4)
    # Add two differences, a square, a comparison and a product, and two to convert half precision.
    arithmetic = degree + 2 + 5 + (2 if bits == 16 else 0)
    assert shortest.count("\n") < 4 * (arithmetic + 3) + 16
