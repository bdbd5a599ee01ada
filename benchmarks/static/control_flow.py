"""Basic blocks, dominators and natural loops of assembly text that was parsed into instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """One instruction of PTX or SASS.

    Attributes:
        opcode: with its modifiers, without predicate and operands: ``HMMA.16816.F32.BF16``.
        operands: the rest of the text.
        predicate: what it is guarded by (``P0``, ``!P1``), or nothing.
        targets: labels that it may jump to.
        falls_through: whether the next instruction may be executed after it.
    """

    opcode: str
    operands: str = ""
    predicate: str = ""
    targets: tuple[str, ...] = ()
    falls_through: bool = True

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass
class Block:
    """Instructions that are executed together; ``successors`` are indices of blocks."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


class FlowGraph:
    """The blocks of one function that can be reached from its first, in the order of the text.

    Args:
        lines: labels (str) and instructions, as they follow each other.
    """

    def __init__(self, lines: Sequence[str | Instruction]) -> None:
        self.blocks = _reachable(_split(lines))

    @cached_property
    def predecessors(self) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in self.blocks]
        for i, block in enumerate(self.blocks):
            for successor in block.successors:
                result[successor].append(i)
        return result

    @cached_property
    def dominators(self) -> list[set[int]]:
        """For each block those that every path to it passes, itself included."""
        everything = set(range(len(self.blocks)))
        dominators = [{0}] + [set(everything) for _ in self.blocks[1:]]
        changed = True
        while changed:
            changed = False
            for i in range(1, len(self.blocks)):
                new = {i} | set.intersection(*(dominators[p] for p in self.predecessors[i]))
                changed |= new != dominators[i]
                dominators[i] = new
        return dominators

    @cached_property
    def natural_loops(self) -> dict[int, frozenset[int]]:
        """Header -> blocks of the loop, in the order of the text; loops with the same header are one."""
        loops: dict[int, set[int]] = {}
        for tail, block in enumerate(self.blocks):
            for header in block.successors:
                if header not in self.dominators[tail]:
                    continue
                body, pending = loops.setdefault(header, {header}), [tail]
                while pending:
                    i = pending.pop()
                    if i not in body:
                        body.add(i)
                        pending.extend(self.predecessors[i])
        return {header: frozenset(loops[header]) for header in sorted(loops)}

    def innermost_loops(self, wanted: Callable[[Instruction], bool]) -> dict[int, frozenset[int]]:
        """Natural loops that hold a wanted instruction outside of the wanted loops within them.

        Loops without one, such as a spin on a barrier, count as part of what is around them.
        """
        wanted_blocks = {i for i, block in enumerate(self.blocks) if any(map(wanted, block.instructions))}
        loops = {header: body for header, body in self.natural_loops.items() if body & wanted_blocks}
        return {
            header: body
            for header, body in loops.items()
            if not any(other < body for other in loops.values())
        }

    def reaching(self, blocks: Iterable[int]) -> set[int]:
        """The blocks from which one of these can be reached, these included."""
        return _closure(blocks, lambda i: self.predecessors[i])

    def without_inner_loops(self, header: int) -> frozenset[int]:
        """The blocks of a natural loop's iterations that enter none of the loops within it; empty if all do."""
        body = self.natural_loops[header]
        inner = frozenset().union(*(loop for loop in self.natural_loops.values() if loop < body))
        if header in inner:
            return frozenset()
        rest = body - inner
        tails = [i for i in rest if header in self.blocks[i].successors]
        begun = _closure([header], lambda i: rest.intersection(self.blocks[i].successors))
        return frozenset(begun & _closure(tails, lambda i: rest.intersection(self.predecessors[i])))

    def opcodes(self) -> Counter[str]:
        """Instructions of the whole function by opcode without modifiers."""
        return Counter(instruction.name for block in self.blocks for instruction in block.instructions)

    def instructions(self, blocks: frozenset[int]) -> list[Instruction]:
        return [instruction for i in sorted(blocks) for instruction in self.blocks[i].instructions]


def _closure(start: Iterable[int], neighbours: Callable[[int], Iterable[int]]) -> set[int]:
    found, pending = set(), list(start)
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending.extend(neighbours(i))
    return found


def _split(lines: Sequence[str | Instruction]) -> list[Block]:
    blocks, block_of_label = [Block("")], {}
    for line in lines:
        last = blocks[-1]
        if isinstance(line, str):
            if last.instructions:
                blocks.append(Block(line))
            elif not last.label:
                last.label = line
            block_of_label[line] = len(blocks) - 1
            continue
        last.instructions.append(line)
        if line.targets or not line.falls_through:
            blocks.append(Block(""))
    for i, block in enumerate(blocks):
        if not block.instructions:
            continue
        end = block.instructions[-1]
        if end.falls_through and i + 1 < len(blocks):
            block.successors.append(i + 1)
        block.successors += [block_of_label[target] for target in end.targets]
    return blocks


def _reachable(blocks: list[Block]) -> list[Block]:
    seen, pending = set(), [0]
    while pending:
        i = pending.pop()
        if i not in seen:
            seen.add(i)
            pending.extend(blocks[i].successors)
    index = {old: new for new, old in enumerate(sorted(seen))}
    return [
        Block(
            blocks[i].label, blocks[i].instructions, [index[s] for s in dict.fromkeys(blocks[i].successors)]
        )
        for i in index
    ]
