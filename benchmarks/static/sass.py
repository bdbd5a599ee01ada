"""This module reads what ptxas made of a kernel: registers, stack, and the instructions of its loops.

Read with ``cuobjdump`` and ``nvdisasm``, which Triton's wheel brings. Loops are the innermost ones that hold
tensor-core instructions, and numbers are those of one warp and one iteration *of the machine code*: where ptxas
unrolled, an iteration is several of the source's. Ratios do not depend on that.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from benchmarks.static.control_flow import FlowGraph
from benchmarks.static.fake_driver import Launch

HMMA_MACS = 16 * 8 * 16
"""Multiply-adds of the unit in which tensor work is counted: one HMMA of shape m16n8k16."""

COMPARES = frozenset(["ISETP", "FSETP", "ISET", "FSET", "PLOP3", "P2R", "R2P"])
"""Compares and predicate logic."""

TENSOR_OPCODES = frozenset({"HMMA", "HGMMA", "UTCHMMA"})
"""mma.sync, wgmma and tcgen05."""

PRODUCTS = {
    "_banded_forward_kernel": 2,
    "_banded_dq_kernel": 3,
    "_banded_dkdv_kernel": 4,
    "_banded_dkdv_globals_kernel": 4,
    "_global_forward_kernel": 2,
    "_global_dq_kernel": 3,
    "_global_dkdv_kernel": 4,
}
"""Matrix products of BLOCK_M x BLOCK_N x BLOCK_D that a tile of each kernel needs; two more with ``WRITE_DKDV``."""

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_JUMPS = frozenset({"BRA", "BRX", "JMP", "JMX", "CALL"})
_ENDS = frozenset({"EXIT", "RET", "KILL"})


@dataclass(frozen=True)
class Instruction:
    """Holds one instruction.

    Attributes:
        opcode: with its modifiers, without predicate and operands: ``HMMA.16816.F32.BF16``.
        operands: the rest of the text.
        targets: labels that it may jump to.
        falls_through: whether the next instruction may be executed after it.
    """

    opcode: str
    operands: str = ""
    targets: tuple[str, ...] = ()
    falls_through: bool = True

    @property
    def name(self) -> str:
        """Returns the opcode without modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Resources:
    """Holds registers per thread; bytes of stack and of local memory per thread, of static shared memory per block."""

    registers: int
    stack: int
    local: int
    shared: int


@dataclass(frozen=True)
class Loop:
    """Describes one iteration of an innermost loop that uses tensor cores, for one warp."""

    header: int
    instructions: tuple[Instruction, ...]

    @property
    def size(self) -> int:
        return len(self.instructions)

    @property
    def tensor_instructions(self) -> int:
        return sum(map(is_tensor, self.instructions))

    @property
    def tensor_macs(self) -> int:
        """Counts the multiply-adds of this warp's share; 0 where the machine code does not say (tcgen05)."""
        return sum(map(tensor_macs, self.instructions))

    @property
    def exponentials(self) -> int:
        return sum(instruction.opcode.startswith("MUFU.EX2") for instruction in self.instructions)

    @property
    def mask_instructions(self) -> int:
        return sum(map(is_mask, self.instructions))

    @property
    def mask_per_score(self) -> float:
        """Returns the mask instructions for each score, which has one exponential: about 0 in an interior loop."""
        return self.mask_instructions / max(1, self.exponentials)

    def hmmas(self, launch: Launch) -> float:
        """Counts the products that the attention needs of this warp, in HMMAs of shape m16n8k16 on any target.

        Of the products in the loop that is a whole number of tiles; what remains, such as a row sum taken by a product
        with ones, is overhead as any other instruction. Loops over other tiles, and other kernels, count all.
        """
        tiles = self.tiles(launch)
        return (tiles * tile_macs(launch) if tiles else self.tensor_macs) / HMMA_MACS

    def tiles(self, launch: Launch) -> int:
        """Counts the tiles, BLOCK_M x BLOCK_N, that an iteration multiplies completely; 0 for loops over others."""
        return self.tensor_macs // tile_macs(launch) if launch.name in PRODUCTS else 0


def tile_macs(launch: Launch) -> int:
    """Counts one warp's multiply-adds for the products of a tile, of a kernel in :data:`PRODUCTS`."""
    tile = math.prod(launch.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    products = PRODUCTS[launch.name] + 2 * launch.constexprs.get("WRITE_DKDV", False)
    return tile * products // launch.kernel.metadata.num_warps


def cubins(library: Path) -> list[bytes]:
    """Extracts the machine code of every object and architecture that was linked into an executable or a library.

    Raises:
        ValueError: cuobjdump finds none, and says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [_BINARIES / "cuobjdump", "--extract-elf", "all", library.resolve()]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise ValueError(done.stdout.strip())
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def resources(cubin: bytes) -> Resources:
    """Returns the resources of the only function."""
    (used,) = resources_by_function(cubin).values()
    return used


def resources_by_function(cubin: bytes) -> dict[str, Resources]:
    return parse_resources(_run("cuobjdump", "--dump-resource-usage", cubin))


def parse_resources(text: str) -> dict[str, Resources]:
    """Returns resources by function, from what cuobjdump prints."""
    functions = {}
    for name, figures in re.findall(r"^ *Function (.*):\n(.*)", text, re.MULTILINE):
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", figures)}
        functions[name] = Resources(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"])
    return functions


def disassemble(cubin: bytes) -> str:
    return _run("nvdisasm", "-c", cubin)


def functions(sass: str) -> dict[str, str]:
    """Returns the text of each function, by name."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+),.*", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def flow_graph(sass: str) -> FlowGraph:
    """Returns the flow graph of the first function in the text, which is the kernel."""
    lines: list[str | Instruction] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            lines.append(label[1])
        elif match := _INSTRUCTION.match(line):
            lines.append(_instruction(*match.groups()))
    return FlowGraph(lines)


def loops(graph: FlowGraph) -> list[Loop]:
    """Returns the loops in the order of the text."""
    found = graph.innermost_loops(is_tensor)
    return [Loop(header, tuple(graph.instructions(blocks))) for header, blocks in found.items()]


def kinds(loops: list[Loop], dropout: bool = False) -> list[str]:
    """Names each loop ``interior`` or ``masked``.

    Interior is a loop with less than one mask instruction for two scores. Dropout selects every score once more, in
    every loop: there the loop with the fewest sets the level.
    """
    level = min((loop.mask_per_score for loop in loops), default=0.0) if dropout else 0.0
    return ["interior" if loop.mask_per_score - level < 0.5 else "masked" for loop in loops]


def tensor_opcodes(graph: FlowGraph) -> Counter[str]:
    """Counts the tensor-core instructions of the whole kernel, by opcode without modifiers."""
    return Counter(i.name for block in graph.blocks for i in block.instructions if is_tensor(i))


def is_mask(instruction: Instruction) -> bool:
    """Tells whether masks are made of it: compares, and selects between a value and -inf or 0."""
    if instruction.name in ("FSEL", "SEL"):
        return "INF" in instruction.operands or "RZ" in instruction.operands
    return instruction.name in COMPARES


def is_tensor(instruction: Instruction) -> bool:
    return instruction.name in TENSOR_OPCODES


def tensor_macs(instruction: Instruction) -> int:
    """Counts the multiply-adds of one warp: of the instruction, or for HGMMA of its quarter of the warpgroup's."""
    if instruction.name == "HMMA":  # HMMA.16816: m16n8k16, HMMA.1688: m16n8k8, HMMA.1684: m16n8k4
        return 16 * 8 * int(instruction.opcode.split(".")[1].removeprefix("168"))
    if instruction.name == "HGMMA":  # HGMMA.64x128x16
        m, n, k = map(int, instruction.opcode.split(".")[1].split("x"))
        return m * n * k // 4
    return 0


def print_loops(launch: Launch) -> None:
    """Prints a table of a captured launch's loops, for whoever tunes the kernel."""
    cubin = launch.kernel.asm["cubin"]
    used, metadata, graph = resources(cubin), launch.kernel.metadata, flow_graph(disassemble(cubin))
    print(
        f"{launch.name} {launch.target} "
        + " ".join(f"{name}={value}" for name, value in launch.constexprs.items() if name.isupper())
        + f"\n{metadata.num_warps} warps, "
        f"{used.registers} registers, {used.stack} B stack, {metadata.shared} B shared, "
        f"{sum(len(block.instructions) for block in graph.blocks)} instructions in all"
    )
    found = loops(graph)
    print(f"{'loop':9}{'instr':>6}{'tensor':>7}{'HMMA':>6}{'/HMMA':>6}{'EX2':>5}{'mask':>6}  others")
    for kind, loop in zip(kinds(found, launch.constexprs.get("DROPOUT", False)), found, strict=True):
        others = Counter(i.name for i in loop.instructions if not is_mask(i) and not is_tensor(i))
        hmmas = loop.hmmas(launch)
        per_hmma = f"{loop.size / hmmas:.2f}" if hmmas else "-"
        print(
            f"{kind:9}{loop.size:6}{loop.tensor_instructions:7}{hmmas:6.0f}{per_hmma:>6}"
            f"{loop.exponentials:5}{loop.mask_instructions:6}  "
            + " ".join(f"{name}:{count}" for name, count in others.most_common(14))
        )


def _instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    targets = tuple(_TARGET.findall(operands))
    if opcode.startswith("BRX"):
        targets = tuple(re.findall(r"\.L_\w+", operands))
    name = opcode.split(".")[0]
    if name not in _JUMPS:
        targets = ()  # BSSY names the place where threads meet again
    conditional = bool(predicate) or (bool(targets) and not operands.startswith("`"))
    ends = name in _ENDS or (name in _JUMPS and bool(targets))
    return Instruction(opcode, operands, targets, conditional or not ends)


def _run(program: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BINARIES / program, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
