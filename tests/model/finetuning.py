"""Runs of ``led finetune`` in processes of their own, which may be killed, on small examples."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any

WORDS = ("encoder", "reads", "whole", "text", "decoder", "writes", "short", "one", "the", "and")


def write_examples(path: Path, count: int, seed: int = 0, **names: str) -> list[dict[str, str]]:
    """Writes examples whose target is how the text begins, and returns them."""
    draw = random.Random(seed)
    text, target = names.get("text", "text"), names.get("target", "summary")
    examples = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(4, 40))
        examples.append({text: " ".join(words), target: " ".join(words[:4])})
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return examples


def arguments(model: Path, train: Path, output: Path, *others: object) -> list[str]:
    """Returns the arguments of a short run."""
    short = [
        "--batch-size",
        2,
        "--accumulate",
        2,
        "--max-target-length",
        12,
        "--device",
        "cpu",
    ]
    return [
        str(value)
        for value in ("finetune", "--model", model, "--train", train, "--output", output, *short, *others)
    ]


def start(
    argv: list[str],
    kill_at_call: int | None = None,
    kill_at_sync: int | None = None,
    counts: Path | None = None,
    largest: int | None = None,
) -> Any:
    """Starts a run in a process that is forked from one that has imported everything; it writes stderr.txt.

    Args:
        kill_at_call: the process kills itself in its so-manieth call of a function, whatever it does there. A clock
            would find it at another place on every machine.
        kill_at_sync: it kills itself in its so-manieth ``os.fsync``.
        counts: the run writes into this file how many of both there were, as ``{"calls": …, "syncs": …}``.
        largest: no file can grow beyond so many bytes, as on a full disk.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.model.finetuning_imports"])
    limits = (kill_at_call, kill_at_sync, counts, largest)
    process = context.Process(target=_run, args=([*argv, "--threads", "1"], os.getcwd(), *limits))
    process.start()
    return process


def finish(argv: list[str], **limits: Any) -> int:
    """Runs to the end and returns the exit status, negative if a signal ended it."""
    process = start(argv, **limits)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(
    argv: list[str],
    folder: str,
    kill_at_call: int | None,
    kill_at_sync: int | None,
    counts: Path | None,
    largest: int | None,
) -> None:
    from led_model.cli.parser import main

    os.chdir(folder)
    sys.stderr = open("stderr.txt", "w", encoding="utf-8")  # noqa: SIM115
    calls, syncs, sync = itertools.count(1), itertools.count(1), os.fsync

    def count_call(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call") and next(calls) == kill_at_call:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_sync(descriptor: int) -> None:
        if next(syncs) == kill_at_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.fsync = count_sync
    if counts is not None or kill_at_call is not None:
        sys.setprofile(count_call)
    status = main(argv)
    sys.setprofile(None)
    if counts is not None:
        counts.write_text(json.dumps({"calls": next(calls) - 1, "syncs": next(syncs) - 1}))
    sys.exit(status)
