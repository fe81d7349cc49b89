"""Check the machine code that the compiler makes of the kernels, for any vocabulary.

The compiler knows nothing about sizes, so what holds here holds for V = 50257 as for any other.
"""

import importlib
import math
import re
from collections import Counter

import pytest
import torch
from conftest import GFX942, SLACK
from emulated import compilations, emulate, launch
from ptx_emulator import compile_kernel
from triton.backends.compiler import GPUTarget

from bench.build import build_finish, build_gradient, build_partial, gradient_launch, packing_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a card: see test_gpu.py"
)

# The most instructions per pair in the loop: what it takes. That is less than the 85 % of what an
# H100 (SXM, 1.755 GHz, 132 SMs, 3.35 TB/s) issues while memory delivers the pair's bytes, which are
# 60.1, 45.1 and 37.6 in float32, and half as many in half precision. Of special-function operations,
# 85 %.
BUDGETS = {
    ("fp32", 1): (21.3, 7.5),
    ("fp32", 2): (18.9, 5.6),
    ("fp32", 4): (17.7, 4.7),
    ("bf16", 1): (22.4, 3.75),
    ("bf16", 2): (19.6, 2.8),
    ("fp16", 1): (22.2, 3.75),
    ("fp16", 2): (19.6, 2.8),
    ("bf16", 4): (18.3, 2.3),
    ("fp16", 4): (18.3, 2.3),
}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@pytest.mark.parametrize(("dtype", "group"), BUDGETS)
def test_body_loop(dtype, group):
    kernel = build_partial("sm_90", dtype, group, hints=False, compiler=compile_kernel)
    body, pairs = kernel.program.body, kernel.body_pairs
    assert set(body.load_widths) == {16}
    assert body.load_bytes == pairs * BYTES[dtype] * (1 + 1 / group)
    assert (body.barriers, body.shuffles, body.shared_accesses, body.spills) == (0, 0, 0, 0)
    # Even a mask that does not narrow a load has a cost, and shows that the tail was not peeled.
    assert body.masked_loads == 0
    instructions, special = BUDGETS[dtype, group]
    assert len(body) / pairs <= instructions * SLACK
    assert body.special / pairs <= special


@pytest.mark.parametrize(("dtype", "group"), BUDGETS)
def test_registers(dtype, group):
    """No spill, and half of an SM's 2048 threads fit into its 65536 registers."""
    program = build_partial("sm_90", dtype, group, compiler=compile_kernel).program
    assert program.stack == 0
    assert 65536 // (program.registers * program.threads) * program.threads >= 1024


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_100", GFX942])
@pytest.mark.parametrize("dtype", BYTES)
def test_other_targets(target, dtype):
    """The loop has wide loads, no barriers or shuffles, and no spills, on every generation."""
    for group in (1, 4):
        kernel = build_partial(target, dtype, group, hints=False, compiler=compile_kernel)
        body = kernel.program.body
        assert set(body.load_widths) == {16}
        assert (body.barriers, body.shuffles, body.spills) == (0, 0, 0)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize(("group", "instructions"), [(1, 18.4), (2, 15.8), (4, 14.3)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_packed_operations(dtype, group, instructions, divide):
    """A B200 issues 9.3 instructions while memory delivers 2 bytes: operations take two floats."""
    kernel = build_partial("sm_100", dtype, group, divide=divide, compiler=compile_kernel)
    program, body = kernel.program, kernel.program.body
    assert (body.barriers, body.shuffles, body.shared_accesses, body.spills) == (0, 0, 0, 0)
    # With a temperature, two registers of fp16 are spilled, outside the loop.
    assert program.stack <= 8 * divide
    assert program.shared == 0
    assert 65536 // (program.registers * program.threads) * program.threads >= 1024
    # The difference, x, three steps of the polynomial, its last one and two products.
    packed = sum(body.opcodes[name] for name in ("FFMA2", "FMUL2", "FADD2"))
    assert packed >= 8 / 2 * kernel.body_pairs
    # Dividing by a temperature doubles the difference.
    assert len(body) / kernel.body_pairs <= (instructions + divide) * SLACK


@pytest.mark.parametrize(
    ("capability", "itemsize", "packing"),
    [((9, 0), 2, "none"), ((10, 3), 2, "ptx"), ((10, 0), 4, "none"), ((12, 0), 2, "none")],
)
def test_which_cards_pack(monkeypatch, capability, itemsize, packing):
    """float32 has twice the time for memory, and the memory of other cards is slower."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for hip, expected in ((None, packing), ("7.0", "compiler")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert launch.packing_of(card, itemsize) == expected
        assert launch.packing_of(torch.device("cpu"), itemsize) == "compiler"


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", BYTES)
def test_gradient_kernel(dtype, reference):
    """Wide accesses, no spill, barrier or shuffle, and 1/2 or 3/8 of an SM's threads at a time."""
    program = build_gradient(
        "sm_90", dtype, reference=reference, hints=False, compiler=compile_kernel
    )
    tile = gradient_launch.GRADIENT_TILES[BYTES[dtype]]
    blocks = (*program.loops, program.outside)
    assert (program.stack, program.shared) == (0, 0)
    assert all((b.barriers, b.shuffles, b.shared_accesses) == (0, 0, 0) for b in blocks)
    assert 65536 // (program.registers * program.threads) * program.threads >= (
        768 if reference else 1024
    )
    # The loop over circuits loads the circuit's logits; the reference's are loaded before it.
    assert program.body.load_widths.count(16) == tile.loads
    assert program.outside.load_widths.count(16) == tile.loads
    # The narrower loads are of the table and of a row's numbers, none of a half-precision token.
    assert min(program.body.load_widths) == 4
    stores = Counter(
        "128" in i.opcode for b in blocks for i in b.instructions if i.opcode.startswith("STG")
    )
    assert stores[True] == tile.loads * (1 + reference)
    # An H100 issues 35 instructions while memory moves 4 bytes, a half-precision logit and its
    # gradient, so instructions are the limit there. Two of them bring together sides that may lie
    # far apart. All other cases move more: with a single circuit, 6 to 16 bytes. The rounding error
    # of float32 logits' difference takes six instructions.
    pairs, rounded = tile.tokens / program.threads, 6 if dtype == "fp32" else 0
    assert len(program.body) / pairs <= SLACK * (43.2 if reference else 35.1) + rounded
    assert program.body.special / pairs <= 1.25


@pytest.mark.parametrize("target", ["sm_80", "sm_100", GFX942])
@pytest.mark.parametrize("dtype", BYTES)
def test_gradient_kernel_elsewhere(target, dtype):
    for reference in (False, True):
        program = build_gradient(
            target, dtype, reference=reference, hints=False, compiler=compile_kernel
        )
        if packing_of(target, dtype) == "ptx":
            # Operations take two floats; see above.
            assert len(program.body) / 8 <= SLACK * (35.8 if reference else 29.5)
        # Before the loop, AMD's compiler spills scalars to lanes of a register, by "shuffles".
        blocks = program.loops if target == "gfx942" else (*program.loops, program.outside)
        assert program.stack == program.shared == 0
        assert all((b.barriers, b.shuffles, b.spills) == (0, 0, 0) for b in blocks)
        assert 16 in program.body.load_widths


@pytest.mark.parametrize("keep", [False, True])
def test_finish_kernel(keep):
    for dtype in BYTES:
        program = build_finish("sm_90", dtype, keep=keep, compiler=compile_kernel)
        assert program.stack == 0
        assert any(set(loop.load_widths) == {16} for loop in program.loops)


def test_sizes_do_not_recompile(generator):
    def step(reference, n_circuits):
        # Circuits that start where the reference does; otherwise the launcher would copy it.
        emulate([reference] * n_circuits, reference, arch=90)

    # The first size compiles the two kernels and the one that fills the table; later ones nothing.
    assert compilations(generator, step, longest=17000) == [3] * 6


class PTX:
    """The PTX of a compiled kernel, whose instructions can be counted by name."""

    def __init__(self, arch, dtype, group):
        packing = launch.nvidia_packing(arch // 10, BYTES[dtype])
        tile = launch.tile_of(packing, BYTES[dtype], group)
        kinds = {"p_row_stride": "i64", "unit": "fp32", "inverse": "fp32"}
        sizes = {name: kinds.get(name, "i32") for name in launch.kernels.SIZES}
        pointers = {"p_ptr": f"*{dtype}", "table_ptr": "*i64", "state_ptr": "*fp32"}
        self.text = compile_kernel(
            launch.kernels.partial_kernel,
            sizes | pointers,
            {
                "G": group,
                "LANES": 32,
                "VEC": tile.vec,
                "UNROLL": tile.unroll,
                "DIVIDE": False,
                "PACKING": packing,
            },
            target=GPUTarget("cuda", arch, 32),
            num_warps=1,
        ).asm["ptx"]

    def count(self, name):
        return len(re.findall(rf"^\s+(?:@\S+\s+)?{re.escape(name)}\s", self.text, re.M))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_instructions_that_decide_the_edge_cases(arch, dtype):
    """The compiler emits what kernels/triton/algebra.py says decides each edge case."""
    ptx = PTX(arch, dtype, 4)
    # The maxima of a row drop a NaN; it survives in the exponentials.
    assert ptx.count("max.f32") > 0
    assert "min.NaN" not in ptx.text
    packed = launch.nvidia_packing(arch // 10, BYTES[dtype]) == "ptx"
    assert ptx.count("fma.rn.f32x2" if packed else "fma.rn.f32") > 0
    assert "fma.rn.ftz" not in ptx.text
    # NaN survives where the lowest float (0xFF7FFFFF) replaces -inf, in circuits and reference.
    vec = launch.TILES[BYTES[dtype], 4].vec
    lowest = re.findall(r"max\.NaN\.f32[^;]*0fFF7FFFFF", ptx.text)
    assert len(lowest) == ptx.count("max.NaN.f32") >= 5 * vec
    # Every 2^x flushes results below 2^-126 to zero, so that -inf gives +0; none multiplies first.
    assert ptx.count("ex2.approx.ftz.f32") > 0
    assert ptx.count("ex2.approx.f32") == 0


def test_what_far_tokens_add_is_a_known_part_of_their_weights():
    """e^(-d) - 1 + d is at least 1 / FAR_WEIGHT of max(1, e^(-d)): least at d = -NEAR."""
    algebra = importlib.import_module("fastkl._triton.algebra")
    near, far_weight = algebra.NEAR.value, algebra.FAR_WEIGHT.value
    sizes = [near * 1.01**n for n in range(500)]
    parts = [(math.expm1(-d) + d) / max(1, math.exp(-d)) for x in sizes for d in (x, -x)]
    assert 1 / far_weight <= min(parts) <= 1.01 / far_weight
