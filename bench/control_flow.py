"""Follow a program's control flow: what a thread executes on its way through one of its loops.

If a kernel branches, counting all of its instructions would count some that no thread executes. The
machine code does not say which way threads take, so a rule decides. Within an iteration of the
loop, threads take the longest way, that of an iteration which skips nothing. Up to the loop, and
from the loop to the end, they take the shortest way, since the code that can be bypassed there is
other loops. A loop within an iteration counts once: AMD's compiler puts such a loop around a load
or store if it cannot tell that the base address is the same for all lanes.
"""

from collections.abc import Container
from dataclasses import dataclass

from bench.machine_code import Block, Code


@dataclass(frozen=True)
class Way:
    """What a thread executes before a loop, in each of its iterations, and after it."""

    before: Block
    iteration: Block
    after: Block

    def times(self, iterations: int) -> Block:
        """Return all that a thread executes with this many iterations."""
        parts = (self.before, *[self.iteration] * iterations, self.after)
        return Block(tuple(i for part in parts for i in part.instructions), self.iteration.amd)


def special_loops(code: Code) -> list[int]:
    """Return where the innermost loops with special functions begin, the loop with most first."""
    special = {
        begin: Block(code.instructions[begin : end + 1], code.amd).special
        for begin, end in code.loops.items()
    }
    found = [begin for begin, count in special.items() if count]
    inner = [b for b in found if not any(b < other <= code.loops[b] for other in found)]
    return sorted(inner, key=special.__getitem__, reverse=True)


def way_through(code: Code, begin: int) -> Way:
    """Return the way through the loop that begins at the instruction `begin`."""
    inside = range(begin, code.loops[begin] + 1)
    iteration = _longest(code, begin, inside[-1])
    after = []
    # A thread that does not stop within the loop executes what follows it.
    if not any(_stops(code, at) for at in iteration):
        leaving = [to for at in iteration for to in _successors(code, at) if to not in inside]
        after = _shortest(code, leaving)
    before = _shortest(code, [0], inside)[:-1]
    blocks = (
        Block(tuple(code.instructions[at] for at in part), code.amd)
        for part in (before, iteration, after)
    )
    return Way(*blocks)


def _stops(code: Code, at: int) -> bool:
    return code.instructions[at].opcode in {"EXIT", "s_endpgm"}


def _successors(code: Code, at: int) -> list[int]:
    """Return where a thread may go on after an instruction."""
    instruction = code.instructions[at]
    # AMD's branch around code that no lane of a wavefront executes: assume that some lane does.
    target = None if instruction.opcode == "s_cbranch_execz" else code.target_of(at)
    ends = not instruction.predicated and (target is not None or _stops(code, at))
    onward = [] if ends else [at + 1]
    return onward if target is None else [*onward, target]


def _shortest(code: Code, starts: list[int], goals: Container[int] | None = None) -> list[int]:
    """Return the shortest way from one of `starts` to one of `goals`, or to the program's end."""
    previous: dict[int, int | None] = dict.fromkeys(starts)
    todo = list(starts)
    # The list grows during the iteration.
    for at in todo:
        if _stops(code, at) if goals is None else at in goals:
            way = [at]
            while (before := previous[way[-1]]) is not None:
                way.append(before)
            return way[::-1]
        for following in _successors(code, at):
            if following not in previous:
                previous[following] = at
                todo.append(following)
    raise ValueError(f"no way from {starts} to {goals or 'the end'}")


def _longest(code: Code, begin: int, end: int) -> list[int]:
    """Return the way with the most instructions from `begin` to `end`, without a backward jump."""
    ways = {begin: [begin]}
    for at in range(begin, end):
        for following in _successors(code, at) if at in ways else ():
            if following > at and len(ways.get(following, ())) <= len(ways[at]):
                ways[following] = [*ways[at], following]
    return ways[end]
