"""The reader of machine code, and what is predicted from it: the real kernel and bad ones."""

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiles what the interpreter would run"),
]

if sys.platform == "linux":
    from ptx_emulator.compile import compile_kernel

    from bench import build, cards, machine_code, roofline

ROOT = Path(__file__).parents[1]
# One circuit and a group, and what they read a pair: the circuit, and the reference's share.
GROUPS = (1, 4)


@functools.cache
def partial(dtype, group, target="sm_90", **options):
    return build.build_partial(target, dtype, group, compiler=compile_kernel, **options)


@functools.cache
def finish(dtype, target="sm_90"):
    return build.build_finish(target, dtype, compiler=compile_kernel)


def card(name):
    return next(card for card in cards.CARDS if card.name == name)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_body_of_the_real_kernel(dtype, group):
    """Wide loads even where the compiler knows nothing of the arguments, as for V = 50257."""
    kernel = partial(dtype, group, hints=False)
    body = roofline.body_of(kernel)
    assert set(body.load_widths) == {16}
    assert len(body.load_widths) == (group + 1) * kernel.tile.unroll
    assert roofline.loop_bytes(kernel) == build.ITEMSIZE[dtype] * (1 + 1 / group)
    assert (body.barriers, body.shuffles, body.spills, body.shared_accesses) == (0, 0, 0, 0)
    assert kernel.program.stack == 0
    assert kernel.program.registers <= 64
    # Two exponentials a pair for one circuit, 1 + 1/G in a group.
    assert body.special / kernel.body_pairs == pytest.approx(1 + 1 / group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_binds_on_an_h100(dtype, group):
    prediction = roofline.predict_loop(partial(dtype, group), card("H100 SXM"))
    assert prediction.binds == "memory"
    assert prediction.fraction_of_peak == 1
    # Both sums of four half-precision circuits do not fit into 85 %: see test_codegen.py.
    assert prediction.share("issue") <= (0.9 if (dtype, group) == ("bf16", 4) else 0.85)
    assert prediction.share("special") <= 0.85


@pytest.mark.parametrize("n_cols", [50257, 151936])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_rows_on_an_h100(dtype, group, n_cols):
    """Head, tail and merging cost something, and leave the memory its peak."""
    prediction = roofline.predict_rows(
        partial(dtype, group), finish(dtype), n_cols, card("H100 SXM")
    )
    loop = roofline.predict_loop(partial(dtype, group), card("H100 SXM"))
    assert prediction.share("issue") > loop.share("issue")
    assert prediction.share("issue") <= (0.985 if (dtype, group) == ("bf16", 4) else 0.85)
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
        # A slice leaves less than a tile behind its body, and less than a vector before it.
        assert all(0 <= rest < tile + vec for _, rest in shape)


def test_occupancy():
    # 65536 registers: 8 blocks of 128 threads with 64 each are 32 of 64 warps.
    assert cards.occupancy("sm_90", 64, 16, 128) == 0.5
    assert cards.occupancy("sm_90", 65, 16, 128) == 28 / 64
    # Shared memory: 2 blocks of 100 KiB in 228.
    assert cards.occupancy("sm_90", 32, 100 * 1024, 128) == 8 / 64
    # 16 blocks of one warp at the most.
    assert cards.occupancy("sm_86", 32, 0, 32) == 16 / 48
    assert cards.occupancy("gfx942", 64, 0, 256) == 1


def test_prediction_takes_the_slowest_limit():
    h100 = card("H100 SXM")
    slots = 4 / h100.bandwidth * h100.per_second("issue")
    # As many instructions as are issued while memory delivers one bfloat16 pair.
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
	v_exp_f32_e32 v1, v1
	v_pk_add_f32 v[0:1], v[0:1], v[2:3]
	v_mov_b32_dpp v2, v1 row_shr:1 row_mask:0xf bank_mask:0xf
	s_add_i32 s0, s0, 1
	s_barrier
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_reading_sass():
    (loop,), outside = machine_code.parse_sass(SASS)
    assert len(loop) == 8
    assert loop.load_widths == [2, 8]
    assert (loop.masked_loads, outside.masked_loads) == (1, 0)
    assert (loop.special, loop.spills, loop.shuffles, loop.barriers) == (1, 1, 1, 1)
    assert loop.occupied == {"issue": 8, "fma": 2, "alu": 0, "special": 1}
    assert outside.load_widths == [16]


def test_reading_amdgcn():
    (loop,), outside = machine_code.parse_amdgcn(AMDGCN)
    assert loop.load_widths == [16, 2]
    assert (loop.special, loop.shuffles, loop.barriers) == (1, 1, 1)
    # Three vector instructions, one of which takes four times as long.
    assert loop.occupied == {"issue": 6, "special": 1}
    assert len(outside) == 1


def test_innermost_loops_only():
    nested = ".L_x_0:\n/*0000*/ MOV R1, R2 ;\n.L_x_1:\n/*0010*/ LDG.E R1, [R2] ;\n"
    nested += "/*0020*/ @P0 BRA `(.L_x_1) ;\n/*0030*/ @P1 BRA `(.L_x_0) ;\n"
    (loop,), outside = machine_code.parse_sass(nested)
    # What stands in the outer loop alone is neither: nobody knows how often it runs.
    assert (len(loop), len(outside)) == (2, 0)


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
    # All the same: one exponential a pair.
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


def test_command_line_on_another_kernel(bad_file, tmp_path):
    """As a user would: in a process of its own, without the interpreter."""
    command = [sys.executable, "-m", "bench.roofline", "--targets", "sm_90", "gfx942"]
    command += ["--kernel", f"{bad_file}:bad", "--bytes-per-pair", "4", "--constexpr", "BLOCK=1024"]
    command += ["--signature", ",".join(f"{k}={v}" for k, v in BAD_SIGNATURE.items())]
    command += ["--output", str(tmp_path)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing here was timed" in done.stdout
    document = json.loads((tmp_path / "roofline.json").read_text())
    assert document["device"] == "none: predicted from machine code"
    assert [p["target"] for p in document["programs"]] == ["sm_90", "gfx942"]
    assert document["programs"][1]["loop"]["barriers"] > 0


def test_tables_document_and_picture(tmp_path):
    programs = [roofline.describe_kernel(partial("fp32", 1), finish("fp32"))]
    document = roofline.report(programs, "python -m bench.roofline")
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
    roofline.plot(document, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_the_committed_result_is_of_this_kernel():
    """bench/results/roofline.json says what the compiler makes of the kernel today."""
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
