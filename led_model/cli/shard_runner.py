"""Defines what a process of the cluster does: it loads the model once, and reads and writes one shard after another."""

from __future__ import annotations

import json
import os
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from led_kernels import BackendUnavailable
from led_model.batch.documents import Document, Unreadable
from led_model.batch.input_shards import Sources
from led_model.batch.loading import TaskSpec
from led_model.batch.scheduling import Outcome, run_documents
from led_model.batch.tasks import Task
from led_model.cli.output_directory import ShardFiles
from led_model.cli.records import to_record
from led_model.cli.results import to_line
from led_model.terminal import quiet

TRIES = 4
"""So often a shard is begun in one run."""


@dataclass(frozen=True)
class Job:
    """Says what all processes of a run have in common.

    ``directory`` is that of the command, which inputs and model are named from, and ``output`` one of a shared file
    system, too, which ``run`` may write into.
    """

    spec: TaskSpec
    limits: dict[str, Any]
    threads: int
    made_by: dict[str, Any]
    output: str
    run: str
    directory: str
    is_quiet: bool


@dataclass
class Report:
    """Says what has become of a shard; ``failed`` has a sentence on each document without a result.

    ``error`` is a sentence on why the run cannot go on, with a ``trace`` if it is a bug. A shard that ``is_lost`` was
    begun several times, and each time its process died. ``unread`` says why the shard could not be read, or not to its
    end, by this process; nothing is written of it.
    """

    number: int
    done: int = 0
    failed: list[str] = field(default_factory=list)
    read_tokens: int = 0
    written_tokens: int = 0
    error: str | None = None
    trace: str | None = None
    is_lost: bool = False
    unread: str | None = None


class _Unread(Exception):
    """Says that an input cannot be read here, or not to its end, which is no fault of a document."""


class ShardRunner:
    """Takes shards, of :func:`cut_shards`, to files of their results; an instance is an actor of Ray.

    It raises no errors but reports them, as Ray would start it again and again.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._task: Task | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Reads the shards of a batch, whose ``number`` and pickled ``sources`` are columns, and returns reports."""
        reports = []
        for number, sources in zip(batch["number"], batch["sources"], strict=True):
            with quiet(self._job.is_quiet):
                report = self._report(int(number), pickle.loads(sources))
            reports.append(json.dumps(vars(report)))
        return {"report": reports}

    def _report(self, number: int, sources: Sources) -> Report:
        report = Report(number)
        files = ShardFiles(self._job.output, number, self._job.run)
        try:
            if not files.are_there:  # an actor that died after that has written them
                if files.begin() > TRIES:
                    report.is_lost = True
                    return report
                if self._task is None:
                    self._task = self._load()
                work = self._task.work
                read, written = work.read_tokens, work.written_tokens
                self._write(self._task, sources, files)
                report.read_tokens, report.written_tokens = (
                    work.read_tokens - read,
                    work.written_tokens - written,
                )
            report.done, report.failed = files.count()
        except _Unread as error:
            files.forget_tries()
            report.unread = str(error)
        except (OSError, ValueError, ImportError, BackendUnavailable) as error:
            report.error = str(error)
        except Exception as error:
            report.error, report.trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        return report

    def _load(self) -> Task:
        try:
            os.chdir(self._job.directory)
        except OSError as error:
            raise OSError(
                f"{self._job.directory} cannot be entered on {os.uname().nodename} ({error.strerror}); run the "
                "command in a directory that all nodes share."
            ) from None
        torch.set_num_threads(self._job.threads)
        return self._job.spec.load()

    def _write(self, task: Task, sources: Sources, files: ShardFiles) -> None:
        results: list[str] = []
        errors: list[str] = []
        for outcome in run_documents(task, _documents(sources), in_order=True, **self._job.limits):
            document, result, about = outcome
            if isinstance(document, Document) and not isinstance(result, Exception):
                results.append(to_line(to_record(document, result | about, self._job.made_by)))
                continue
            name = {"led": self._job.made_by["command"]}
            if isinstance(document, Document):
                name |= {"id": document.id, "source": document.source}
            errors.append(to_line(name | {"error": outcome.problem}))
        files.write(results, errors)


def _documents(sources: Sources) -> Iterator[Document | Outcome]:
    for source in sources:
        try:
            for document in source.documents():
                if isinstance(document, Unreadable):
                    yield Outcome(document, ValueError(document.message), {})
                else:
                    yield document
        except OSError as error:
            raise _Unread(source.why(error)) from error
