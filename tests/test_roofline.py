"""Test the reader of machine code and the predictions from it, on real kernels and bad ones."""

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import GFX942, SLACK, TRITON_3_7, needs_amd

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiles what the interpreter would run"),
]

if sys.platform == "linux":
    from emulated import emulate_gradients
    from ptx_emulator.compile import compile_kernel

    from bench import build, cards, control_flow, machine_code, roofline, roofline_gradient

ROOT = Path(__file__).parents[1]
# Group sizes: a single circuit, and a full group.
GROUPS = (1, 4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def partial(dtype, group, target="sm_90", **options):
    return build.build_partial(target, dtype, group, compiler=compile_kernel, **options)


@functools.cache
def finish(dtype, target="sm_90"):
    return build.build_finish(target, dtype, compiler=compile_kernel)


@functools.cache
def gradient(dtype, reference, target="sm_90"):
    program = build.build_gradient(target, dtype, reference=reference, compiler=compile_kernel)
    return roofline_gradient.Gradient(target, dtype, reference, program)


def card(name):
    return next(card for card in cards.CARDS if card.name == name)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_body_of_the_real_kernel(dtype, group):
    """Loads are wide even if the compiler knows nothing of the arguments, as for V = 50257."""
    kernel = partial(dtype, group, hints=False)
    body = roofline.body_of(kernel)
    assert set(body.load_widths) == {16}
    assert len(body.load_widths) == (group + 1) * kernel.tile.unroll
    assert roofline.loop_bytes(kernel) == build.ITEMSIZE[dtype] * (1 + 1 / group)
    assert (body.barriers, body.shuffles, body.spills, body.shared_accesses) == (0, 0, 0, 0)
    assert kernel.program.stack == 0
    assert kernel.program.registers <= 64
    # Two exponentials per pair for one circuit, 1 + 1/G in a group.
    assert body.special / kernel.body_pairs == pytest.approx(1 + 1 / group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_binds_on_an_h100(dtype, group):
    prediction = roofline.predict_loop(partial(dtype, group), card("H100 SXM"))
    assert prediction.binds == "memory"
    assert prediction.fraction_of_peak == 1
    assert prediction.share("issue") <= 0.85 * SLACK
    assert prediction.share("special") <= 0.85


@pytest.mark.parametrize("n_cols", [50257, 151936])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_rows_on_an_h100(dtype, group, n_cols):
    """Head, tail and merging cost instructions, but memory still reaches its peak."""
    most = {("bf16", 2): 0.87, ("bf16", 4): 0.92}.get((dtype, group), 0.85)
    prediction = roofline.predict_rows(
        partial(dtype, group), finish(dtype), n_cols, card("H100 SXM")
    )
    loop = roofline.predict_loop(partial(dtype, group), card("H100 SXM"))
    assert prediction.share("issue") > loop.share("issue")
    assert prediction.share("issue") <= most * SLACK
    assert prediction.share("special") <= 0.85
    assert (prediction.binds, prediction.fraction_of_peak) == ("memory", 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("n_cols", [1, 1000, 50257, 128256, 151936])
def test_slices_cover_the_row(dtype, n_cols):
    kernel = partial(dtype, 1)
    vec = kernel.tile.vec
    tile = kernel.program.threads * vec
    for shift in range(vec):
        shape = roofline.row_shape(kernel, n_cols, shift)
        assert sum(tiles * tile + rest for tiles, rest in shape) == n_cols
        # A slice leaves less than a tile after its body, and less than a vector before it.
        assert all(0 <= rest < tile + vec for _, rest in shape)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", GFX942])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_gradient_kernel_executes(dtype, reference, target):
    """A tile accesses each logit and gradient once, 128 bits at a time, and waits for nothing."""
    kernel = gradient(dtype, reference, target)
    tile, token = kernel.ways
    loads = kernel.tile.loads
    for n_circuits in roofline_gradient.CIRCUITS:
        block, pairs = tile.times(n_circuits), n_circuits * kernel.tokens
        assert block.store_widths == [16] * loads * (n_circuits + reference)
        read, written = kernel.bytes_a_pair(n_circuits)
        assert sum(block.store_widths) == written * pairs
        # AMD's compiler also loads an address and the stride next to it in a single load, and four
        # of the numbers kept of a row.
        others = 2 * n_circuits + reference if kernel.program.code.amd else 0
        assert block.load_widths.count(16) == loads * (n_circuits + 1) + others
        assert 16 * loads * (n_circuits + 1) == read * pairs
        assert (block.barriers, block.shuffles, block.shared_accesses) == (0, 0, 0)
        assert block.spills == 0
    itemsize = build.ITEMSIZE[dtype]
    assert token.iteration.store_widths == [itemsize]
    assert token.after.store_widths == [itemsize] * reference
    # An exponential per token of the reference and of each circuit; for each circuit also 1 / z_p,
    # and the exponential that moves z_p.
    assert tile.iteration.special == kernel.tokens + 2
    assert tile.before.special >= kernel.tokens


@pytest.mark.parametrize("n_circuits", [1, 4])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_kernel_as_executed(generator, dtype, reference, n_circuits):
    """The emulator executes the counted exponentials and bytes exactly, and about the total."""
    kernel = gradient(dtype, reference)
    n_rows, n_cols = 2, 2 * kernel.tile.tokens + 104
    ((tiles, steps),) = roofline_gradient.row_shape(kernel.tile, n_cols)
    assert (tiles, steps) == (2, 1)
    logits = torch.randn(n_circuits + 1, n_rows, n_cols, generator=generator).to(DTYPES[dtype])
    *circuits, p = (rows.clone() for rows in logits)
    grad, wanted = torch.ones(n_circuits, n_rows), [True] * n_circuits
    *_, session = emulate_gradients(grad, circuits, p, wanted, reference, arch=90)
    stats = session.total("gradient_kernel")

    tile, token = (way.times(n_circuits) for way in kernel.ways)
    threads = n_rows * kernel.program.threads

    def exponentials(block):
        return sum(i.opcode.startswith("MUFU.EX2") for i in block.instructions)

    executed = sum(n for name, n in stats.threads.items() if name.startswith("ex2"))
    assert executed == threads * (tiles * exponentials(tile) + steps * exponentials(token))
    for name, what, widths, a_pair in zip(
        ("row", "gradient"),
        ("load", "store"),
        (tile.load_widths, tile.store_widths),
        kernel.bytes_a_pair(n_circuits),
        strict=True,
    ):
        accessed = session.accessed("gradient_kernel", name, what)
        assert accessed[16] == threads * tiles * 16 * widths.count(16)
        assert sum(accessed.values()) == a_pair * n_circuits * n_rows * n_cols
    # PTX adds, multiplies and divides 64-bit integers in one instruction, machine code in several.
    kinds = stats.by_class("threads")
    executed = stats.thread_instructions - kinds["move"] - kinds["param"]
    counted = threads * (tiles * len(tile) + steps * len(token))
    assert executed < counted < 1.5 * executed


@pytest.mark.parametrize("n_circuits", [1, 4])
@pytest.mark.parametrize("reference", [False, True])
def test_gradients_on_an_h100(reference, n_circuits):
    """Memory reaches its peak in float32; in half precision, instructions are about as slow."""
    h100 = card("H100 SXM")
    for predict in (
        roofline_gradient.predict_tile,
        functools.partial(roofline_gradient.predict_rows, n_cols=50257),
    ):
        full = predict(gradient("fp32", reference), n_circuits, card=h100)
        assert (full.binds, full.fraction_of_peak) == ("memory", 1)
        assert full.share("issue") <= 0.7
        half = predict(gradient("bf16", reference), n_circuits, card=h100)
        assert half.binds in {"memory", "issue"}
        # Both gradients of four circuits take the most instructions for their bytes.
        assert half.fraction_of_peak >= (0.75 if reference and n_circuits > 1 else 0.85)
        assert half.share("special") <= 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_cols", [1, 3, 1000, 1024, 50257, 151936])
def test_tiles_of_gradients_cover_the_row(dtype, n_cols):
    tile = gradient(dtype, False).tile
    lanes = build.gradient_launch.LANES
    shape = roofline_gradient.row_shape(tile, n_cols)
    assert len(shape) == (tile.vec if n_cols % tile.vec else 1)
    for row, (tiles, steps) in enumerate(shape):
        rest = n_cols - tiles * tile.tokens
        # Less than a vector lies before the first whole tile, and less than a tile after the last.
        assert 0 <= rest < tile.tokens + -row * n_cols % tile.vec
        assert steps * lanes - lanes < rest <= steps * lanes


def test_rows_of_gradients_are_their_tiles_and_single_tokens():
    kernel = gradient("bf16", True)
    tile, token = (len(way.times(4)) for way in kernel.ways)
    threads = kernel.program.threads
    of = kernel.row_operations(4, 50257)["issue"] * 50257 * 4
    assert of == pytest.approx(threads * (49 * tile + token))
    # A row without a whole tile is processed token by token.
    assert kernel.row_operations(1, 100)["issue"] == threads * len(kernel.ways[1].times(1)) / 100


def test_occupancy():
    # 65536 registers: 8 blocks of 128 threads with 64 each are 32 of 64 warps.
    assert cards.occupancy("sm_90", 64, 16, 128) == 0.5
    assert cards.occupancy("sm_90", 65, 16, 128) == 28 / 64
    # Shared memory: 2 blocks of 100 KiB in 228.
    assert cards.occupancy("sm_90", 32, 100 * 1024, 128) == 8 / 64
    # At most 16 blocks of one warp.
    assert cards.occupancy("sm_86", 32, 0, 32) == 16 / 48
    assert cards.occupancy("gfx942", 64, 0, 256) == 1


def test_prediction_takes_the_slowest_limit():
    h100 = card("H100 SXM")
    slots = 4 / h100.bandwidth * h100.per_second("issue")
    # The number of instructions that are issued while memory delivers one bfloat16 pair.
    assert slots == pytest.approx(35, abs=0.5)
    bound = roofline.predict(h100, 4, {"issue": 0.9 * slots, "special": 1})
    assert (bound.binds, bound.fraction_of_peak) == ("memory", 1)
    slow = roofline.predict(h100, 4, {"issue": 2 * slots, "special": 1})
    assert slow.binds == "issue"
    assert slow.fraction_of_peak == pytest.approx(0.5)


SASS = """
kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD2 R4, R4, R6 ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   STL [R1], R5 ;
        /*0058*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0060*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   BRA `(.L_x_1);
        /*00b0*/                   NOP;
"""
AMDGCN = """
.LBB0_1:
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ushort v5, v[6:7], off
	buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen
	v_exp_f32_e32 v1, v1
	v_pk_add_f32 v[0:1], v[0:1], v[2:3]
	v_mov_b32_dpp v2, v1 row_shr:1 row_mask:0xf bank_mask:0xf
	s_add_i32 s0, s0, 1
	s_barrier
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_reading_sass():
    (loop,), outside = machine_code.split(machine_code.parse_sass(SASS))
    assert len(loop) == 9
    assert loop.load_widths == [2, 8]
    assert loop.store_widths == [2]
    assert (loop.masked_loads, outside.masked_loads) == (1, 0)
    assert (loop.special, loop.spills, loop.shuffles, loop.barriers) == (1, 1, 1, 1)
    assert loop.occupied == {"issue": 9, "fma": 2, "alu": 0, "special": 1}
    assert outside.load_widths == [16]


def test_reading_amdgcn():
    (loop,), outside = machine_code.split(machine_code.parse_amdgcn(AMDGCN))
    assert loop.load_widths == [16, 2]
    assert loop.store_widths == [8]
    assert (loop.special, loop.shuffles, loop.barriers) == (1, 1, 1)
    # Three vector instructions, one of which takes four times as long.
    assert loop.occupied == {"issue": 6, "special": 1}
    assert len(outside) == 1


def test_innermost_loops_only():
    nested = ".L_x_0:\n/*0000*/ MOV R1, R2 ;\n.L_x_1:\n/*0010*/ LDG.E R1, [R2] ;\n"
    nested += "/*0020*/ @P0 BRA `(.L_x_1) ;\n/*0030*/ @P1 BRA `(.L_x_0) ;\n"
    (loop,), outside = machine_code.split(machine_code.parse_sass(nested))
    # Instructions of the outer loop alone are in neither: it is unknown how often they run.
    assert (len(loop), len(outside)) == (2, 0)


# A loop that a thread enters after its first instruction and exits from within, with three ways
# through it, and before it another loop that can be bypassed.
BRANCHES = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R1 ;
        /*0020*/                   BRA.U !UP0, `(.L_x_0) ;
.L_x_1:
        /*0030*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/               @P1 EXIT ;
.L_x_3:
        /*0050*/                   BRA P2, `(.L_x_4) ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   MUFU.EX2 R6, R6 ;
        /*0080*/              @!P3 CALL.REL.NOINC `(.L_x_2) ;
        /*0090*/                   BRA `(.L_x_5) ;
.L_x_4:
        /*00a0*/                   FMUL R1, R1, R1 ;
.L_x_5:
        /*00b0*/                   BRA `(.L_x_2) ;
"""
# The same in AMD's form: a loop around a load, one that is entered in its middle, a masked store.
AMD_BRANCHES = """
	s_cbranch_scc0 .LBB0_2
	s_nop 0
.LBB0_1:
	v_exp_f32_e32 v1, v1
.LBB0_2:
	v_exp_f32_e32 v2, v2
.LBB0_3:
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	s_cbranch_execnz .LBB0_3
	s_cbranch_scc1 .LBB0_1
	s_cbranch_vccnz .LBB0_4
	s_branch .LBB0_1
.LBB0_4:
	s_cbranch_execz .LBB0_5
	buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen
.LBB0_5:
	s_endpgm
"""


def test_way_through_a_loop():
    code = machine_code.parse_sass(BRANCHES)
    (begin,) = control_flow.special_loops(code)
    way = control_flow.way_through(code, begin)
    assert [i.opcode for i in way.before.instructions] == ["BRA", "BRA"]
    # The longest of the ways; a call is not followed.
    names = ["EXIT", "BRA", "MUFU", "MUFU", "CALL", "BRA", "BRA"]
    assert [i.opcode.split(".")[0] for i in way.iteration.instructions] == names
    assert len(way.after) == 0
    assert len(way.times(3)) == 2 + 3 * 7
    assert way.times(3).special == 6


def test_way_through_a_loop_of_amd():
    code = machine_code.parse_amdgcn(AMD_BRANCHES)
    (begin,) = control_flow.special_loops(code)
    way = control_flow.way_through(code, begin)
    assert [i.opcode for i in way.before.instructions] == ["s_cbranch_scc0"]
    assert (way.iteration.special, way.iteration.load_widths) == (2, [16])
    assert way.after.store_widths == [16]
    endless = ".L_x_0:\n/*0000*/ MUFU.EX2 R1, R1 ;\n/*0010*/ BRA `(.L_x_0) ;\n"
    with pytest.raises(ValueError, match="no way from"):
        control_flow.way_through(machine_code.parse_sass(endless), 0)


def test_overlapping_loops_are_nested():
    """An outer loop whose jump back is within an inner loop ends where the inner loop does."""
    text = "".join(
        f"{label}\t{code}\n"
        for label, code in (
            (".LBB0_1:\n", "s_nop 0"),
            (".LBB0_2:\n", "v_exp_f32_e32 v1, v1"),
            ("", "s_cbranch_scc0 .LBB0_1"),
            ("", "s_branch .LBB0_2"),
        )
    )
    assert machine_code.parse_amdgcn(text).loops == {0: 3, 1: 3}


BAD = textwrap.dedent(
    '''
    import triton
    import triton.language as tl

    @triton.jit
    def bad(p_ptr, q_ptr, out_ptr, stride, n_cols, BLOCK: tl.constexpr):
        """A mask in the loop, and a sum over all lanes in it."""
        row = tl.program_id(0)
        total = 0.0
        for start in range(0, n_cols, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < n_cols
            p = tl.load(p_ptr + row * stride + token, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(q_ptr + row * stride + token, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.exp2(p) * (p - q), axis=0)
        tl.store(out_ptr + row, total)

    @triton.jit
    def loopless(p_ptr, BLOCK: tl.constexpr):
        tl.store(p_ptr + tl.arange(0, BLOCK), 0.0)
    '''
)
BAD_SIGNATURE = {
    **{"p_ptr": "*bf16", "q_ptr": "*bf16", "out_ptr": "*fp32"},
    **{"stride": "i32", "n_cols": "i32"},
}


@pytest.fixture
def bad_file(tmp_path):
    path = tmp_path / "bad_kernels.py"
    path.write_text(BAD)
    return path


def test_a_bad_kernel_is_seen_to_be_bad(bad_file):
    (program,) = roofline.survey_other(
        roofline.load_function(f"{bad_file}:bad"),
        BAD_SIGNATURE,
        {"BLOCK": 1024},
        targets=["sm_90"],
        bytes_a_pair=4,
        compiler=compile_kernel,
    )
    loop = program["loop"]
    assert set(loop["load_widths_bytes"]) == {2}
    assert loop["barriers"] > 0
    assert loop["shuffles"] > 0
    assert loop["bytes_a_pair"] == 4
    # There is still one exponential per pair.
    assert loop["special_a_pair"] == 1


def test_other_kernels_errors(bad_file):
    with pytest.raises(ValueError, match=r"no function 'good' in .*bad_kernels\.py"):
        roofline.load_function(f"{bad_file}:good")
    with pytest.raises(ValueError, match="a file that exists"):
        roofline.load_function("nowhere.py:bad")
    with pytest.raises(ValueError, match="no loop of the kernel loads from global memory on sm_90"):
        roofline.survey_other(
            roofline.load_function(f"{bad_file}:loopless"),
            {"p_ptr": "*fp32"},
            {"BLOCK": 128},
            targets=["sm_90"],
            bytes_a_pair=4,
            compiler=compile_kernel,
        )
    with pytest.raises(ValueError, match="expected a target such as"):
        build.gpu_target("cuda")


@needs_amd
def test_command_line_on_another_kernel(bad_file, tmp_path):
    """Run the command as a user would: in a process of its own, without the interpreter."""
    command = [sys.executable, "-m", "bench.roofline", "--targets", "sm_90", "gfx942"]
    command += ["--kernel", f"{bad_file}:bad", "--bytes-per-pair", "4", "--constexpr", "BLOCK=1024"]
    command += ["--signature", ",".join(f"{k}={v}" for k, v in BAD_SIGNATURE.items())]
    command += ["--out", str(tmp_path)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing here was timed" in done.stdout
    document = json.loads((tmp_path / "roofline.json").read_text())
    assert document["device"] == "none: predicted from machine code"
    assert [p["target"] for p in document["programs"]] == ["sm_90", "gfx942"]
    loops = [program["loop"] for program in document["programs"]]
    assert loops[0]["barriers"] > 0
    assert loops[1]["bytes_a_pair"] == 4
    # With Triton 3.8 the loop that is found is within that one, around a single load.
    assert loops[1]["barriers"] > 0 or not TRITON_3_7


def test_tables_document_and_picture(tmp_path):
    programs = [roofline.describe_kernel(partial("fp32", 1), finish("fp32"))]
    gradients = [
        roofline_gradient.describe_kernel(gradient("bf16", side)) for side in (False, True)
    ]
    document = roofline.report(programs, "python -m bench.roofline", gradients)
    assert json.loads(json.dumps(document)) == document
    assert document["notice"] == roofline.NOTICE
    assert document["versions"]["triton"]
    (program,) = document["programs"]
    assert [p["card"] for p in program["loop_predictions"]] == ["H100 SXM", "H200"]
    assert set(program["whole_rows"]) == {"50257", "151936"}
    text = roofline.show(roofline.prediction_table(programs))
    assert len(text.splitlines()) == 3
    assert "H200" in text
    assert "sm_90" in roofline.show(roofline.code_table(programs))
    # A heading, and a row per card, set of gradients and number of circuits.
    text = roofline.show(roofline_gradient.prediction_table(gradients))
    assert len(text.splitlines()) == 1 + 2 * 2 * 2
    (line,) = (row for row in roofline_gradient.code_table(gradients) if row[2:4] == ["both", "4"])
    assert line[line.index("2.5") :] == ["2.5", "2.5", "4/8/16", "16", "0", "0", "0"]
    assert "| H200 | bf16 | " in roofline.markdown(document)
    roofline.plot(document, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_the_committed_result_is_of_this_kernel():
    """bench/results/roofline.json matches what the compiler makes of the kernel today."""
    path = roofline.RESULTS / "roofline.json"
    document = json.loads(path.read_text())
    if document["versions"]["triton"] != roofline.triton.__version__:
        pytest.skip(f"{path.name} is of Triton {document['versions']['triton']}")
    for group in GROUPS:
        kernel = partial("bf16", group)
        (program,) = (
            p
            for p in document["programs"]
            if (p["target"], p["dtype"], p["group"]) == ("sm_90", "bf16", group)
        )
        assert program["tile"] == kernel.tile._asdict()
        assert program["registers"] == kernel.program.registers
        assert program["loop"]["instructions"] == len(roofline.body_of(kernel))
    for side in (False, True):
        kernel = gradient("bf16", side)
        (program,) = (
            p
            for p in document["gradients"]
            if (p["target"], p["dtype"]) == ("sm_90", "bf16")
            and p["gradients"] == roofline_gradient.SIDES[side]
        )
        assert program == roofline_gradient.describe_kernel(kernel)
