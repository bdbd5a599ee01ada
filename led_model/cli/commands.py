"""Runs ``led summarize``, ``led answer`` and ``led classify`` over documents, one batch at a time."""

from __future__ import annotations

import codecs
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from tqdm import tqdm

from led_model.batch.documents import Document, Source, Unreadable
from led_model.batch.pieces import Piece
from led_model.batch.streaming import TextStreamer
from led_model.batch.tasks import Result, Task, as_text
from led_model.cli.finding import find_sources
from led_model.cli.joined import Joined
from led_model.cli.loading import load_task, made_by
from led_model.cli.results import ResultFile, to_line
from led_model.overflow import NotFinite
from led_model.terminal import log, log_error, no_bars, one_line, quiet, seconds

DONE, SOME_FAILED, INTERRUPTED = 0, 3, 130


def run_on_documents(args: Namespace) -> int:
    """Runs ``args.command`` over all documents that ``args`` names; returns the exit status."""
    with ExitStack() as stack:
        stack.enter_context(quiet(args.quiet))
        set_threads(args.threads)
        check_revision(args)
        sources, problems = find_documents(args)
        results = None
        if args.output is not None:
            question = getattr(args, "question", None)
            results = stack.enter_context(ResultFile(args.output, made_by(args), question, args.overwrite))
        if results is not None and results.count:
            log(f"{args.output} holds {results.count:,} results already; these documents are left out.")
        run = _Run(args, results, sources, problems)
        stack.enter_context(run.bar)
        try:
            run.work()
        except KeyboardInterrupt:
            run.bar.close()  # it would overwrite the message
            if results is None or results.count == 0:
                raise
            log_error(
                f"interrupted; {args.output} holds {results.count:,} results. Give the same command again to go "
                "on with the others.",
                f"led {args.command}",
            )
            return INTERRUPTED
        if results is not None and results.count:
            results.check_unchanged()
        if run.renamed:
            log(
                f"{run.renamed:,} of the results in {args.output} stand under names that their documents had before, "
                "which have the same text."
            )
        return SOME_FAILED if run.failed else DONE


def find_documents(args: Namespace) -> tuple[list[Source | Joined], list[str]]:
    """Returns where the documents are, and a sentence on each input that names none; with ``--join`` they are one."""
    sources, problems = find_sources(
        args.inputs, jsonl=args.jsonl, text_field=args.text_field, leave_out=args.output
    )
    if not args.join:
        return list(sources), problems
    return [] if problems else [Joined(sources)], problems


@dataclass
class _Run:
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
    # The length of the bar is the bytes of all documents that count.
    size: int = field(init=False)
    bar: tqdm = field(init=False)
    # This is the form in which results are printed; with None they are not printed.
    format: str | None = field(init=False)
    streamer: TextStreamer | None = None  # prints the only result while it is written

    def __post_init__(self) -> None:
        extents = [source.extent for source in self.sources]
        counts = [count for count, _ in extents if count is not None]
        self.total = sum(counts) if len(counts) == len(extents) else None
        self.is_alone = self.total is not None and self.total + len(self.problems) == 1
        self.format = self.args.format
        if self.format is None and self.results is None:
            self.format = "text" if self.is_alone else "jsonl"
        self.size = sum(size for _, size in extents)
        self.bar = tqdm(
            total=self.size,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
            desc=self._count(),
            leave=False,
            disable=True if self.total == 1 else no_bars(),
        )

    def fail(self, problem: str) -> None:
        """Counts and reports a document or an input that has no result."""
        self.failed += 1
        log_error(problem, f"led {self.args.command}")

    def work(self) -> None:
        """Reads all documents and delivers their results."""
        for problem in self.problems:
            self.fail(problem)
        documents = self._documents()
        first = next(documents, None)
        if first is None:  # no model is needed
            return
        start = time.perf_counter()
        task = load_task(self.args)
        loading = time.perf_counter() - start
        if self.is_alone and self.format == "text" and sys.stdout.isatty():
            task.streamer = self.streamer = TextStreamer(task.reader.tokenizer, sys.stdout)
        self.bar.reset()  # the time of loading says nothing about the documents
        pieces = self._pieces(task, chain([first], documents))
        found: list[Result | NotFinite] = []
        while batch := list(islice(pieces, self.args.batch_size)):
            for piece, result in zip(batch, self._results(task, batch), strict=True):
                found.append(result)
                if piece.index + 1 == piece.count:
                    self._finish(task, piece, found)
                    found = []
                self.bar.set_description_str(self._count(), refresh=False)
                self.bar.update(piece.document.size / piece.count)
        self.bar.close()
        if self.total == 1 and not self.made:  # the failure has been reported
            return
        done = "" if self.total == 1 else f"{self.made:,} documents done, {self.failed:,} failed; "
        log(f"{done}loaded in {seconds(loading)}, {task.work}.")

    def _results(self, task: Task, batch: Sequence[Piece]) -> Sequence[Result | NotFinite]:
        """Returns the result of each piece; one whose numbers overflow spoils no other of its batch."""
        try:
            return task.run(batch)
        except NotFinite as error:
            return [error] if len(batch) == 1 else [self._results(task, [piece])[0] for piece in batch]

    def _finish(self, task: Task, last: Piece, found: Sequence[Result | NotFinite]) -> None:
        """Delivers the result of a document of which all pieces are read, or reports why there is none."""
        about = {"tokens": last.tokens, "pieces": last.count, "truncated": last.is_truncated}
        try:
            results: list[Result] = []
            for result in found:
                if isinstance(result, NotFinite):
                    raise result
                results.append(result)
            joined = task.join(last.document, results)
        except NotFinite as error:
            self.fail(f"{last.document.name}: {error}")
            return
        self._deliver(last.document, joined | about)

    def _documents(self) -> Iterator[Document]:
        """Yields the documents that can be read and have no result yet."""
        for source in self.sources:
            is_counted = source.extent[0] is not None
            for document in source.read():
                self._change_bar_length(0 if is_counted else document.size)
                if isinstance(document, Unreadable):
                    self.fail(document.message)
                elif (record := self._earlier_record(document)) is None:
                    yield document
                    continue
                else:
                    self.earlier += 1
                    self.renamed += _name(record) != _name({"id": document.id, "source": document.source})
                    self._print(document, record | {"id": document.id, "source": document.source})
                self._change_bar_length(-document.size)

    def _change_bar_length(self, by: int) -> None:
        """Adds the bytes of a document to the length of the bar, or takes them away if ``by`` is negative."""
        self.size += by
        self.bar.total = self.size

    def _pieces(self, task: Task, documents: Iterator[Document]) -> Iterator[Piece]:
        """Yields the pieces of all documents that the model can read."""
        for document in documents:
            try:
                pieces = task.reader.pieces(document)
            except ValueError as error:
                self.fail(str(error))
                self._change_bar_length(-document.size)
                continue
            yield from pieces

    def _earlier_record(self, document: Document) -> dict[str, Any] | None:
        """Returns what an earlier run has written for the document, if it has."""
        if self.results is None:
            return None
        record = self.results.take(document)
        if record is None and self.results.has_changed(document):
            log(f"{document.name} has changed since its result was made; it is read again.")
        return record

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


def check_revision(args: Namespace) -> None:
    """Checks that a revision is not of a directory.

    Raises:
        ValueError: when it is.
    """
    if args.revision is not None and os.path.isdir(args.model):
        raise ValueError(f"--revision is for hub ids and {args.model} is a directory; leave it out.")


def set_threads(wanted: int | None) -> None:
    """Makes torch use ``wanted`` threads, or as many as there are processors."""
    if wanted is None:
        return
    there = os.cpu_count() or wanted
    if wanted > there:
        log(f"--threads is {wanted} and there are {there} processors, which are all used.")
    torch.set_num_threads(min(wanted, there))


def _name(record: dict[str, Any]) -> tuple[object, ...]:
    """Returns what a record calls its document, however the path of that is spelled."""
    source = os.path.realpath(record["source"])
    return source, source if record["id"] == record["source"] else record["id"]
