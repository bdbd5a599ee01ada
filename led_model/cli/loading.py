"""Loads the model that a command needs, and tells what its results depend on."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from typing import Any

import torch

from led_model.batch.tasks import Classifier, SpanFinder, Task
from led_model.batch.writers import SAMPLING_FLAGS, Answerer, Summarizer
from led_model.checkpoint.checkpoint import trained_head
from led_model.checkpoint.fingerprint import fingerprint
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


def made_by(args: Namespace) -> dict[str, Any]:
    """Returns what a result depends on beside its document: the checkpoint, and the flags that change it.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
    """
    flags = {
        name: getattr(args, name, None) for name in ("long", "global_tokens", "dtype", *GENERATION_FLAGS)
    }
    flags |= {name: True for name in ("load_in_4bit", "load_in_8bit") if getattr(args, name)}
    # What is drawn for a document depends on the others of its batch.
    if getattr(args, "seed", None) is not None:
        flags |= batch_limits(args)
    given = {f"--{name.replace('_', '-')}": value for name, value in flags.items() if value is not None}
    weights = fingerprint(args.model, args.revision)
    return {"command": args.command, "model": args.model, "model's fingerprint": weights, **given}


def batch_limits(args: Namespace) -> dict[str, Any]:
    """Returns how large batches may be: with a seed a document is by itself, unless more are asked for."""
    is_seeded = getattr(args, "seed", None) is not None
    batch_size = 1 if args.batch_size is None and is_seeded else args.batch_size
    return {"batch_size": batch_size, "batch_tokens": args.batch_tokens}


def load_task(args: Namespace) -> Task:
    """Returns the task of ``args.command``, with its model and tokenizer."""
    tokenizer = LEDTokenizer.from_pretrained(args.model, revision=args.revision)
    if sys.stderr.isatty():  # somebody sits there and waits
        log(f"loading {args.model} …")
    where = {
        "dtype": DTYPES.get(args.dtype),
        "device": args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "revision": args.revision,
        "load_in_4bit": args.load_in_4bit,
        "load_in_8bit": args.load_in_8bit,
    }
    condense = args.long == "condense"
    reading: dict[str, Any] = {"long": "chunk" if condense else args.long}
    if args.command == "answer":
        reading["question"] = args.question
        if finds_answers(args):
            longest = args.max_new_tokens or DEFAULT_NEW_TOKENS["answer"]
            model = LEDForQuestionAnswering.from_pretrained(args.model, **where)
            return SpanFinder(model, tokenizer, longest, **reading)
    else:
        reading["global_tokens"] = args.global_tokens
    head = trained_head(args.model, args.revision)
    if args.command == "classify":
        if head != "classification_head":
            raise ValueError(
                f"{args.model} has no classification head; give a checkpoint that was trained to classify."
            )
        return Classifier(
            LEDForSequenceClassification.from_pretrained(args.model, **where), tokenizer, **reading
        )
    if head is not None:
        raise ValueError(
            f"{args.model} is a checkpoint with {head}, whose head for writing was never trained; "
            "use the command for what it does, or give another."
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* asks for ")  # the task logs it
        model = LEDForConditionalGeneration.from_pretrained(args.model, **where)
    settings = {name: getattr(args, name) for name in GENERATION_FLAGS if getattr(args, name) is not None}
    generation = model.generation_config
    if "max_new_tokens" not in settings and generation.max_new_tokens is generation.max_length is None:
        default = DEFAULT_NEW_TOKENS[args.command]
        settings["max_new_tokens"] = min(default, model.config.max_decoder_position_embeddings)
    if args.command == "answer":
        return Answerer(model, tokenizer, settings, **reading)
    return Summarizer(model, tokenizer, settings, condense=condense, **reading)


def finds_answers(args: Namespace) -> bool:
    """Returns whether the checkpoint is one of question answering, which writes nothing.

    Raises:
        ValueError: when it is, and a flag of writing is given.
    """
    if trained_head(args.model, args.revision) != "qa_outputs":
        return False
    for name in GENERATION_FLAGS:
        if name != "max_new_tokens" and getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is for models that write, and this one finds the answer in the text; "
                "leave it out."
            )
    return True
