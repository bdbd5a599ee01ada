"""Runs of ``led finetune`` in processes of their own, which may be killed, on small examples."""

from __future__ import annotations

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
    kill_at_sync: int | None = None,
    kill_after: float | None = None,
    largest: int | None = None,
) -> Any:
    """Starts a run in a process that is forked from one that has imported everything; it writes stderr.txt.

    Args:
        kill_at_sync: the process kills itself in its so-manieth ``os.fsync``.
        kill_after: it is killed after so many seconds, whatever it does.
        largest: no file can grow beyond so many bytes, as on a full disk.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.model.finetuning_imports"])
    process = context.Process(
        target=_run, args=([*argv, "--threads", "1"], os.getcwd(), kill_at_sync, kill_after, largest)
    )
    process.start()
    return process


def finish(argv: list[str], **limits: Any) -> int:
    """Runs to the end and returns the exit status, negative if a signal ended it."""
    process = start(argv, **limits)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(
    argv: list[str], folder: str, kill_at_sync: int | None, kill_after: float | None, largest: int | None
) -> None:
    from led_model.cli.parser import main

    os.chdir(folder)
    sys.stderr = open("stderr.txt", "w", encoding="utf-8")  # noqa: SIM115
    if kill_at_sync is not None:
        left, sync = kill_at_sync, os.fsync

        def counted(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        os.fsync = counted
    if kill_after is not None:
        signal.setitimer(signal.ITIMER_REAL, kill_after)  # nobody handles the signal, which ends the process
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.exit(main(argv))
