"""Test the PTX emulator against kernels with known results, exact arithmetic, and known mistakes.

Two kinds of programs are run: Triton kernels compiled for sm_80, sm_90 and sm_100, and snippets of
PTX, a line or two that every thread of one warp executes.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import triton
import triton.language as tl
from conftest import TRITON_3_7, needs_amd
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_emulator import (
    Memory,
    MemoryFault,
    Module,
    PtxError,
    Stats,
    SyncFault,
    Unsupported,
    compile_kernel,
    compile_ptx,
    launch,
)
from triton.backends.compiler import GPUTarget

ARCHITECTURES = (80, 90, 100)
N_COLS = 5008


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def denominator(x, out, n, BLOCK: tl.constexpr):
    """Compute a softmax's denominator by reductions across the CTA."""
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=float("-inf"))
    tl.store(out + tl.program_id(0), tl.sum(tl.exp(v - tl.max(v, 0)), 0))


@triton.jit
def logsumexp(x, out, n, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Compute online in every lane, merge at the end; loads are asynchronous if STAGES > 1."""
    m, z = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    i = tl.arange(0, BLOCK)
    for k in tl.range(0, n, BLOCK, num_stages=STAGES):
        v = tl.load(x + tl.program_id(0) * n + k + i, mask=k + i < n, other=-1e30)
        top = tl.maximum(m, v)
        m, z = top, z * tl.exp(m - top) + tl.exp(v - top)
    peak = tl.max(m, 0)
    tl.store(out + tl.program_id(0), peak + tl.log(tl.sum(z * tl.exp(m - peak), 0)))


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr):
    """Sum bfloat16 numbers."""
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0))


@triton.jit
def quotient(x, y, out, BLOCK: tl.constexpr):
    """Divide int64 numbers; the code branches for operands of 32 bits, so that lanes diverge."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) // tl.load(y + i))


@triton.jit
def halvings(x, out):
    z, k = tl.load(x + tl.program_id(0)), 0
    while z > 1.0:
        z, k = z * 0.5, k + 1
    tl.store(out + tl.program_id(0), k)


@triton.jit
def copy(x, out, shift, BLOCK: tl.constexpr):
    """Copy from x + shift, promising the compiler that it is aligned to 16 bytes."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(tl.multiple_of(x + shift, 16) + i))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run_triton(fn, arch, args, grid=(3,), constexprs=None, **options):
    """Compile fn for these arguments as a launcher on a GPU would, and run it on them."""
    kinds = {"float32": "*fp32", "int32": "*i32", "int64": "*i64", "uint16": "*bf16"}
    constexprs = constexprs or {}
    names = [name for name in fn.arg_names if name not in constexprs]
    signature, divisible = {}, []
    for name, arg in zip(names, args, strict=True):
        is_array = isinstance(arg, np.ndarray)
        signature[name] = kinds[arg.dtype.name] if is_array else "i32"
        if (arg.ctypes.data if is_array else arg) % 16 == 0:
            divisible.append(name)
    module = compile_ptx(fn, signature, constexprs, arch=arch, divisible=divisible)
    return launch(module, grid, args, **options)


def exponential_sums(x):
    return np.exp(x - x.max(1, keepdims=True), dtype=np.float64).sum(1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestCompiledKernels:
    def test_vector_add(self, arch):
        x, out = normal(1000), np.full(1000, np.nan, np.float32)
        stats = run_triton(add, arch, [x, x[::-1].copy(), out, 1000], constexprs={"BLOCK": 512})
        np.testing.assert_array_equal(out, x + x[::-1])
        assert (stats.bytes_loaded, stats.bytes_stored, stats.ctas) == (8000, 4000, 3)
        assert stats.shuffles == stats.barriers == 0

    def test_reductions_across_the_cta(self, arch):
        x, out = normal(3, N_COLS) * 4, np.full(3, np.nan, np.float32)
        stats = run_triton(denominator, arch, [x, out, N_COLS], constexprs={"BLOCK": 8192})
        np.testing.assert_allclose(out, exponential_sums(x), rtol=3e-7)
        assert stats.bytes_loaded == x.nbytes
        # Two reductions per row, each with barriers around its exchange through shared memory.
        assert stats.barriers == 15 if TRITON_3_7 else stats.barriers >= 3 * 2
        assert stats.shuffles > 0

    @pytest.mark.parametrize("stages", [1, 3])
    def test_online_logsumexp(self, arch, stages):
        x, out = normal(3, N_COLS) * 4, np.full(3, np.nan, np.float32)
        constexprs = {"BLOCK": 512, "STAGES": stages}
        stats = run_triton(logsumexp, arch, [x, out, N_COLS], constexprs=constexprs)
        np.testing.assert_allclose(out, np.log(exponential_sums(x)) + x.max(1), rtol=3e-7)
        assert stats.bytes_loaded == x.nbytes
        assert (stats.by_class()["async"] > 0) == (stages > 1)

    def test_bfloat16_sum(self, arch):
        bits = (normal(1000).view(np.uint32) >> 16).astype(np.uint16)
        out = np.full(1, np.nan, np.float32)
        run_triton(total, arch, [bits, out, 1000], constexprs={"BLOCK": 1024})
        exact = decode(bits, "bf16").sum()
        np.testing.assert_allclose(out, exact, rtol=0, atol=2e-5)

    def test_lanes_that_diverge(self, arch):
        random = np.random.default_rng(0).integers(1 << 20, 1 << 62, 512)
        x, out = random >> np.arange(512) % 3 * 16, np.zeros(512, np.int64)
        y = x[::-1] >> 9
        run_triton(quotient, arch, [x, y, out], constexprs={"BLOCK": 512})
        np.testing.assert_array_equal(out, x // y)

    def test_loop_of_unknown_length(self, arch):
        x, out = np.array([0.5, 3, 1e6], np.float32), np.full(3, -1, np.int32)
        run_triton(halvings, arch, [x, out])
        np.testing.assert_array_equal(out, [0, 2, 20])

    @pytest.mark.parametrize(
        ("shift", "message"), [(512, "outside every allocation"), (1, "not aligned to 16 bytes")]
    )
    def test_wide_loads_that_fault(self, arch, shift, message):
        signature = {"x": "*fp32", "out": "*fp32", "shift": "i32"}
        module = compile_ptx(copy, signature, {"BLOCK": 512}, arch=arch)
        out = np.zeros(512, np.float32)
        # With a shift of 512, the last of the elements read is missing.
        x = np.zeros(2048, np.float32)
        x = x[-(x.ctypes.data // 4) % 4 :][:1023]
        with pytest.raises(MemoryFault, match=message):
            launch(module, (1,), [x, out, shift])
        assert not out.any()
        launch(module, (1,), [x + 1, out, 0])
        assert out.all()


SNIPPET = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 buffer[];
.visible .entry snippet(
    .param .u64 .ptr .global .align 1 x0,
    .param .u64 .ptr .global .align 1 x1,
    .param .u64 .ptr .global .align 1 x2,
    .param .u64 .ptr .global .align 1 out
)
.reqntid %(threads)d
{
    .reg .pred %%p<4>;
    .reg .b16 %%h<8>;
    .reg .b32 %%r<16>;
    .reg .b64 %%rd<16>;
    ld.param.b64 %%rd0, [x0];
    ld.param.b64 %%rd1, [x1];
    ld.param.b64 %%rd2, [x2];
    ld.param.b64 %%rd3, [out];
    mov.u32 %%r15, %%tid.x;
    %(body)s
    ret;
}
"""


def run_ptx(body, *arrays, threads=32, grid=(1,), **options) -> Stats:
    """Run PTX with the addresses of up to three arrays in %rd0 to %rd2, and of the last in %rd3."""
    module = Module(SNIPPET % {"body": body, "threads": threads}, shared_bytes=512)
    *sources, out = arrays
    args = [*sources, *[0] * (3 - len(sources)), out]
    return launch(module, grid, args, **options)


REGISTERS = {2: "%h", 4: "%r", 8: "%rd"}


@functools.cache
def elementwise(opcode: str, sizes: tuple[int, ...], out_size: int) -> Module:
    """Return a Module whose threads each apply an opcode to elements of these sizes in bytes."""
    lines = []
    for i, size in enumerate((*sizes, out_size)):
        source = i if i < len(sizes) else 3
        lines.append(f"mad.wide.u32 %rd{i + 8}, %r15, {size}, %rd{source};")
        if i < len(sizes):
            lines.append(f"ld.global.b{8 * size} {REGISTERS[size]}{i + 4}, [%rd{i + 8}];")
    operands = ", ".join(f"{REGISTERS[size]}{i + 4}" for i, size in enumerate(sizes))
    result = f"{REGISTERS[out_size]}7"
    lines.append(f"{opcode} {result}, {operands};")
    lines.append(f"st.global.b{8 * out_size} [%rd{len(sizes) + 8}], {result};")
    return Module(SNIPPET % {"body": "\n    ".join(lines), "threads": 32})


def apply(opcode: str, out_type, *sources, **options):
    """Return the results of an opcode on up to 32 elements; bfloat16 results are bits in uint16."""
    count = len(sources[0])
    sources = [np.resize(source, 32) for source in sources]
    out = np.zeros(32, out_type)
    module = elementwise(opcode, tuple(s.itemsize for s in sources), out.itemsize)
    launch(module, (1,), [*sources, *[0] * (3 - len(sources)), out], **options)
    return out[:count]


def bits_of(values):
    return values.view(f"u{values.itemsize}")


# Significant bits, exponents of the smallest normal and the largest number; NumPy type of storage.
FORMATS = {
    "f16": (11, -14, 15, np.float16),
    "bf16": (8, -126, 127, np.uint16),
    "f32": (24, -126, 127, np.float32),
    "f64": (53, -1022, 1023, np.float64),
}


def decode(stored, name):
    """Return elements of a format as float64."""
    if name == "bf16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float64)


def rounded(exact: Fraction, name: str, mode: str = "rn") -> float:
    """Round a number to a format, by exact arithmetic alone."""
    precision, emin, emax, _ = FORMATS[name]
    if exact == 0:
        return 0.0
    magnitude, negative = abs(exact), exact < 0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, emin) - precision + 1)
    steps = magnitude / unit
    whole = steps.numerator // steps.denominator
    if mode == "rn":
        whole = round(steps)
    elif whole != steps and mode == ("rm" if negative else "rp"):
        whole += 1
    value, largest = whole * unit, (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** emax
    if value > largest:
        toward_zero = mode in ("rz", "rp" if negative else "rm")
        value = largest if toward_zero else float("inf")
    return -float(value) if negative else float(value)


@st.composite
def columns(draw, name, count):
    """Hypothesis strategy for `count` arrays of 32 finite numbers, some of them subnormal."""
    precision, _, emax, dtype = FORMATS[name]
    exponent = st.integers(0, 2 * emax)
    first, last = sorted((draw(exponent), draw(exponent)))
    random = np.random.default_rng(draw(st.integers(0, 1 << 20)))

    def integers(low, high):
        return random.integers(low, high, (count, 32), dtype=np.uint64)

    # Trailing zeros make ties likelier.
    zeros = integers(0, precision)
    fraction = integers(0, 1 << precision - 1) >> zeros << zeros
    bits = integers(first, last + 1) << np.uint64(precision - 1) | fraction
    size = np.dtype(dtype).itemsize
    bits |= integers(0, 2) << np.uint64(8 * size - 1)
    return list(bits.astype(f"u{size}").view(dtype))


def assert_rounded(got, exact, name, mode="rn"):
    want = np.array([rounded(value, name, mode) for value in exact])
    np.testing.assert_array_equal(decode(got, name), want)


def fractions(column, name):
    return [Fraction(float(value)) for value in decode(column, name)]


examples = settings(max_examples=25, deadline=None)


class TestArithmetic:
    @pytest.mark.parametrize("name", FORMATS)
    @examples
    @given(data=st.data())
    def test_fma_rounds_once(self, name, data):
        dtype = FORMATS[name][3]
        x, y, z = data.draw(columns(name, 3))
        if data.draw(st.booleans()):
            # The sum cancels all but the product's rounding error.
            product = apply(f"mul.rn.{name}", dtype, x, y)
            minus = (bits_of(product) ^ bits_of(product).dtype.type(1 << 8 * z.itemsize - 1)).view(
                dtype
            )
            z = np.where(np.isfinite(decode(minus, name)), minus, z)
        got = apply(f"fma.rn.{name}", dtype, x, y, z)
        terms = zip(*(fractions(column, name) for column in (x, y, z)), strict=True)
        assert_rounded(got, [a * b + c for a, b, c in terms], name)

    def test_fma_of_doubles_at_the_edges(self):
        cases = [
            # x, y, z, and x * y + z: the product alone would overflow, or lose its sign.
            (1e200, -1e200, 1.0, -np.inf),
            (
                1e154,
                1.5e154,
                -1e308,
                rounded(Fraction(1e154) * Fraction(1.5e154) - Fraction(1e308), "f64"),
            ),
            (1e154, 1.5e154, -np.inf, -np.inf),
            (2.0**1023, 2.0, -(2.0**1023), 2.0**1023),
            (-1e-200, 1e-200, 0.0, -0.0),
            (-0.0, 1.0, 0.0, 0.0),
            (np.inf, 0.0, 1.0, np.nan),
        ]
        x, y, z, want = np.array(cases).T.copy()
        got = apply("fma.rn.f64", np.float64, x, y, z)
        np.testing.assert_array_equal(got, want)
        known = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]))

    @pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
    @pytest.mark.parametrize("operation", ["add", "sub", "mul"])
    @examples
    @given(pair=columns("f32", 2))
    def test_rounding_modes(self, operation, mode, pair):
        got = apply(f"{operation}.{mode}.f32", np.float32, *pair)
        f = {"add": Fraction.__add__, "sub": Fraction.__sub__, "mul": Fraction.__mul__}[operation]
        x, y = (fractions(column, "f32") for column in pair)
        assert_rounded(got, [f(a, b) for a, b in zip(x, y, strict=True)], "f32", mode)

    @pytest.mark.parametrize("name", ["f16", "bf16"])
    @examples
    @given(column=columns("f32", 1))
    def test_conversions_to_16_bits(self, name, column):
        got = apply(f"cvt.rn.{name}.f32", FORMATS[name][3], *column)
        assert_rounded(got, fractions(column[0], "f32"), name)

    def test_conversion_ties_go_to_even(self):
        x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-23], np.float32)
        want = np.array([1, 1 + 2**-6, 1 + 2**-7])
        np.testing.assert_array_equal(decode(to_bf16(x), "bf16"), want)

    def test_packed_conversion_puts_the_first_source_above(self):
        one, two = np.ones(1, np.float32), np.full(1, 2, np.float32)
        assert apply("cvt.rn.bf16x2.f32", np.uint32, one, two)[0] == 0x3F80_4000

    def test_integer_division_truncates(self):
        x, y = np.array([7, -7, 7, -7, 5], np.int32), np.array([2, 2, -2, -2, 0], np.int32)
        np.testing.assert_array_equal(apply("div.s32", np.int32, x, y), [3, -3, -3, 3, -1])
        np.testing.assert_array_equal(apply("rem.s32", np.int32, x[:4], y[:4]), [1, -1, 1, -1])

    def test_maximum_and_nan(self):
        nan, one = np.array([np.nan, 1, np.nan, -0.0]), np.array([1, np.nan, np.nan, 0.0])
        x, y = nan.astype(np.float32), one.astype(np.float32)
        ignores, keeps = (apply(f"{op}.f32", np.float32, x, y) for op in ("max", "max.NaN"))
        np.testing.assert_array_equal(ignores, [1, 1, np.nan, 0])
        np.testing.assert_array_equal(keeps, [np.nan, np.nan, np.nan, 0])
        assert not np.signbit(ignores[3])
        # Arithmetic produces the canonical NaN only.
        assert bits_of(keeps)[0] == bits_of(ignores)[2] == 0x7FFF_FFFF

    def test_comparisons_and_nan(self):
        x, y = np.array([np.nan, 1, 2], np.float32), np.array([1, 1, 1], np.float32)
        body = """
            mad.wide.u32 %rd8, %r15, 4, %rd0;  ld.global.b32 %r0, [%rd8];
            mad.wide.u32 %rd8, %r15, 4, %rd1;  ld.global.b32 %r1, [%rd8];
            mad.wide.u32 %rd8, %r15, 4, %rd3;
            setp.{test}.f32 %p0, %r0, %r1;  selp.b32 %r2, 1, 0, %p0;  st.global.b32 [%rd8], %r2;
        """
        results = {}
        for test in ("gt", "gtu", "le", "leu", "ne", "neu", "num", "nan"):
            out = np.zeros(32, np.int32)
            run_ptx(body.format(test=test), np.resize(x, 32), np.resize(y, 32), out)
            results[test] = out[:3].tolist()
        assert results == {
            "gt": [0, 0, 1],
            "gtu": [1, 0, 1],
            "le": [0, 1, 0],
            "leu": [1, 1, 0],
            "ne": [0, 0, 1],
            "neu": [1, 0, 1],
            "num": [0, 1, 1],
            "nan": [1, 0, 0],
        }

    def test_exponential_flushes_subnormals_if_told_to(self):
        x = np.array([-126, -126.5, -149, -150], np.float32)
        exact = np.exp2(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(apply("ex2.approx.f32", np.float32, x), exact)
        flushed = apply("ex2.approx.ftz.f32", np.float32, x)
        np.testing.assert_array_equal(flushed, [2.0**-126, 0, 0, 0])
        # Operands are flushed too, and keep their sign.
        tiny = np.array([-(2.0**-127), 2.0**-127], np.float32)
        np.testing.assert_array_equal(
            apply("rcp.approx.f32", np.float32, tiny), [-(2.0**127), 2.0**127]
        )
        flushed = apply("rcp.approx.ftz.f32", np.float32, tiny)
        np.testing.assert_array_equal(flushed, [-np.inf, np.inf])

    @pytest.mark.parametrize("opcode", ["ex2.approx.ftz.f32", "lg2.approx.f32", "rcp.approx.f32"])
    def test_approximation_errors_are_bounded_and_reproducible(self, opcode):
        x = np.linspace(2.5, 9, 32, dtype=np.float32)
        exact = apply(opcode, np.float32, x)
        noisy = apply(opcode, np.float32, x, approx_ulp=2)
        assert (noisy != exact).any()
        # Half an ulp more for the rounding of each result.
        assert (np.abs(noisy - exact) <= 3 * np.spacing(np.abs(exact))).all()
        np.testing.assert_array_equal(noisy, apply(opcode, np.float32, x, approx_ulp=2))
        # A lane's error depends on its operand, not on the lane.
        np.testing.assert_array_equal(
            noisy[::-1], apply(opcode, np.float32, x[::-1].copy(), approx_ulp=2)
        )
        assert (noisy != apply(opcode, np.float32, x, approx_ulp=2, seed=1)).any()


def to_bf16(values):
    return apply("cvt.rn.bf16.f32", np.uint16, values.astype(np.float32))


class TestRefusals:
    @pytest.mark.parametrize(
        "line",
        [
            "atom.global.add.u32 %r0, [%rd3], 1;",
            "mul.rn.exotic.f32 %r0, %r1, %r2;",
            "add.u32 %r0, %r1, %r2, %r3;",
            "add.u32 %r0, %r1;",
            "add.u64 %rd0, %rd1, %r2;",
            "cvt.f16.f32 %h0, %r0;",
            "bra NOWHERE;",
            "call.uni somewhere;",
            ".local .b8 stack[16];",
        ],
    )
    def test_what_is_not_modeled(self, line):
        with pytest.raises(Unsupported, match=r"PTX line \d+"):
            Module(SNIPPET % {"body": line, "threads": 32})

    def test_unknown_directives_and_parameters(self):
        good = SNIPPET % {"body": "", "threads": 32}
        for old, new in [
            (".reqntid 32", ".reqntid 32\n.maxclusterrank 2"),
            (".param .u64", ".param .texref"),
            (".address_size 64", ".address_size 64\n.const .b8 table[4];"),
            (".reqntid 32", ""),
        ]:
            assert old in good
            with pytest.raises(Unsupported):
                Module(good.replace(old, new))
        assert Module(good.replace(".reqntid 32", ""), num_warps=2).num_warps == 2

    def test_arguments_that_do_not_fit(self):
        module = Module(SNIPPET % {"body": "", "threads": 32}, divisible=[0])
        out = np.zeros(1)
        for args in ([out], [0, 0, 0, 0, 0], [1 << 64, 0, 0, out], [8, 0, 0, out]):
            with pytest.raises(ValueError, match="snippet"):
                launch(module, (1,), args)
        with pytest.raises(ValueError, match="1 warps, not 4"):
            launch(module, (1,), [0, 0, 0, out], num_warps=4)

    def test_endless_loop(self):
        with pytest.raises(PtxError, match="does not end"):
            run_ptx("AGAIN: bra AGAIN;", np.zeros(1), max_instructions=1000)


OWN_ADDRESS = "mad.wide.u32 %rd8, %r15, 4, %rd3;"


class TestMemory:
    @pytest.mark.parametrize(
        ("offset", "message"),
        [
            (2, "thread 0 .* not aligned to 4 bytes"),
            (4, "thread 31 .* offset 128 of"),
            (-4, "thread 0 .* 4 bytes before"),
        ],
    )
    def test_stores_that_fault_store_nothing(self, offset, message):
        out = np.zeros(32, np.float32)
        memory = Memory(out=out)
        body = f"{OWN_ADDRESS} add.s64 %rd8, %rd8, {offset}; st.global.b32 [%rd8], 0f3F800000;"
        with pytest.raises(MemoryFault, match=message):
            run_ptx(body, out, memory=memory)
        assert not out.any()

    def test_wide_store_has_to_be_aligned_to_its_width(self):
        # Eight bytes past a multiple of sixteen.
        out = np.zeros(64, np.float64)
        out = out[1 + out.ctypes.data // 8 % 2 :]
        body = "st.global.v{}.b32 [%rd3], {{{}}};"
        run_ptx(body.format(2, "%r0, %r1"), out)
        with pytest.raises(MemoryFault, match="not aligned to 16 bytes"):
            run_ptx(body.format(4, "%r0, %r1, %r2, %r3"), out)

    def test_gaps_between_rows_may_be_touched_but_not_the_end(self):
        rows = np.zeros((2, 64), np.float32)[:, :32]
        (allocation,) = Memory(rows).allocations
        assert allocation.data.size == 4 * (64 + 32)

    def test_read_only_memory(self):
        out = np.zeros(32, np.float32)
        memory = Memory()
        memory.add(out, "constant", writable=False)
        with pytest.raises(MemoryFault, match="store to read-only memory"):
            run_ptx(f"{OWN_ADDRESS} st.global.b32 [%rd8], %r0;", out, memory=memory)

    def test_lanes_that_store_different_values_to_one_address(self):
        out = np.zeros(1, np.int32)
        run_ptx("mov.u32 %r0, 7; st.global.b32 [%rd3], %r0;", out)
        assert out[0] == 7
        with pytest.raises(MemoryFault, match="another lane stored something else"):
            run_ptx("st.global.b32 [%rd3], %r15;", out)

    def test_what_was_never_written_is_nan(self):
        out = np.zeros(32, np.float32)
        run_ptx(f"{OWN_ADDRESS} st.global.b32 [%rd8], %r9;", out)
        assert np.isnan(out).all()
        out[:] = 0
        body = f"mov.u32 %r0, buffer; ld.shared.b32 %r1, [%r0+64]; {OWN_ADDRESS}"
        run_ptx(f"{body} st.global.b32 [%rd8], %r1;", out)
        assert np.isnan(out).all()

    def test_shared_memory_ends(self):
        body = "mov.u32 %r0, buffer; ld.shared.b32 %r1, [%r0+{}];"
        run_ptx(body.format(508), np.zeros(1))
        with pytest.raises(MemoryFault, match="shared memory"):
            run_ptx(body.format(512), np.zeros(1))

    def test_asynchronous_copy_is_poison_until_waited_for(self):
        x, early, late = normal(32), np.zeros(32, np.float32), np.zeros(32, np.float32)
        body = f"""
            mad.wide.u32 %rd9, %r15, 4, %rd0;
            mad.wide.u32 %rd10, %r15, 4, %rd1;
            {OWN_ADDRESS}
            mov.u32 %r0, buffer;
            mad.lo.u32 %r0, %r15, 4, %r0;
            cp.async.ca.shared.global [%r0], [%rd9], 4;
            cp.async.commit_group;
            ld.shared.b32 %r1, [%r0];
            st.global.b32 [%rd10], %r1;
            cp.async.wait_group 0;
            ld.shared.b32 %r1, [%r0];
            st.global.b32 [%rd8], %r1;
        """
        run_ptx(body, x, early, late)
        assert np.isnan(early).all()
        np.testing.assert_array_equal(late, x)

    @pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (64, 32)])
    def test_bytes_and_sectors_of_a_strided_copy(self, stride, sectors):
        # Begin at the start of a sector.
        x = np.zeros(64 * 64, np.float32)
        x = x[-(x.ctypes.data // 4) % 8 :][: 31 * stride + 1]
        x[:] = np.arange(x.size)
        out = np.zeros(32, np.float32)
        memory = Memory(x, out)
        body = f"""
            mad.wide.u32 %rd9, %r15, {4 * stride}, %rd0;
            {OWN_ADDRESS}
            ld.global.b32 %r0, [%rd9];
            setp.lt.u32 %p0, %r15, 8;
            @%p0 st.global.b32 [%rd8], %r0;
        """
        stats = run_ptx(body, x, out, memory=memory)
        np.testing.assert_array_equal(out[:8], x[::stride][:8])
        assert (stats.bytes_loaded, stats.sectors_loaded) == (128, sectors)
        # Eight lanes pass the guard, but all 32 execute the instruction.
        assert stats.bytes_stored == 32
        assert stats.threads["st.global.b32"] == 32
        assert stats.warps["st.global.b32"] == 1
        assert (stats + stats).sectors_loaded == 2 * sectors


class TestSynchronization:
    def test_threads_meet_again_after_a_branch(self):
        out = np.zeros(32, np.int32)
        body = f"""
            {OWN_ADDRESS}
            setp.lt.u32 %p0, %r15, 10;
            @%p0 bra SMALL;
            mov.u32 %r0, 200;
            bra JOIN;
        SMALL:
            mov.u32 %r0, 100;
        JOIN:
            add.u32 %r0, %r0, %r15;
            st.global.b32 [%rd8], %r0;
        """
        stats = run_ptx(body, out)
        lane = np.arange(32)
        np.testing.assert_array_equal(out, np.where(lane < 10, 100, 200) + lane)
        assert stats.threads["add.u32"] == 32
        assert stats.warps["add.u32"] == 1

    def test_shuffle_within_a_warp(self):
        out = np.zeros(32, np.int32)
        body = f"{OWN_ADDRESS} shfl.sync.bfly.b32 %r0, %r15, 3, 31, -1;"
        stats = run_ptx(f"{body} st.global.b32 [%rd8], %r0;", out)
        np.testing.assert_array_equal(out, np.arange(32) ^ 3)
        assert stats.shuffles == 1

    # The first half of the warp, or of two warps, takes another branch than the second.
    FORK = """
            setp.lt.u32 %p0, %r15, {half};
            @%p0 bra OTHER;
            {mine}
            bra END;
        OTHER:
            {other}
        END:
    """

    def test_shuffle_that_misses_lanes(self):
        shuffle = "shfl.sync.bfly.b32 %r0, %r15, 1, 31, -1;"
        body = self.FORK.format(half=16, mine=shuffle, other="bar.sync 0;")
        with pytest.raises(SyncFault, match="stuck"):
            run_ptx(body, np.zeros(1))
        # The mask names only the lanes that arrive, so this is correct.
        body = self.FORK.format(half=16, mine=shuffle.replace("-1", "0xFFFF0000"), other="")
        run_ptx(body, np.zeros(1))

    def test_barrier_reached_by_parts_of_a_warp(self):
        body = self.FORK.format(half=16, mine="bar.sync 0;", other="bar.sync 0;")
        with pytest.raises(SyncFault, match="stuck"):
            run_ptx(body, np.zeros(1))

    def test_warps_may_reach_one_barrier_at_different_places(self):
        body = self.FORK.format(half=32, mine="bar.sync 0;", other="bar.sync 0;")
        assert run_ptx(body, np.zeros(1), threads=64).barriers == 1

    def test_warps_that_wait_at_different_barriers(self):
        body = self.FORK.format(half=32, mine="bar.sync 0;", other="bar.sync 1;")
        with pytest.raises(SyncFault, match="stuck"):
            run_ptx(body, np.zeros(1), threads=64)


class TestSideBySide:
    """CTAs of one warp, which run side by side."""

    # %r14 is the CTA's index, %rd8 the thread's own address.
    BEGIN = """
        mov.u32 %r14, %ctaid.x;
        mad.lo.u32 %r13, %r14, 32, %r15;
        mul.wide.u32 %rd8, %r13, 4;
        add.u64 %rd8, %rd3, %rd8;
    """

    def test_like_one_by_one(self, monkeypatch):
        """Each CTA loops as often as its index says; some CTAs end before they shuffle."""
        body = f"""
            {self.BEGIN}
            mov.u32 %r0, %r14;
            rem.u32 %r1, %r14, 5;
        AGAIN:
            add.u32 %r0, %r0, %r15;
            add.u32 %r1, %r1, -1;
            setp.gt.s32 %p0, %r1, 0;
            @%p0 bra AGAIN;
            rem.u32 %r1, %r14, 7;
            setp.eq.u32 %p1, %r1, 0;
            @%p1 bra END;
            shfl.sync.bfly.b32 %r2, %r0, 5, 31, -1;
            st.global.b32 [%rd8], %r2;
        END:
        """
        found = []
        # Both runs use one array: another one may start elsewhere in a sector.
        out = np.empty(70 * 32, np.int32)
        for n in (1, 32):
            monkeypatch.setattr("ptx_emulator.module.SIDE_BY_SIDE", n)
            out[:] = 0
            stats = run_ptx(body, out, grid=(70,))
            found.append((out.tolist(), stats.threads, stats.warps, stats.sectors_stored))
            assert stats.ctas == 70
        assert found[0] == found[1]
        cta, lane = np.divmod(np.arange(70 * 32), 32)
        expected = cta + np.maximum(cta % 5, 1) * (lane ^ 5)
        np.testing.assert_array_equal(found[0][0], np.where(cta % 7 == 0, 0, expected))

    def test_a_fault_names_its_cta(self):
        body = f"{self.BEGIN} st.global.b32 [%rd8], %r15;"
        with pytest.raises(MemoryFault, match=r"thread 0 of CTA \(36, 0, 0\)"):
            run_ptx(body, np.zeros(36 * 32, np.int32), grid=(40,))

    def test_the_cta_that_does_not_end_is_named(self):
        body = f"""
            {self.BEGIN}
            setp.eq.u32 %p0, %r14, 3;
        AGAIN:
            @%p0 bra AGAIN;
            st.global.b32 [%rd8], %r15;
        """
        with pytest.raises(PtxError, match=r"CTA \(3, 0, 0\) does not end"):
            run_ptx(body, np.zeros(5 * 32, np.int32), grid=(5,), max_instructions=1000)

    def test_the_cta_that_is_stuck_is_named(self):
        body = f"""
            {self.BEGIN}
            add.u32 %r0, %r13, -70;
            setp.lt.u32 %p0, %r0, 8;
            @%p0 bra END;
            shfl.sync.bfly.b32 %r2, %r15, 1, 31, -1;
        END:
            shfl.sync.bfly.b32 %r3, %r15, 2, 31, -1;
        """
        with pytest.raises(SyncFault, match=r"CTA \(2, 0, 0\) is stuck.*, 1, .*, 2, "):
            run_ptx(body, np.zeros(1), grid=(5,))


DEVICE_FUNCTIONS = """
    import triton
    import triton.language as tl

    @triton.jit
    def squares(x):
        return (x * x).sum(0)
"""
KERNEL = """
    import device_functions
    import triton
    import triton.language as tl

    @triton.jit
    def weight(x):
        return tl.exp(x - tl.max(x, 0))

    @triton.jit
    def kernel(x, out, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < n, other=float("-inf"))
        w = weight(v)
        s = tl.sum(tl.sigmoid(w), 0) + w.sum(0) + device_functions.squares(w)
        tl.store(out, s + tl.cdiv(n, 4))
"""
SCRIPT = """
    import numpy as np
    from kernel_module import kernel, tl
    from ptx_emulator import compile_ptx, launch

    interprets = type(kernel).__name__ == "InterpretedFunction"
    x = np.arange(16, dtype=np.float32) / 8

    def interpreted():
        import torch

        out = torch.full((1,), float("nan"))
        kernel[(1,)](torch.from_numpy(x), out, 16, BLOCK=16)
        return out.item()

    results = [interpreted()] if interprets else []
    unpatched = tl.core.is_builtin(tl.core.load)
    module = compile_ptx(kernel, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 16})
    results += [interpreted()] if interprets else []
    out = np.full(1, np.nan, np.float32)
    launch(module, (1,), [x, out, 16])
    print(interprets, unpatched, out.item(), *results)
    print(module.ptx)
"""


def start_script(folder: Path, **environment):
    for name, text in [
        ("device_functions.py", DEVICE_FUNCTIONS),
        ("kernel_module.py", KERNEL),
        ("script.py", SCRIPT),
    ]:
        (folder / name).write_text(textwrap.dedent(text))
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(__file__).parent), "TRITON_ALWAYS_COMPILE": "1", **environment}
    command = [sys.executable, "script.py"]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


def finish_script(process):
    """Return the words of the first line printed, and the PTX."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    first, _, ptx = output.partition("\n")
    return first.split(), ptx


class TestCompilation:
    def test_beside_the_interpreter(self, tmp_path):
        """The PTX is the same, byte for byte, and the interpreter works before and after."""
        processes = start_script(tmp_path, TRITON_INTERPRET="1"), start_script(tmp_path)
        (interprets, unpatched, emulated, *interpreted), ptx = finish_script(processes[0])
        (plain, untouched, emulated_too), ptx_too = finish_script(processes[1])
        assert (interprets, plain) == ("True", "False")
        # What makes this hard: interpreting has changed triton.language.
        assert (unpatched, untouched) == ("False", "True")
        assert ".visible .entry kernel" in ptx
        assert ptx == ptx_too
        assert emulated == emulated_too
        assert interpreted[0] == interpreted[1]
        assert float(emulated) == pytest.approx(float(interpreted[0]), rel=1e-6)

    def test_import_after_an_interpreted_kernel_is_refused(self, monkeypatch):
        spec = importlib.util.find_spec("ptx_emulator.compile")
        second = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(tl.core, "load", lambda *args, **kwargs: None)
        with pytest.raises(RuntimeError, match="imported after an interpreted kernel"):
            spec.loader.exec_module(second)

    @needs_amd
    def test_other_targets(self):
        signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}
        for target, code in [
            (GPUTarget("cuda", 90, 32), "cubin"),
            (GPUTarget("hip", "gfx942", 64), "hsaco"),
        ]:
            built = compile_kernel(add, signature, {"BLOCK": 512}, target=target)
            assert len(built.asm[code]) > 1000

    def test_only_triton_functions_compile(self):
        with pytest.raises(TypeError, match="got function"):
            compile_ptx(normal, {})
