"""Keeps the log of a run, as lines and as a picture, beside its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from led_model.training.plot import plot_log
from led_model.training.run_directory import LOG, PLOT, RunDirectory
from led_model.training.schedule import Judge

_PLOT_SECONDS = 60  # between two drawings, which take a second


class Logbook(TrainerCallback):
    """Appends each entry of Trainer's log to ``training_log.jsonl``, and draws ``loss.png`` at checkpoints.

    A run that goes on begins with the entries up to its checkpoint, which holds them. Of the checkpoints the newest
    one is kept, and the best.
    """

    def __init__(self, directory: RunDirectory, judge: Judge) -> None:
        self.directory = directory
        self.judge = judge
        self._next_plot = time.monotonic() + _PLOT_SECONDS

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.directory.write_text(LOG, "".join(map(_line, state.log_history)))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self.directory.writing(), (self.directory.path / LOG).open("a", encoding="utf-8") as file:
            file.write(_line(state.log_history[-1]))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        best = self.judge.best(state.log_history)
        self.directory.keep_checkpoints({state.global_step, *([] if best is None else [best["step"]])})
        if time.monotonic() > self._next_plot:
            self.plot(state.log_history)
            self._next_plot = time.monotonic() + _PLOT_SECONDS

    def plot(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Draws ``loss.png``."""
        with self.directory.new_file(PLOT) as path:
            plot_log(log, path)


def _line(entry: Mapping[str, Any]) -> str:
    """Returns an entry as a line, whose order does not depend on whether it was read back from a checkpoint."""
    first = {name: entry[name] for name in ("step", "epoch")}
    return json.dumps(first | dict(sorted(entry.items()))) + "\n"
