"""The interpreter raises these."""

from __future__ import annotations


class PtxFault(Exception):
    """Base of all faults; the message ends with the instruction that raised it."""

    def at(self, line: int, text: str) -> PtxFault:
        return type(self)(f"{self}\n  line {line}: {text}")


class UnknownInstruction(PtxFault):
    """An opcode, modifier or directive that is not modelled."""


class MemoryFault(PtxFault):
    """Out of bounds, misaligned, or outside every tensor."""


class UnwrittenRead(PtxFault):
    """A read of shared memory that was never written, or whose cp.async has not been waited for."""


class RaceFault(PtxFault):
    """A result that depends on which of two warps or CTAs comes first."""


class DivergenceFault(PtxFault):
    """A barrier or a warp-wide instruction that not all of its lanes reach."""


class EndlessLoop(PtxFault):
    """More basic blocks than a kernel on small tensors has reason to run."""
