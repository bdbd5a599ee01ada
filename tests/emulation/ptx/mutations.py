"""Small faults planted in a kernel's PTX, of the kinds that a compiler or a kernel's author makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.emulation.ptx.machine import compiled

_STRICTNESS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
_OTHER_OPERATION = {"add": "sub", "sub": "add", "mul": "add"}


@dataclass(frozen=True)
class Mutation:
    """Lines (from 0) of a PTX text, and what they become."""

    lines: dict[int, str]

    def apply(self, ptx: str) -> str:
        lines = ptx.split("\n")
        for number, text in self.lines.items():
            lines[number] = text
        return "\n".join(lines)

    def __str__(self) -> str:
        number, text = next(iter(self.lines.items()))
        others = f" and {len(self.lines) - 1} more" if len(self.lines) > 1 else ""
        return f"line {number + 1}: {text.strip() or '(removed)'}{others}"


def _compare(line: str) -> str:
    return re.sub(r"(?<=setp\.)(lt|le|gt|ge)(?=\.(?:and\.|or\.)?[su]32)", lambda m: _STRICTNESS[m[0]], line)


def _wait(line: str) -> str:
    return re.sub(r"(?<=wait_group)(\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}", line)


def _operator(line: str) -> str:
    return re.sub(r"\b(add|sub|mul)(?=\.f32)", lambda m: _OTHER_OPERATION[m[0]], line)


def _shared_address(line: str) -> str:
    if ".shared" not in line or "cp.async" in line:
        return line
    return re.sub(r"\[\s*(%\w+)(?:\s*\+\s*(\d+))?\s*\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + 16}]", line)


def _global_address(line: str) -> str:
    """Returns the global address of loads, stores and the sources of cp.async."""
    if ".global" not in line:
        return line
    return re.sub(r"\[\s*(%rd\d+)\s*\+\s*0\s*\]", r"[\1+16]", line)


def _barrier(line: str) -> str:
    return re.sub(r"bar\.sync\s+0;", "", line)


KINDS: dict[str, Callable[[str], str]] = {
    "compare": _compare,
    "wait": _wait,
    "operator": _operator,
    "shared address": _shared_address,
    "global address": _global_address,
    "barrier": _barrier,
}


def mutations(ptx: str, kind: str) -> list[Mutation]:
    """Returns all of one kind in what was executed of a kernel.

    A compare is changed in all the instructions that come from one source line, since each alone may well belong to
    fragments where it makes no difference.
    """
    program = compiled(ptx)
    executed = {
        instruction.line - 1 for block in program.executed for instruction in program.blocks[block].body
    }
    changed: dict[object, dict[int, str]] = {}
    place = ""
    for number, line in enumerate(ptx.split("\n")):
        if located := re.match(r"\s*\.loc\s+(\d+ \d+)", line):
            place = located[1]
        mutated = KINDS[kind](line)
        if number in executed and mutated != line:
            changed.setdefault(place if kind == "compare" else number, {})[number] = mutated
    return [Mutation(lines) for lines in changed.values()]


def spread(candidates: list, count: int) -> list:
    """Picks up to ``count``, evenly."""
    if len(candidates) <= count:
        return candidates
    return [candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)]
