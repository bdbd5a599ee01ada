"""This suite measures one attention layer, from projected q, k, v, beside its peers and the machine's own rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.harness.cases import FORWARD, FORWARD_BACKWARD, Call, Case, Group
from benchmarks.harness.figures import Figure, Run, efficiency, ratio, seqlen_of
from benchmarks.harness.shapes import SMOKE, Shape, attention_bytes, attention_flop
from benchmarks.harness.suite import Suite
from benchmarks.suites import attention_providers
from benchmarks.suites.attention_providers import BANDED, CORE, CPU, FLEX, STOCK, Provider
from benchmarks.suites.attention_truth import LEAVES, make_inputs, truth_of
from benchmarks.suites.yardsticks import yardstick_cases

# The backward's five products against the forward's two: S again, dP, dV, dK, dQ.
BACKWARD_FLOP = 2.5


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else Shape()
    providers = {"banded": BANDED, "core": CORE}
    return [
        Group(f"attention_{s.seqlen}", s, yardstick_cases(s, smoke) + attention_cases(s, providers))
        for s in (shape, replace(shape, seqlen=4 * shape.seqlen))
    ]


def attention_cases(shape: Shape, providers: dict[str, dict[str, Provider]]) -> tuple[Case, ...]:
    """Returns each direction of each provider of ``banded`` and ``core``."""
    flop, tensor = attention_flop(shape), attention_bytes(shape)
    # forward: q, k, v in, out back; with the backward also q, k, v, out, d_out in, dq, dk, dv back
    work = {
        FORWARD: (flop, 4 * tensor),
        FORWARD_BACKWARD: (int((1 + BACKWARD_FLOP) * flop), 12 * tensor),
    }
    cases = []
    for what, named in providers.items():
        truth = functools.partial(truth_of, what)
        for name, provider in named.items():
            for direction in (FORWARD, FORWARD_BACKWARD):
                if direction == FORWARD or provider.has_backward:
                    prepare = _prepare(what, provider, direction)
                    cases.append(
                        Case(
                            what, name, direction, prepare, truth, *work[direction], refusal=provider.refusal
                        )
                    )
    return tuple(cases)


def _prepare(what: str, provider: Provider, direction: str) -> Callable[[Shape], Call]:
    run = attention_providers.forward if direction == FORWARD else attention_providers.forward_backward
    return lambda shape: run(provider, make_inputs(shape), LEAVES[what])


def figures(run: Run) -> Iterator[Figure]:
    layers = run.groups("attention")
    for group in layers:
        seqlen, mm = seqlen_of(group), run.rate(group)
        banded, both = (run.row(group, "banded", CPU, d) for d in (FORWARD, FORWARD_BACKWARD))
        yield Figure("forward, FLOP/s ÷ `torch.mm`'s", seqlen, 0.75, efficiency(banded, mm))
        yield Figure("forward + backward, FLOP/s ÷ `torch.mm`'s", seqlen, 0.60, efficiency(both, mm))
        flex = ratio(run.row(group, "banded", FLEX), banded)
        yield Figure("forward vs `torch.compile(flex_attention)`", seqlen, 1.8, flex, unit=" ×")
        for direction, name, reach in (
            (FORWARD, "forward", 25),
            (FORWARD_BACKWARD, "forward + backward", 15),
        ):
            stock, ours = (run.row(group, "core", provider, direction) for provider in (STOCK, CPU))
            yield Figure(
                f"{name} vs transformers' attention core", seqlen, reach, ratio(stock, ours), unit=" ×"
            )
    if len(layers) == 2:
        shorter, longer = sorted(layers, key=seqlen_of)
        growth = ratio(run.row(longer, "banded", CPU), run.row(shorter, "banded", CPU))
        name = f"forward, time ÷ time at {seqlen_of(shorter)} tokens"
        yield Figure(name, seqlen_of(longer), 4.2, growth, is_limit=True)


def floors(run: Run) -> list[str]:
    """Returns for every row what its operations need at mm's rate, its bytes at copy's, and its time."""
    lines = []
    for row in run.rows:
        mm, copy = run.rate(row.group), run.row(row.group, "copy", "torch.copy")
        if row.what in LEAVES and mm and copy:
            compute, traffic = row.flop * mm.median_ms / mm.flop, row.bytes * copy.median_ms / copy.bytes
            name = f"{row.seqlen} tokens, {row.what}, {row.direction}, {row.provider}"
            lines.append(
                f"{name:62}{compute:10.2f}{traffic:10.2f}{row.median_ms:10.2f}  ({row.repeats} repeats)"
            )
    header = "operations ÷ torch.mm's rate, bytes ÷ torch.copy's rate, time (ms, medians)"
    return [header, *lines] if lines else []


SUITE = Suite(
    "attention", "one attention layer, forward and backward, beside its peers", groups, figures, floors
)
