"""PTX types, and arithmetic with PTX's rounding on NumPy arrays.

A result is first computed in a format, wider if need be, from which one more rounding gives the
correctly rounded number; where necessary, it is rounded "to odd" there (see `to_odd`). `round_to`
then rounds it to the register's type. NumPy lacks bfloat16: such operands are taken as float32.
"""

import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

F32, F64 = np.float32, np.float64
U8, U16, U32, U64, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64

TYPE_NAME = re.compile(r"pred|bf16(x2)?|f(16|32)(x2)?|f64|[su]16x2|[sub](8|16|32|64)")


class Type:
    """A PTX type, such as "u32", "f64", "bf16x2" or "pred".

    Attributes
    ----------
    kind : "b", "s", "u", "f", "bf" or "pred"
    lanes : elements in a register: 2 if packed ("x2"), else 1
    bits, width : bits of an element, and of the register
    store : NumPy type of an element (that of bf16 is its bits, uint16)
    raw : NumPy type of a register's bits; registers are arrays of it
    """

    def __init__(self, name: str):
        match = re.fullmatch(r"(bf|[fsub]|pred)(\d*)(x2)?", name)
        if match is None:
            raise ValueError(f"{name} is no PTX type")
        self.name = name
        self.kind, bits, packed = match.groups()
        self.float = self.kind in ("f", "bf")
        self.lanes = 2 if packed else 1
        self.bits = int(bits or 8)
        self.width = self.bits * self.lanes
        if self.kind == "pred":
            self.store = self.raw = np.dtype("?")
        else:
            code = {"f": "f", "s": "i"}.get(self.kind, "u")
            self.store = np.dtype(f"{code}{self.bits // 8}")
            self.raw = np.dtype(f"u{self.width // 8}")


# One object per type, so that types can be compared by `is`.
ptx_type = functools.cache(Type)
PRED, B32, B64 = ptx_type("pred"), ptx_type("b32"), ptx_type("b64")


def flush(x):
    """Replace subnormal numbers with zeros of the same sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def from_bf16(bits):
    return (bits.astype(U32) << U32(16)).view(F32)


def to_odd(nearest, error):
    """Round `nearest + error` to odd, where `nearest` is that sum rounded to nearest.

    Of the two neighbors of an inexact sum, this takes the one whose last bit is odd. Rounding that
    again, to a format at least two bits narrower, equals rounding the exact sum once.
    """
    bits = nearest.view(f"i{nearest.itemsize}")
    step = np.where((error > 0) != np.signbit(nearest), 1, -1).astype(bits.dtype)
    other = (np.abs(error) > 0) & (bits & 1 == 0)
    return np.where(other, bits + step, bits).view(nearest.dtype)


def _bf16_bits(r, ftz: bool):
    nearest = r.astype(F32)
    if r.dtype == F64:
        nearest = to_odd(nearest, r - nearest)
    elif ftz:
        nearest = flush(nearest)
    bits = nearest.view(U32)
    even = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(nearest), 0x7FFF, even).astype(U16)


def round_to(r, t: Type, ftz: bool = False, sat: bool = False):
    """Round r to what a register of float type t holds; a NaN becomes the canonical NaN."""
    if sat:
        one, zero = r.dtype.type(1), r.dtype.type(0)
        r = np.where(r > 0, np.minimum(r, one), zero)
    if t.kind == "bf":
        return _bf16_bits(r, ftz)
    r = r.astype(t.store, copy=False)
    if ftz:
        r = flush(r)
    # A double's NaN keeps its payload.
    if t.bits < 64 and (nan := np.isnan(r)).any():
        canonical = np.array((1 << t.bits - 1) - 1, f"u{t.bits // 8}").view(t.store)
        r = np.where(nan, canonical, r)
    return r


def fma(x, y, z):
    """Return x * y + z, such that `round_to` rounds it correctly."""
    if z.dtype == F64:
        return _fma_f64(x, y, z)
    # The wide format holds the product exactly; Knuth's two-sum gives the error of the sum.
    wide = F64 if z.dtype == F32 else F32
    product, z = x.astype(wide) * y.astype(wide), z.astype(wide)
    total = product + z
    part = total - product
    return to_odd(total, (product - (total - part)) + (z - part))


def _fma_one(x: float, y: float, z: float) -> float:
    if not (math.isfinite(x) and math.isfinite(y)):
        return x * y + z
    if not math.isfinite(z):
        return z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        # A Fraction has no signed zero. The float sum is exact here, so its sign is right.
        return x * y + z
    try:
        magnitude = float(abs(exact))
    except OverflowError:
        magnitude = math.inf
    return magnitude if exact > 0 else -magnitude


_fma_f64 = np.vectorize(_fma_one, otypes=[F64])


def directed(x, mode: str):
    """Round x, a float64 that is exact or rounded to odd, to float32 in mode rz, rm or rp."""
    r = x.astype(F32)
    past = {"rz": np.abs(r) > np.abs(x), "rm": r > x, "rp": r < x}[mode]
    back = F32({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])
    return np.where(past, np.nextafter(r, back), r)


def larger(x, y):
    """Return the larger number, preferring +0 to -0 and a number to NaN."""
    return np.where(x == y, np.where(np.signbit(x), y, x), np.fmax(x, y))


def smaller(x, y):
    """Return the smaller number, preferring -0 to +0 and a number to NaN."""
    return np.where(x == y, np.where(np.signbit(x), x, y), np.fmin(x, y))


def each(f: Callable[..., int], t: Type):
    """Turn a function of Python numbers into one of arrays that keeps each result's low bits."""
    low_bits = np.vectorize(lambda *values: f(*values) & (1 << t.bits) - 1, otypes=[U64])

    def apply(*arrays):
        return low_bits(*(x.astype(object) for x in arrays)).astype(t.raw).view(t.store)

    return apply


def divide(x: int, y: int) -> int:
    """Divide, truncating; division by zero sets all bits, as on NVIDIA's hardware."""
    if y == 0:
        return -1
    sign = 1 if (x < 0) == (y < 0) else -1
    return abs(x) // abs(y) * sign


def permute(x: int, y: int, selector: int) -> int:
    """prmt.b32: each result byte is one of the eight of x and y, or its sign replicated."""
    source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
    picks = [selector >> shift & 15 for shift in (0, 4, 8, 12)]
    chosen = [source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in picks]
    return int.from_bytes(bytes(chosen), "little")


def extract(x: int, start: int, length: int, signed: bool) -> int:
    """bfe: `length` bits of x from bit `start` on; Python sign-extends x for us."""
    start, length = start & 255, length & 255
    field = x >> start & (1 << length) - 1
    negative = signed and length and field >> length - 1
    return field - (1 << length) if negative else field
