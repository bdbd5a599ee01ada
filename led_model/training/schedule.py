"""Says when a run is logged, evaluated, saved and stopped: by its log, the time, and signals."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from led_model.data.batching import LengthBatchSampler, TokenBatchSampler
from led_model.training.interruption import Interruption

_SAVE_SECONDS = 900  # after so long an update is followed by a checkpoint, whatever its number
_MAX_LOGGED = 2000  # updates that are logged one by one; of longer runs the means over several are


@dataclass
class Judge:
    """Says which evaluation was the best one by ``metric``, and whether no better one is to be expected.

    ``patience`` is the number of evaluations after the best one that end a run; with ``None`` none does.
    """

    metric: str
    patience: int | None = None

    def best(self, log: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Returns the best evaluation, of equals that with the lower loss, then the first; ``None`` before any."""

        def rank(entry: Mapping[str, Any]) -> tuple[float, float]:
            return (
                -entry["eval_loss"] if self.metric == "eval_loss" else entry[self.metric],
                -entry["eval_loss"],
            )

        return max(self._evaluations(log), key=rank, default=None)

    def gives_up(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether the last ``patience`` evaluations were no better than the best before them."""
        best = self.best(log)
        if self.patience is None or best is None:
            return False
        return sum(entry["step"] > best["step"] for entry in self._evaluations(log)) >= self.patience

    def _evaluations(self, log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [entry for entry in log if self.metric in entry]


@dataclass
class Schedule(TrainerCallback):
    """Evaluates every ``eval_every`` updates (``None``: never) and at the end, and saves then and every so often.

    Before each checkpoint the loss is logged, so that nothing of it is lost with the process.
    """

    batches: LengthBatchSampler | TokenBatchSampler
    judge: Judge
    eval_every: int | None
    save_every: int
    interruption: Interruption
    saved_at: float = field(default_factory=time.monotonic)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.batches.set_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        if self.eval_every is not None:
            control.should_evaluate = is_last or step % self.eval_every == 0
        control.should_save = (
            is_last
            or control.should_evaluate
            or step % self.save_every == 0
            or time.monotonic() - self.saved_at > _SAVE_SECONDS
            or self.interruption.is_asked
        )
        control.should_log = control.should_save or step % (1 + state.max_steps // _MAX_LOGGED) == 0

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.judge.gives_up(state.log_history):
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.saved_at = time.monotonic()
        if self.interruption.is_asked:
            control.should_training_stop = True
