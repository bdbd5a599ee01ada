"""What a training step keeps is counted as it is, and the predictions are sums that give the counted bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import __main__ as benchmarks
from benchmarks.harness import table
from benchmarks.harness.cases import FORWARD_BACKWARD
from benchmarks.harness.figures import Run
from benchmarks.harness.saved_tensors import Saved, saved_tensors
from benchmarks.suites import memory, training_step
from benchmarks.suites.encoder import DROP_IN, OWN, STOCK
from benchmarks.suites.step_memory import kinds
from benchmarks.suites.step_memory.models import PROVIDERS, build
from benchmarks.suites.step_memory.predict import predict
from benchmarks.suites.step_memory.step import AUTOCAST, BF16, FP32, LED_BASE, LED_LARGE, Sizes, Step

SIZES = Sizes(
    d_model=64, heads=4, ffn_dim=176, encoder_layers=2, decoder_layers=2, vocab_size=200, window=16, max_source=200,
    max_target=64,
)  # fmt: skip
STEPS = {
    "fp32": Step(SIZES, source=160, target=48),
    "fp32, batch": Step(SIZES, source=96, target=24, batch=3, num_globals=2),
    "fp32, many globals": Step(SIZES, source=96, target=24, num_globals=17),
    "bf16": Step(SIZES, source=128, target=40, batch=2, precision=BF16),
    "autocast": Step(SIZES, source=160, target=48, precision=AUTOCAST, num_globals=3),
    "autocast, batch": Step(SIZES, source=96, target=40, batch=2, precision=AUTOCAST),
    "checkpointed": Step(SIZES, source=160, target=48, batch=2, checkpointing=True),
    "autocast, checkpointed": Step(SIZES, source=96, target=40, precision=AUTOCAST, checkpointing=True),
    "other shapes": Step(
        replace(SIZES, d_model=96, heads=3, ffn_dim=64, encoder_layers=1, decoder_layers=3, window=8),
        48,
        30,
        2,
    ),
}

# Kinds are told by shapes, which in the others are not all different.
KINDS_ARE_APART = ("fp32", "bf16", "autocast", "checkpointed")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", STEPS)
def test_sums_of_named_tensors_are_the_counted_bytes(provider: str, name: str) -> None:
    step = STEPS[name]
    expected, found = memory.summed(provider, step), memory.count(provider, step)
    assert _by_place(expected) == _by_place(found)
    if name in KINDS_ARE_APART:
        assert expected == found


def _by_place(nbytes: Counter[tuple[str, str]]) -> Counter[str]:
    places: Counter[str] = Counter()
    for (place, _), n in nbytes.items():
        places[place] += n
    return places


class Two(nn.Module):
    """Keeps the input of its linear layer, and what its own forward saves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x))


def test_each_block_is_counted_once_where_it_was_saved_first() -> None:
    model, x = Two(), torch.randn(3, 8)

    def forward() -> Tensor:
        y = model(x)
        return (y * y).sum() + F.relu(x).sum()  # y is sigmoid's result and kept already; x needs no gradient

    first, second = saved_tensors(model, forward)
    assert first == Saved((("linear", "forward"),), (3, 8), torch.float32, 96, False)
    assert (second.sites[0], len(second.sites), second.nbytes) == (("", "forward"), 3, 48)


def test_what_is_dropped_within_the_forward_is_not_counted() -> None:
    model = Two()

    def forward() -> Tensor:
        model(torch.randn(5, 8))
        return model(torch.randn(3, 8)).sum()

    assert [saved.shape[0] for saved in saved_tensors(model, forward)] == [3, 3]


def test_casts_of_weights_are_told_apart() -> None:
    model = Two()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.randn(3, 8, requires_grad=True))

    casts = [saved for saved in saved_tensors(model, forward) if saved.is_weight]
    assert [saved.nbytes for saved in casts] == [2 * 8 * 4]


def test_a_checkpoint_keeps_its_inputs() -> None:
    model = nn.Sequential(Two())

    def forward() -> Tensor:
        return checkpoint(model[0], torch.randn(3, 8, requires_grad=True), use_reentrant=False).sum()

    (saved,) = saved_tensors(model, forward)
    assert saved.sites[0][0] == "0"
    assert saved.nbytes == 96


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_parameters_are_those_of_the_models(precision: str) -> None:
    step = Step(SIZES, 32, 8, precision=precision)
    for provider in PROVIDERS:
        parameters = list(build(provider, step).parameters())
        assert sum(p.numel() for p in parameters) == SIZES.parameters
        assert sum(p.nbytes for p in parameters) == predict(provider, step).weights


def test_released_models_have_the_published_numbers_of_parameters() -> None:
    assert LED_BASE.parameters == pytest.approx(162e6, rel=0.01)
    assert LED_LARGE.parameters == pytest.approx(460e6, rel=0.01)


def test_stock_source_of_part_of_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="source is 33; give a multiple of 32"):
        predict(STOCK, Step(SIZES, 33, 8))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_predictions_grow_with_the_source_and_shrink_by_checkpointing(provider: str) -> None:
    for model in memory.MODELS:
        totals = [memory.total_gb(model, provider, n, False) for n in memory.LENGTHS]
        checkpointed = [memory.total_gb(model, provider, n, True) for n in memory.LENGTHS]
        assert totals == sorted(totals)
        assert all(a > b for a, b in zip(totals, checkpointed, strict=True))


def test_what_was_to_be_reached_is() -> None:
    """By sums, which are cheap at any size; those above carry them to what is counted."""
    step = memory.COUNTED
    rows = [
        memory.Row(provider, *key, nbytes, nbytes, step.source, step.target, step.unit)
        for provider in PROVIDERS
        for key, nbytes in memory.summed(provider, step).items()
    ]
    figures = list(memory.figures(rows))
    assert len(figures) == 10
    assert [figure.name for figure in figures if not figure.is_met] == []


@pytest.mark.parametrize("provider", [DROP_IN, OWN])
def test_an_encoder_layer_of_led_large_keeps_11_units_under_autocast(provider: str) -> None:
    step = Step(LED_LARGE, 4096, 256, precision=AUTOCAST, device="cuda")
    found = memory.summed(provider, step)
    layer = sum(n for (place, kind), n in found.items() if place == "encoder layer 1" and kind != kinds.CASTS)
    assert layer <= 11 * step.unit


def test_committed_counts_are_the_sums_that_predict() -> None:
    rows = table.read(memory.DEFAULT, memory.Row)
    assert [row for row in rows if row.counted != row.summed] == []
    assert {row.provider for row in rows} == set(PROVIDERS)


def test_a_count_that_is_no_sum_fails_the_suite(tmp_path, monkeypatch, capsys) -> None:
    count = memory.count
    monkeypatch.setattr(memory, "count", lambda *of: count(*of) + Counter({("loss", kinds.SMALL): 1}))
    assert memory.run(tmp_path / "memory.csv", smoke=True, threads=1) == 1
    assert "3 sums are not what was counted, first loss" in capsys.readouterr().err


def test_figures_of_a_training_step() -> None:
    def row(
        seqlen: int,
        what: str,
        provider: str,
        direction: str = "forward",
        group: str = "step",
        **values: float,
    ) -> table.Row:
        return table.Row(f"{group}_{seqlen}", what, provider, direction, seqlen, 12, 64, 512, 1, **values)

    expected = predict(OWN, training_step.step_of(training_step.SHAPE)).activations / 2**20
    rows = [
        row(4096, "step", OWN, FORWARD_BACKWARD, median_ms=20),
        row(4096, "step", STOCK, FORWARD_BACKWARD, median_ms=90),
        row(4096, "memory", OWN, peak_mib=1.2 * expected),
        row(2048, "documents", OWN, FORWARD_BACKWARD, "documents", median_ms=30),
        row(2048, "documents", f"{OWN}, packed", FORWARD_BACKWARD, "documents", median_ms=15),
    ]
    seen = {
        (figure.seqlen, figure.name): (round(figure.seen, 3), figure.is_met)
        for figure in training_step.figures(Run(rows))
        if figure.seen is not None
    }
    assert seen == {
        (4096, "training step (led_model) vs transformers"): (4.5, True),
        (4096, "training step (led_model), peak memory ÷ predicted"): (1.2, False),
        (2048, "training step (led_model, packed) vs padded, 4 documents, 1.9 rows a token"): (2.0, True),
    }


def test_smoke_run_counts_what_is_summed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.csv"
    assert benchmarks.main(["memory", "--smoke", "--threads", "1", "--out", str(out)]) == 0
    rows = table.read(out, memory.Row)
    assert {row.provider for row in rows} == set(PROVIDERS)
    assert all(row.counted == row.summed for row in rows)
    assert Counter(row.kind for row in rows)[kinds.FEED_FORWARD] == 3 * 4
    assert "| led-large, led_model, checkpointed |" in capsys.readouterr().out
