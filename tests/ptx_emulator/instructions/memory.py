"""Loads, stores, asynchronous copies, and matrices of shared memory."""

import numpy as np

from ..errors import Unsupported
from ..numbers import B32, B64, PRED, U8, U16, U32, ptx_type
from .builder import SYNC, Builder, op


@op("ld st")
def _load_store(b: Builder):
    t, load = b.type(), b.base == "ld"
    space, has_policy = b.memory_modifiers()
    count = int((b.take("v2", "v4", "v8") or "v1")[1:])
    # A signed load sign-extends the value to the width of the register.
    word = ptx_type(f"{'s' if t.kind == 's' else 'u'}{t.bits}")
    if len(b.ops) != 2 + has_policy:
        b.fail("operands")
    # ld d, [a]  or  st [a], s
    registers = [
        b.arg(word, text, wide=True, write=load) for text in b.vector(b.ops.pop(0 if load else 1))
    ]
    address = b.address()
    if has_policy:
        b.arg(B64)
    if len(registers) != count or t.lanes == 2 or t is PRED or (space == "param" and not load):
        b.fail("vector or type")
    unit, access = t.bits // 8, b.machine.access

    def run_load(mask):
        lanes = b.lanes(mask)
        words = access(b.ins, space, address()[lanes], lanes, unit=unit, count=count)
        for register, column in zip(registers, words.view(word.store).T, strict=True):
            register[lanes] = column

    def run_store(mask):
        lanes = b.lanes(mask)
        values = np.stack([register[lanes] for register in registers], 1).view(f"u{unit}")
        access(b.ins, space, address()[lanes], lanes, unit=unit, count=count, values=values)

    return run_load if load else run_store


@op("cp")
def _copy_async(b: Builder):
    b.need("async")
    order = b.take("commit_group", "wait_group", "wait_all")
    return _copy_order(b, order) if order else _copy(b)


def _copy_order(b: Builder, order: str):
    machine = b.machine
    # wait_group n leaves the n newest committed groups pending. wait_all leaves none, not even the
    # group that is not committed yet.
    allowed = int(b.next(), 0) if order == "wait_group" else -1

    def run(mask):
        if mask is not None:
            raise Unsupported(f"{machine.name}, {b.ins}: by a part of the CTA")
        if order == "commit_group":
            machine.groups.append([])
            return
        while len(machine.groups) > allowed + 1:
            for lanes, to, data in machine.groups.pop(0):
                machine.access(b.ins, "shared", to, lanes, count=data.shape[1], values=data)
        machine.groups = machine.groups or [[]]

    return run


def _copy(b: Builder):
    """Build a copy that reads and checks its source at once, and writes poison until the wait."""
    machine = b.machine
    _, has_policy = b.memory_modifiers()
    b.need("shared", "shared::cta")
    target, source = b.address(), b.address()
    size = int(b.ops[0], 0)
    # The remaining operands are the size and, optionally, how many of its bytes to copy.
    amount = [b.arg(B32) for _ in b.ops[has_policy:]][-1]
    if has_policy:
        b.arg(B64)

    def run(mask):
        lanes = b.lanes(mask)
        to = target()[lanes]
        # Bytes that are not copied are filled with zeros.
        data = np.zeros((lanes.size, size), U8)
        for n in set(amount[lanes].tolist()) - {0}:
            chosen = amount[lanes] == n
            some = lanes[chosen]
            data[chosen, :n] = machine.access(
                b.ins, "global", source()[some], some, count=n, align=size
            )
        machine.access(b.ins, "shared", to, lanes, count=size, values=np.full_like(data, 255))
        machine.groups[-1].append((lanes, to, data))

    return run


@op("ldmatrix stmatrix")
def _matrix(b: Builder):
    """Move 8x8 matrices of 16-bit elements; lanes 8i to 8i+7 hold addresses of matrix i's rows."""
    b.kind, b.members = SYNC, np.full(b.machine.n, 0xFFFFFFFF, U32)
    load = b.base == "ldmatrix"
    b.type("b16")
    for name in ("sync", "aligned", "m8n8"):
        b.need(name)
    space, _ = b.memory_modifiers()
    count, transpose = int(b.need("x1", "x2", "x4")[1:]), b.take("trans")
    registers = [b.arg(B32, text, write=load) for text in b.vector(b.ops.pop(0 if load else 1))]
    address, access = b.address(), b.machine.access
    if len(registers) != count:
        b.fail("vector")

    def turn(matrices):
        return np.ascontiguousarray(matrices.swapaxes(2, 3) if transpose else matrices)

    def run_load(mask):
        lanes = b.lanes(mask).reshape(-1, 32)
        rows = lanes[:, : 8 * count].ravel()
        words = access(b.ins, space, address()[rows], rows, unit=2, count=8)
        matrices = turn(words.reshape(-1, count, 8, 8)).reshape(-1, count, 64).view(U32)
        for i, register in enumerate(registers):
            register[lanes] = matrices[:, i]

    def run_store(mask):
        lanes = b.lanes(mask).reshape(-1, 32)
        rows = lanes[:, : 8 * count].ravel()
        pairs = np.stack([register[lanes] for register in registers], 1)
        matrices = turn(pairs.view(U16).reshape(-1, count, 8, 8))
        values = matrices.reshape(-1, 8)
        access(b.ins, space, address()[rows], rows, unit=2, count=8, values=values)

    return run_load if load else run_store
