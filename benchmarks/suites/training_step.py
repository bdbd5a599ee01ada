"""This suite measures a training step of LED: its time, and its peak memory with and without checkpointing.

A step is forward, loss and backward of led-base's shape with 2 + 2 layers, with dropout as released checkpoints have
it; memory is the peak above weights and gradients. What a step keeps is counted by ``python -m benchmarks memory``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import FORWARD_BACKWARD, Call, Case, Group, MemoryCase
from benchmarks.harness.figures import Figure, Run, ratio, seqlen_of
from benchmarks.harness.shapes import SMOKE, Shape
from benchmarks.harness.suite import Suite
from benchmarks.harness.table import Row
from benchmarks.suites.encoder import DROP_IN, OWN, STOCK
from benchmarks.suites.step_memory.models import PROVIDERS, build, forward_of
from benchmarks.suites.step_memory.predict import predict
from benchmarks.suites.step_memory.step import Sizes, Step
from led_model.data.collator import LEDDataCollator

CHECKPOINTED, PACKED = ", checkpointed", ", packed"
TARGET = 256
SHAPE = Shape(layers=2)
# The documents of a batch whose padding is to be saved, in sixteenths of the longest: 1.9 rows for each token.
DOCUMENTS = (16, 8, 6, 4)


def step_of(shape: Shape, checkpointing: bool = False) -> Step:
    """Returns the step of a shape: as many layers in the decoder as in the encoder."""
    is_smoke = shape.d_model == SMOKE.d_model
    sizes = Sizes(
        d_model=shape.d_model,
        heads=shape.heads,
        ffn_dim=shape.ffn_dim,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        vocab_size=500 if is_smoke else Sizes.vocab_size,
        window=shape.window,
    )
    target = shape.seqlen // 16 if is_smoke else TARGET
    return Step(sizes, shape.seqlen, target, checkpointing=checkpointing)


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else SHAPE
    cases = tuple(
        Case("step", provider, FORWARD_BACKWARD, functools.partial(_prepare, provider))
        for provider in PROVIDERS
    )
    measured = (OWN, STOCK) if smoke else PROVIDERS
    timed = Group(f"step_{shape.seqlen}", shape, cases, _memory_cases(measured))
    of_documents = replace(shape, seqlen=shape.seqlen // 2)
    packing = tuple(
        Case(
            "documents",
            f"{OWN}{suffix}",
            FORWARD_BACKWARD,
            functools.partial(_prepare_documents, bool(suffix)),
        )
        for suffix in ("", PACKED)
    )
    packed = Group(f"documents_{of_documents.seqlen}", of_documents, packing)
    return [timed, packed]


def _memory_cases(providers: Iterable[str]) -> tuple[MemoryCase, ...]:
    return tuple(
        MemoryCase(f"{provider}{suffix}", functools.partial(_prepare_memory, provider, bool(suffix)))
        for provider in providers
        for suffix in ("", CHECKPOINTED)
    )


def _prepare(provider: str, shape: Shape) -> Call:
    step = step_of(shape)
    model = build(provider, step)
    return functools.partial(_run, model, forward_of(model, step))


def _run(model: nn.Module, forward: Callable) -> dict[str, Tensor]:
    loss = forward().loss
    loss.backward()
    return {"loss": loss.detach()}


def _prepare_documents(packing: bool, shape: Shape) -> Call:
    step = step_of(shape)
    model = build(OWN, step)
    generator = torch.Generator().manual_seed(0)
    features = [
        {
            "input_ids": torch.randint(
                4, step.sizes.vocab_size, (share * shape.seqlen // 16,), generator=generator
            ),
            "labels": torch.randint(
                4, step.sizes.vocab_size, (share * step.target // 32,), generator=generator
            ),
        }
        for share in DOCUMENTS
    ]
    # The collator asks a tokenizer for these only.
    tokenizer = SimpleNamespace(pad_token_id=1, eos_token_id=2, sep_token_id=2)
    batch = LEDDataCollator(tokenizer, packing=packing)(features)
    return functools.partial(_run, model, functools.partial(model, **batch))


def _prepare_memory(
    provider: str, checkpointing: bool, shape: Shape
) -> tuple[Callable[[], object], Callable[[], object]]:
    step = step_of(shape, checkpointing)
    model = build(provider, step)
    short = forward_of(model, Step(step.sizes, 2 * shape.window, 8))

    def warm_up() -> None:  # the gradients come into being, too
        _run(model, short)

    return warm_up, functools.partial(_run, model, forward_of(model, step))


def figures(run: Run) -> Iterator[Figure]:
    """Returns ratios to transformers' steps, and to what :mod:`benchmarks.suites.step_memory` predicts."""
    for group in run.groups("documents"):
        rows = (run.row(group, "documents", f"{OWN}{suffix}", FORWARD_BACKWARD) for suffix in ("", PACKED))
        name = f"training step ({OWN}{PACKED}) vs padded, 4 documents, 1.9 rows a token"
        yield Figure(name, seqlen_of(group), 1.5, ratio(*rows), unit=" ×")
    for group in run.groups("step"):
        seqlen = seqlen_of(group)
        stock = run.row(group, "step", STOCK, FORWARD_BACKWARD)
        for provider in (OWN, DROP_IN):
            row = run.row(group, "step", provider, FORWARD_BACKWARD)
            name = f"training step ({provider}) vs transformers"
            yield Figure(name, seqlen, 4.0, ratio(stock, row), unit=" ×")
        for provider in PROVIDERS:
            for suffix in ("", CHECKPOINTED):
                row = run.row(group, "memory", f"{provider}{suffix}")
                name = f"training step ({provider}{suffix}), peak memory ÷ predicted"
                yield Figure(name, seqlen, 1.1, _of_predicted(row, provider, bool(suffix)), is_limit=True)


def _of_predicted(row: Row | None, provider: str, checkpointing: bool) -> float | None:
    """Returns the measured peak as a fraction of the predicted one."""
    if row is None:
        return None
    shape = SMOKE if row.heads == SMOKE.heads else replace(SHAPE, seqlen=row.seqlen)
    return row.peak_mib * 2**20 / predict(provider, step_of(shape, checkpointing)).activations


SUITE = Suite(
    "step", "a training step of led-base's shape, 2 + 2 layers, and its peak memory", groups, figures
)
