"""Basic blocks of a kernel, where lanes that branched apart meet again, and which registers live there."""

from __future__ import annotations

from dataclasses import dataclass, field

from .faults import UnknownInstruction
from .parser import Entry, Instruction, Symbol


@dataclass
class Block:
    """A straight piece of code.

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
    """
    Raises:
        UnknownInstruction: a branch to nowhere.
    """
    code = entry.instructions
    is_branch = [x.name in ("bra", "ret", "exit") for x in code]
    goals = {entry.labels[x.operands[0].name] for x in code if x.name == "bra" and _known_label(x, entry)}
    starts = {0} | goals | {i + 1 for i, ends in enumerate(is_branch) if ends}
    starts = sorted(x for x in starts if x < len(code))
    block_at = {start: i for i, start in enumerate(starts)} | {len(code): len(starts)}
    blocks = []
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True)):
        if not is_branch[stop - 1]:
            blocks.append(Block(code[start:stop], None, None, i + 1))
            continue
        branch = code[stop - 1]
        target = len(starts)
        if branch.name == "bra":
            target = block_at[entry.labels[branch.operands[0].name]]
        blocks.append(Block(code[start : stop - 1], branch, target, i + 1 if branch.predicate else None))
    _find_joins(blocks)
    _find_live_registers(blocks)
    return blocks


def _known_label(branch: Instruction, entry: Entry) -> bool:
    (label,) = branch.operands
    if not isinstance(label, Symbol) or label.name not in entry.labels:
        raise UnknownInstruction(f"no such label: {branch.text}")
    return True


def _find_joins(blocks: list[Block]) -> None:
    """Post-dominators as bit sets, to a fixed point."""
    end = len(blocks)
    everything = (1 << (end + 1)) - 1
    after = [everything] * end + [1 << end]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(end)):
            common = everything
            for successor in blocks[i].successors:
                common &= after[successor]
            common |= 1 << i
            changed |= common != after[i]
            after[i] = common
    for i, block in enumerate(blocks):
        strict = [j for j in range(end + 1) if j != i and after[i] >> j & 1]
        # the nearest is itself post-dominated by all the others
        block.join = max(strict, key=lambda j: after[j].bit_count(), default=end)


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
