"""Runs a kernel: waves of lanes go through its basic blocks, part at branches and meet again.

A wave is any set of lanes of a group of CTAs that are at the same instruction. Where a branch divides them, each side
runs to the branch's immediate post-dominator, one after the other, and there they are one wave again: CTAs with loops
of different lengths and lanes of one warp are treated alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .control_flow import Block, basic_blocks
from .faults import DivergenceFault, EndlessLoop, PtxFault
from .instructions import Step, bind
from .memory import GlobalMemory, load_parameters
from .operands import Binder
from .parser import Instruction, parse
from .shared_memory import SharedMemory
from .warp import WARP

# Lanes of a group: enough to hide numpy's overhead, few enough to stay in the cache.
MAX_LANES = 4096
# Basic blocks that a group may run; attention over a few hundred tokens takes hundreds.
MAX_BLOCKS = 20_000


class Program:
    """A parsed kernel, its instructions bound.

    Attributes:
        entry: the parsed kernel.
        blocks: its basic blocks.
        steps: for every block, its instructions with the functions that execute them.
        conditions: for every block, which lanes take the branch at its end.
        executed: the blocks that some lane has run.
    """

    def __init__(self, ptx: str) -> None:
        self.entry = parse(ptx)
        self.blocks: list[Block] = basic_blocks(self.entry)
        binder = Binder(self.entry)
        self.steps: list[list[tuple[Instruction, Step]]] = [
            [(x, _bind_with_place(x, binder)) for x in block.body] for block in self.blocks
        ]
        self.conditions = [block.branch and binder.active(block.branch) for block in self.blocks]
        self.executed: set[int] = set()
        self.granule = min(
            [_smallest_access(x) for x in self.entry.instructions if "shared" in x.opcode], default=16
        )


@functools.lru_cache(maxsize=64)
def compiled(ptx: str) -> Program:
    return Program(ptx)


def execute(
    program: Program,
    grid: tuple[int, int, int],
    parameters: dict[str, int],
    memory: GlobalMemory,
    shared_bytes: int,
) -> None:
    """Runs all CTAs of the grid, a group at a time.

    Args:
        parameters: bits of every parameter of the entry, by name; a struct's first byte is the lowest.
        shared_bytes: dynamic shared memory of a CTA.
    """
    ctas = grid[0] * grid[1] * grid[2]
    space = bytearray(max((place.stop for place in program.entry.parameters.values()), default=0))
    for name, place in program.entry.parameters.items():
        bits = parameters[name] & ((1 << 8 * len(place)) - 1)
        space[place.start : place.stop] = bits.to_bytes(len(place), "little")
    at_once = max(1, MAX_LANES // program.entry.threads)
    with np.errstate(all="ignore"):
        for first in range(0, ctas, at_once):
            numbers = np.arange(first, min(first + at_once, ctas))
            Group(program, grid, numbers, bytes(space), memory, shared_bytes).run()


class Group:
    """CTAs that run together.

    Args:
        numbers: of the CTAs in the grid, x fastest.
        parameters: the parameter space.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        numbers: np.ndarray,
        parameters: bytes,
        memory: GlobalMemory,
        shared_bytes: int,
    ) -> None:
        self.program = program
        self.grid = grid
        self.numbers = numbers
        self.threads = program.entry.threads
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.memory = memory
        self.shared = SharedMemory(len(numbers), shared_bytes, self.threads, program.granule)
        self._blocks_left = MAX_BLOCKS

    def run(self) -> None:
        lanes = np.arange(len(self.numbers) * self.threads)
        self._run_until(len(self.program.blocks), 0, Wave(self, lanes, {}))

    def _run_until(self, stop: int, at: int, wave: Wave) -> Wave:
        """Runs from the block ``at`` to the entry of the block ``stop`` -> the same lanes"""
        while at != stop:
            self.program.executed.add(at)
            self._blocks_left -= 1
            if self._blocks_left < 0:
                raise EndlessLoop(f"a group of CTAs has run {MAX_BLOCKS} basic blocks")
            for instruction, step in self.program.steps[at]:
                try:
                    step(wave)
                except PtxFault as fault:
                    raise fault.at(instruction.line, instruction.text) from None
            block, condition = self.program.blocks[at], self.program.conditions[at]
            if condition is None:
                at = block.following if block.branch is None else block.target
                continue
            taken = condition(wave)
            if taken.all():
                at = block.target
            elif not taken.any():
                at = block.following
            else:
                sides = [
                    self._run_until(block.join, start, wave.part(side, self._live(start)))
                    for start, side in ((block.target, taken), (block.following, ~taken))
                ]
                at, wave = block.join, Wave.joined(*sides, self._live(block.join))
        return wave

    def _live(self, block: int) -> set[str]:
        return self.program.blocks[block].live if block < len(self.program.blocks) else set()


class Wave:
    """Lanes of a group at the same instruction, with their registers.

    Attributes:
        lanes: number of each lane in the group, ascending.
        registers: storage array ``[lanes]`` by name.
    """

    def __init__(self, group: Group, lanes: np.ndarray, registers: dict[str, np.ndarray]) -> None:
        self.group = group
        self.lanes = lanes
        self.registers = registers
        self.size = len(lanes)
        self._cta = lanes // group.threads  # in the group
        self._thread = lanes % group.threads
        self._warp = self._thread // WARP
        self._number = group.numbers[self._cta]  # of the CTA in the grid

    def part(self, chosen: np.ndarray, live: set[str]) -> Wave:
        """The chosen lanes alone, with the registers that are still needed."""
        registers = {name: self.registers[name][chosen] for name in live if name in self.registers}
        return Wave(self.group, self.lanes[chosen], registers)

    @staticmethod
    def joined(one: Wave, other: Wave, live: set[str]) -> Wave:
        lanes = np.concatenate([one.lanes, other.lanes])
        order = np.argsort(lanes)
        registers = {}
        for name in live & (one.registers.keys() | other.registers.keys()):
            storage = next(x.registers[name] for x in (one, other) if name in x.registers).dtype
            parts = [wave.register_or_poison(name, storage) for wave in (one, other)]
            registers[name] = np.concatenate(parts)[order]
        return Wave(one.group, lanes[order], registers)

    def register_or_poison(self, name: str, storage: np.dtype) -> np.ndarray:
        """Undefined bits are ones: NaN in every floating type, no pointer and a large count."""
        if name in self.registers:
            return self.registers[name]
        return np.full(self.size, ~storage.type(0), storage)

    def special(self, name: str) -> np.ndarray:
        """``tid.x``, ``ctaid.y`` ..., [lanes] or [1]"""
        grid, kind, axis = self.group.grid, *f"{name}.x".split(".")[:2]
        i = "xyz".index(axis)
        if kind in ("tid", "ntid") and i > 0:
            return np.array([int(kind == "ntid")])
        return {
            "tid": self._thread,
            "ntid": np.array([self.group.threads]),
            "ctaid": self._number // int(np.prod(grid[:i])) % grid[i],
            "nctaid": np.array([grid[i]]),
            "laneid": self._thread % WARP,
            "warpid": self._warp,
        }[kind]

    def lanes_where(self, active: Callable[[Wave], np.ndarray] | None) -> slice | np.ndarray:
        """Index of the active lanes."""
        if active is None:
            return slice(None)
        mask = active(self)
        return slice(None) if mask.all() else np.flatnonzero(mask)

    def first_of_each_warp(self, count: int) -> slice | np.ndarray:
        if count == WARP:
            return slice(None)
        return np.flatnonzero(np.arange(self.size) % WARP < count)

    def load(self, space: str, address: np.ndarray, nbytes: int, lanes: slice | np.ndarray) -> np.ndarray:
        """-> uint8 [lanes, nbytes]"""
        if space == "global":
            return self.group.memory.load(address, nbytes, self._number[lanes])
        if space == "param":
            return load_parameters(self.group.parameters, address.astype(np.int64), nbytes)
        return self.group.shared.load(self._cta[lanes], self._warp[lanes], address.astype(np.int64), nbytes)

    def store(self, space: str, address: np.ndarray, rows: np.ndarray, lanes: slice | np.ndarray) -> None:
        if space == "global":
            self.group.memory.store(address, rows, self._number[lanes])
        else:
            self.group.shared.store(self._cta[lanes], self._warp[lanes], address.astype(np.int64), rows)

    def copy_async(
        self,
        to: np.ndarray,
        origin: np.ndarray,
        nbytes: int,
        sizes: np.ndarray,
        lanes: slice | np.ndarray,
    ) -> None:
        """cp.async: ``sizes`` bytes of each lane are read, the rest of ``nbytes`` is zeros."""
        rows = np.zeros((len(to), nbytes), np.uint8)
        for size in set(np.unique(sizes)) - {0}:
            chosen = np.flatnonzero(sizes == size)
            rows[chosen, :size] = self.group.memory.load(
                origin[chosen], int(size), self._number[lanes][chosen]
            )
        self.group.shared.start_copy(
            self.lanes[lanes], self._cta[lanes], self._warp[lanes], to.astype(np.int64), rows
        )

    def commit_copies(self) -> None:
        self.group.shared.commit_copies(self.lanes)

    def wait_for_copies(self, pending: int) -> None:
        self.group.shared.wait_for_copies(self.lanes, pending)

    def barrier(self) -> None:
        ctas, threads = np.unique(self._cta, return_counts=True)
        if (threads != self.group.threads).any():
            raise DivergenceFault("a barrier that not all threads of the CTA reach together")
        self.group.shared.barrier(ctas)

    def reducing_barrier(self, function: np.ufunc, values: np.ndarray) -> np.ndarray:
        """-> [lanes], of each CTA's ``values``"""
        self.barrier()
        order = np.argsort(self._cta, kind="stable")
        by_cta = np.broadcast_to(values, self.size)[order].reshape(-1, self.group.threads)
        result = np.empty(self.size, by_cta.dtype)
        result[order] = np.repeat(function.reduce(by_cta, axis=1), self.group.threads)
        return result

    def expect_whole_warps(self) -> None:
        if not self._has_whole_warps:
            raise DivergenceFault("an instruction of whole warps, but not all lanes are here")

    @functools.cached_property
    def _has_whole_warps(self) -> bool:
        if self.size % WARP:
            return False
        warps = self.lanes.reshape(-1, WARP)
        return bool((warps == warps[:, :1] + np.arange(WARP)).all() and (warps[:, 0] % WARP == 0).all())


def _bind_with_place(instruction: Instruction, binder: Binder) -> Step:
    try:
        return bind(instruction, binder)
    except PtxFault as fault:
        raise fault.at(instruction.line, instruction.text) from None


def _smallest_access(instruction: Instruction) -> int:
    """Bytes of shared memory that a lane touches at once."""
    if instruction.name == "ldmatrix":
        return 16
    if instruction.name == "cp":
        return instruction.operands[2].bits
    *modifiers, type_name = instruction.modifiers
    count = next((int(x[1]) for x in modifiers if x in ("v2", "v4")), 1)
    return count * int(type_name.lstrip("bsuf")) // 8
