"""Changes to Triton's interpreter, made before the first interpreted kernel runs."""

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def correct() -> None:
    """Make a multiply-add and `exp2` give what the hardware's instructions do."""
    InterpreterBuilder.create_fma = _fused_multiply_add
    InterpreterBuilder.create_exp2 = _flushed_exp2


def hasten() -> None:
    """Have the interpreter patch `triton.language` once per launch, which halves a launch's time.

    It does so at a launch, and again at each call of a jitted function, to no effect.
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
    """Round once: the interpreter's own rounds the product too.

    float64 holds the product of two float32 exactly.
    """
    del self
    with np.errstate(all="ignore"):
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _flushed_exp2(self, x):
    """Return 2^x, and 0 instead of subnormal numbers, as `ex2.approx.ftz` does."""
    del self
    with np.errstate(all="ignore"):
        power = np.exp2(x.data)
        tiny = np.finfo(power.dtype).tiny
        return TensorHandle(np.where(power < tiny, 0, power).astype(power.dtype), x.dtype.scalar)
