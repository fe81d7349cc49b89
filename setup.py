"""Locate the packages and build the compiled kernel; the rest is in pyproject.toml.

The device code lives in kernels/triton and installs as fastkl._triton, since the top-level package
name `kernels` belongs to somebody else. The CPU kernel in kernels/cpu becomes fastkl._native, one
file for all Pythons from 3.10 on. If it cannot be built, the package works without it.
"""

import os
import platform
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Each level of the kernel is compiled with its own flags; the kernel chooses a level at run time.
LEVEL_FLAGS = {
    "level_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "level_avx512.cpp": [
        *("-mavx2", "-mfma", "-mf16c"),
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        # GCC warns about its own header's deliberately undefined vectors.
        "-Wno-uninitialized",
    ],
}
FLAGS = [
    *("-std=c++17", "-O3", "-fno-math-errno", "-fvisibility=hidden"),
    # No contraction: the source says explicitly which products are fused with which sums.
    "-ffp-contract=off",
    # Python's own flags ask for debug information, which is six times the size of the code.
    "-g0",
]


def _processors():
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class BuildNative(build_ext):
    """Compile the files in parallel, each level with its own flags; carry on without a compiler."""

    def build_extension(self, ext):
        """Build the extension, or warn once what its absence means."""
        compiler = self.compiler
        compile_one = getattr(compiler, "_compile", None)
        try:
            if compiler.compiler_type != "unix" or compile_one is None:
                raise RuntimeError(f"the kernel needs GCC or Clang, not {compiler.compiler_type}")
            with ThreadPoolExecutor(_processors()) as pool:
                self._compile_in(pool)
                super().build_extension(ext)
        except Exception as error:
            reason = " ".join(str(error).split())
            self.warn(
                f"fastkl._native was not built ({reason}): CPU tensors are measured by the slower "
                "PyTorch backend, with the same results. Install a C++17 compiler (GCC or Clang) "
                "and reinstall fastkl for the fast one."
            )
        finally:
            for name in ("_compile", "link_shared_object"):
                vars(compiler).pop(name, None)

    def _compile_in(self, pool):
        """Make the compiler run its jobs in a pool, and the linker wait for them."""
        compiler, jobs = self.compiler, []
        compile_one, link = compiler._compile, compiler.link_shared_object

        def with_level_flags(obj, src, suffix, cc_args, postargs, pp_opts):
            flags = next((f for name, f in LEVEL_FLAGS.items() if src.endswith(name)), [])
            args = [*postargs, *(flags if X86 else [])]
            jobs.append(pool.submit(compile_one, obj, src, suffix, cc_args, args, pp_opts))

        def link_when_compiled(*args, **kwargs):
            for job in jobs:
                job.result()
            link(*args, **kwargs)

        compiler._compile, compiler.link_shared_object = with_level_flags, link_when_compiled


NATIVE = Extension(
    "fastkl._native",
    sources=[
        f"kernels/cpu/{name}.cpp"
        for name in (
            "module",
            "run",
            "gradient",
            "jensen_shannon",
            "summary",
            "state",
            "level_baseline",
            "level_avx2",
            "level_avx512",
        )
    ],
    depends=sorted(f"kernels/cpu/{path.name}" for path in HERE.glob("kernels/cpu/*.hpp")),
    extra_compile_args=FLAGS,
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    language="c++",
    optional=True,
    py_limited_api=True,
)
# A free-threaded Python has no limited API yet, so the extension is built for that Python alone.
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    NATIVE.py_limited_api = False
    NATIVE.define_macros = []

setup(
    packages=["fastkl", "fastkl.backends", "fastkl._triton"],
    package_dir={"fastkl._triton": "kernels/triton"},
    package_data={"fastkl": ["py.typed"]},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE.py_limited_api else {},
)
