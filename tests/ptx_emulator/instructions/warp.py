"""Exchange between the lanes of a warp, which execute these instructions together."""

import numpy as np

from ..numbers import B32, I64, U32
from .arithmetic import LOGIC
from .builder import SYNC, Builder, op, write


@op("shfl")
def _shuffle(b: Builder):
    b.kind = SYNC
    b.type("b32")
    b.need("sync")
    mode = b.need("up", "down", "bfly", "idx")
    destination, in_range = b.pair(B32)
    x, n, clamp, b.members = (b.arg(B32) for _ in range(4))
    threads = b.machine.threads
    lane = threads % 32

    def run(mask):
        # As in PTX's pseudocode, `clamp` holds a bound in bits 0-4 and a segment mask in bits 8-12.
        k, bound, segment = (v.astype(I64) for v in (n & 31, clamp & 31, clamp >> 8 & 31))
        last = lane & segment | bound & ~segment
        if mode == "up":
            other = lane - k
            inside = other >= last
        else:
            other = {"down": lane + k, "bfly": lane ^ k, "idx": lane & segment | k & ~segment}[mode]
            inside = other <= last
        other = threads - lane + np.where(inside, other, lane)
        # A lane that does not take part supplies poison.
        value = x[other] if mask is None else np.where(mask[other], x[other], ~U32(0))
        write(destination, value, mask)
        if in_range is not None:
            write(in_range, inside, mask)

    return run


@op("redux elect")
def _collective(b: Builder):
    b.kind = SYNC
    b.need("sync")
    if b.base == "elect":
        # The lowest lane is elected.
        t, kind = B32, "min"
        destination, is_mine = b.pair(t)
        x = b.machine.values["%laneid"]
    else:
        t = b.type("b32", "s32", "u32", "f32")
        kind = b.need("min", "max") if t.float else b.need("min", "max", "add", *LOGIC)
        destination, is_mine = b.pair(t)
        x = b.arg(t)
    b.members = b.arg(B32)
    absolute = b.take("abs")
    propagates_nan = b.take("NaN") or not t.float
    f = {
        "add": np.add,
        "min": np.minimum if propagates_nan else np.fmin,
        "max": np.maximum if propagates_nan else np.fmax,
        **LOGIC,
    }[kind]

    def run(mask):
        # (threads, 32): for each thread, the lanes of its warp that it combines.
        named = (b.members[:, None] >> np.arange(32, dtype=U32) & U32(1)).astype(bool)
        v = np.abs(x) if absolute else x
        # A lane that is not named supplies a neutral value: 0, or the thread's own value again.
        neutral = v.dtype.type(0) if kind in ("add", "xor") else v[:, None]
        lanes = np.where(named, np.repeat(v.reshape(-1, 32), 32, 0), neutral)
        r = f.reduce(lanes, axis=1).astype(v.dtype)
        write(destination, r, mask)
        if is_mine is not None:
            write(is_mine, r == x, mask)

    return run
