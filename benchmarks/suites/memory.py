"""This suite counts what a training step keeps for its backward, by part of the model and kind, and predicts the rest.

The count is of tensors that are really kept, on the CPU. Beside each stands the sum of named tensors from which steps
of any length, on a GPU, are predicted (:mod:`benchmarks.suites.step_memory`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.harness import figures as harness_figures
from benchmarks.harness import table
from benchmarks.harness.figures import Figure
from benchmarks.harness.saved_tensors import saved_tensors
from benchmarks.suites.encoder import DROP_IN, OWN, STOCK
from benchmarks.suites.step_memory import kinds
from benchmarks.suites.step_memory.models import PROVIDERS, build, forward_of
from benchmarks.suites.step_memory.predict import kept, predict
from benchmarks.suites.step_memory.step import AUTOCAST, LED_BASE, LED_LARGE, Sizes, Step

DEFAULT = table.RESULTS / "memory.csv"
LENGTHS = tuple(1024 * 2**i for i in range(7))
MODELS = {"led-base": LED_BASE, "led-large": LED_LARGE}

COUNTED = Step(replace(LED_BASE, encoder_layers=2, decoder_layers=2), source=4096, target=1024)
SMOKE = Step(
    Sizes(d_model=32, heads=2, ffn_dim=80, encoder_layers=2, decoder_layers=2, vocab_size=90, window=16),
    source=64,
    target=24,
)


@dataclass(frozen=True)
class Row:
    """Holds the bytes that one part of a model keeps of one kind, counted, and the sum of the named tensors."""

    provider: str
    place: str
    kind: str
    counted: int
    summed: int
    source: int
    target: int
    unit: int
    torch: str = ""
    transformers: str = ""


def count(provider: str, step: Step) -> Counter[tuple[str, str]]:
    """Returns the bytes that are really kept, by place and kind."""
    found: Counter[tuple[str, str]] = Counter()
    model = build(provider, step)
    for saved in saved_tensors(model, forward_of(model, step)):
        found[kinds.place_of(saved), kinds.kind_of(saved, step)] += saved.nbytes
    return found


def summed(provider: str, step: Step) -> Counter[tuple[str, str]]:
    """Returns what :func:`count` has to give, as sums of named tensors."""
    found: Counter[tuple[str, str]] = Counter()
    for tensor in kept(provider, step):
        found[tensor.place, tensor.kind] += tensor.nbytes
    return found


def finetuning(model: str, source: int, checkpointing: bool = False) -> Step:
    """Returns the step that is predicted: 1,024 targets on a GPU, as Trainer with ``bf16=True`` has them."""
    sizes = MODELS[model]
    sizes = replace(sizes, max_source=max(sizes.max_source, source))
    return Step(sizes, source, 1024, precision=AUTOCAST, checkpointing=checkpointing, device="cuda")


def total_gb(model: str, provider: str, source: int, checkpointing: bool) -> float:
    """Returns what :func:`finetuning` is predicted to take in all."""
    return predict(provider, finetuning(model, source, checkpointing)).total / 1e9


def figures(rows: list[Row]) -> Iterator[Figure]:
    """Returns what was to be reached: first what was counted, then what is predicted."""
    for provider in (DROP_IN, OWN):
        own = [row for row in rows if row.provider == provider and row.kind != kinds.CASTS]
        unit, layer = own[0].unit, sum(row.counted for row in own if row.place == "encoder layer 1")
        name = f"kept by an encoder layer ({provider}), in tensors tokens × d_model"
        yield Figure(name, own[0].source, 11, layer / unit, is_limit=True)
    for provider in (DROP_IN, OWN):
        own = [row for row in rows if row.provider == provider and row.place.startswith("decoder layer")]
        mib = (sum(row.counted for row in own) - own[0].unit) / 2**20
        name = f"kept by 2 decoder layers beside the encoder's output ({provider})"
        yield Figure(name, own[0].source, 190, mib, True, " MiB")
    for checkpointing, reach in ((False, 15), (True, 11)):
        for provider in (DROP_IN, OWN):
            total = total_gb("led-large", provider, 16384, checkpointing)
            suffix = ", checkpointed" if checkpointing else ""
            yield Figure(f"led-large ({provider}{suffix}), predicted", 16384, reach, total, True, " GB")
    for provider in (DROP_IN, OWN):
        stock, ours = (
            predict(name, Step(LED_BASE, 16384, 1024, checkpointing=True)).activations
            for name in (STOCK, provider)
        )
        name = f"activations of led-base ({provider}, checkpointed, fp32) ÷ transformers', predicted"
        yield Figure(name, 16384, 0.25, ours / stock, is_limit=True)


def markdown(rows: list[Row]) -> str:
    """Returns the README's tables and what they show."""
    first = rows[0]
    return "\n\n".join(
        [
            table.markdown(("kept by an encoder layer", *PROVIDERS), _layer_cells(rows)),
            f"In tensors of tokens × d_model, as counted by saved-tensor hooks in a step of led-base's shape with "
            f"2 + 2 layers, {first.source:,} tokens and {first.target:,} targets in fp32; torch {first.torch}, "
            f"transformers {first.transformers}.",
            table.markdown(
                ("bf16, AdamW, 1,024 targets", *(f"{n // 1024}k tokens" for n in LENGTHS)),
                _prediction_cells(),
            ),
            "GB of weights, gradients, AdamW's states and activations of one document at the fullest moment of a step "
            "as Trainer's `bf16=True` has it: predicted as a sum of named tensors, which gives every byte that was "
            "counted on the CPU. No GPU has measured it.",
            harness_figures.markdown(figures(rows)),
            "Made by `python -m benchmarks memory`.",
        ]
    )


def _layer_cells(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    layer = {
        (row.provider, row.kind): row.counted / row.unit for row in rows if row.place == "encoder layer 1"
    }
    for kind in kinds.KINDS:
        values = [layer.get((provider, kind), 0) for provider in PROVIDERS]
        if any(values):
            yield kind, *(f"{value:.2f}" if value else "–" for value in values)
    yield "all", *(f"{sum(layer.get((name, kind), 0) for kind in kinds.KINDS):.2f}" for name in PROVIDERS)


def _prediction_cells() -> Iterator[tuple[str, ...]]:
    for model in MODELS:
        for provider in PROVIDERS:
            for checkpointing in (False, True):
                totals = (total_gb(model, provider, n, checkpointing) for n in LENGTHS)
                name = f"{model}, {provider}{', checkpointed' if checkpointing else ''}"
                yield name, *(f"{total:.1f}" for total in totals)


def run(out: Path, *, smoke: bool, threads: int) -> int:
    """Counts into a new CSV, prints the README's tables and returns the exit status of a command that does so.

    That is 1 where a count is not its sum, as for a release of transformers that keeps other tensors.
    """
    torch.set_num_threads(threads)
    step = SMOKE if smoke else COUNTED
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    rows = []
    for provider in PROVIDERS:
        found, expected = count(provider, step), summed(provider, step)
        rows += [
            Row(provider, *key, found[key], expected[key], step.source, step.target, step.unit, **versions)
            for key in sorted({*found, *expected})
        ]
    table.write(out, rows)
    print(markdown(table.read(out, Row)))
    if wrong := [row for row in rows if row.counted != row.summed]:
        first = wrong[0]
        print(
            f"{len(wrong)} sums are not what was counted, first {first.place}, {first.kind} of {first.provider}: "
            f"{first.summed:,} bytes for {first.counted:,}; the predictions do not hold here.",
            file=sys.stderr,
        )
        return 1
    return 0
