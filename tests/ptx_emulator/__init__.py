"""A PTX emulator: execute what Triton compiles for NVIDIA GPUs with NumPy, without a GPU.

    module = compile_ptx(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 1024}, arch=90,
                         divisible=("x",))
    stats = launch(module, (rows,), [x, n])

The emulator models what memory-bound reductions compile to: scalar and packed arithmetic, global
and shared memory, cp.async, shuffles, barriers and branches. It refuses atomics, local memory,
tensor cores, TMA, mbarriers, clusters and calls. CTAs run one by one, or side by side if they are
single warps without shared memory. Their threads run in lock step; threads that diverge run in
groups until their paths join.

What is checked:

- every opcode, modifier and operand is understood, or building the Module raises Unsupported;
- every access of every lane lies inside one registered allocation and is aligned to its full
  width, or MemoryFault is raised before memory is touched;
- lanes that store different values to one address in one instruction raise MemoryFault, even if
  they belong to different CTAs that run side by side;
- shuffles that miss lanes, and barriers that parts of a warp reach separately, raise SyncFault;
- registers and shared memory start as NaN (all ones) in every CTA, and the target of an
  asynchronous copy holds NaN until the copy is waited for.

What is not checked: other races between warps, and between CTAs.

Arithmetic whose rounding PTX defines, fma included, is bit-exact. Approximate instructions
(.approx, div.full) are correctly rounded here, but may be off by an ulp or two on hardware:
launch(..., approx_ulp=2) adds errors of up to that size, always the same for the same operands.

Where to start reading: module.py (building and launching), machine.py (how CTAs run),
instructions/builder.py (how an instruction becomes a closure), then the instructions themselves.
"""

from .compile import as_compiled, compile_kernel, compile_ptx
from .errors import MemoryFault, PtxError, SyncFault, Unsupported
from .memory import Memory
from .module import Module, launch
from .stats import Stats

__all__ = [
    "Memory",
    "MemoryFault",
    "Module",
    "PtxError",
    "Stats",
    "SyncFault",
    "Unsupported",
    "as_compiled",
    "compile_kernel",
    "compile_ptx",
    "launch",
]
