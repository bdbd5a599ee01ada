"""``python -m benchmarks.suites.compiled``: the encoders under ``torch.compile(fullgraph=True)``, beside eager.

They are compiled for lengths of any size, on a first document of another length.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import table
from benchmarks.harness.cases import FORWARD, SMOKE, Case, Group
from benchmarks.harness.shapes import Shape
from benchmarks.suites import encoder, yardsticks
from benchmarks.suites.encoder import DROP_IN, OWN, Encode, make_arguments, shortest

COMPILED = ", compiled"


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else Shape()
    cases = [Case("linears", "torch.nn", FORWARD, yardsticks.encoder_linears)]
    for provider, build in {OWN: _build_own, DROP_IN: _build_drop_in}.items():
        for suffix, wrap in {"": _as_it_is, COMPILED: _compiled}.items():
            prepare = functools.partial(encoder.prepare, functools.partial(wrap, build))
            cases.append(Case("encoder", provider + suffix, FORWARD, prepare))
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


if __name__ == "__main__":
    from benchmarks.harness import runner

    sys.exit(runner.main(groups=groups, out=table.COMPILED, prog="python -m benchmarks.suites.compiled"))
