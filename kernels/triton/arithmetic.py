"""Arithmetic on floats, packed where that pays, and the sums of lanes.

`PACKING` says who packs two floats into the operands of one instruction, which takes a single issue
slot:

- "ptx": we do, by `fma.rn.f32x2` and the like, of which the compiler finds few by itself. Only
  NVIDIA's data-center Blackwell has them and needs them;
- "none": nobody, on NVIDIA's other cards, in float32, and on all targets outside the loops that
  every token passes;
- "compiler": AMD's compiler, which finds packed instructions in sums of products but not in chains
  of multiply-adds. Triton's interpreter runs this code too: it would spend most of its time on
  `columns`.
"""

import triton
import triton.language as tl


@triton.jit
def fma(a, b, c, PACKING: tl.constexpr):
    """Return a · b + c, rounded once."""
    if PACKING == "ptx":
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 a, b, c;
            mov.b64 a, {$2, $3};
            mov.b64 b, {$4, $5};
            mov.b64 c, {$6, $7};
            fma.rn.f32x2 c, a, b, c;
            mov.b64 {$0, $1}, c;
            }""",
            constraints="=r,=r,r,r,r,r,r,r",
            args=[a, b, c],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.fma(a, b, c)


@triton.jit
def multiply_add(a, b, c, PACKING: tl.constexpr):
    """Return a · b + c, where it does not matter whether it is rounded once or twice."""
    return a * b + c if PACKING == "compiler" else fma(a, b, c, PACKING)


@triton.jit
def multiply(a, b, PACKING: tl.constexpr):
    """Return a · b."""
    if PACKING == "ptx":
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 a, b;
            mov.b64 a, {$2, $3};
            mov.b64 b, {$4, $5};
            mul.rn.f32x2 a, a, b;
            mov.b64 {$0, $1}, a;
            }""",
            constraints="=r,=r,r,r,r,r",
            args=[a, b],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return a * b


@triton.jit
def columns(values):
    """Split values (LANES, N), which a thread holds, into N tensors (LANES,); N is up to 8."""
    LANES: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    parts = (values,)
    for step in tl.static_range(3):
        if N >> step > 1:
            halves = ()
            for i in tl.static_range(len(parts)):
                even, odd = tl.split(parts[i].reshape((LANES, N >> (step + 1), 2)))
                halves = halves + (even, odd)
            parts = halves
    result = ()
    for i in tl.static_range(len(parts)):
        result = result + (parts[i].reshape((LANES,)),)
    return result


@triton.jit
def add_up(total, values, PACKING: tl.constexpr):
    """Return the lanes' totals (LANES,) with each lane's values (LANES, N) added; None is 0."""
    if PACKING == "compiler":
        part = tl.sum(values, axis=1)
        return part if total is None else total + part
    else:
        values = columns(values)
        for n in tl.static_range(len(values)):
            total = values[n] if total is None else total + values[n]
        return total


@triton.jit
def add_products(total, a, b, PACKING: tl.constexpr):
    """Return the lanes' totals (LANES,) with each lane's products a · b (LANES, N) added.

    None is 0. Where the compiler does not pack, every addition is part of a multiply-add.
    """
    if PACKING == "compiler":
        part = tl.sum(a * b, axis=1)
        return part if total is None else total + part
    else:
        a, b = columns(a), columns(b)
        for n in tl.static_range(len(a)):
            total = a[n] * b[n] if total is None else tl.fma(a[n], b[n], total)
        return total
