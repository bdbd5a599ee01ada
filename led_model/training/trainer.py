"""Trains by transformers' Trainer, with checkpoints that led_model reads and an evaluation that encodes texts once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from led_model.data.batching import LengthBatchSampler, TokenBatchSampler
from led_model.data.collator import LEDDataCollator
from led_model.modeling.model import LEDForConditionalGeneration
from led_model.tokenization.tokenizer import LEDTokenizer
from led_model.training.progress import Progress
from led_model.training.run_directory import RunDirectory
from led_model.training.scores import rouge

_DROPPED = ("_runtime", "_per_second")  # ends of names in Trainer's log that differ from run to run


def smoothed_loss(smoothing: float, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Returns the loss of labels of whose probability ``smoothing`` is spread over the vocabulary.

    Trainer's own smoothing does not divide by ``num_items_in_batch`` in all releases.
    """
    total = F.cross_entropy(
        outputs.logits.flatten(0, -2).float(), labels.flatten(), label_smoothing=smoothing, reduction="sum"
    )
    return total / num_items_in_batch


class FinetuneTrainer(Trainer):
    """Trains and evaluates an LED, and writes checkpoints whole into a :class:`RunDirectory`.

    Args:
        directory: of the run.
        batches, evaluation_batches: what the batches of an epoch and of an evaluation are.
        evaluation_collator: pads what is evaluated, where ``data_collator`` may pack.
        writing: settings of ``generate`` in evaluations; ``None``: nothing is written and there is no ROUGE.
        progress: is told how far an evaluation is.
        kwargs: Trainer's own; ``processing_class`` is an LEDTokenizer, which is written beside the weights.
    """

    def __init__(
        self,
        model: LEDForConditionalGeneration,
        args: TrainingArguments,
        *,
        directory: RunDirectory,
        batches: LengthBatchSampler | TokenBatchSampler,
        evaluation_batches: LengthBatchSampler | None,
        evaluation_collator: LEDDataCollator,
        writing: dict[str, Any] | None,
        progress: Progress,
        **kwargs: Any,
    ) -> None:
        use_cache = model.config.use_cache
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True  # older releases are told otherwise, for their label smoothing
        self.led = model
        model.config.use_cache = use_cache  # Trainer turns it off, also for those who load the result
        self.directory = directory
        self.batches = batches
        self.evaluation_batches = evaluation_batches
        self.evaluation_collator = evaluation_collator
        self.writing = writing
        self.progress = progress
        self._folder = str(directory.path)  # in which Trainer makes the directories of checkpoints
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            cast(Dataset, self.train_dataset), batch_sampler=self.batches, collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return DataLoader(
            cast(Dataset, self.eval_dataset),
            batch_sampler=self.evaluation_batches,
            collate_fn=self.evaluation_collator,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns the loss, a mean over all targets' tokens, and ROUGE of what the model writes."""
        self.led.eval()
        loss, tokens, examples = 0.0, 0, 0
        targets: list[str] = []
        written: list[str] = []
        with self.progress.evaluating(len(dataloader)) as bar, torch.no_grad():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                labels = inputs["labels"]
                output = self.led(**inputs)
                count = int((labels != -100).sum())
                loss, tokens = loss + float(output.loss) * count, tokens + count
                examples += len(labels)
                if self.writing is not None:
                    targets += self._texts(labels)
                    written += self._texts(self._write(inputs, output.encoder_last_hidden_state))
                bar.update()
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        if self.writing is not None:
            scores = rouge(targets, written)
            metrics |= {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=examples)

    def _write(self, inputs: dict[str, Tensor], encoder_hidden_states: Tensor) -> Tensor:
        tokens = self.led.generate(
            inputs["input_ids"],
            inputs["attention_mask"],
            encoder_hidden_states=encoder_hidden_states.to(self.led.dtype),
            **self.writing or {},
        )
        assert isinstance(tokens, Tensor)  # which is what generate returns unless asked for scores
        return tokens

    def _texts(self, rows: Tensor) -> Sequence[str]:
        tokenizer = cast(LEDTokenizer, self.processing_class)
        rows = rows.masked_fill(rows == -100, tokenizer.pad_token_id)
        return [text.strip() for text in tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Notes what is the same in every run: no times, and no summary, which an interrupted run has twice."""
        if "train_runtime" in logs:
            return
        kept = {name: value for name, value in logs.items() if not name.endswith(_DROPPED)}
        for name, value in kept.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} after update {self.state.global_step}; look at the examples, or give "
                    "--overwrite with a lower --learning-rate or --dtype float32."
                )
        super().log(kept)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with self.directory.new_checkpoint(step) as folder:
            self._folder = str(folder)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._folder = str(self.directory.path)

    def _get_output_dir(self, trial: Any) -> str:
        return self._folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self._folder)
        self.led.save_pretrained(folder)
        cast(LEDTokenizer, self.processing_class).save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing, as the model was loaded from the checkpoint to begin with."""
