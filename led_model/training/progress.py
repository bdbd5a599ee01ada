"""Tells people how far a run is: a bar on a terminal, and a line for each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """Draws a bar over the updates with the newest loss.

    Args:
        log: prints a line.
        disable: as tqdm's.
    """

    def __init__(self, log: Callable[[str], None], disable: bool | None) -> None:
        self.log = log
        self.disable = disable
        self.bar: tqdm | None = None

    def evaluating(self, batches: int) -> tqdm:
        """Returns a bar over the batches of an evaluation, to be closed after it."""
        return tqdm(total=batches, desc="validation", unit="batch", leave=False, disable=self.disable)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="update", leave=False,
            disable=self.disable,
        )  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" in entry and self.bar is not None:
            self.bar.set_postfix(loss=f"{entry['loss']:.3f}")
        if "eval_loss" in entry:
            self.log(f"update {state.global_step:,} of {state.max_steps:,}: {describe(entry)}.")


def describe(entry: Mapping[str, Any]) -> str:
    """Returns what an evaluation has found, in words."""
    text = f"validation loss {entry['eval_loss']:.4f}"
    if "eval_rougeLsum" in entry:
        scores = "/".join(f"{entry[f'eval_{name}']:.1f}" for name in ("rouge1", "rouge2", "rougeLsum"))
        text += f", ROUGE-1/2/L {scores}"
    return text
