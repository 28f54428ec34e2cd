"""Count the instructions that a thread executes in the main loop of a kernel, in its listing by cuobjdump (SASS).

The main loop is the innermost one that loads or copies 16 bytes at a time, and a second one if that stores, too. Of
the ways through a loop the shortest that still holds such a load is counted: a branch over a body is taken, and a body
that lies elsewhere is not entered. What lies beside that way is counted apart, and so are other loops that load, such
as that of a masked tail.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_WIDE = re.compile(r"(?:LDG|LDGSTS)\.E\S*\.128\b")
_WIDE_STORE = re.compile(r"STG\.E\S*\.128\b")
_BARRIER, _SHUFFLE = re.compile(r"BAR\b"), re.compile(r"(?:SHFL|REDUX)\b")
_JUMP, _END = re.compile(r"(?:BRA|JMP|BRX|JMX)\b"), re.compile(r"(?:EXIT|RET|KILL)\b")
WIDE_BYTES = 16


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    operands: str


@dataclass(frozen=True)
class Count:
    """What a thread executes on its way through a main loop, or through the program if it has no loop that loads."""

    loop: str  # its addresses
    logits: int
    instructions: int
    barriers: int
    shuffles: int
    apart: int  # instructions of the loop, or of the program without one, beside the way
    around: int  # instructions of the loop around it, if there is one, on the shortest way
    once: int  # instructions of the program outside of loops, on the shortest way
    tails: int  # instructions of other loops that load
    way: tuple[str, ...]  # each branch on it

    @property
    def per_logit(self) -> float:
        return self.instructions / self.logits


class Loop(NamedTuple):
    """Blocks by the place of their first instruction; the program too, if it has no loop that loads."""

    body: frozenset[int]
    ends: frozenset[int]  # the blocks that jump back to the first, or leave the program


def count(listing: str, itemsize: int) -> list[Count]:
    """Of the listing of a kernel, whose logits have so many bytes: its main loop, or the one that loads and the one
    that stores. Nothing where no 16 bytes are loaded at a time."""
    program = _Program(listing)
    mains, tails = program.main_loops()
    nest = [loop for loop in program.loops() if any(inner.body <= loop.body for inner in (*mains, *tails))]
    counted = []
    for loop in mains or [program.whole]:
        way = program.shortest(loop)
        if way is None:
            continue
        outer = min(
            (other for other in nest if other.body > loop.body), key=lambda other: len(other.body), default=None
        )
        around = (program.shortest(outer, way[0]) or ()) if outer else ()
        once = (program.shortest(program.whole, way[0]) or ()) if mains else ()
        executed = program.of(way)
        addresses = [one.address for one in executed]
        counted.append(
            Count(
                loop=f"{min(addresses):#x}-{max(addresses):#x}" if mains else "",
                logits=_number(_WIDE, executed) * WIDE_BYTES // itemsize,
                instructions=len(executed),
                barriers=_number(_BARRIER, executed),
                shuffles=_number(_SHUFFLE, executed),
                apart=len(program.of(loop.body)) - len(executed),
                around=len(program.of(block for block in around if block not in loop.body)),
                once=len(program.of(block for block in once if not any(block in other.body for other in nest))),
                tails=sum(len(program.of(tail.body)) for tail in tails),
                way=tuple(program.turns(way, loop)),
            )
        )
    return counted


def marked(listing: str) -> str:
    """The listing of the kernel with | before what `count` counts and : before the loop's other instructions."""
    program = _Program(listing)
    mains = program.main_loops()[0] or [program.whole]
    counted = {one.address for loop in mains for one in program.of(program.shortest(loop) or ())}
    inside = {one.address for loop in mains for one in program.of(loop.body)}
    return "".join(
        f"{'|' if one.address in counted else ':' if one.address in inside else ' '} {one.address:05x} "
        f"{'@' + one.predicate if one.predicate else '':>6} {one.name} {one.operands}\n"
        for one in program.instructions
    )


def _number(kind: re.Pattern[str], instructions: Iterable[Instruction]) -> int:
    return sum(bool(kind.match(one.name)) for one in instructions)


class _Program:
    """The blocks of a kernel by their first instruction's place, and what follows what."""

    def __init__(self, listing: str) -> None:
        self.instructions = [
            Instruction(int(address, 16), predicate, name, operands)
            for address, predicate, name, operands in _LINE.findall(listing)
        ]
        if not self.instructions:
            raise ValueError(f"no instruction in the listing: {listing[:200]!r}")
        place = {one.address: n for n, one in enumerate(self.instructions)}
        leads = {0}
        jumps: dict[int, int] = {}
        for n, one in enumerate(self.instructions):
            if _JUMP.match(one.name):
                targets = re.findall(r"0x([0-9a-f]+)", one.operands)
                if targets and (target := place.get(int(targets[-1], 16))) is not None:
                    jumps[n] = target
                    leads.add(target)
            if (n in jumps or _END.match(one.name)) and n + 1 < len(self.instructions):
                leads.add(n + 1)
        starts = sorted(leads)
        self.ends = dict(zip(starts, [*starts[1:], len(self.instructions)], strict=True))
        self.after: dict[int, tuple[int, ...]] = {}
        for start, end in self.ends.items():
            last = self.instructions[end - 1]
            stops = not last.predicate and (_END.match(last.name) or (end - 1 in jumps and "," not in last.operands))
            falls = () if stops or end not in self.ends else (end,)
            self.after[start] = (*falls, *([jumps[end - 1]] if end - 1 in jumps else ()))
        self.order = self._reverse_postorder()
        self.rank = {block: n for n, block in enumerate(self.order)}
        # Where it leaves for a reason that a predicate holds, it leaves early.
        exits = {block for block in self.order if not self.after[block]}
        self.whole = Loop(frozenset(self.order), frozenset(exits))
        self.before: dict[int, list[int]] = defaultdict(list)
        for block in self.order:
            for then in self.after[block]:
                self.before[then].append(block)

    def of(self, blocks: Iterable[int]) -> list[Instruction]:
        return [one for block in blocks for one in self.instructions[block : self.ends[block]]]

    def _reverse_postorder(self) -> list[int]:
        """Of the blocks that are reached, the ones that are called apart."""
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            then = next((other for other in rest if other not in seen), None)
            if then is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(then)
                stack.append((then, iter(self.after[then])))
        return done[::-1]

    def loops(self) -> list[Loop]:
        """By the jumps back in the order of the blocks; a compiler's loops are entered at their first block."""
        backs: dict[int, set[int]] = defaultdict(set)
        for block in self.order:
            for head in self.after[block]:
                if self.rank[head] <= self.rank[block]:
                    backs[head].add(block)
        found = []
        for head, latches in backs.items():
            body, todo = {head}, [*latches]
            while todo:
                block = todo.pop()
                if block not in body and self.rank[block] > self.rank[head]:
                    body.add(block)
                    todo += self.before[block]
            found.append(Loop(frozenset(body), frozenset(latches)))
        return found

    def main_loops(self) -> tuple[list[Loop], list[Loop]]:
        """The innermost loops with wide loads: with wide stores and without, each the one that loads most at a time,
        without a mask if there is such a one. Then the others."""
        loops = self.loops()
        kinds: dict[bool, list[Loop]] = {False: [], True: []}
        for loop in loops:
            own = self.of(loop.body.difference(*(other.body for other in loops if other.body < loop.body)))
            if _number(_WIDE, own):
                kinds[_number(_WIDE_STORE, own) > 0].append(loop)

        def key(loop: Loop) -> tuple[int, int, int]:
            wide = [one for one in self.of(self.shortest(loop) or ()) if _WIDE.match(one.name)]
            return -len(wide), sum(bool(one.predicate) for one in wide), min(loop.body)

        ordered = [sorted(kind, key=key) for kind in kinds.values() if kind]
        return [kind[0] for kind in ordered], [loop for kind in ordered for loop in kind[1:]]

    def shortest(self, loop: Loop, through: int | None = None) -> tuple[int, ...] | None:
        """The way from the first block to one of the ends with the fewest instructions, of those that hold a wide load
        or the block `through`."""
        order = sorted(loop.body, key=self.rank.__getitem__)
        best: dict[tuple[int, bool], tuple[int, tuple[int, ...]]] = {}
        for block in order:
            holds = _number(_WIDE, self.of((block,))) > 0 if through is None else block == through
            known = [
                (best[other, held], held)
                for other in self.before[block]
                if other in loop.body and self.rank[other] < self.rank[block]
                for held in (False, True)
                if (other, held) in best
            ]
            for (length, way), held in known if block != order[0] else [((0, ()), False)]:
                new = length + self.ends[block] - block, (*way, block)
                at = block, held or holds
                best[at] = min(best.get(at, new), new)
        return min((best[end, True] for end in loop.ends if (end, True) in best), default=(0, None))[1]

    def turns(self, way: tuple[int, ...], loop: Loop) -> Iterable[str]:
        """Each branch on the way that could go elsewhere within the loop, and how many instructions that leaves out."""
        for block, then in pairwise(way):
            for other in self.after[block]:
                if other != then and other in loop.body:
                    branch, low, high = self.instructions[self.ends[block] - 1], min(other, then), max(other, then)
                    left = sum(self.ends[inside] - inside for inside in loop.body if low <= inside < high)
                    how = "falls through" if then == self.ends[block] else "jumps"
                    yield f"{branch.address:#x} {how} to {self.instructions[then].address:#x}, {left} between"
