"""Read machine code: loops, load widths, and the unit that each instruction occupies.

Counts are static: every instruction in a loop counts once, predicated or not. They say nothing
about latency, and nothing about how often a loop runs.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Which unit of an NVIDIA SM an instruction keeps busy, by the opcode up to the first dot. All
# others (moves, branches, the uniform datapath) take an issue slot and no other scarce resource.
_FMA = {"FADD", "FMUL", "FFMA", "FHADD", "FHFMA", "IMAD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
_PACKED_FMA = {"FADD2", "FMUL2", "FFMA2"}
_ALU = {
    *("FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "SEL", "ISETP", "IADD3", "IADD", "VIADD"),
    *("LOP3", "PLOP3", "SHF", "SHL", "SHR", "LEA", "PRMT", "IMNMX", "VIMNMX", "IABS", "BMSK"),
    *("VIADDMNMX", "F2FP", "SGXT", "ISCADD"),
}
_SPECIAL = {"MUFU", "F2I", "I2F", "F2F", "I2FP", "F2IP", "POPC", "FLO", "BREV"}
# AMD's transcendental instructions, each of which occupies a SIMD four times as long as others.
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_SHUFFLE = re.compile(r"(_dpp$|^ds_swizzle|^ds_b?permute|^v_readlane|^v_permlane)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with all modifiers, and the label it may jump to."""

    opcode: str
    target: str | None = None
    # Whether it runs, or jumps, only if a predicate holds.
    predicated: bool = False


@dataclass(frozen=True)
class Block:
    """A stretch of machine code, with its counts per thread; for a loop, those of one iteration."""

    instructions: tuple[Instruction, ...]
    amd: bool = False

    def __len__(self) -> int:
        return len(self.instructions)

    @cached_property
    def opcodes(self) -> Counter:
        """How often each opcode occurs in the block, without modifiers."""
        return Counter(_stem(i.opcode, self.amd) for i in self.instructions)

    def _count(self, names: Iterable[str]) -> int:
        return sum(self.opcodes[name] for name in names)

    @property
    def load_widths(self) -> list[int]:
        """Bytes per thread of each load from global memory."""
        widths = (_load_bytes(i.opcode, self.amd) for i in self.instructions)
        return [width for width in widths if width]

    @property
    def load_bytes(self) -> int:
        """Bytes a thread loads from global memory."""
        return sum(self.load_widths)

    @property
    def store_widths(self) -> list[int]:
        """Bytes per thread of each store to global memory."""
        widths = (_store_bytes(i.opcode, self.amd) for i in self.instructions)
        return [width for width in widths if width]

    @property
    def masked_loads(self) -> int:
        """Loads from global memory under a predicate, as masked loads are on NVIDIA."""
        return sum(i.predicated and _load_bytes(i.opcode, self.amd) > 0 for i in self.instructions)

    @property
    def barriers(self) -> int:
        """Instructions at which warps wait for each other."""
        return self._count(("s_barrier",)) if self.amd else self._count(("BAR", "WARPSYNC"))

    @property
    def shuffles(self) -> int:
        """Instructions that move data between lanes of a warp."""
        if self.amd:
            return sum(n for name, n in self.opcodes.items() if _AMD_SHUFFLE.search(name))
        return self._count(("SHFL", "REDUX", "CREDUX", "VOTE"))

    @property
    def shared_accesses(self) -> int:
        """Loads from and stores to shared memory."""
        if self.amd:
            return sum(n for name, n in self.opcodes.items() if re.match(r"ds_(read|write)", name))
        return self._count(("LDS", "STS", "LDSM", "STSM"))

    @property
    def spills(self) -> int:
        """Loads from and stores to a thread's own stack."""
        if self.amd:
            return sum(n for name, n in self.opcodes.items() if name.startswith("scratch_"))
        return self._count(("LDL", "STL"))

    @property
    def special(self) -> int:
        """Operations of the special-function unit: exponentials, logarithms, reciprocals."""
        if self.amd:
            return sum(n for name, n in self.opcodes.items() if _AMD_SPECIAL.match(name))
        return self._count(_SPECIAL)

    @property
    def occupied(self) -> dict[str, int]:
        """How many operations each limited unit performs for a thread, by the unit's name.

        `issue` counts what the scheduler issues. On NVIDIA that is every instruction. On AMD it is
        the vector instructions, transcendentals four times each, since scalar instructions and
        loads issue beside the vector instructions of other wavefronts. A packed NVIDIA instruction
        counts as two operations of the FMA unit.
        """
        if self.amd:
            vector = sum(n for name, n in self.opcodes.items() if name.startswith("v_"))
            return {"issue": vector + 3 * self.special, "special": self.special}
        return {
            "issue": len(self),
            "fma": self._count(_FMA) + 2 * self._count(_PACKED_FMA),
            "alu": self._count(_ALU),
            "special": self.special,
        }


@dataclass(frozen=True)
class Code:
    """All of a kernel's instructions, and the positions of its labels."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    amd: bool = False

    def target_of(self, at: int) -> int | None:
        """Return where an instruction may jump to, None if it does not jump."""
        return self.labels.get(self.instructions[at].target)

    @cached_property
    def loops(self) -> dict[int, int]:
        """The position of each loop's last instruction, by the position of its first one."""
        ends = {}
        for at, instruction in enumerate(self.instructions):
            begin = self.target_of(at)
            # A CALL is a jump too far for a branch, and closes no loop; a jump to itself is
            # padding.
            if begin is not None and begin < at and not instruction.opcode.startswith("CALL"):
                # Two backward jumps to one label form a single loop that contains a `continue`.
                ends[begin] = at
        # A loop that begins inside another also ends there, wherever the outer loop's last jump is.
        for begin in sorted(ends, reverse=True):
            for inner in sorted(ends):
                if begin < inner <= ends[begin]:
                    ends[begin] = max(ends[begin], ends[inner])
        return dict(sorted(ends.items()))


@dataclass(frozen=True)
class Program:
    """A compiled kernel: its resources, its innermost loops, and the code outside all loops."""

    registers: int
    # Bytes of a thread's stack; in a kernel without arrays, nonzero means that registers spill.
    stack: int
    # Bytes of shared memory per block, without the kilobyte that the hardware reserves.
    shared: int
    threads: int
    loops: tuple[Block, ...]
    outside: Block
    code: Code

    @property
    def body(self) -> Block | None:
        """The loop that loads the most from global memory per iteration; None if none loads."""
        loads = [loop for loop in self.loops if loop.load_bytes]
        return max(loads, key=lambda loop: loop.load_bytes, default=None)


def _stem(opcode: str, amd: bool) -> str:
    if not amd:
        return opcode.split(".", maxsplit=1)[0]
    return re.sub(r"_e(32|64)$", "", opcode)


def _load_bytes(opcode: str, amd: bool) -> int:
    """Return how many bytes a thread loads from global memory, 0 for any other instruction."""
    return _amd_bytes(opcode, "load") if amd else _nvidia_bytes(opcode, {"LDG", "LD", "LDGSTS"})


def _store_bytes(opcode: str, amd: bool) -> int:
    """Return how many bytes a thread stores to global memory, 0 for any other instruction."""
    return _amd_bytes(opcode, "store") if amd else _nvidia_bytes(opcode, {"STG", "ST"})


def _nvidia_bytes(opcode: str, names: set[str]) -> int:
    name, *modifiers = opcode.split(".")
    if name not in names:
        return 0
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[modifier] for modifier in modifiers if modifier in widths), 4)


def _amd_bytes(opcode: str, what: str) -> int:
    match = re.match(rf"(?:buffer|global|flat)_{what}_(\w+)", opcode)
    if not match:
        return 0
    if dwords := re.match(r"dword(?:x(\d))?$", match[1]):
        return 4 * int(dwords[1] or 1)
    return 1 if "byte" in match[1] else 2


def split(code: Code) -> tuple[tuple[Block, ...], Block]:
    """Return the innermost loops (each closed by a backward jump), and the code in no loop."""
    spans = list(code.loops.items())
    inner = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    taken = {at for begin, end in spans for at in range(begin, end + 1)}
    outside = tuple(i for at, i in enumerate(code.instructions) if at not in taken)
    loops = tuple(Block(code.instructions[b : e + 1], code.amd) for b, e in inner)
    return loops, Block(outside, code.amd)


def parse_sass(text: str) -> Code:
    """Parse the output of `nvdisasm -c`, without padding."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = raw.strip()
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            # `BRA P0, label` jumps under a predicate, just as `@P0 BRA label` does.
            jump = re.match(r"(.*?),?\s*`\((\.L_x_\d+)\)", code[3].strip())
            if not code[2].startswith(("BRA", "CALL")):
                jump = None
            predicated = code[1] is not None or bool(jump and jump[1])
            if code[2] != "NOP":
                instructions.append(Instruction(code[2], jump and jump[2], predicated))
    return Code(tuple(instructions), labels)


def parse_amdgcn(text: str) -> Code:
    """Parse AMDGCN assembly text."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+((?:[sv]|ds|buffer|global|flat|scratch)_\w+)(.*)", line):
            jump = re.search(r"(\.LBB\d+_\d+)", code[2]) if "branch" in code[1] else None
            predicated = code[1].startswith("s_cbranch")
            instructions.append(Instruction(code[1], jump and jump[1], predicated))
    return Code(tuple(instructions), labels, amd=True)


def disassemble(cubin: bytes) -> str:
    """Return a cubin's SASS, disassembled by the nvdisasm that comes with Triton."""
    return _tool("nvdisasm", ["-c"], cubin)


def _tool(name: str, arguments: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / name), *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def inspect(compiled) -> Program:
    """Read a kernel that Triton compiled for NVIDIA or AMD.

    Parameters
    ----------
    compiled : triton.compiler.CompiledKernel

    Raises
    ------
    ValueError
        It holds neither a cubin nor AMDGCN assembly.
    """
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        cubin = compiled.asm["cubin"]
        usage = _tool("cuobjdump", ["-res-usage"], cubin)
        resources = {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        code = parse_sass(disassemble(cubin))
        stack = resources["STACK"] + resources["LOCAL"]
        return Program(resources["REG"], stack, shared, threads, *split(code), code)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        notes = {k: int(n) for k, n in re.findall(r"\.(\w+_count|\w+_size): +(\d+)", text)}
        code = parse_amdgcn(text)
        stack = notes["private_segment_fixed_size"]
        return Program(notes["vgpr_count"], stack, shared, threads, *split(code), code)
    raise ValueError(f"neither a cubin nor amdgcn in what was compiled: {sorted(compiled.asm)}")
