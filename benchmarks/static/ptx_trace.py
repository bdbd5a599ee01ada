"""How often a program runs each loop of its kernel, found by executing only what the compiled PTX branches on.

Branches of these kernels depend on program ids, launch arguments and a few loaded integers (lengths, counts), never
on the products. So the backward slice of the branch conditions, a few dozen integer instructions, is executed for one
thread, with the captured launch's own arguments and the real contents of its tensors.
"""

from __future__ import annotations

import ctypes
import operator
import re
from collections.abc import Callable, Iterable

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.static.control_flow import FlowGraph, Instruction
from benchmarks.static.fake_driver import Launch

_LABEL = re.compile(r"^\s*([$\w]+):")
_STATEMENT = re.compile(r"^\s*(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_REGISTER = re.compile(r"%[a-z]+\d+")
_TYPE = re.compile(r"pred|[subf]\d+")
_WITHOUT_RESULT = frozenset(
    (
        "st",
        "bra",
        "ret",
        "exit",
        "bar",
        "barrier",
        "cp",
        "red",
        "fence",
        "membar",
        "mbarrier",
        "trap",
        "setmaxnreg",
    )
)

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "min": min,
    "max": max,
    "shl": lambda a, b: a << min(b, 64),
    "shr": lambda a, b: a >> min(b, 64),
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
}


class UnknownBranch(RuntimeError):
    """A branch depends on something that the slice cannot compute."""


class PtxTrace:
    """The control flow of a captured launch.

    Attributes:
        graph: the blocks of the kernel's PTX.
        loops: its innermost loops that use tensor cores, header -> blocks, in the order of the text.
    """

    def __init__(self, launch: Launch) -> None:
        self.graph = _flow_graph(launch.kernel.asm["ptx"])
        self.loops = self.graph.innermost_loops(is_tensor)
        # what comes after the last loop may branch on results, and is not followed
        self._followed = self.graph.reaching(self.loops)
        self._slices = _slices(self.graph, self._followed)
        values = [value for _, value in launch.parameters.values()]
        self._memory = _Memory(x for x in values if isinstance(x, torch.Tensor))
        self._parameters = [x for value in values for x in _parameters(value)]

    def iterations(self, program: tuple[int, int, int]) -> list[int]:
        """How often the program runs each of ``loops``.

        Raises:
            UnknownBranch: a branch depends on an instruction or a load that is not known here.
        """
        registers = {f"%ctaid.{axis}": x for axis, x in zip("xyz", program, strict=True)} | {"%tid.x": 0}
        counts, at = [0] * len(self.graph.blocks), 0
        while at in self._followed:
            counts[at] += 1
            for instruction, operands in self._slices[at]:
                if not instruction.predicate or _holds(instruction.predicate, registers):
                    self._execute(instruction, operands, registers)
            block = self.graph.blocks[at]
            taken = len(block.successors) > 1 and _holds(block.instructions[-1].predicate, registers)
            at = block.successors[taken]
        return [counts[header] for header in self.loops]

    def _execute(self, instruction: Instruction, operands: list[str], registers: dict[str, int]) -> None:
        result, *operands = operands
        try:
            if instruction.name == "ld":
                loaded = self._load(instruction, operands[0], registers)
                registers.update(zip(_REGISTER.findall(result), loaded, strict=True))
            else:
                registers[result] = _compute(instruction, [_value(x, registers) for x in operands])
        except KeyError as missing:
            text = f"{instruction.opcode} {instruction.operands}"
            raise UnknownBranch(f"a branch depends on `{text}`: {missing} is not known") from None

    def _load(self, instruction: Instruction, address: str, registers: dict[str, int]) -> list[int]:
        base, _, offset = re.sub(r"[\[\]\s]", "", address).partition("+")
        if ".param." in instruction.opcode:
            return [self._parameters[int(base.rpartition("_")[2])]]
        size = int(instruction.opcode.rpartition(".")[2][1:]) // 8
        count = int((re.search(r"\.v(\d)", instruction.opcode) or [0, 1])[1])
        start = registers[base] + int(offset or 0)
        return [self._memory.read(start + i * size, size) for i in range(count)]


def is_tensor(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


def _parameters(value: object) -> list[object]:
    """What the compiled function takes for one argument."""
    if isinstance(value, TensorDescriptor):
        return [None, *value.shape, *value.strides]
    return [value.data_ptr() if isinstance(value, torch.Tensor) else value]


class _Memory:
    """Reads of integers from tensors; anything else is an error."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.storages = [x.untyped_storage() for x in tensors]

    def read(self, address: int, size: int) -> int:
        if not any(0 <= address - x.data_ptr() <= x.nbytes() - size for x in self.storages):
            raise UnknownBranch(f"a load of {size} bytes lies outside of the launch's tensors")
        return int.from_bytes(ctypes.string_at(address, size), "little")


def _compute(instruction: Instruction, values: list[int]) -> int:
    """The integer semantics of the PTX manual, section 9.7."""
    name, *modifiers = instruction.opcode.split(".")
    types = [modifier for modifier in modifiers if _TYPE.fullmatch(modifier)]
    if name in ("mov", "not") and types == ["pred"]:
        return values[0] if name == "mov" else not values[0]
    if name == "setp":
        a, b = (_typed(x, types[0]) for x in values)
        return _COMPARE[modifiers[0]](a, b)
    if name == "selp":
        return values[0] if values[2] else values[1]
    if (name == "shfl" and "idx" in modifiers) or name == "mov":
        return values[0]  # one thread stands for all
    if name == "cvt":
        return _typed(_typed(values[0], types[1]), types[0])
    if name == "bfe":
        return _typed(values[0], types[0]) >> values[1] & (1 << values[2]) - 1
    if name == "neg":
        return _typed(-values[0], types[0])
    if name == "mad":
        a, b = (_typed(x, types[0]) for x in values[:2])
        return a * b + values[2] if "wide" in modifiers else _typed(a * b + values[2], types[0])
    if "hi" in modifiers:
        raise KeyError("mul.hi")
    shift = name in ("shl", "shr")
    a, b = _typed(values[0], types[0]), _typed(values[1], "u32" if shift else types[0])
    result = _BINARY[name](a, b)
    return result if "wide" in modifiers else _typed(result, types[0])


def _typed(value: int, ptx_type: str) -> int:
    """The bits of ``value`` as s32, u64, b32 ...; predicates are themselves."""
    if ptx_type == "pred":
        return value
    if ptx_type.startswith("f"):
        raise KeyError(ptx_type)
    bits = int(ptx_type[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if ptx_type.startswith("s") and value >> (bits - 1) else value


def _value(operand: str, registers: dict[str, int]) -> int:
    return registers[operand] if operand.startswith("%") else int(operand, 0)


def _holds(predicate: str, registers: dict[str, int]) -> bool:
    register = predicate.removeprefix("!")
    if register not in registers:
        raise UnknownBranch(f"a branch depends on {register}, which is not known")
    return bool(registers[register]) != predicate.startswith("!")


def _operands(instruction: Instruction) -> list[str]:
    """Split at commas outside of braces; of a pair ``%r1|%p1`` the first."""
    parts = re.split(r",(?![^{]*\})", instruction.operands)
    return [part.strip().split("|")[0] for part in parts]


def _flow_graph(ptx: str) -> FlowGraph:
    """Of the kernel: all labels and statements of the text, the declarations among them being in nobody's way.

    Inline assembly that waits for a barrier jumps between labels of its own, which are the only ones without a ``$``:
    those jumps are left out, so that a wait is passed once.
    """
    lines: list[str | Instruction] = []
    for line in ptx.splitlines():
        if match := _STATEMENT.match(line):
            predicate, opcode, operands = match.groups()
            if opcode.startswith("bra") and not operands.startswith("$"):
                continue
            targets = (operands.strip(),) if opcode.startswith("bra") else ()
            ends = opcode in ("ret", "exit", "trap") or (bool(targets) and not predicate)
            lines.append(
                Instruction(opcode, operands.strip(), (predicate or ""), targets, bool(predicate) or not ends)
            )
        elif match := _LABEL.match(line):
            lines.append(match[1])
    return FlowGraph(lines)


def _slices(graph: FlowGraph, followed: set[int]) -> list[list[tuple[Instruction, list[str]]]]:
    """For each block the instructions that a branch of the followed blocks depends on, with their operands."""
    definitions: dict[str, list[Instruction]] = {}
    for block in graph.blocks:
        for instruction in block.instructions:
            if instruction.name not in _WITHOUT_RESULT:
                for register in _REGISTER.findall(_operands(instruction)[0]):
                    definitions.setdefault(register, []).append(instruction)
    needed: set[str] = set()
    sliced: set[int] = set()
    pending = [
        graph.blocks[i].instructions[-1].predicate.removeprefix("!")
        for i in followed
        if len(graph.blocks[i].successors) > 1
    ]
    while pending:
        register = pending.pop()
        if register in needed:
            continue
        needed.add(register)
        for instruction in definitions.get(register, []):
            sliced.add(id(instruction))
            pending += _REGISTER.findall(instruction.predicate + ",".join(_operands(instruction)[1:]))
    return [[(i, _operands(i)) for i in block.instructions if id(i) in sliced] for block in graph.blocks]
