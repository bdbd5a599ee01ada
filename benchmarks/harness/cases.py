"""What is measured: the shapes, and for each group of cases that are timed together its list of providers.

A provider is one implementation of one piece of work. All cases of a group run interleaved, with the group's
own ``torch.mm``, so that a ratio within a group compares like with like even when the machine's clock drifts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from benchmarks.harness.shapes import Shape, attention_bytes, attention_flop
from benchmarks.suites import attention, encoder, yardsticks
from led_kernels.dispatch import missing_kernels

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
# The backward's five products against the forward's two: S again, dP, dV, dK, dQ.
BACKWARD_FLOP = 2.5

YARDSTICKS = ("mm", "copy")

SMOKE = Shape(seqlen=256, heads=2, head_dim=16, window=32, layers=2, ffn_dim=64)

Call = Callable[[], dict[str, Tensor]]


def unnamed_fallback(device_type: str) -> str | None:
    """Why what is timed as led_kernels would be torch's operations; None where kernels run or a backend was named."""
    return None if os.environ.get("LED_KERNELS_BACKEND") else missing_kernels(device_type)


@dataclass(frozen=True)
class Case:
    """One provider doing one piece of work.

    ``prepare`` does everything that is not to be timed and returns the call that is; the call's result is
    named tensors, which :mod:`benchmarks.harness.verify` checks against the truth for ``what``. ``refusal`` says why
    the provider cannot run here, or nothing. ``flop`` and ``bytes`` are what the work needs at least, 0 where
    that is no figure.
    """

    what: str
    provider: str
    direction: str
    prepare: Callable[[Shape], Call]
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
class Group:
    """Cases of one shape, timed interleaved; ``memory`` names the encoders whose peak memory is measured."""

    name: str
    shape: Shape
    cases: tuple[Case, ...]
    memory: tuple[str, ...] = ()


def groups(smoke: bool = False) -> list[Group]:
    """All groups, at the sizes of the published figures or, for ``smoke``, at sizes of a second each."""
    shape = SMOKE if smoke else Shape()
    longer = replace(shape, seqlen=4 * shape.seqlen)
    # each is a fresh process that imports transformers, which is most of what a smoke run spends
    memory = (encoder.OWN, encoder.STOCK) if smoke else tuple(encoder.PROVIDERS)
    sizes = (128, 2**16) if smoke else (2048, 2**26)
    providers = {"banded": attention.BANDED, "core": attention.CORE}
    return [
        *(
            Group(f"attention_{s.seqlen}", s, yardstick_cases(s, *sizes) + attention_cases(s, providers))
            for s in (shape, longer)
        ),
        Group(f"encoder_{shape.seqlen}", shape, yardstick_cases(shape, *sizes) + _encoders(), memory),
    ]


def yardstick_cases(shape: Shape, size: int, elements: int) -> tuple[Case, ...]:
    """Product of square matrices and copy, in the shape's dtype and on its device."""
    new = {"dtype": shape.torch_dtype, "device": shape.device}
    itemsize = shape.torch_dtype.itemsize
    return (
        Case(
            "mm", "torch.mm", FORWARD, lambda _: yardsticks.matrix_product(size, **new), flop=2 * size**3,
            bytes=3 * itemsize * size**2,
        ),
        Case(
            "copy", "torch.copy", FORWARD, lambda _: yardsticks.copy(elements, **new),
            bytes=2 * itemsize * elements,
        ),
    )  # fmt: skip


def attention_cases(shape: Shape, providers: dict[str, dict[str, attention.Provider]]) -> tuple[Case, ...]:
    """Each direction of each provider of ``banded`` and ``core``."""
    flop, tensor = attention_flop(shape), attention_bytes(shape)
    # forward: q, k, v in, out back; with the backward also q, k, v, out, d_out in, dq, dk, dv back
    work = {
        FORWARD: (flop, 4 * tensor),
        FORWARD_BACKWARD: (int((1 + BACKWARD_FLOP) * flop), 12 * tensor),
    }
    cases = []
    for what, named in providers.items():
        for name, provider in named.items():
            for direction in (FORWARD, FORWARD_BACKWARD):
                if direction == FORWARD or provider.has_backward:
                    prepare = _prepare(what, provider, direction)
                    cases.append(
                        Case(what, name, direction, prepare, *work[direction], refusal=provider.refusal)
                    )
    return tuple(cases)


def _prepare(what: str, provider: attention.Provider, direction: str) -> Callable[[Shape], Call]:
    run = attention.forward if direction == FORWARD else attention.forward_backward
    return lambda shape: run(provider, attention.make_inputs(shape), attention.LEAVES[what])


def _encoders() -> tuple[Case, ...]:
    cases = [Case("linears", "torch.nn", FORWARD, yardsticks.encoder_linears)]
    for name, build in encoder.PROVIDERS.items():
        cases.append(Case("encoder", name, FORWARD, functools.partial(encoder.prepare, build)))
    return tuple(cases)
