"""Arithmetic, logic, comparisons, conversions and moves."""

import functools
import math

import numpy as np

from ..numbers import (
    B32,
    F64,
    PRED,
    Type,
    directed,
    divide,
    each,
    extract,
    fma,
    larger,
    permute,
    ptx_type,
    smaller,
)
from .builder import Builder, op, write

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

# Functions whose results are correct once rounded to nearest; "lo" is the low half of an integer
# product.
_NEAREST = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "lo": np.multiply,
    "div": np.divide,
    "fma": fma,
    "mad": fma,
}


def _exact_add(x, y):
    return fma(x, np.ones_like(x), y)


# Functions of float32 operands with float64 results that are exact or rounded to odd, so that these
# can be rounded in any direction.
_EXACT_F32 = {
    "add": _exact_add,
    "sub": lambda x, y: _exact_add(x, -y),
    "mul": lambda x, y: x.astype(F64) * y,
    "fma": fma,
    "mad": fma,
}

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
# If an operand is NaN, comparisons that end in u are true, and all others except "nan" are false.
_COMPARE_FLOAT = _COMPARE | {
    "ne": lambda x, y: (x < y) | (x > y),
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}

# Functions that round to an integer: for arrays, and for one Python float.
_WHOLE = {
    "rni": (np.rint, round),
    "rzi": (np.trunc, math.trunc),
    "rmi": (np.floor, math.floor),
    "rpi": (np.ceil, math.ceil),
}


@op("add sub mul div rem fma mad")
def _arithmetic(b: Builder):
    t = b.type()
    return _float_arithmetic(b, t) if t.float else _integer_arithmetic(b, t)


def _float_arithmetic(b: Builder, t: Type):
    first = t
    if b.mods[-1:] == ["f32"] and t.width == 16:
        # sub.f32.bf16 d, a, b: only a is bf16.
        t = b.type()
    mode, ftz, sat = b.take("rn", "rz", "rm", "rp"), b.take("ftz"), b.take("sat")
    to_nearest = mode in (None, "rn")
    if b.base == "div" and b.take("full"):
        f = functools.partial(b.machine.approximate, "div")
    elif to_nearest:
        f = _NEAREST.get(b.base)
    else:
        f = _EXACT_F32.get(b.base) if t.bits == 32 else None
    if f is None:
        b.fail("type")
    factors = [first] * (2 if f is fma else 1)
    if to_nearest:
        return b.emit(f, t, *factors, t, ftz=ftz, sat=sat)
    return b.emit(lambda *v: directed(f(*v), mode), t, *factors, t, ftz=ftz, sat=sat)


def _integer_arithmetic(b: Builder, t: Type):
    part = b.need("lo", "hi", "wide") if b.base in ("mul", "mad") else b.base
    out = ptx_type(f"{t.kind}{t.bits * 2}") if part == "wide" else t
    if part == "wide":

        def f(x, y):
            return x.astype(out.store) * y.astype(out.store)
    elif part == "hi":
        f = each(lambda x, y: x * y >> t.bits, t)
    elif part == "div":
        f = each(divide, t)
    elif part == "rem":
        f = each(lambda x, y: x - y * divide(x, y), t)
    else:
        f = _NEAREST[part]
    if b.base == "mad":
        return b.emit(lambda x, y, z: f(x, y) + z, out, t, t, out)
    return b.emit(f, out, t, t)


@op("min max")
def _extreme(b: Builder):
    t, low = b.type(), b.base == "min"
    if not t.float:
        return b.emit(np.minimum if low else np.maximum, t, t, t)
    ftz, nan, xorsign = b.take("ftz"), b.take("NaN"), b.take("xorsign") and b.need("abs")
    # sm_100 has a form with three sources.
    count = 3 if len(b.ops) == 4 and not xorsign else 2

    def f(*v):
        r = functools.reduce(smaller if low else larger, map(np.abs, v) if xorsign else v)
        if xorsign:
            r = np.where(np.signbit(v[0]) != np.signbit(v[1]), -r, r)
        if nan:
            any_nan = functools.reduce(np.logical_or, map(np.isnan, v))
            r = np.where(any_nan, np.nan, r).astype(r.dtype)
        return r

    return b.emit(f, t, *[t] * count, ftz=ftz)


@op("abs neg")
def _sign(b: Builder):
    t = b.type()
    return b.emit(np.abs if b.base == "abs" else np.negative, t, t, ftz=b.take("ftz"))


@op("selp")
def _select(b: Builder):
    bits = ptx_type(f"b{b.type().width}")
    return b.emit(lambda x, y, p: np.where(p, x, y), bits, bits, bits, PRED)


@op("and or xor not shl shr bfe prmt cvta")
def _bits(b: Builder):
    t = b.type()
    if t.float or (b.base == "prmt" and t is not B32) or (b.base == "bfe" and t.bits < 32):
        b.fail("type")
    if b.base in LOGIC:
        return b.emit(LOGIC[b.base], t, t, t)
    if b.base in ("shl", "shr"):
        # Like PTX, NumPy shifts all bits out if the shift is the width or more.
        shift = np.left_shift if b.base == "shl" else np.right_shift
        return b.emit(lambda x, n: shift(x, np.minimum(n, 64).astype(x.dtype)), t, t, B32)
    if b.base == "prmt":
        return b.emit(each(permute, t), t, t, t, t)
    if b.base == "bfe":
        f = each(lambda x, start, length: extract(x, start, length, t.kind == "s"), t)
        return b.emit(f, t, t, B32, B32)
    if b.base == "cvta":
        # Generic and global addresses are the same numbers.
        b.take("to")
        b.need("global")
    return b.emit(np.invert if b.base == "not" else np.copy, t, t)


@op("setp")
def _compare(b: Builder):
    t, ftz, logic = b.type(), b.take("ftz"), b.take(*LOGIC)
    test, destinations = b.need(*_COMPARE_FLOAT), b.pair(PRED)
    x, y = b.source(t, ftz), b.source(t, ftz)
    f = (_COMPARE_FLOAT if t.float else _COMPARE).get(test) or b.fail("comparison")
    other = b.arg(PRED) if logic else None

    def run(mask):
        r = f(x(), y())
        # p|q are the results of both elements of a packed type, else the result and its complement.
        results = (r[:, 0], r[:, 1]) if t.lanes == 2 else (r, ~r)
        for destination, value in zip(destinations, results, strict=True):
            if destination is not None:
                write(destination, LOGIC[logic](value, other) if logic else value, mask)

    return run


@op("mov")
def _move(b: Builder):
    """Build a move, which may also pack {a, b} into one wider register, or unpack it."""
    t, to, source = b.type(), b.vector(), b.vector()
    count = max(len(to), len(source))
    if count == 1:
        part = t
    elif t.kind == "b" and 1 in (len(to), len(source)):
        part = ptx_type(f"b{t.bits // count}")
    else:
        b.fail("vector")

    def parts(texts, **how):
        if len(texts) == count:
            return [b.arg(part, text, **how) for text in texts]
        return b.arg(t, texts[0], **how).view(part.store).reshape(-1, count).T

    destinations, sources = parts(to, write=True), parts(source)

    def run(mask):
        for destination, value in zip(destinations, sources, strict=True):
            write(destination, value, mask)

    return run


@op("cvt")
def _convert(b: Builder):
    s, t = b.type(), b.type()
    mode, ftz, sat = b.take("rn", *_WHOLE), b.take("ftz"), b.take("sat")
    if t.lanes == 2 and t.float and s.name == "f32" and mode == "rn":
        # The first source becomes the high half.
        return b.emit(lambda high, low: np.stack([low, high], 1), t, s, s, ftz=ftz, sat=sat)
    whole = _WHOLE.get(mode)
    if s.float and (not t.float or (s is t and mode)):
        good_mode = whole is not None
    elif t.float and not (s.float and (s.bits < t.bits or s is t)):
        good_mode = mode == "rn"
    else:
        good_mode = mode is None
    if s.lanes + t.lanes > 2 or not good_mode:
        b.fail("conversion or rounding")
    if t.float:
        if whole:
            f = whole[0]
        elif s.float:
            f = np.asarray
        else:
            dtype = F64 if t.kind == "bf" else t.store
            f = functools.partial(np.ndarray.astype, dtype=dtype)
        return b.emit(f, t, s, ftz=ftz, sat=sat, wide=True)
    return b.emit(_to_integer(s, t, whole, sat), t, s, ftz=ftz, wide=True)


def _to_integer(s: Type, t: Type, whole, sat):
    low, high = int(np.iinfo(t.store).min), int(np.iinfo(t.store).max)
    if s.float:
        # Values are clamped. NaN becomes 0, or the top bit alone if either type has 64 bits.
        nan = 0
        if max(t.bits, s.bits) == 64:
            nan = low or high // 2 + 1
        return each(lambda x: nan if math.isnan(x) else whole[1](min(max(x, low), high)), t)
    if sat:
        low, high = max(low, np.iinfo(s.store).min), min(high, np.iinfo(s.store).max)
        return lambda x: np.clip(x, low, high).astype(t.store)
    return functools.partial(np.ndarray.astype, dtype=t.store)


@op("ex2 lg2 rcp sqrt rsqrt")
def _special(b: Builder):
    t, ftz, approx = b.type(), b.take("ftz"), b.take("approx")
    if not t.float:
        b.fail("type")
    if approx:
        if t.bits == 64:
            b.fail("type")
        return b.emit(functools.partial(b.machine.approximate, b.base), t, t, ftz=ftz)
    if not b.take("rn") or b.base not in ("rcp", "sqrt"):
        b.fail("type")
    exact = np.sqrt if b.base == "sqrt" else lambda x: x.dtype.type(1) / x
    return b.emit(exact, t, t, ftz=ftz)
