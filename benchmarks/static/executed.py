"""How many machine instructions a launch executes, and the HMMAs that its band needs.

The model: loop iterations are exact, found for every program of the grid by :mod:`.ptx_trace`; ptxas keeps
the loops of the PTX one for one, which is checked by their tensor instructions. Code outside of these loops is counted
once per warp, along the costliest path that enters just the loops that the program enters: an upper bound. Other
loops, such as spins on a barrier, count as one iteration.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.shapes import Shape, attention_flop
from benchmarks.static import ptx_trace, sass
from benchmarks.static.control_flow import FlowGraph
from benchmarks.static.fake_driver import Launch


class UnknownLoops(RuntimeError):
    """The loops of the machine code cannot be told from those of the PTX."""


@dataclass(frozen=True)
class Execution:
    """One launch, executed by count.

    Attributes:
        instructions: of all warps of the grid.
        programs: how many programs run the kernel's tensor-core loops so many times each, in the order of the text.
    """

    instructions: int
    programs: Counter[tuple[int, ...]]

    @property
    def mean_iterations(self) -> list[float]:
        """Of each loop, over the programs."""
        total = self.programs.total()
        by_loop = zip(*self.programs, strict=True)
        counts = self.programs.values()
        return [sum(n * count for n, count in zip(runs, counts, strict=True)) / total for runs in by_loop]


def execute(launch: Launch, graph: FlowGraph) -> Execution:
    """Follows every program of the grid; ``graph`` is the launch's machine code.

    Raises:
        UnknownLoops, benchmarks.static.ptx_trace.UnknownBranch: the model does not hold for this kernel.
    """
    trace = ptx_trace.PtxTrace(launch)
    in_sass = _tensor_instructions(graph, graph.innermost_loops(sass.is_tensor), sass.is_tensor)
    in_ptx = _tensor_instructions(trace.graph, trace.loops, ptx_trace.is_tensor)
    if in_sass != in_ptx:
        raise UnknownLoops(f"tensor instructions by loop are {in_ptx} in PTX and {in_sass} in machine code")
    programs = Counter(
        tuple(trace.iterations((x, y, z))) for z, y, x in itertools.product(*map(range, launch.grid[::-1]))
    )
    per_warp = sum(count * instructions_of_program(graph, loops) for loops, count in programs.items())
    return Execution(per_warp * launch.kernel.metadata.num_warps, programs)


def instructions_of_program(graph: FlowGraph, iterations: Sequence[int]) -> int:
    """Of one warp that runs the tensor-core loops so many times each.

    Raises:
        UnknownLoops: no path enters exactly the loops that are run, or one lies in another.
    """
    wanted = dict(zip(graph.innermost_loops(sass.is_tensor), iterations, strict=True))
    loops = graph.natural_loops
    outermost = {h: body for h, body in loops.items() if not any(body < other for other in loops.values())}
    if not wanted.keys() <= outermost.keys():
        raise UnknownLoops("a loop that uses tensor cores lies in another loop")
    node_of_block = {i: header for header, body in outermost.items() for i in body}

    @functools.cache
    def costliest(node: int) -> tuple[int, int]:
        """Loops entered from here on, which is to be all, and instructions."""
        body = outermost.get(node, frozenset({node}))
        runs = wanted.get(node, 1)
        if runs == 0:
            return -len(graph.blocks), 0
        following = {s for i in body for s in graph.blocks[i].successors if s not in body}
        entered, cost = max((costliest(node_of_block.get(s, s)) for s in following), default=(0, 0))
        return entered + (node in wanted), cost + runs * len(graph.instructions(body))

    entered, cost = costliest(node_of_block.get(0, 0))
    if entered != sum(runs > 0 for runs in iterations):
        raise UnknownLoops(f"no path enters just the loops of {tuple(iterations)} iterations")
    return cost


def needed_hmmas(shape: Shape) -> float:
    """The forward's work in the exact band, in products of shape m16n8k16."""
    return attention_flop(shape) / (2 * sass.HMMA_MACS)


def _tensor_instructions(graph: FlowGraph, loops: dict[int, frozenset[int]], is_tensor) -> list[int]:
    return [sum(map(is_tensor, graph.instructions(body))) for body in loops.values()]
