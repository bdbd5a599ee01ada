"""Checks what ``led finetune`` is asked for, before anything is trained."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from pathlib import Path

import torch

from led_kernels.extras import install_extra
from led_model.checkpoint.checkpoint import trained_head
from led_model.cli.commands import check_revision

_PACKAGES = ("transformers", "accelerate", "rouge_score", "matplotlib")


def check_arguments(args: Namespace) -> None:
    """Checks what can be checked before anything is read.

    Raises:
        ImportError: when a package is missing.
        ValueError: for flags that contradict each other, and for what this command does not do.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"led finetune needs {', '.join(missing)}; {install_extra('train')}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "led finetune runs in one process, and WORLD_SIZE asks for more; use transformers' Trainer with "
            "led_model, as the README shows."
        )
    check_revision(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda and torch sees no GPU; leave it out.")
    if args.global_tokens == "question" and args.question_field is None:
        raise ValueError("--global-tokens is question and there is none; give --question-field, too.")
    if args.batch_tokens is not None and args.packing == "off":
        raise ValueError("--batch-tokens packs, and --packing is off; leave one of the two out.")
    has_validation = args.validation or args.validation_split is not None
    for name in ("patience", "eval_every"):
        if getattr(args, name) is not None and not has_validation:
            raise ValueError(
                f"--{name.replace('_', '-')} needs examples to validate on; give --validation or --validation-split."
            )
    output, model = (Path(os.path.realpath(path)) for path in (args.output, args.model))
    if model.is_dir() and model.is_relative_to(output):
        raise ValueError(f"--output {args.output} holds the --model itself; give another directory.")
    head = trained_head(args.model, args.revision)
    if head is not None:
        raise ValueError(f"{args.model} is a checkpoint with {head}, which does not write; give another.")


def length_within(flag: str, given: int | None, positions: int, default: int | None = None) -> int:
    """Returns the greatest length to read or write: what a flag says, else ``default``.

    Raises:
        ValueError: when the model has fewer positions than the flag says.
    """
    if given is not None and given > positions:
        raise ValueError(
            f"{flag} is {given:,} and the model has {positions:,} positions; give at most these."
        )
    return given or min(default or positions, positions)


def check_enough(train: int, validation: int, has_validation: bool) -> None:
    """Checks that there are examples.

    Raises:
        ValueError: when there are none to train on, or none to validate on where there should be.
    """
    if train == 0:
        raise ValueError("there is no example to train on; see --train, --text-field and --target-field.")
    if has_validation and validation == 0:
        raise ValueError("there is no example to validate on; see --validation, or leave it out.")
