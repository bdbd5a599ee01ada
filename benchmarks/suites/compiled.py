"""This suite measures the encoders under ``torch.compile(fullgraph=True)``, beside eager.

They are compiled for lengths of any size, on a first document of another length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness.cases import Group
from benchmarks.harness.figures import Figure, Run, ratio, seqlen_of
from benchmarks.harness.shapes import SMOKE, Shape
from benchmarks.harness.suite import Suite
from benchmarks.suites import encoder
from benchmarks.suites.encoder import DROP_IN, OWN, Encode, make_arguments, shortest
from benchmarks.suites.yardsticks import linears_case

COMPILED = ", compiled"


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else Shape()
    cases = [linears_case()]
    for provider, build in {OWN: _build_own, DROP_IN: _build_drop_in}.items():
        for suffix, wrap in {"": _as_it_is, COMPILED: _compiled}.items():
            cases.append(encoder.encoder_case(provider + suffix, functools.partial(wrap, build)))
    return [Group(f"compiled_{shape.seqlen}", shape, tuple(cases))]


def _as_it_is(build: Callable[[Shape], Encode], shape: Shape) -> Encode:
    return torch.no_grad()(build(shape))


def _compiled(build: Callable[[Shape], Encode], shape: Shape) -> Encode:
    encode = torch.no_grad()(torch.compile(build(shape), fullgraph=True, dynamic=True))
    encode(*make_arguments(shortest(shape)))
    return encode


def _build_own(shape: Shape) -> Encode:
    model = encoder.own_model(encoder.stock_model(shape))
    return functools.partial(model.led.encode, max_globals=len(shape.global_index))


def _build_drop_in(shape: Shape) -> Encode:
    from led_kernels.hf import apply_led_kernels

    model = encoder.stock_model(shape)
    apply_led_kernels(model, max_globals=len(shape.global_index))
    stack = model.get_encoder()

    def encode(ids: Tensor, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        return stack(
            input_ids=ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask
        ).last_hidden_state

    return encode


def figures(run: Run) -> Iterator[Figure]:
    for group in run.groups("compiled"):
        seqlen, linears = seqlen_of(group), run.row(group, "linears", "torch.nn")
        for provider in (OWN, DROP_IN):
            row, eager = (run.row(group, "encoder", f"{provider}{suffix}") for suffix in (COMPILED, ""))
            yield Figure(f"encoder ({provider}), eager ÷ compiled", seqlen, 1.0, ratio(eager, row), unit=" ×")
            name = f"encoder ({provider}), compiled, time ÷ its linear layers alone"
            yield Figure(name, seqlen, 1.35, ratio(row, linears), is_limit=True)


SUITE = Suite("compiled", "the encoders under torch.compile, beside eager", groups, figures)
