"""Runs a training from its beginning or its newest checkpoint to its result."""

from __future__ import annotations

import functools
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from led_model.data.batching import LengthBatchSampler
from led_model.data.collator import LEDDataCollator
from led_model.modeling.model import LEDForConditionalGeneration
from led_model.tokenization.tokenizer import LEDTokenizer
from led_model.training.interruption import Interruption
from led_model.training.logbook import Logbook
from led_model.training.plan import Plan
from led_model.training.progress import Progress
from led_model.training.run_directory import RunDirectory
from led_model.training.schedule import Judge, Schedule
from led_model.training.store import Examples
from led_model.training.trainer import FinetuneTrainer, smoothed_loss


@dataclass
class Outcome:
    """Says how far a run has come: updates done, and the best evaluation; ``signal`` interrupted it, if any did."""

    step: int
    best: Mapping[str, Any] | None
    signal: int | None = None


@dataclass
class Run:
    """Trains a model by a plan, in a directory.

    Attributes:
        args: of ``led finetune``, with ``device`` and ``dtype`` chosen.
        global_tokens: as :class:`LEDDataCollator` takes them.
        log: prints a line for people.
        no_bars: as tqdm's ``disable``.
    """

    args: Namespace
    plan: Plan
    directory: RunDirectory
    tokenizer: LEDTokenizer
    train: Examples
    validation: Examples | None
    max_target_length: int
    global_tokens: Any
    log: Callable[[str], None]
    no_bars: bool | None

    def finish(self) -> Outcome:
        """Trains what is left to train, and makes the best model the result unless a signal comes."""
        judge = Judge("eval_loss" if self.args.best_by == "loss" else "eval_rougeLsum", self.args.patience)
        logbook = Logbook(self.directory, judge)
        state = self._latest_state()
        signal = None
        if state is None or not self._is_trained(state, judge):
            state, signal = self._train(judge, logbook)
        logbook.plot(state.log_history)
        best = judge.best(state.log_history)
        if not self._is_trained(state, judge):
            return Outcome(state.global_step, best, signal)
        self.directory.finish(state.global_step if best is None else best["step"])
        self.directory.keep_checkpoints([])
        return Outcome(state.global_step, best)

    def _latest_state(self) -> TrainerState | None:
        step = self.directory.latest_step
        if step is None:
            return None
        return TrainerState.load_from_json(str(self.directory.checkpoint(step) / "trainer_state.json"))

    def _is_trained(self, state: TrainerState, judge: Judge) -> bool:
        return state.global_step >= self.plan.steps or judge.gives_up(state.log_history)

    def _train(self, judge: Judge, logbook: Logbook) -> tuple[TrainerState, int | None]:
        """Returns the state after the last update of this run, and the signal that ended it."""
        step = self.directory.latest_step
        checkpoint = None if step is None else str(self.directory.checkpoint(step))
        if checkpoint is not None:
            self.log(f"going on after update {step:,} of {self.plan.steps:,}.")
        progress = Progress(self.log, self.no_bars)
        interruption = Interruption(
            lambda: self.log("finishing this update, then a checkpoint; once more to stop without one.")
        )
        schedule = Schedule(
            self.plan.batches, judge, self.plan.eval_every, self.args.save_every, interruption
        )
        trainer = self._trainer(checkpoint, [schedule, logbook, progress], progress)
        with interruption:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            finally:
                progress.close()
        return trainer.state, interruption.signal

    def _trainer(self, checkpoint: str | None, callbacks: list[Any], progress: Progress) -> FinetuneTrainer:
        args, plan = self.args, self.plan
        source = checkpoint or args.model
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* asks for ")
            model = LEDForConditionalGeneration.from_pretrained(
                source, dtype=torch.float32, revision=None if checkpoint else args.revision
            )
        if plan.checkpointing:
            model.gradient_checkpointing_enable()
        training = TrainingArguments(
            output_dir=str(self.directory.path),
            max_steps=plan.steps,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=plan.warmup_steps,
            weight_decay=args.weight_decay,
            seed=args.seed,
            bf16=args.dtype == "bfloat16",
            use_cpu=args.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
        # With more GPUs, Trainer would copy the model onto each at every step.
        training._n_gpu = min(training.n_gpu, 1)
        writing = {
            "max_new_tokens": self.max_target_length, "num_beams": args.num_beams, "num_return_sequences": 1,
            "do_sample": False,
        }  # fmt: skip
        is_smoothed = args.label_smoothing > 0
        return FinetuneTrainer(
            model,
            training,
            directory=self.directory,
            batches=plan.batches,
            evaluation_batches=None
            if self.validation is None
            else LengthBatchSampler(self.validation.lengths[:, 0], args.batch_size),
            evaluation_collator=LEDDataCollator(self.tokenizer, global_tokens=self.global_tokens),
            writing=writing if args.best_by == "rouge" else None,
            progress=progress,
            # Without labels in the batch the model computes no loss of its own besides.
            compute_loss_func=functools.partial(smoothed_loss, args.label_smoothing) if is_smoothed else None,
            train_dataset=self.train,
            eval_dataset=self.validation,
            data_collator=LEDDataCollator(
                self.tokenizer,
                global_tokens=self.global_tokens,
                packing=plan.packing,
                model=model if is_smoothed else None,
            ),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )
