"""Turn the text of an instruction into a closure over the arrays of its registers."""

import re
from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..numbers import PRED, TYPE_NAME, U32, U64, Type, flush, from_bf16, ptx_type, round_to
from ..parser import Instruction

# Kinds of instructions: see Builder.
PLAIN, SYNC, CONTROL = range(3)

# Modifiers of loads and stores that change neither the result nor the counts here.
_HINTS = """
    weak volatile relaxed acquire release cta gpu sys nc ca cg cs lu cv wb wt
    L1::evict_first L1::evict_last L1::evict_normal L1::evict_unchanged L1::no_allocate
    L2::64B L2::128B L2::256B
""".split()  # noqa: SIM905

_IMMEDIATE = re.compile(
    r"0[fF](?P<f32>\w{8})|0[dD](?P<f64>\w{16})|(?P<int>-?(?:0[xX][\da-fA-F]+|\d+))U?"
)
_ADDRESS = re.compile(r"\[ ?(?P<base>[%$\w]+) ?(?:\+ ?(?P<offset>-?\w+) ?)?\]")

# Base of the opcode -> function that takes a Builder and returns the closure.
_OPS: dict[str, Callable] = {}


def op(names: str):
    """Register the decorated function to build instructions with these (space-separated) bases."""

    def register(build):
        _OPS.update(dict.fromkeys(names.split(), build))
        return build

    return register


def write(destination, value, mask) -> None:
    """Set a register for the threads in mask (None: all)."""
    if mask is None:
        destination[...] = value
    else:
        where = mask if destination.ndim == 1 else mask[:, None]
        np.copyto(destination, value, where=where, casting="unsafe")


class Builder:
    """One instruction, compiled to `run`.

    The functions registered with `op` take modifiers and operands from the Builder one by one and
    return `run`. Anything left over is an error, so nothing is ignored by accident.

    Attributes
    ----------
    kind : PLAIN, SYNC (lanes of a warp have to execute it together) or CONTROL.
    run : PLAIN and SYNC instructions are called as run(mask), which executes them for the threads
        in mask (None: all). CONTROL instructions are called as run(at, mask): they set the program
        counters and the status of the threads themselves and return None, or return the index of
        the next instruction if all threads continue there.
    members : for each thread of a SYNC instruction, a bit mask of the lanes of its warp that must
        take part.
    barrier_id : the number of a CTA's barrier; None for other instructions.
    base, mods, ops : "mul.rn.f32 %r1, %r2, %r3" splits into "mul", ["rn", "f32"] and the operands;
        `mods` and `ops` hold only what has not been taken yet.
    """

    def __init__(self, machine, ins: Instruction):
        self.machine = machine
        self.ins = ins
        self.kind = PLAIN
        self.members = None
        self.barrier_id: int | None = None
        self.base, *self.mods = ins.name.split(".")
        self.ops = list(ins.ops)
        self.guard = self.arg(PRED, ins.guard) if ins.guard else None
        if self.base not in _OPS:
            self.fail("unknown opcode")
        self.run = _OPS[self.base](self)
        if self.mods or self.ops:
            self.fail(f"left over: {self.mods + self.ops}")

    def fail(self, why: str):
        raise Unsupported(f"{self.machine.name}, {self.ins}: {why}")

    def take(self, *names: str) -> str | None:
        """Remove and return the first of these modifiers that is present."""
        for name in names:
            if name in self.mods:
                self.mods.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        return self.take(*names) or self.fail(f"needs one of {names}")

    def type(self, *allowed: str) -> Type:
        """Take the last modifier, which must be a type."""
        name = self.mods.pop() if self.mods else "none"
        if not TYPE_NAME.fullmatch(name) or (allowed and name not in allowed):
            self.fail(f"type {name}")
        return ptx_type(name)

    def memory_modifiers(self) -> tuple[str, bool]:
        """Take a memory access's modifiers; return its space, and whether a policy comes last."""
        while self.take(*_HINTS):
            pass
        space = self.take("param", "global", "shared", "shared::cta") or "global"
        return space.split(":")[0], bool(self.take("L2::cache_hint"))

    def next(self) -> str:
        return self.ops.pop(0) if self.ops else self.fail("too few operands")

    def vector(self, text: str | None = None) -> list[str]:
        """Return the parts of an operand {a, b, ...}, or the operand alone."""
        return [part.strip() for part in (text or self.next()).strip("{}").split(",")]

    def arg(self, t: Type, text: str | None = None, wide: bool = False, write: bool = False):
        """Return the array behind the next operand: register, symbol or immediate.

        With `wide`, a register may be wider than t: then its low part is read, or the value that is
        written to it is extended.
        """
        text = text or self.next()
        bits = (self.machine.registers if write else self.machine.values).get(text)
        if bits is None and write and text == "_":
            bits = np.empty(self.machine.n, t.raw)
        elif bits is None and not write and (value := _immediate(text, t)) is not None:
            bits = np.full(self.machine.n, value % (1 << t.width), U64).astype(t.raw)
        if wide and bits is not None and bits.itemsize > t.raw.itemsize:
            if write:
                return bits.view(f"{'i' if t.kind == 's' else 'u'}{bits.itemsize}")
            bits = bits.view(t.raw)[:: bits.itemsize // t.raw.itemsize]
        if bits is None or bits.dtype != t.raw:
            self.fail(f"operand {text} as .{t.name}")
        return bits.view(t.store).reshape(-1, 2) if t.lanes == 2 else bits.view(t.store)

    def dst(self, t: Type, text: str | None = None, wide: bool = False):
        """Return the array behind the next operand, a destination."""
        return self.arg(t, text, wide, write=True)

    def pair(self, t: Type):
        """Return the arrays of a destination d|p with a predicate p, or of d alone and None."""
        first, _, second = self.next().partition("|")
        return self.dst(t, first), self.dst(PRED, second) if second else None

    def source(self, t: Type, ftz: bool = False, wide: bool = False) -> Callable:
        """Return a function that reads the next operand for arithmetic; bf16 as float32."""
        register = self.arg(t, wide=wide)

        def read():
            return from_bf16(register) if t.kind == "bf" else register

        if ftz and t.float and (t.bits == 32 or self.base != "cvt"):
            return lambda: flush(read())
        return read

    def emit(self, f, out: Type, *sources: Type, ftz=False, sat=False, wide=False) -> Callable:
        """Return the closure of an instruction that sets its destination to f(sources)."""
        destination = self.dst(out, wide=wide)
        reads = [self.source(t, ftz, wide) for t in sources]
        flush_result = ftz and (out.bits == 32 or self.base != "cvt")

        def run_integer(mask):
            write(destination, f(*[read() for read in reads]), mask)

        def run_float(mask):
            result = round_to(f(*[read() for read in reads]), out, flush_result, sat)
            write(destination, result, mask)

        return run_float if out.float else run_integer

    def address(self) -> Callable:
        """Return a function that computes addresses from the next operand, [register + offset]."""
        m = _ADDRESS.fullmatch(self.next()) or self.fail("address")
        base = self.machine.values.get(m["base"])
        if base is None or base.dtype not in (U32, U64):
            self.fail("address")
        offset = base.dtype.type(int(m["offset"] or "0", 0) % (1 << base.itemsize * 8))
        return lambda: (base + offset).astype(U64)

    def lanes(self, mask):
        """Return the indices of the threads in mask."""
        return self.machine.threads if mask is None else np.flatnonzero(mask)

    def enabled(self, mask):
        """Return the threads of mask whose guard lets them execute."""
        if self.guard is None:
            return mask
        passes = self.guard != self.ins.negate
        return passes if mask is None else passes & mask


def _immediate(text: str, t: Type) -> int | None:
    """Return a constant of type t as an integer (its bits modulo 2^width), else None."""
    m = _IMMEDIATE.fullmatch(text)
    if m is None:
        return None
    if m["int"]:
        # The only float constants that are written as integers are those of 16 bits.
        fits = not t.float or t.width < 32
        value = int(m["int"], 0)
    else:
        fits = t.width == (32 if m["f32"] else 64)
        value = int(m["f32"] or m["f64"], 16)
    return value if fits and -(1 << t.width - 1) <= value < 1 << t.width else None
