"""Reads examples to train on, a text and its target a JSON line, and encodes them one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from led_model.batch.documents import MAX_BYTES, Document, Source, Unreadable, too_much
from led_model.batch.json_lines import check_encodable, parse_record, parts_of
from led_model.batch.pieces import Reader
from led_model.cli.finding import find_sources
from led_model.terminal import log_error, no_bars, quiet
from led_model.tokenization.tokenizer import LEDTokenizer

PROG = "led finetune"


@dataclass(frozen=True)
class Example(Document):
    """Holds a text with what shall be written of it, and the question about it if there is one."""

    target: str = ""
    question: str | None = None


@dataclass
class ExampleSource(Source):
    """Reads a JSONL file of one example a line."""

    target_field: str = "summary"
    question_field: str | None = None

    def _document(self, line: bytes, number: int, line_of: dict[str, int]) -> Example | Unreadable:
        where = f"{self.name} line {number}"
        if len(line) > MAX_BYTES:
            return Unreadable(f"{where} {too_much()}", len(line))
        try:
            record = parse_record(line, self.text_field)
            parts = parts_of(record, self.text_field, "--text-field")
            target = "\n".join(parts_of(record, self.target_field, "--target-field"))
            question = None
            if self.question_field is not None:
                question = "\n".join(parts_of(record, self.question_field, "--question-field"))
            check_encodable([*parts, target, question or ""])
        except ValueError as error:
            return Unreadable(f"{where} {error}", len(line))
        document = Document.of_parts(number, self.name, parts, len(line))
        return Example(**vars(document) | {"target": target, "question": question})


def find_examples(
    inputs: Sequence[str], flag: str, text_field: str, target_field: str, question_field: str | None
) -> list[ExampleSource]:
    """Returns the files that ``inputs``, the values of ``flag``, name.

    Raises:
        ValueError: when an input names no file, a directory or stdin, which an interrupted run could not read again.
    """
    for item in inputs:
        if item == "-" or os.path.isdir(item):
            what = "stdin, which cannot be read twice" if item == "-" else "a directory"
            raise ValueError(f"{flag} {item} is {what}; give .jsonl files, or a quoted glob.")
    found, problems = find_sources(inputs, jsonl=True)
    if problems:
        raise ValueError(f"{flag}: {problems[0].partition(';')[0]}; give .jsonl files, or a quoted glob.")
    fields = {"text_field": text_field, "target_field": target_field, "question_field": question_field}
    return [ExampleSource(source.path, True, **fields) for source in found]


@dataclass
class EncodedExample:
    """Holds the ids of an example: what the encoder reads, and the labels, int32 ``[seqlen]`` and ``[target]``."""

    input_ids: np.ndarray
    labels: np.ndarray
    is_cut: bool  # whether the text has lost its end
    is_target_cut: bool


@dataclass
class ExampleEncoder:
    """Encodes examples as ``led summarize`` and ``led answer`` read documents, cut to the greatest lengths.

    ``failed`` counts the lines that were no examples.
    """

    tokenizer: LEDTokenizer
    max_source_length: int
    max_target_length: int
    failed: int = 0
    _targets: Reader = field(init=False)

    def __post_init__(self) -> None:
        self._targets = Reader(self.tokenizer, self.max_target_length, "truncate")

    def encoded(self, sources: Sequence[ExampleSource], what: str) -> Iterator[EncodedExample]:
        """Yields the examples of all sources in order; what is none is named on stderr.

        Args:
            what: what the examples are for, a word of the bar.
        """
        size = sum(source.size for source in sources)
        with tqdm(
            total=size or None,
            desc=f"reading {what}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=no_bars(),
        ) as bar:
            for source in sources:
                for example in source.read():
                    bar.update(example.size)
                    try:
                        if isinstance(example, Unreadable):
                            raise ValueError(example.message)
                        assert isinstance(example, Example)
                        yield self._encode(example)
                    except ValueError as error:
                        self.failed += 1
                        log_error(str(error), PROG)

    def _encode(self, example: Example) -> EncodedExample:
        asked = f"the question of {example.name}"
        reader = Reader(
            self.tokenizer, self.max_source_length, "truncate", question=example.question, question_name=asked
        )
        with quiet():  # how many texts are cut is said once, for all
            (source,) = reader.pieces(example)
            target_document = Document(example.id, f"the target of {example.source}", example.target, 0)
            (target,) = self._targets.pieces(target_document)
        return EncodedExample(
            np.array(source.input_ids, np.int32),
            np.array(target.input_ids, np.int32),
            source.is_truncated,
            target.is_truncated,
        )
