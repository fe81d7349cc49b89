"""Compile @triton.jit functions without a GPU, even in a process with Triton's interpreter.

If TRITON_INTERPRET=1 is set before triton is imported, @triton.jit returns InterpretedFunction
objects, which the compiler refuses. This affects kernels, the device functions they call, and
Triton's own library (`tl.max`, `tl.sum`, `tl.cdiv`, ...). In addition, an interpreted kernel that
calls a library function leaves `triton.language.core` patched for the interpreter, permanently.

`compiler_mode` undoes both during a compilation. It restores triton.language to its state when this
module was imported. It also replaces each InterpretedFunction in triton.language, or reachable from
the kernel, with a JITFunction of the same Python function, in every namespace where its name is
looked up. If TRITON_INTERPRET is not set, there is nothing to replace.

This module therefore has to be imported before the first interpreted kernel runs, and raises
RuntimeError if it was not. Pytest, for example, imports all test modules before it runs a test. Not
handled: autotuned kernels, and interpreted functions in a kernel's closure.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .module import Module

_MISSING = object()

if not tl.core.is_builtin(tl.core.load):
    raise RuntimeError("ptx_emulator was imported after an interpreted kernel ran, not before")


# A namespace in which names are looked up: a module's dictionary, or a class.
Place = dict | type


def _language() -> list[Place]:
    """Return the modules of triton.language, and the classes of its core."""
    modules = [vars(m) for name, m in sys.modules.items() if name.startswith("triton.language")]
    classes = [value for value in vars(tl.core).values() if isinstance(value, type)]
    return modules + [c for c in classes if c.__module__ == tl.core.__name__]


def _contents(place: Place) -> dict:
    return dict(place if isinstance(place, dict) else vars(place))


def _assign(place: Place, name: str, value) -> None:
    if isinstance(place, type):
        if value is _MISSING:
            delattr(place, name)
        else:
            setattr(place, name, value)
    elif value is _MISSING:
        del place[name]
    else:
        place[name] = value


# What triton.language was before any interpreted kernel ran.
_PRISTINE = [(place, _contents(place)) for place in _language()]

_twins: dict[InterpretedFunction, JITFunction] = {}


def _twin(fn: InterpretedFunction) -> JITFunction:
    """Return what @triton.jit would have made of the same Python function."""
    if fn not in _twins:
        _twins[fn] = JITFunction(fn.fn, **fn.rewriter.kwargs)
    return _twins[fn]


def _wrapped(value) -> InterpretedFunction | None:
    """Return the library function that a method of tl.tensor forwards to, if it is interpreted."""
    if not inspect.isfunction(value) or value.__closure__ is None:
        return None
    fn = inspect.getclosurevars(value).nonlocals.get("fn")
    return fn if isinstance(fn, InterpretedFunction) else None


def _reach(function: Callable) -> Iterator[dict]:
    """Yield a function's globals, and those of modules and interpreted functions named there."""
    todo = [function.__globals__]
    # The loop appends to the list that it iterates over.
    for namespace in todo:
        modules = [vars(value) for value in namespace.values() if isinstance(value, ModuleType)]
        for place in (namespace, *modules):
            yield place
            for value in place.values():
                if not isinstance(value, InterpretedFunction):
                    continue
                if not any(value.fn.__globals__ is known for known in todo):
                    todo.append(value.fn.__globals__)


def as_compiled(fn: JITFunction | InterpretedFunction) -> JITFunction:
    """Return the function as the compiler's launcher sees it, even if it is interpreted."""
    return _twin(fn) if isinstance(fn, InterpretedFunction) else fn


@contextlib.contextmanager
def compiler_mode(function: Callable) -> Iterator[None]:
    """Context manager in which a kernel's Python function, and all it calls, can be compiled."""
    undo = []

    def assign(place: Place, name: str, value) -> None:
        undo.append((place, name, _contents(place).get(name, _MISSING)))
        _assign(place, name, value)

    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False
            for place, pristine in _PRISTINE:
                now = _contents(place)
                for name, value in pristine.items():
                    if now.get(name) is not value and not name.startswith("__annot"):
                        assign(place, name, value)
                if isinstance(place, type):
                    for name in now.keys() - pristine.keys() - {"__annotations__"}:
                        assign(place, name, _MISSING)
            for name, value in vars(tl.tensor).copy().items():
                if fn := _wrapped(value):
                    assign(tl.tensor, name, _twin(fn))
            modules = [place for place in _language() if isinstance(place, dict)]
            for place in [*modules, *_reach(function)]:
                for name, value in list(place.items()):
                    if isinstance(value, InterpretedFunction):
                        assign(place, name, _twin(value))
            yield
    finally:
        for place, name, value in reversed(undo):
            _assign(place, name, value)


def compile_kernel(
    fn,
    signature: dict[str, str],
    constexprs: dict | None = None,
    *,
    target: GPUTarget,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Sequence[str] = (),
    **options,
):
    """Compile a @triton.jit function without a GPU, whether or not TRITON_INTERPRET is set.

    Parameters
    ----------
    fn : JITFunction or InterpretedFunction
    signature : dict
        The Triton type of each argument, such as "*fp32" or "i32".
    constexprs : dict, optional
        The values of the constexpr arguments.
    target : GPUTarget
        For example GPUTarget("cuda", 90, 32) or GPUTarget("hip", "gfx942", 64).
    divisible : sequence of str, optional
        The arguments that are multiples of 16. On a GPU the launcher detects these itself.
    options
        Options of the compiler (enable_fp_fusion, maxnreg, ...).

    Returns
    -------
    CompiledKernel
        Triton's object, with `.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared`, ...
    """
    if not isinstance(fn, JITFunction | InterpretedFunction):
        raise TypeError(f"expected a @triton.jit function, got {type(fn).__name__}")
    constexprs = constexprs or {}
    names = list(fn.arg_names)
    with compiler_mode(fn.fn):
        source = ASTSource(
            fn=as_compiled(fn),
            signature={n: "constexpr" if n in constexprs else signature[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constexprs.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages, **options}
        return triton_compile(source, target=target, options=options)


def compile_ptx(
    fn,
    signature: dict[str, str],
    constexprs: dict | None = None,
    *,
    arch: int = 90,
    divisible: Sequence[str] = (),
    **options,
) -> Module:
    """Compile a @triton.jit function for sm_`arch` and the emulator; see compile_kernel."""
    target = GPUTarget("cuda", arch, 32)
    built = compile_kernel(fn, signature, constexprs, target=target, divisible=divisible, **options)
    live = [name for name in fn.arg_names if name not in (constexprs or {})]
    return Module(
        built.asm["ptx"],
        shared_bytes=built.metadata.shared,
        divisible=[live.index(name) for name in divisible],
    )
