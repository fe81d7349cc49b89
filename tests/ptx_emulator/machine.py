"""Execute CTAs: the threads of one or several in lock step, then those of the next.

A register is an array with one element per thread, and an instruction is a closure over such arrays
(see `instructions.builder`), so all threads execute an instruction in one NumPy call. Threads that
diverge at a branch run in groups that share a program counter, lowest program counter first. They
meet again at labels, where paths join. CTAs that share nothing but global memory run side by side
(see `independent`); others run one after another.
"""

import math
import re
import time
from collections import ChainMap

import numpy as np

from .errors import LaneFault, MemoryFault, PtxError, SyncFault, Unsupported
from .instructions import CONTROL, SYNC, Builder
from .instructions.control import DONE, PARKED, READY
from .memory import Allocation, Memory
from .numbers import F32, F64, I64, TYPE_NAME, U8, U32, U64, ptx_type
from .parser import Kernel
from .stats import Stats

# The most CTAs that run side by side: `access` stores the index of their warp in five bits.
SIDE_BY_SIDE = 32

# The system reserves the first kilobyte of shared memory, as on hardware.
_SHARED_BASE = 1024

_APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "div": np.divide,
}


def independent(kernel: Kernel, cta_size: int) -> bool:
    """Return whether CTAs of this size are single warps without shared memory or barriers."""
    together = re.compile(r"\bshared\b|^bar(rier)?\.(?!warp)|^cp\.|matrix")
    alone = not any(together.search(instruction.name) for instruction in kernel.body)
    return cta_size == 32 and alone and not kernel.shared_symbols


class Machine:
    """A kernel bound to its registers and threads, and the state of the running CTAs.

    Parameters
    ----------
    kernel : Kernel
    cta_size : int
        Threads per CTA.
    n_ctas : int
        CTAs that can run side by side.

    Attributes
    ----------
    n, threads : the number of threads, and their indices
    registers, values : name -> array of the register's bits; `values` also has the special
        registers, and the addresses of parameters and shared-memory symbols.
    code : for each instruction its Builder, or None for a label.
    pc, status : for each thread, its next instruction, and READY, PARKED or DONE.
    groups : groups of asynchronous copies not yet waited for; the last group is still open.
    """

    def __init__(self, kernel: Kernel, cta_size: int, n_ctas: int):
        self.name = kernel.name
        self.cta_size, self.n_ctas = cta_size, n_ctas
        self.n = n = cta_size * n_ctas
        self.threads = np.arange(n)
        # The grid coordinates of the running CTAs.
        self.ctas: list[tuple[int, ...]] = []
        self.pc = np.zeros(n, I64)
        self.status = np.zeros(n, U8)
        self.registers: dict[str, np.ndarray] = {}
        self.values = ChainMap(self.registers, self._special_registers(kernel))
        self.banks: list[np.ndarray] = []
        body = [i for i in kernel.body if not i.name.startswith(".reg")]
        self.labels = {i.ops[0]: at for at, i in enumerate(body) if i.name == ":"}
        self.code: list[Builder | None] = []
        for i in kernel.body:
            if i.name == ":":
                self.code.append(None)
            elif i.name.startswith(".reg"):
                self._declare(i)
            else:
                self.code.append(Builder(self, i))

    def _special_registers(self, kernel: Kernel) -> dict[str, np.ndarray]:
        special = {}
        for axis in "xyz":
            # CTAs are one-dimensional. `run` fills in their grid coordinates.
            special |= {f"%{name}.{axis}": np.zeros(self.n, U32) for name in ("tid", "ctaid")}
            special |= {f"%{name}.{axis}": np.ones(self.n, U32) for name in ("ntid", "nctaid")}
        special["%tid.x"] = (self.threads % self.cta_size).astype(U32)
        special["%ntid.x"] = np.full(self.n, self.cta_size, U32)
        special["%laneid"] = (self.threads % 32).astype(U32)
        special["%warpid"] = (self.threads % self.cta_size // 32).astype(U32)
        for name in kernel.shared_symbols:
            special[name] = np.full(self.n, _SHARED_BASE, U32)
        for i, (name, _) in enumerate(kernel.params):
            special[name] = np.full(self.n, 16 * i, U32)
        return special

    def _declare(self, declaration) -> None:
        """Declare registers as rows of banks: `.reg .b32 %r<7>` is one bank, `%a, %b` are two."""
        type_name = declaration.name.removeprefix(".reg .")
        for stem, count in re.findall(r"([^<,\s]+)(?:<(\d+)>)?", ",".join(declaration.ops)):
            if not TYPE_NAME.fullmatch(type_name):
                raise Unsupported(f"{self.name}, {declaration}")
            bank = np.empty((int(count or 1), self.n), ptx_type(type_name).raw)
            self.banks.append(bank)
            for k, row in enumerate(bank):
                self.registers[f"{stem}{k}" if count else stem] = row

    def approximate(self, base: str, x, *y):
        """Return the float64 result of an approximate instruction.

        With approx_ulp, a float32 result has an error that depends on operands and seed alone.
        """
        r = _APPROXIMATE[base](x.astype(F64), *y)
        if not self.approx_ulp or x.dtype != F32:
            return r
        size = self.approx_ulp * np.abs(np.spacing(r.astype(F32))).astype(F64)
        if base == "lg2":
            # Around 1 the documented error is an absolute one of 2^-22.
            size = np.where((x > 0.5) & (x < 2), np.maximum(size, 2.0**-22), size)
        # A hash with the constants of splitmix64; its upper 53 bits are mapped to [-1, 1).
        h = (sum(y, x).view(U32).astype(U64) + U64(self.seed)) * U64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> U64(29))) * U64(0xBF58476D1CE4E5B9)
        error = size * ((h >> U64(11)) * 2.0**-52 - 1)
        return np.where(np.isfinite(size) & (r != 0) & (x != 0), r + error, r)

    def access(self, ins, space, addresses, lanes, *, unit=1, count, values=None, align=None):
        """Load, or store values, for the threads numbered `lanes`; see Memory.access."""
        if space == "global":
            size = addresses.size * unit * count
            warp = (lanes >> 5).astype(U64)
            sectors = np.unique(warp << U64(59) | addresses >> U64(5)).size
            if values is None:
                self.stats.bytes_loaded += size
                self.stats.sectors_loaded += sectors
            else:
                self.stats.bytes_stored += size
                self.stats.sectors_stored += sectors
        try:
            return self.spaces[space].access(addresses, unit, count, values=values, align=align)
        except LaneFault as fault:
            cta, thread = divmod(int(lanes[fault.lane]), self.cta_size)
            thread = f"thread {thread} of CTA {self.ctas[cta]}"
            raise MemoryFault(f"{self.name}, {ins}: {thread}: {fault.reason}") from None

    def run(
        self, grid, params, memory, *, shared_bytes, approx_ulp, seed, max_instructions
    ) -> Stats:
        """Run all CTAs of a grid; `params` are the bytes of the parameters, 16 for each."""
        begin = time.perf_counter()
        self.stats, self.approx_ulp, self.seed = Stats(), approx_ulp, seed
        shared = np.empty(shared_bytes, U8)
        self.spaces = {"global": memory, "shared": Memory(), "param": Memory()}
        self.spaces["shared"].allocations.append(Allocation("shared memory", _SHARED_BASE, shared))
        self.spaces["param"].allocations.append(Allocation("parameters", 0, params, writable=False))
        # See _count.
        self.counts = np.zeros((2, len(self.code) + 1), I64)
        places = [place[::-1] for place in np.ndindex(*grid[::-1])]
        for first in range(0, len(places), self.n_ctas):
            self.ctas = places[first : first + self.n_ctas]
            self.budget, self.groups = max_instructions * len(self.ctas), [[]]
            n_threads = self.cta_size * len(self.ctas)
            for axis, index, size in zip("xyz", zip(*self.ctas, strict=True), grid, strict=True):
                self.values[f"%ctaid.{axis}"][:n_threads] = np.repeat(index, self.cta_size)
                self.values[f"%nctaid.{axis}"][:] = size
            # All ones: a NaN in every float type, and no plausible address.
            for bits in (*self.banks, shared):
                bits[...] = ~np.zeros((), bits.dtype)
            self.pc[:] = 0
            self.status[:n_threads], self.status[n_threads:] = READY, DONE
            with np.errstate(all="ignore"):
                while (self.status != DONE).any():
                    at, mask, met = self._next()
                    self._execute(at, None if mask.all() else mask, met)
        totals = self.counts.cumsum(1)[:, :-1].tolist()
        for op, threads, warps in zip(self.code, *totals, strict=True):
            if op and threads:
                self.stats.threads[op.ins.name] += threads
                self.stats.warps[op.ins.name] += warps
        self.stats.ctas, self.stats.seconds = math.prod(grid), time.perf_counter() - begin
        return self.stats

    def _warp_bits(self, flags):
        """Return, for each thread, the lanes of its warp whose flag is set, as a bit mask."""
        bits = np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view("<u4")
        return np.repeat(bits[:, 0], 32)

    def _next(self):
        """Return a program counter, the threads to run there, and whether they met for a SYNC."""
        ready = self.status == READY
        if ready.any():
            at = int(self.pc[ready].min())
            return at, ready & (self.pc == at), False
        # All live threads wait.
        alive = self.status != DONE
        places = {at: self.code[at] for at in sorted(set(self.pc[alive].tolist()))}
        for at, op in places.items():
            if op.kind != SYNC:
                continue
            here = alive & (self.pc == at)
            runs = op.enabled(here)
            missing = op.members & self._warp_bits(alive) & ~self._warp_bits(runs) != 0
            # A lane's own member mask must name that lane.
            not_named = op.members >> self.values["%laneid"] & 1 == 0
            waits = runs & (missing | not_named)
            if not waits[here].all():
                self.status[here & ~waits] = READY
                return at, here & ~waits, True
        self._complete_barrier(alive, list(places.values()))
        return self._next()

    def _complete_barrier(self, alive, ops) -> None:
        """Release all live threads, which wait at `ops`, if these are one barrier; else raise."""
        warps = self.threads.reshape(-1, 32)
        parted = any(len(set(self.pc[w][alive[w]])) > 1 for w in warps)
        if parted or any(op.kind == SYNC for op in ops) or len({op.barrier_id for op in ops}) > 1:
            cta = self._cta(alive)
            mine = alive & (self.threads // self.cta_size == cta)
            where = [str(self.code[at].ins) for at in sorted(set(self.pc[mine].tolist()))]
            raise SyncFault(f"{self.name}: CTA {self.ctas[cta]} is stuck at {where}")
        self.status[alive] = READY
        self.pc[alive] += 1
        self.stats.barriers += 1

    def _count(self, start: int, end: int, mask) -> None:
        """Count the instructions from `start` up to `end`, as executed by the threads in mask.

        Only the steps at both ends are stored: their cumulative sum is each instruction's count.
        """
        if mask is None:
            n = (self.n, self.n // 32)
        else:
            n = (mask.sum(), mask.reshape(-1, 32).any(1).sum())
        self.counts[:, start] += n
        self.counts[:, end] -= n
        self.budget -= end - start
        if self.budget < 0:
            running = self.status != DONE if mask is None else mask
            raise PtxError(f"{self.name}: CTA {self.ctas[self._cta(running)]} does not end")

    def _cta(self, threads) -> int:
        """Return the index, among CTAs that run side by side, of the first thread's CTA."""
        return int(np.flatnonzero(threads)[0]) // self.cta_size

    def _execute(self, at: int, mask, met: bool) -> None:
        """Run the threads in mask from `at` until they diverge, wait, end or may meet others."""
        start, here = at, slice(None) if mask is None else mask
        while True:
            op = self.code[at]
            if op is None:
                # A label, where other threads may be waiting or may arrive later.
                if mask is not None and at != start:
                    break
            elif op.kind == CONTROL:
                self._count(start, at + 1, mask)
                start = at = op.run(at, mask)
                if at is None:
                    return
                continue
            elif op.kind == SYNC and not (met and at == start) and self._must_meet(op, mask):
                self.status[here] = PARKED
                break
            else:
                m = op.enabled(mask)
                active = self.n if m is None else np.count_nonzero(m)
                if active:
                    op.run(None if active == self.n else m)
            at += 1
        self.pc[here] = at
        self._count(start, at, mask)

    @staticmethod
    def _must_meet(op: Builder, mask) -> bool:
        """Return whether threads must wait for others of their warps at this SYNC."""
        if op.guard is not None or op.members.min() < 0xFFFFFFFF:
            return True
        if mask is None:
            return False
        warps = mask.reshape(-1, 32)
        return bool((warps.any(1) != warps.all(1)).any())
