"""Runs a command on documents from the first to the last, and writes and prints what becomes of them."""

from __future__ import annotations

import codecs
import os
import sys
import time
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from tqdm import tqdm

from led_model.batch.documents import Document, Source, Unreadable
from led_model.batch.scheduling import Outcome, run_documents
from led_model.batch.streaming import TextStreamer
from led_model.batch.tasks import as_text
from led_model.batch.worker_processes import Processes
from led_model.cli.devices import devices_of, threads_of
from led_model.cli.joined import Joined
from led_model.cli.loading import batch_limits, load_task, task_spec
from led_model.cli.results import ResultFile, to_line
from led_model.terminal import log, log_error, no_bars, one_line, seconds

_EARLIER = {"is_earlier": True}  # an outcome is about this if an earlier run made the result


@dataclass
class Run:
    """Runs one command over its documents; ``failed`` counts documents and inputs without a result."""

    args: Namespace
    results: ResultFile | None
    sources: list[Source | Joined]
    problems: list[str]  # a sentence on each input that names no document
    failed: int = 0
    made: int = 0  # results that this run has made
    earlier: int = 0  # results that an earlier run had made
    renamed: int = 0  # those of them whose documents had another name or id
    total: int | None = field(init=False)  # the number of documents, None while it is unknown
    bar: tqdm = field(init=False)
    # This is the form in which results are printed; with None they are not printed.
    format: str | None = field(init=False)
    streamer: TextStreamer | None = None  # prints the only result while it is written

    def __post_init__(self) -> None:
        self._known_size = sum(source.size for source in self.sources)  # bytes
        self._streamed_size = 0  # bytes from pipes, as far as they were read
        self._skipped_size = 0  # bytes of documents that needed no model
        self._outcomes = self._read()
        self.is_alone = self._looks_alone()
        self.total = None if any(source.is_jsonl for source in self.sources) else len(self.sources)
        if self.is_alone:
            self.total = 1
        self.format = self.args.format
        if self.format is None and self.results is None:
            self.format = "text" if self.is_alone else "jsonl"
        self.bar = tqdm(
            total=self._known_size,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
            desc=self._count(),
            leave=False,
            disable=True if self.total == 1 else no_bars(),
        )

    def _looks_alone(self) -> bool:
        """Returns whether there is one document and nothing else, for which two lines of a file are read.

        A shard is a part of many, whatever falls to it.
        """
        if len(self.sources) != 1 or self.problems or self.args.shard is not None:
            return False
        [source] = self.sources
        if not isinstance(source, Source) or not source.is_jsonl:
            return True
        if not source.is_file:
            return False
        beginning = list(islice(self._outcomes, 2))
        self._outcomes = chain(beginning, self._outcomes)
        return len(beginning) == 1

    def work(self) -> None:
        """Reads all documents and delivers their results."""
        for problem in self.problems:
            self._fail(problem)
        while isinstance(first := next(self._outcomes, None), Outcome):
            self._settle(first)
        if first is None:  # no model is needed
            return
        documents = chain([first], self._outcomes)
        made = (
            self._made_by_several if (self.args.devices or 1) > 1 and not self.is_alone else self._made_by_one
        )
        how = made(documents)
        self.bar.close()
        if self.total == 1 and not self.made:  # the failure has been reported
            return
        done = "" if self.total == 1 else f"{self.made:,} documents done, {self.failed:,} failed; "
        log(f"{done}{how}.")

    def _made_by_one(self, documents: Iterable[Document | Outcome]) -> str:
        """Delivers the results of all documents, and returns how long that took."""
        start = time.perf_counter()
        task = load_task(self.args)
        loading = time.perf_counter() - start
        if self.is_alone and self.format == "text" and sys.stdout.isatty():
            task.streamer = self.streamer = TextStreamer(task.reader.tokenizer, sys.stdout)
        in_order = self.results is None
        self._settle_all(run_documents(task, documents, in_order=in_order, **batch_limits(self.args)))
        return f"loaded in {seconds(loading)}, {task.work}"

    def _made_by_several(self, documents: Iterable[Document | Outcome]) -> str:
        """Does so in several processes."""
        args = self.args
        processes = Processes(task_spec(args), devices_of(args), threads_of(args), batch_limits(args))
        self._settle_all(processes.run(documents, in_order=self.results is None))
        return f"{args.devices} processes {processes.work}"

    def _settle_all(self, outcomes: Generator[Outcome, None, None]) -> None:
        self.bar.reset()  # the time of loading says nothing about the documents
        with closing(outcomes):
            for outcome in outcomes:
                self._settle(outcome)

    def _read(self) -> Iterator[Document | Outcome]:
        """Yields the documents that have no result yet, and the outcomes of the others and of what is none.

        A thread of its own iterates over most of them.
        """
        for source in self.sources:
            is_sized = source.size > 0
            for document in source.read():
                if not is_sized:
                    self._streamed_size += document.size
                if isinstance(document, Unreadable):
                    yield Outcome(document, ValueError(document.message), {})
                elif (record := self._earlier_record(document)) is not None:
                    yield Outcome(document, record, _EARLIER)
                else:
                    yield document

    def _earlier_record(self, document: Document) -> dict[str, Any] | None:
        """Returns what an earlier run has written for the document, if it has."""
        if self.results is None:
            return None
        record = self.results.take(document)
        if record is None and self.results.has_changed(document):
            log(f"{document.name} has changed since its result was made; it is read again.")
        return record

    def _settle(self, outcome: Outcome) -> None:
        """Delivers a result, or reports why there is none, and draws the bar."""
        document, result, about = outcome
        if isinstance(result, Exception) or about is _EARLIER:
            self._skipped_size += document.size
        if isinstance(result, Exception):
            self._fail(outcome.problem)
        elif isinstance(document, Document) and about is _EARLIER:
            self.earlier += 1
            name = {"id": document.id, "source": document.source}
            self.renamed += _name(result) != _name(name)
            self._print(document, result | name)
        elif isinstance(document, Document):
            self._deliver(document, result | about)
        self.bar.total = self._known_size + self._streamed_size - self._skipped_size
        self.bar.set_description_str(self._count(), refresh=False)
        self.bar.update(0 if isinstance(result, Exception) or about is _EARLIER else document.size)

    def _fail(self, problem: str) -> None:
        """Counts and reports a document or an input that has no result."""
        self.failed += 1
        log_error(problem, f"led {self.args.command}")

    def _deliver(self, document: Document, result: dict[str, Any]) -> None:
        """Writes and prints a result."""
        record = {"id": document.id, "source": document.source} | result
        if self.results is not None:
            record = self.results.append(document, result)
        self._print(document, record)
        self.made += 1

    def _print(self, document: Document, record: dict[str, Any]) -> None:
        if self.format is None:
            return
        encoding = sys.stdout.encoding or "utf-8"
        text = (
            as_text(record)
            if self.format == "text"
            else to_line(record, is_ascii=not _encodes_any_letter(encoding))
        )
        if self.streamer is not None:
            self.streamer.finish(text)
            return
        with self.bar.external_write_mode(file=sys.stdout):
            if self.format == "text" and not self.is_alone:
                text = f"==> {one_line(document.name)} <==\n{text}\n"
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def _count(self) -> str:
        of_all = "" if self.total is None else f" of {self.total}"
        return f"{self.made + self.earlier}{of_all} documents"


def _encodes_any_letter(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith("utf")


def _name(record: dict[str, Any]) -> tuple[object, ...]:
    """Returns what a record calls its document, however the path of that is spelled."""
    source = os.path.realpath(record["source"])
    return source, source if record["id"] == record["source"] else record["id"]
