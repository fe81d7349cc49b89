"""Arithmetic as each chip does it best: operations on two floats at once, and the sums of lanes.

`CHIP` names what the code is compiled for:

- "nvidia": NVIDIA's cards but for the next;
- "blackwell": NVIDIA's data-center Blackwell, whose PTX has instructions for two floats
  (`fma.rn.f32x2` and others). They take one issue slot, which is what the kernels are short of on
  these cards, whose memory is fast. The compiler finds few of them by itself;
- "other": AMD's cards, whose compiler finds such instructions in sums of products but not in
  chains of multiply-adds, and Triton's interpreter, where columns would take most of the time.

All results but those of sums have the same bits on all chips.
"""

import triton
import triton.language as tl


@triton.jit
def fma(a, b, c, CHIP: tl.constexpr):
    """Return a · b + c, rounded once."""
    if CHIP == "blackwell":
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
def multiply_add(a, b, c, CHIP: tl.constexpr):
    """Return a · b + c, where it does not matter how often it is rounded."""
    return a * b + c if CHIP == "other" else fma(a, b, c, CHIP)


@triton.jit
def add(a, b, CHIP: tl.constexpr):
    """Return a + b."""
    if CHIP == "blackwell":
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 a, b;
            mov.b64 a, {$2, $3};
            mov.b64 b, {$4, $5};
            add.rn.f32x2 a, a, b;
            mov.b64 {$0, $1}, a;
            }""",
            constraints="=r,=r,r,r,r,r",
            args=[a, b],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return a + b


@triton.jit
def multiply(a, b, CHIP: tl.constexpr):
    """Return a · b."""
    if CHIP == "blackwell":
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
    """Split values (LANES, N), which a thread holds, into N tensors (LANES,)."""
    LANES: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    if N == 1:
        return (values.reshape((LANES,)),)
    else:
        even, odd = tl.split(values.reshape((LANES, N // 2, 2)))
        return columns(even) + columns(odd)


@triton.jit
def add_up(total, values, CHIP: tl.constexpr):
    """Return the lanes' totals (LANES,) with each lane's values (LANES, N) added."""
    if CHIP == "other":
        return total + tl.sum(values, axis=1)
    else:
        values = columns(values)
        for n in tl.static_range(len(values)):
            total += values[n]
        return total


@triton.jit
def add_products(total, a, b, CHIP: tl.constexpr):
    """Return the lanes' totals (LANES,) with each lane's products a · b (LANES, N) added.

    The sum of a tile's products, added to the total by itself, would take an operation more.
    """
    if CHIP == "other":
        return total + tl.sum(a * b, axis=1)
    else:
        a, b = columns(a), columns(b)
        for n in tl.static_range(len(a)):
            total = tl.fma(a[n], b[n], total)
        return total
