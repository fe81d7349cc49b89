"""Counts of what a launch executed."""

import re
from collections import Counter
from dataclasses import dataclass, field, fields

# The class of an opcode is the first whose pattern matches its beginning.
_CLASSES = {
    name: re.compile(pattern)
    for name, pattern in {
        "branch": r"bra\b|ret|exit",
        "barrier": r"bar|membar|fence",
        "shuffle": r"shfl|redux|elect",
        "async": r"cp\.async",
        "param": r"ld\.param",
        "shared": r"(ld|st)\..*shared",
        "load": r"ld\.",
        "store": r"st\.",
        "convert": r"cvt\.",
        "special": r"(ex2|lg2|rcp|r?sqrt)\.|div.*\.f\d",
        "move": r"mov|cvta|createpolicy",
        "select": r"setp|selp|\w+\.pred",
        "float": r".*\.b?f\d\d",
        "integer": r"",
    }.items()
}


@dataclass
class Stats:
    """Dynamic counts of a launch; `+` adds launches up.

    The counts are of PTX instructions; ptxas later deletes most moves. An instruction counts even
    if its guard is false, but bytes count only for lanes that do access global memory. A sector is
    32 bytes and counts once per warp and instruction: `32 * sectors_loaded / bytes_loaded` is above
    1 where the lanes of a warp do not use whole sectors.
    """

    # Full opcode (such as "ld.global.v4.b32") -> executions, summed over threads, or over warps.
    threads: Counter = field(default_factory=Counter)
    warps: Counter = field(default_factory=Counter)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    sectors_loaded: int = 0
    sectors_stored: int = 0
    # Completed barriers of whole CTAs.
    barriers: int = 0
    ctas: int = 0
    seconds: float = 0.0

    @property
    def thread_instructions(self) -> int:
        return sum(self.threads.values())

    @property
    def warp_instructions(self) -> int:
        return sum(self.warps.values())

    @property
    def shuffles(self) -> int:
        return self.by_class()["shuffle"]

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def by_class(self, level: str = "warps") -> Counter:
        """Return executions by class ("load", "shuffle", ...), of "warps" or of "threads"."""
        counts: Counter = Counter()
        for opcode, times in getattr(self, level).items():
            counts[next(name for name, p in _CLASSES.items() if p.match(opcode))] += times
        return counts
