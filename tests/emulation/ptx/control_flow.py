"""The flow graph of a kernel, where lanes that branched apart meet again, and which registers live in its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.static.control_flow import FlowGraph

from .faults import UnknownInstruction
from .parser import Entry, Instruction, Symbol


@dataclass
class Block:
    """Holds a straight piece of code.

    Attributes:
        body: its instructions without the branch.
        branch: the ``bra``, ``ret`` or ``exit`` at its end, if any.
        target: the block where the branch goes; the number of blocks stands for the kernel's end.
        following: the block after it; None after an unconditional branch.
        join: its immediate post-dominator.
        live: registers that it or a successor reads before writing them.
    """

    body: list[Instruction]
    branch: Instruction | None
    target: int | None
    following: int | None
    join: int = 0
    live: set[str] = field(default_factory=set)

    @property
    def successors(self) -> list[int]:
        return [x for x in (self.target, self.following) if x is not None]


def basic_blocks(entry: Entry) -> list[Block]:
    """Returns the blocks that can be reached.

    Raises:
        UnknownInstruction: a branch to nowhere.
    """
    for instruction in entry.instructions:
        if instruction.name == "bra":
            _check_label(instruction, entry)
    graph = FlowGraph(_lines(entry))
    end = len(graph.blocks)
    blocks = []
    for flow, after in zip(graph.blocks, graph.post_dominators, strict=True):
        successors = flow.successors + [end] * flow.may_end
        *body, last = flow.instructions or [None]
        if last is None or not last.is_branch:
            body, branch, target, following = flow.instructions, None, None, successors[0]
        else:
            branch, target = last, successors[-1]
            following = successors[0] if last.predicate else None
        # the nearest is itself post-dominated by all the others
        nearest = after - {len(blocks)}
        join = max(nearest, key=lambda i: len(graph.post_dominators[i]) if i < end else 1)
        blocks.append(Block(body, branch, target, following, join))
    _find_live_registers(blocks)
    return blocks


def _lines(entry: Entry) -> list[str | Instruction]:
    """Labels that are jumped to and instructions, as they follow each other; the other labels are for debuggers."""
    goals = {label for instruction in entry.instructions for label in instruction.targets}
    labels: dict[int, list[str]] = {}
    for name, at in entry.labels.items():
        if name in goals:
            labels.setdefault(at, []).append(name)
    lines: list[str | Instruction] = []
    for at, instruction in enumerate(entry.instructions):
        lines += [*labels.get(at, []), instruction]
    return lines + labels.get(len(entry.instructions), [])


def _check_label(branch: Instruction, entry: Entry) -> None:
    (label,) = branch.operands
    if not isinstance(label, Symbol) or label.name not in entry.labels:
        raise UnknownInstruction(f"no such label: {branch.text}")


def _find_live_registers(blocks: list[Block]) -> None:
    """Backwards to a fixed point."""
    reads, writes = [], []
    for block in blocks:
        read: set[str] = set()
        written: set[str] = set()
        for instruction in [*block.body, *([block.branch] if block.branch else [])]:
            read |= instruction.read() - written
            written |= instruction.written()
        reads.append(read)
        writes.append(written)
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(blocks))):
            live = set(reads[i])
            for successor in blocks[i].successors:
                if successor < len(blocks):
                    live |= blocks[successor].live - writes[i]
            changed |= live != blocks[i].live
            blocks[i].live = live
