"""PTX text to instructions: one ``.entry`` per module, as Triton and, cut to one kernel, nvcc emit it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from benchmarks.static.control_flow import END

from .faults import UnknownInstruction


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """``bits``: the value's bits; floats (``0f3F800000``) come as such, integers may be negative."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a special register (``%tid.x``), shared memory's name, or ``_``."""

    name: str


@dataclass(frozen=True)
class Vector:
    """``{a, b}``, and the pair ``a|b`` of destinations."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``"""

    base: Register | Symbol | Immediate
    offset: int = 0


Operand = Register | Immediate | Symbol | Vector | Address

# Opcodes (before the first dot) whose first operand is no destination.
WITHOUT_DESTINATION = {
    "st",
    "bra",
    "bar",
    "barrier",
    "cp",
    "ret",
    "exit",
    "fence",
    "membar",
    "griddepcontrol",
}


@dataclass(frozen=True)
class Instruction:
    """``@predicate opcode operands;`` — ``negated`` is the predicate's ``!``, ``line`` counts from 1."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    line: int
    text: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def is_branch(self) -> bool:
        return self.name in ("bra", "ret", "exit")

    @property
    def targets(self) -> tuple[str, ...]:
        """The label that it may jump to; the kernel's end has one, too."""
        if not self.is_branch:
            return ()
        return (self.operands[0].name,) if self.name == "bra" else (END,)

    @property
    def falls_through(self) -> bool:
        return not self.is_branch or self.predicate is not None

    @property
    def _has_no_destination(self) -> bool:
        return self.name in WITHOUT_DESTINATION and not self.opcode.startswith("bar.red")

    def written(self) -> set[str]:
        if self._has_no_destination or not self.operands:
            return set()
        return set(_registers(self.operands[:1]))

    def read(self) -> set[str]:
        """Returns what is read; a predicated instruction keeps its destinations, and so reads them, where it is off."""
        sources = self.operands if self._has_no_destination else self.operands[1:]
        names = set(_registers(sources))
        return names | {self.predicate.name} | self.written() if self.predicate else names


@dataclass
class Entry:
    """One kernel.

    Attributes:
        parameters: bytes of each in the parameter space, by name, in order.
        threads: of a CTA (``.reqntid``, or all that ``.maxntid`` allows).
        shared_memory: names of the dynamic shared memory.
        registers: type (``pred``, ``b16``, ``b32``, ``b64``) by name.
        instructions: in order.
        labels: index into ``instructions`` by name.
    """

    name: str
    parameters: dict[str, range]
    threads: int
    shared_memory: set[str] = field(default_factory=set)
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|\.reg\s+\.(?P<type>\w+)\s+(?P<names>[^;]+);|(?P<instruction>[^;]+);)"
)


def parse(ptx: str) -> Entry:
    """
    Raises:
        UnknownInstruction: a directive inside the kernel that is not known, or no single kernel.
    """
    text = re.sub(r"//.*", "", ptx)
    heads = list(re.finditer(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text))
    if len(heads) != 1:
        raise UnknownInstruction(f"expected one kernel in the module, found {len(heads)}")
    head = heads[0]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*(?=\.|$)", head[3].strip())
    if threads is None:
        raise UnknownInstruction(
            f"expected a one-dimensional .reqntid or .maxntid, found {head[3].strip()!r}"
        )
    entry = Entry(head[1], _parameter_space(head[2]), int(threads[1]))
    entry.shared_memory |= set(re.findall(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\[\]\s*;", text))
    # positions of debug information, one a line and without a semicolon
    body = re.sub(r"^[ \t]*\.(?:loc|file)\b.*$", "", text[head.end() :], flags=re.MULTILINE)
    first_line = text.count("\n", 0, head.end()) + 1
    _parse_body(entry, body, first_line)
    return entry


def _parameter_space(declarations: str) -> dict[str, range]:
    """A scalar is as aligned as it is wide, a struct (an array of bytes) as it says."""
    parameters: dict[str, range] = {}
    stop = 0
    for declaration in filter(None, map(str.strip, declarations.split(","))):
        match = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[bsuf](\d+)\s.*?([\w$]+)(?:\[(\d+)\])?", declaration
        )
        if match is None:
            raise UnknownInstruction(f"cannot read the parameter {declaration!r}")
        element = int(match[2]) // 8
        start = -(-stop // int(match[1] or element)) * int(match[1] or element)
        stop = start + element * int(match[4] or 1)
        parameters[match[3]] = range(start, stop)
    return parameters


def _parse_body(entry: Entry, body: str, first_line: int) -> None:
    depth, position, line = 1, 0, first_line
    while depth:
        match = _STATEMENT.match(body, position)
        if match is None:
            raise UnknownInstruction(f"cannot read line {line}: {body[position : position + 60]!r}")
        line += body.count("\n", position, match.start(match.lastgroup))
        if match["label"]:
            entry.labels[match["label"]] = len(entry.instructions)
        elif match["brace"]:
            depth += 1 if match["brace"] == "{" else -1
        elif match["type"]:
            entry.registers |= {name: _register_type(match["type"]) for name in _declared(match["names"])}
        elif not match["instruction"].startswith(".pragma"):
            entry.instructions.append(_parse_instruction(match["instruction"], line, entry.registers))
        line += body.count("\n", match.start(match.lastgroup), match.end())
        position = match.end()


def _declared(names: str) -> list[str]:
    """``%r<3>`` declares ``%r0 %r1 %r2``; ``a, b`` declares both."""
    ranged = re.fullmatch(r"\s*(%\w+?)<(\d+)>\s*", names)
    if ranged:
        return [f"{ranged[1]}{i}" for i in range(int(ranged[2]))]
    return [name.strip() for name in names.split(",")]


def _register_type(name: str) -> str:
    return name if name == "pred" else f"b{name.lstrip('bsuf')}"


def _parse_instruction(statement: str, line: int, registers: dict[str, str]) -> Instruction:
    text = " ".join(statement.split())
    match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if match is None:
        raise UnknownInstruction(f"cannot read the statement of line {line}: {text!r}")
    operands = tuple(_parse_operand(x, registers) for x in _split(match[4]))
    predicate = Register(match[2]) if match[2] else None
    return Instruction(match[3], operands, predicate, match[1] == "!", line, text)


def _split(operands: str) -> list[str]:
    """Splits at the commas outside of braces and brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", operands) if x.strip()]


def _parse_operand(text: str, registers: dict[str, str]) -> Operand:
    if text in registers:
        return Register(text)
    if text.startswith("{"):
        return Vector(tuple(_parse_operand(x.strip(), registers) for x in text[1:-1].split(",")))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_parse_operand(base, registers), int(offset or "0", 0))
    if "|" in text:
        return Vector(tuple(_parse_operand(x.strip(), registers) for x in text.split("|")))
    if re.match(r"0[fFdD]", text):
        return Immediate(int(text[2:], 16))
    if re.match(r"-?\d", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"[%$\w.]+", text):
        return Symbol(text)
    raise UnknownInstruction(f"cannot read the operand {text!r}")


def _registers(operands: tuple[Operand, ...]) -> list[str]:
    names = []
    for operand in operands:
        if isinstance(operand, Register):
            names.append(operand.name)
        elif isinstance(operand, Vector):
            names += _registers(operand.items)
        elif isinstance(operand, Address):
            names += _registers((operand.base,))
    return names
