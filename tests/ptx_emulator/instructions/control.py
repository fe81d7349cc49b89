"""Barriers, branches, and instructions without a visible effect."""

import numpy as np

from ..numbers import B32, B64
from .builder import CONTROL, SYNC, Builder, op, write

# The status of a thread. PARKED: it waits at a barrier or a warp-synchronous instruction.
READY, PARKED, DONE = range(3)


@op("bar barrier")
def _barrier(b: Builder):
    machine = b.machine
    b.take("cta")
    b.take("aligned")
    if b.take("warp"):
        b.need("sync")
        b.kind, b.members = SYNC, b.arg(B32)
        return lambda mask: None
    b.need("sync")
    b.kind, b.barrier_id = CONTROL, int(b.next())

    def run(at, mask):
        if mask is None and b.guard is None:
            machine.stats.barriers += 1
            return at + 1
        here = np.isin(machine.threads, b.lanes(mask))
        wait = b.enabled(here)
        machine.pc[here] = at + 1
        machine.pc[wait] = at
        machine.status[wait] = PARKED
        return None

    return run


@op("bra ret exit")
def _branch(b: Builder):
    machine = b.machine
    b.kind = CONTROL
    b.take("uni")
    target = None
    if b.base == "bra":
        label = b.next()
        target = machine.labels[label] if label in machine.labels else b.fail("no such label")

    def run(at, mask):
        m = b.enabled(mask)
        taken = machine.n if m is None else np.count_nonzero(m)
        if mask is None and taken == 0:
            return at + 1
        if mask is None and taken == machine.n and target is not None:
            return target
        leaving = slice(None) if m is None else m
        machine.pc[slice(None) if mask is None else mask] = at + 1
        if target is None:
            machine.status[leaving] = DONE
        else:
            machine.pc[leaving] = target
        return None

    return run


@op("createpolicy")
def _policy(b: Builder):
    destination = b.dst(B64)
    b.mods, b.ops = [], []
    return lambda mask: write(destination, 0, mask)


@op("nanosleep membar fence griddepcontrol")
def _nothing(b: Builder):
    b.mods, b.ops = [], []
    return lambda mask: None
