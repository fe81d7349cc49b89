"""Modules (kernels ready to run) and their launch."""

import math

import numpy as np

from .errors import Unsupported
from .machine import SIDE_BY_SIDE, Machine, independent
from .memory import Memory, address_of
from .numbers import U8, ptx_type
from .parser import parse
from .stats import Stats


class Module:
    """One kernel of PTX, parsed, checked, and compiled to closures.

    Parameters
    ----------
    ptx : str
    num_warps : int, optional
        Warps per CTA; required if the PTX has no .reqntid.
    shared_bytes : int, optional
        Dynamic shared memory that a launch provides.
    divisible : sequence of int, optional
        Indices of the arguments that the compiler was promised are multiples of 16.

    Raises
    ------
    Unsupported
        Some instruction, even one that would never be executed, is not modeled.
    """

    def __init__(self, ptx: str, *, num_warps: int = 0, shared_bytes: int = 0, divisible=()):
        self.ptx = ptx
        self.shared_bytes = shared_bytes
        self.divisible = divisible
        kernel = parse(ptx)
        self.name, self.params = kernel.name, kernel.params
        self.num_warps = kernel.num_warps or num_warps
        if not self.num_warps:
            raise Unsupported(f"{self.name}: no .reqntid, and num_warps was not given")
        self._kernel = kernel
        cta_size = 32 * self.num_warps
        self._most_ctas = SIDE_BY_SIDE if independent(kernel, cta_size) else 1
        self._machines = {1: Machine(kernel, cta_size, 1)}

    def machine(self, n_ctas: int) -> Machine:
        """Return the machine that runs a grid of this many CTAs."""
        # Powers of two, so that few machines are built.
        n = min(1 << (n_ctas - 1).bit_length(), self._most_ctas) if n_ctas else 1
        if n not in self._machines:
            self._machines[n] = Machine(self._kernel, 32 * self.num_warps, n)
        return self._machines[n]

    def _parameters(self, args, memory: Memory) -> np.ndarray:
        """Return the bytes of the parameters, each at a multiple of 16; add arrays to `memory`."""
        params = np.zeros(16 * len(self.params), U8)
        # The compiler appends up to two scratch pointers; if omitted, they are null.
        missing = [kind for _, kind in self.params[len(args) :]]
        if len(args) > len(self.params) or missing not in ([], ["u64"], ["u64"] * 2):
            raise ValueError(f"{self.name} takes {self.params}, got {len(args)} arguments")
        values = [*args, *[0] * len(missing)]
        for i, ((name, kind), arg) in enumerate(zip(self.params, values, strict=True)):
            if isinstance(arg, np.ndarray) or hasattr(arg, "data_ptr"):
                value = address_of(arg)
                if not memory.find(value, arg.nbytes):
                    memory.add(arg, name)
            else:
                value = arg
            t = ptx_type(kind)
            fits = t.float or -(1 << t.bits - 1) <= value < 1 << t.bits
            if not fits or (i in self.divisible and value % 16):
                raise ValueError(
                    f"{self.name}: argument {i} = {value} is no .{kind}, "
                    "or not divisible by 16 as declared"
                )
            if t.float:
                bits = np.array([value], t.store)
            else:
                bits = np.array([value % (1 << t.bits)], t.raw)
            params[16 * i :][: t.bits // 8] = bits.view(U8)
        return params


def launch(
    module: Module,
    grid,
    args,
    *,
    num_warps: int | None = None,
    shared_bytes: int | None = None,
    memory: Memory | None = None,
    approx_ulp: float = 0,
    seed: int = 0,
    max_instructions: int = 50_000_000,
) -> Stats:
    """Run a kernel on all CTAs of a grid.

    Parameters
    ----------
    module : Module
    grid : tuple of one to three int
    args : sequence
        The run-time arguments: numbers, addresses, arrays, or CPU tensors. Arrays and tensors stand
        for their address, and are registered in `memory` unless they already lie in it. The scratch
        pointers that Triton appends may be omitted.
    num_warps : int, optional
        Only checked against the module's.
    shared_bytes : int, optional
        Dynamic shared memory; by default the module's own number.
    memory : Memory, optional
        Other memory that the kernel may touch, for example through a table of addresses.
    approx_ulp : float, optional
        Largest error, in units in the last place, added to approximate float32 instructions.
    seed : int, optional
        Seed of those errors.
    max_instructions : int, optional
        Instructions that a CTA may execute, on average over the CTAs that run side by side.

    Returns
    -------
    Stats

    Raises
    ------
    MemoryFault, SyncFault, PtxError, ValueError
    """
    memory = Memory() if memory is None else memory
    if num_warps not in (None, module.num_warps):
        raise ValueError(f"{module.name} has {module.num_warps} warps, not {num_warps}")
    params = module._parameters(args, memory)
    grid = (*grid, 1, 1)[:3]
    return module.machine(math.prod(grid)).run(
        grid,
        params,
        memory,
        shared_bytes=module.shared_bytes if shared_bytes is None else shared_bytes,
        approx_ulp=approx_ulp,
        seed=seed,
        max_instructions=max_instructions,
    )
