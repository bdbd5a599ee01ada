"""This module finds basic blocks, dominators and natural loops of assembly that was parsed into instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol


class Instruction(Protocol):
    """Holds what a flow graph knows of an instruction of any language.

    Attributes:
        name: the opcode without modifiers.
        targets: labels that it may jump to; :data:`END` among them where it may leave the function.
        falls_through: whether the next instruction may be executed after it.
    """

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    @property
    def falls_through(self) -> bool: ...


END = "<end>"
"""In the place of a label: what comes after the last instruction."""


@dataclass
class Block:
    """Holds instructions that are executed together.

    Attributes:
        successors: indices of blocks, the one that follows in the text first.
        may_end: whether the function may end with the block.
    """

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    may_end: bool = False


class FlowGraph:
    """Holds the blocks of one function that can be reached from its first, in the order of the text.

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
        """Returns for each block those that every path to it passes, itself included."""
        return _dominators(self.predecessors, 0)

    @cached_property
    def post_dominators(self) -> list[set[int]]:
        """Returns for each block those that every path from it passes, itself and the function's end included.

        The end is the number of blocks. A block that never comes there has all of them.
        """
        end = len(self.blocks)
        following = [block.successors + [end] * block.may_end for block in self.blocks]
        return _dominators([*following, []], end)[:end]

    @cached_property
    def natural_loops(self) -> dict[int, frozenset[int]]:
        """Returns header -> blocks of the loop, in the order of the text; loops with the same header are one."""
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
        """Returns natural loops that hold a wanted instruction outside of the wanted loops within them.

        Loops without one, such as a spin on a barrier, count as part of what is around them.
        """
        wanted_blocks = {i for i, block in enumerate(self.blocks) if any(map(wanted, block.instructions))}
        loops = {header: body for header, body in self.natural_loops.items() if body & wanted_blocks}
        return {
            header: body
            for header, body in loops.items()
            if not any(other < body for other in loops.values())
        }

    def without_inner_loops(self, header: int) -> frozenset[int]:
        """Returns the blocks of a natural loop's iterations that enter none of the loops within it; none if all do."""
        body = self.natural_loops[header]
        inner = frozenset().union(*(loop for loop in self.natural_loops.values() if loop < body))
        if header in inner:
            return frozenset()
        rest = body - inner
        tails = [i for i in rest if header in self.blocks[i].successors]
        begun = _closure([header], lambda i: rest.intersection(self.blocks[i].successors))
        return frozenset(begun & _closure(tails, lambda i: rest.intersection(self.predecessors[i])))

    def opcodes(self) -> Counter[str]:
        """Counts instructions of the whole function by opcode without modifiers."""
        return Counter(instruction.name for block in self.blocks for instruction in block.instructions)

    def instructions(self, blocks: frozenset[int]) -> list[Instruction]:
        return [instruction for i in sorted(blocks) for instruction in self.blocks[i].instructions]


def _dominators(predecessors: list[list[int]], root: int) -> list[set[int]]:
    """Returns for each node those that every path from the root to it passes, itself included."""
    everything = set(range(len(predecessors)))
    dominators = [{root} if i == root else set(everything) for i in everything]
    from_root = sorted(everything - {root}, key=lambda i: abs(i - root))
    changed = True
    while changed:
        changed = False
        for i in from_root:
            new = {i} | everything.intersection(*(dominators[p] for p in predecessors[i]))
            changed |= new != dominators[i]
            dominators[i] = new
    return dominators


def _closure(start: Iterable[int], neighbors: Callable[[int], Iterable[int]]) -> set[int]:
    found, pending = set(), list(start)
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending.extend(neighbors(i))
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
        if not block.instructions:  # a label behind the last instruction
            block.may_end = True
            continue
        end = block.instructions[-1]
        if end.falls_through and i + 1 < len(blocks):
            block.successors.append(i + 1)
        block.successors += [block_of_label[target] for target in end.targets if target != END]
        is_last = i + 1 == len(blocks)
        block.may_end = (
            END in end.targets or (end.falls_through and is_last) or not (end.falls_through or end.targets)
        )
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
        replace(blocks[i], successors=[index[s] for s in dict.fromkeys(blocks[i].successors)]) for i in index
    ]
