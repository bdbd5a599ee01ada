"""Takes the flags of a command to what they say of its model, and tells what its results depend on."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

from led_model.batch import loading
from led_model.batch.loading import GENERATION_FLAGS, TaskSpec
from led_model.batch.tasks import Task
from led_model.checkpoint.fingerprint import fingerprint


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
    """Returns how large batches may be."""
    return loading.batch_limits(args.batch_tokens, args.batch_size, dict(_generation(args)))


def task_spec(args: Namespace) -> TaskSpec:
    """Returns which task ``args.command`` runs with which model."""
    fields = {field.name for field in dataclasses.fields(TaskSpec)} - {"generation"}
    flags = {name: value for name, value in vars(args).items() if name in fields}
    return TaskSpec(**flags, generation=_generation(args))


def load_task(args: Namespace) -> Task:
    """Returns the task of ``args.command``, with its model and tokenizer."""
    return task_spec(args).load()


def _generation(args: Namespace) -> tuple[tuple[str, Any], ...]:
    given = ((name, getattr(args, name, None)) for name in GENERATION_FLAGS)
    return tuple((name, value) for name, value in given if value is not None)
