"""Loads the model that a task needs, of a description that can be sent to another process."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from led_model.batch.tasks import Classifier, SpanFinder, Task
from led_model.batch.writers import SAMPLING_FLAGS, Answerer, Summarizer
from led_model.checkpoint.checkpoint import trained_head
from led_model.modeling.heads import LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.modeling.model import LEDForConditionalGeneration
from led_model.terminal import log
from led_model.tokenization.tokenizer import LEDTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_NEW_TOKENS = {"summarize": 256, "answer": 64}
GENERATION_FLAGS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "do_sample",
    *SAMPLING_FLAGS,
)


@dataclass(frozen=True)
class TaskSpec:
    """Says which task is run with which model; it can be pickled and hashed, and holds no model.

    ``command`` is "summarize", "answer" or "classify", and the other fields are flags of these commands by name, of
    which ``generation`` holds those of ``GENERATION_FLAGS`` that are given.
    """

    command: str
    model: str
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    long: str = "error"
    global_tokens: int = 1
    question: str | None = None
    generation: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Task:
        """Returns the task, with its model and tokenizer.

        Raises:
            ValueError: when the checkpoint is for something else, or damaged, or a setting is out of range.
            OSError: when files are missing.
        """
        tokenizer = LEDTokenizer.from_pretrained(self.model, revision=self.revision)
        if sys.stderr.isatty():  # somebody sits there and waits
            log(f"loading {self.model} …")
        where = {
            "dtype": DTYPES[self.dtype] if self.dtype else None,
            "device": self.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            "revision": self.revision,
            "load_in_4bit": self.load_in_4bit,
            "load_in_8bit": self.load_in_8bit,
        }
        settings = dict(self.generation)
        condense = self.long == "condense"
        reading: dict[str, Any] = {"long": "chunk" if condense else self.long}
        if self.command == "answer":
            reading["question"] = self.question
            if self.finds_answers():
                longest = settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS["answer"]
                model = LEDForQuestionAnswering.from_pretrained(self.model, **where)
                return SpanFinder(model, tokenizer, longest, **reading)
        else:
            reading["global_tokens"] = self.global_tokens
        head = trained_head(self.model, self.revision)
        if self.command == "classify":
            if head != "classification_head":
                raise ValueError(
                    f"{self.model} has no classification head; give a checkpoint that was trained to classify."
                )
            return Classifier(
                LEDForSequenceClassification.from_pretrained(self.model, **where), tokenizer, **reading
            )
        if head is not None:
            raise ValueError(
                f"{self.model} is a checkpoint with {head}, whose head for writing was never trained; "
                "use the command for what it does, or give another."
            )

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* asks for ")  # the task logs it
            model = LEDForConditionalGeneration.from_pretrained(self.model, **where)
        generation = model.generation_config
        if "max_new_tokens" not in settings and generation.max_new_tokens is generation.max_length is None:
            default = DEFAULT_NEW_TOKENS[self.command]
            settings["max_new_tokens"] = min(default, model.config.max_decoder_position_embeddings)
        if self.command == "answer":
            return Answerer(model, tokenizer, settings, **reading)
        return Summarizer(model, tokenizer, settings, condense=condense, **reading)

    def finds_answers(self) -> bool:
        """Returns whether the checkpoint is one of question answering, which writes nothing.

        Raises:
            ValueError: when it is, and a flag of writing is given.
        """
        if trained_head(self.model, self.revision) != "qa_outputs":
            return False
        for name, _ in self.generation:
            if name != "max_new_tokens":
                raise ValueError(
                    f"--{name.replace('_', '-')} is for models that write, and this one finds the answer in the text; "
                    "leave it out."
                )
        return True


def batch_limits(
    batch_tokens: int | None, batch_size: int | None, generation: dict[str, Any]
) -> dict[str, Any]:
    """Returns how large batches may be: with a seed a document is by itself, unless more are asked for."""
    if batch_size is None and generation.get("seed") is not None:
        batch_size = 1
    return {"batch_size": batch_size, "batch_tokens": batch_tokens}
