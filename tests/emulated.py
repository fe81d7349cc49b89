"""Run the launcher with its kernels compiled for a real GPU and executed by the PTX emulator.

`emulate` replaces only the kernels, so everything else is the launcher's own: the grouping, the
copy of a reference with another layout, the tiles, the grids. Every row of a logits tensor is a
separate allocation: reading one byte outside it is a fault, and so is a load that is not aligned to
its width.
"""

import contextlib
import functools
import importlib
import types
from collections import Counter, defaultdict

import torch
from fastkl._triton import gradient_kernels, kernels
from ptx_emulator import Memory, Stats, as_compiled, compile_ptx
from ptx_emulator import launch as run

# The package's attribute `launch` is the function, not the module.
launch = importlib.import_module("fastkl._triton.launch")
gradient_launch = importlib.import_module("fastkl._triton.gradient_launch")

KERNELS = {
    **{
        name: getattr(kernels, name) for name in ("partial_kernel", "finish_kernel", "table_kernel")
    },
    **{name: getattr(gradient_kernels, name) for name in ("gradient_kernel", "top_kernel")},
}

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@functools.cache
def compiled(name, arch, signature, constexprs, divisible, options):
    """Compile a kernel once for each way its arguments are specialized."""
    return compile_ptx(
        KERNELS[name],
        dict(signature),
        dict(constexprs),
        arch=arch,
        divisible=divisible,
        **dict(options),
    )


def compilations(generator, step, longest):
    """Clear the cache; return how many kernels are compiled after each of several steps.

    step(reference, K) gets one row or many, 4 or 8 circuits, odd or round sizes, from any address.
    """
    compiled.cache_clear()
    found = []
    for n_rows, n_cols, n_circuits, start in (
        (2, 700, 4, 0),
        (1, 16, 4, 0),
        (3, 1, 8, 0),
        (16, 64, 4, 0),
        (1, longest, 4, 0),
        (2, 700, 4, 1),
    ):
        reference = torch.randn(start + n_rows * n_cols, generator=generator)[start:]
        step(reference.view(n_rows, n_cols), n_circuits)
        found.append(compiled.cache_info().misses)
    return found


class EmulatedKernel:
    """A kernel that runs in the emulator when it is launched."""

    def __init__(self, name, session):
        self.name = name
        self.function = KERNELS[name]
        self.session = session

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, **arguments):
        """Run, specialized as by Triton's launcher: on types, on ones, on multiples of 16."""
        parameters = as_compiled(self.function).params
        names = [parameter.name for parameter in parameters]
        options = {key: value for key, value in arguments.items() if key not in names}
        signature, constexprs, divisible = {}, {}, []
        for parameter in parameters:
            name, value = parameter.name, arguments[parameter.name]
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or (free and not torch.is_tensor(value) and value == 1):
                constexprs[name] = value
                continue
            if isinstance(value, tuple):
                # The parameter's do_not_specialize options do not apply to a tuple's elements.
                assert all(number >= 2**31 and number % 16 for number in value)
                signature[name] = ("i64",) * len(value)
                continue
            if torch.is_tensor(value):
                signature[name] = POINTERS[value.dtype]
                value = value.data_ptr()
            else:
                fits = -(2**31) <= value < 2**31
                signature[name] = parameter.annotation_type or ("i32" if fits else "i64")
            if free and not parameter.do_not_specialize_on_alignment and value % 16 == 0:
                divisible.append(name)
        module = compiled(
            self.name,
            self.session.arch,
            tuple(signature.items()),
            tuple(constexprs.items()),
            tuple(divisible),
            tuple(options.items()),
        )
        memory = self.session.memory(self.name, arguments)
        values = []
        for name in names:
            value = arguments[name]
            if isinstance(value, tuple):
                values += value
            elif name not in constexprs:
                values.append(value.data_ptr() if torch.is_tensor(value) else value)
        stats = run(module, grid, values, memory=memory, approx_ulp=self.session.approx_ulp)
        self.session.stats[self.name].append(stats)


class CountedMemory(Memory):
    """Count bytes by the first word of the allocation's name, "load" or "store", and width."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def access(self, addresses, unit, count, *, values=None, align=None):
        words = super().access(addresses, unit, count, values=values, align=align)
        # All lanes of an instruction access the same kind of allocation.
        name = self.find(int(addresses[0]), unit * count).name.split()[0]
        what = "load" if values is None else "store"
        self.counts[name, what, unit * count] += unit * count * addresses.size
        return words


class Session:
    """The settings of an emulation, and what was counted, by kernel."""

    def __init__(self, arch, approx_ulp):
        self.arch, self.approx_ulp = arch, approx_ulp
        self.stats = defaultdict(list)
        self.bytes = defaultdict(Counter)
        self.circuits = []
        self.written = []

    def total(self, name):
        return sum(self.stats[name], Stats())

    def accessed(self, kernel, name, what):
        """Return by width the bytes that a kernel loads, or stores, in each "row" or "gradient"."""
        found = self.bytes[kernel].items()
        return {width: n for (owner, how, width), n in found if (owner, how) == (name, what)}

    def memory(self, kernel, arguments):
        memory = CountedMemory(self.bytes[kernel])
        for k, tensor in enumerate(self.written):
            memory.add(tensor, f"gradient {k}")
        logits = [*self.circuits]
        for name, value in arguments.items():
            if name == "p_ptr":
                logits.append(value)
            elif torch.is_tensor(value):
                memory.add(value, name)
        for k, rows in enumerate(logits):
            for r in range(rows.shape[0]):
                if memory.find(rows[r].data_ptr(), rows.itemsize * rows.shape[1]) is None:
                    memory.add(rows[r], f"row {r} of tensor {k}", writable=False)
        return memory


@contextlib.contextmanager
def emulation(arch, approx_ulp=0):
    """Context manager in which the launcher's kernels run in the emulator."""
    session = Session(arch, approx_ulp)
    stand_ins = types.SimpleNamespace(**{name: EmulatedKernel(name, session) for name in KERNELS})
    packing_of = launch.packing_of
    launch.kernels = gradient_launch.kernels = stand_ins
    launch.packing_of = gradient_launch.packing_of = lambda device, itemsize: launch.nvidia_packing(
        arch // 10, itemsize
    )
    try:
        yield session
    finally:
        launch.kernels, gradient_launch.kernels = kernels, gradient_kernels
        launch.packing_of = gradient_launch.packing_of = packing_of


def emulate(circuits, reference, *, arch, approx_ulp=0, temperature=1.0):
    """Launch on circuits (R, V) and a reference (R, V); return the result and the session."""
    with emulation(arch, approx_ulp) as session:
        session.circuits = list(circuits)
        return launch.launch(circuits, reference, temperature), session


def emulate_gradients(
    grad, circuits, reference, wanted, reference_wanted, *, arch, approx_ulp=0, temperature=1.0
):
    """Launch a forward pass and its gradients; return the gradients and the session.

    Each gradient is a separate allocation too, and NaN until it is written.
    """

    def empty(rows):
        return torch.full(rows.shape, torch.nan, dtype=rows.dtype)

    dqs = [empty(c) if want else None for c, want in zip(circuits, wanted, strict=True)]
    dp = empty(reference) if reference_wanted else None
    with emulation(arch, approx_ulp) as session:
        session.circuits = list(circuits)
        kept = launch.launch(circuits, reference, temperature, keep=True)
        session.written = [t for t in (*dqs, dp) if t is not None]
        gradient_launch.launch_gradients(grad, circuits, reference, kept, dqs, dp, temperature)
    return dqs, dp, session
