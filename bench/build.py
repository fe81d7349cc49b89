"""Compile kernels with the launcher's own settings, for cards that this machine need not have."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from fastkl._triton import gradient_kernels, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

from bench.machine_code import Program, inspect

# The package exports the function `launch`; the tile table is in the module of the same name.
launch = importlib.import_module("fastkl._triton.launch")
gradient_launch = importlib.import_module("fastkl._triton.gradient_launch")

POINTERS = {"table_ptr": "*i64"}
POINTERS |= dict.fromkeys(("state_ptr", "kl_ptr", "grad_ptr", "rows_ptr", "top_ptr"), "*fp32")
# The launch to compile for: enough rows to fill any card, with GPT-2's vocabulary.
N_ROWS, N_COLS = 2560, 50257
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Kernel(NamedTuple):
    """A compiled partial_kernel: its target and dtype, how it was built, and its machine code."""

    target: str
    dtype: str
    group: int
    tile: object
    maxnreg: int | None
    program: Program

    @property
    def body_pairs(self) -> float:
        """Pairs that a thread processes in one iteration of the unrolled body loop."""
        tile = self.tile
        return self.group * tile.vec * tile.unroll


def gpu_target(name: str) -> GPUTarget:
    """Return Triton's target for "sm_90", "gfx942", ...

    Raises
    ------
    ValueError
        The name is not of either form.
    """
    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx9"):
        return GPUTarget("hip", name, 64)
    raise ValueError(f"expected a target such as sm_90 or gfx942, got {name!r}")


def compile_kernel(fn, signature, constexprs, *, target, divisible=(), **options):
    """Compile a @triton.jit function with no GPU; `divisible` names arguments that 16 divides.

    Tensors are assumed to be smaller than 2 GB, which Triton tells AMD's compiler.
    """
    names = list(fn.arg_names)
    attrs = {n: [["tt.divisibility", 16]] for n in divisible}
    if target.backend == "hip":
        for n in names:
            if n not in constexprs and str(signature[n]).startswith("*"):
                attrs[n] = [*attrs.get(n, []), ["tt.pointer_range", 32]]
    source = ASTSource(
        fn=fn,
        signature={n: "constexpr" if n in constexprs else signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constexprs.items()},
        attrs={(names.index(n),): attr for n, attr in attrs.items()},
    )
    return triton_compile(source, target=target, options=options)


def specialize(fn, dtype: str, numbers: dict[str, float]) -> tuple[dict, dict, list[str]]:
    """Return (signature, constexprs, divisible) as Triton derives them from a launch's arguments.

    Allocations start at multiples of 16 bytes. Unless the kernel forbids it, Triton specializes on
    addresses and numbers that 16 divides, and compiles the number 1 as a constant.
    """
    # Under Triton's interpreter a kernel is another object, which knows only its Python function.
    function = fn if isinstance(fn, JITFunction) else JITFunction(fn.fn, **fn.rewriter.kwargs)
    parameters = {parameter.name: parameter for parameter in function.params}
    signature, constexprs, divisible = {"p_ptr": f"*{dtype}", **POINTERS}, {}, []
    divisible += [
        name
        for name in signature
        if name in parameters and not parameters[name].do_not_specialize_on_alignment
    ]
    for name, value in numbers.items():
        if name not in parameters:
            continue
        fits = "i32" if -(2**31) <= value < 2**31 else "i64"
        signature[name] = parameters[name].annotation_type or fits
        if parameters[name].do_not_specialize:
            continue
        if value == 1:
            constexprs[name] = 1
        elif value % 16 == 0:
            divisible.append(name)
    return signature, constexprs, divisible


def launch_numbers(dtype: str, group: int, n_rows: int, n_cols: int) -> dict[str, float]:
    """Return the numeric arguments of a launch on one group of circuits with contiguous rows."""
    n_slices, slice_size = launch.slices(n_cols, ITEMSIZE[dtype])
    return {
        "p_row_stride": n_cols,
        "n_rows": n_rows,
        "n_cols": n_cols,
        "n_circuits": group,
        "first_circuit": 0,
        "n_groups": 1,
        "n_slices": n_slices,
        "slice_size": slice_size,
        "lead": 0,
        "aligned": 1,
        "unit": 1.4426950408889634,
        "inverse": 1.0,
    }


def packing_of(target: str, dtype: str) -> str:
    """Return how the launcher has the kernels pack floats on a target."""
    if target.startswith("gfx"):
        return "compiler"
    return launch.nvidia_packing(gpu_target(target).arch // 10, ITEMSIZE[dtype])


def options_for(target: str, warps: int, maxnreg: int | None) -> dict[str, int]:
    """Return the compiler's options; AMD's compiler has no option that limits registers."""
    limits = {} if maxnreg is None or target.startswith("gfx") else {"maxnreg": maxnreg}
    return {"num_warps": warps, **limits}


def build_partial(
    target: str,
    dtype: str,
    group: int,
    *,
    tile=None,
    maxnreg: int | None = launch.MAX_REGISTERS,
    n_rows: int = N_ROWS,
    n_cols: int = N_COLS,
    hints: bool = True,
    divide: bool = False,
    compiler: Callable = compile_kernel,
) -> Kernel:
    """Compile partial_kernel as the launcher does for a group of circuits, and read it.

    Parameters
    ----------
    target : str
        "sm_90", "gfx942", ...
    dtype : {"fp32", "bf16", "fp16"}
    group : {1, 2, 4}
    tile : launch.Tile, optional
        A tile to use instead of the launcher's.
    maxnreg : int or None
        The limit on registers, None for none; by default the launcher's.
    n_rows, n_cols : int
        Sizes of the launch: Triton specializes on 1 and on multiples of 16.
    hints : bool
        If False, compile for arguments about which Triton knows nothing at all.
    divide : bool
        Whether logits are divided by a temperature.
    compiler : callable
        What compiles; another one is needed if Triton's interpreter has replaced the kernels.
    """
    packing = packing_of(target, dtype)
    tile = tile or launch.tile_of(packing, ITEMSIZE[dtype], group)
    numbers = launch_numbers(dtype, group, n_rows, n_cols)
    signature, constexprs, divisible = specialize(kernels.partial_kernel, dtype, numbers)
    if not hints:
        constexprs, divisible = {}, []
    constexprs |= {
        "G": group,
        "LANES": gpu_target(target).warp_size,
        "VEC": tile.vec,
        "UNROLL": tile.unroll,
        "DIVIDE": divide,
        "PACKING": packing,
    }
    compiled = compiler(
        kernels.partial_kernel,
        signature,
        constexprs,
        target=gpu_target(target),
        divisible=divisible,
        **options_for(target, 1, maxnreg),
    )
    return Kernel(target, dtype, group, tile, maxnreg, inspect(compiled))


def build_finish(
    target: str, dtype: str, *, keep: bool = False, compiler: Callable = compile_kernel
) -> Program:
    """Compile finish_kernel as the launcher does; if `keep`, it keeps what gradients need."""
    numbers = launch_numbers(dtype, 1, N_ROWS, N_COLS)
    signature, constexprs, divisible = specialize(kernels.finish_kernel, dtype, numbers)
    compiled = compiler(
        kernels.finish_kernel,
        signature,
        constexprs
        | {
            "LANES": gpu_target(target).warp_size,
            "VEC": launch.TILES[ITEMSIZE[dtype], 1].vec,
            "SLICES": launch.SLICES,
            "DIVIDE": False,
            "KEEP": keep,
            "PACKING": packing_of(target, dtype),
        },
        target=gpu_target(target),
        divisible=divisible,
        **options_for(target, 1, None),
    )
    return inspect(compiled)


def build_gradient(
    target: str,
    dtype: str,
    *,
    reference: bool,
    hints: bool = True,
    compiler: Callable = compile_kernel,
) -> Program:
    """Compile gradient_kernel as the launcher does, with or without the reference's gradient.

    Without `hints` Triton knows nothing at all about its arguments.
    """
    tile = gradient_launch.GRADIENT_TILES[ITEMSIZE[dtype]]
    numbers = launch_numbers(dtype, 1, N_ROWS, N_COLS)
    numbers |= {
        "grad_circuit_stride": N_ROWS,
        "grad_row_stride": 1,
    }
    kernel = gradient_kernels.gradient_kernel
    signature, constexprs, divisible = specialize(kernel, dtype, numbers)
    warps = max(1, gradient_launch.LANES // gpu_target(target).warp_size)
    compiled = compiler(
        kernel,
        signature,
        constexprs
        | {
            "LANES": gradient_launch.LANES,
            "TILE": tile.tokens,
            "VEC": tile.vec,
            "REFERENCE": reference,
            "DIVIDE": False,
            "PACKING": packing_of(target, dtype),
        },
        target=gpu_target(target),
        divisible=divisible if hints else (),
        **options_for(target, warps, gradient_launch.MAX_REGISTERS[reference]),
    )
    return inspect(compiled)
