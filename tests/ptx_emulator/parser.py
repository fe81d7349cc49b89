"""Parse PTX text into a kernel's name, parameters and list of instructions.

The grammar is the part of PTX that Triton emits: one `.visible .entry`, no functions. Text that the
patterns below do not match is refused, never skipped.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from .errors import Unsupported
from .numbers import TYPE_NAME

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(
    r"\.visible\s+\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{]*)\{(.*?)^\}",
    re.S | re.M,
)
# What may appear outside the entry. The only group is the symbol of dynamic shared memory.
_OUTSIDE = re.compile(
    r"\.(?:version|target|address_size|file)\b[^\n]*"
    r"|\.section\s+\S+\s*\{[^{}]*\}"
    r"|\.global\s[^;]*;"
    r"|\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([$\w]+)\[\]\s*;"
)
_STATEMENT = re.compile(
    r"\s*(?:(?P<brace>[{}])"
    r"|(?P<label>[$\w]+)\s*:(?!:)"
    r"|\.loc\s+(?P<loc>[^\n]*)"
    r"|(?P<text>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)"
)
# [@[!]guard] opcode operands, or a declaration of registers
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+) )?([a-z][\w.:]*|\.reg \.\w+) ?(.*)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+(?: [^,\s]+)*")
_DIRECTIVES = {"reqntid", "minnctapersm", "maxnreg"}


class Instruction(NamedTuple):
    """An instruction, a label (its name is ":") or a declaration (its name is ".reg .b32" etc.)."""

    line: int
    source: str
    text: str
    name: str
    ops: list[str]
    guard: str | None
    negate: bool

    def __str__(self) -> str:
        return f"PTX line {self.line} ({self.source}): {self.text}"


class Kernel(NamedTuple):
    """A parsed entry; `num_warps` is 0 if the PTX does not specify it."""

    name: str
    # Name and type (such as "u64") of each parameter.
    params: list[tuple[str, str]]
    shared_symbols: list[str]
    num_warps: int
    body: list[Instruction]


def parse(ptx: str) -> Kernel:
    """Parse PTX with one kernel; raise Unsupported with the text that is not understood."""
    text = _COMMENT.sub(lambda m: "\n" * m[0].count("\n"), ptx)
    entry = _ENTRY.search(text)
    if entry is None:
        raise Unsupported("no .visible .entry")
    name, outside = entry[1], text[: entry.start()] + text[entry.end() :]
    if rest := _OUTSIDE.sub("", outside).strip():
        raise Unsupported(f"{name}: {rest}")
    shared = [m[1] for m in _OUTSIDE.finditer(outside) if m[1]]
    if len(shared) > 1:
        raise Unsupported(f"{name}: more than one symbol of shared memory: {shared}")
    directives = dict(re.findall(r"\.(\w+)\s+([\d, ]+)", entry[3]))
    if unknown := directives.keys() - _DIRECTIVES:
        raise Unsupported(f"{name}: {unknown}")
    params = [(p.split()[-1], p.split()[1][1:]) for p in entry[2].split(",") if p.strip()]
    if unknown := {kind for _, kind in params if not TYPE_NAME.fullmatch(kind)}:
        raise Unsupported(f"{name}: parameters of type {unknown}")
    # Triton's CTAs are one-dimensional: "128" or "128, 1, 1".
    threads = int(re.sub(r", 1\b", "", directives.get("reqntid", "0")))
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:.*/)?(.*)"', text))
    body = list(_statements(name, files, text[: entry.end(4)].rstrip(), entry.start(4)))
    return Kernel(name, params, shared, threads // 32, body)


def _statements(kernel: str, files: dict, text: str, at: int) -> Iterator[Instruction]:
    """Yield the statements of `text` from `at` on; `files` names the sources for .loc."""
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", text))
    source, line, counted = "?", 1, 0
    while at < len(text):
        m = _STATEMENT.match(text, at)
        begin = m.start(m.lastgroup) if m else at
        line, counted = line + text.count("\n", counted, begin), begin
        statement = " ".join(((m and m["text"]) or "").split())
        if i := _INSTRUCTION.fullmatch(statement):
            operands = _OPERAND.findall(i[4])
            yield Instruction(line, source, statement, i[3], operands, i[2], i[1] == "!")
        elif m and m["label"] in targets:
            # A branch target, where threads may join, is an entry of its own.
            yield Instruction(line, source, "", ":", [m["label"]], None, False)
        elif m and m["loc"]:
            file, source_line = m["loc"].split()[:2]
            source = f"{files.get(file)}:{source_line}"
        elif not m or (statement and not statement.startswith(".pragma")):
            found = statement or text[at : at + 60].strip()
            raise Unsupported(f"{kernel}, PTX line {line}: {found}")
        at = m.end()
