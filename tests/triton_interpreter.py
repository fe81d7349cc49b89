"""Patches for Triton's interpreter, to apply before the first interpreted kernel runs."""

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def correct() -> None:
    """Make multiply-adds and `exp2` give the results of the hardware's instructions."""
    InterpreterBuilder.create_fma = _fused_multiply_add
    InterpreterBuilder.create_exp2 = _flushed_exp2


def hasten() -> None:
    """Have the interpreter patch `triton.language` once per launch and module, in half the time.

    By itself it patches at launch and again, without effect, at each call of a jitted function.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope
    restore, patched_modules = scope.restore, set()

    def patch_once(fn):
        if fn.__module__ in patched_modules:
            return scope()
        patched_modules.add(fn.__module__)
        return patch(fn)

    def restore_all(self):
        patched_modules.clear()
        restore(self)

    interpreter._patch_lang, scope.restore = patch_once, restore_all


def _fused_multiply_add(self, x, y, z):
    """Keep the product exact: the interpreter's own version rounds it.

    float64 holds the product of two float32 exactly. The sum is rounded to float64, then again.
    """
    del self
    with np.errstate(all="ignore"):
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _flushed_exp2(self, x):
    """Return 2^x with subnormal results flushed to 0, as `ex2.approx.ftz` does."""
    del self
    with np.errstate(all="ignore"):
        power = np.exp2(x.data)
        tiny = np.finfo(power.dtype).tiny
        return TensorHandle(np.where(power < tiny, 0, power).astype(power.dtype), x.dtype.scalar)
