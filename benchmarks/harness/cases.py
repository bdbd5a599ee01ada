"""A suite is made of these: cases, and groups of cases that are timed together.

A provider is one implementation of one piece of work. All cases of a group run interleaved, with the group's
own ``torch.mm``, so that a ratio within a group compares like with like even when the machine's clock drifts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.harness.shapes import Shape

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
YARDSTICKS = ("mm", "copy")

Call = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """Holds one provider doing one piece of work.

    Attributes:
        prepare: does everything that is not to be timed and returns the call that is; the call's result is named
            tensors.
        truth: gives what the result must be, in fp64; None where the result is not looked at.
        flop, bytes: what the work needs at least, 0 where that is no figure.
        refusal: says why the provider cannot run here, or nothing.
    """

    what: str
    provider: str
    direction: str
    prepare: Callable[[Shape], Call]
    truth: Callable[[Shape], dict[str, Tensor]] | None = None
    flop: int = 0
    bytes: int = 0
    refusal: Callable[[], str | None] = field(default=lambda: None)

    @property
    def name(self) -> str:
        return f"{self.what}, {self.provider}, {self.direction}"

    @property
    def is_ours(self) -> bool:
        return "led_kernels" in self.provider or "led_model" in self.provider


@dataclass(frozen=True)
class MemoryCase:
    """Holds one provider whose peak memory is measured, in a process of its own.

    ``prepare`` builds it and returns two calls: the first has a short input and brings thread pools and the libraries'
    own workspaces into being, the second is measured. It is found by its name in the other process, so that it is a
    function of a module, or a ``functools.partial`` of such ones.
    """

    provider: str
    prepare: Callable[[Shape], tuple[Callable[[], object], Callable[[], object]]]

    @property
    def name(self) -> str:
        return f"memory, {self.provider}"


@dataclass(frozen=True)
class Group:
    """Holds cases of one shape, timed interleaved, and those whose peak memory is measured after them."""

    name: str
    shape: Shape
    cases: tuple[Case, ...]
    memory: tuple[MemoryCase, ...] = ()
