"""Defines what ray.data's ``map_batches``, ``datasets.map`` and Spark's ``mapInPandas`` call: texts in, results out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from led_model.batch import tasks
from led_model.batch.columns import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    STRINGS,
    Column,
    Kind,
    names_of,
    values_of,
    with_columns,
)
from led_model.batch.documents import MAX_BYTES, Document, too_much
from led_model.batch.json_lines import check_encodable, parts_of
from led_model.batch.loading import DTYPES, GENERATION_FLAGS, TaskSpec, batch_limits
from led_model.batch.pieces import Reader
from led_model.batch.rows import QuestionReader, Row
from led_model.batch.scheduling import run_documents
from led_model.batch.tasks import Task
from led_model.terminal import quiet
from led_model.tokenization.fork_safe import new_lock

_ABOUT = {"tokens": INTEGER, "pieces": INTEGER, "truncated": BOOLEAN, "error": STRING}
_LONG = ("error", "truncate", "chunk")

# A process loads one model at a time and runs one batch at a time, whatever number of threads call.
_lock = new_lock()
_process = os.getpid()
_loaded: dict[TaskSpec, Task] = {}  # one at most


def _load(spec: TaskSpec) -> Task:
    """Returns the task, which this process keeps, as Spark makes the callable anew for each of its tasks.

    Another one's model goes before this one's is loaded, as memory may not suffice for both.
    """
    if spec not in _loaded:
        _loaded.clear()
        _loaded[spec] = _task_of(spec)
    return _loaded[spec]


def _task_of(spec: TaskSpec) -> Task:
    task = spec.load()
    if spec.command == "answer" and spec.question is None:
        reader = {item.name: getattr(task.reader, item.name) for item in dataclasses.fields(Reader)}
        task.reader = QuestionReader(**reader | {"question_name": "the question"})
    return task


@dataclass
class _OnBatches:
    """Runs a task over batches of rows; holds no model, so that it can be pickled and sent to other processes."""

    spec: TaskSpec
    text_column: str
    question_column: str | None
    limits: dict[str, Any] = field(repr=False)
    kinds: ClassVar[dict[str, Kind]]

    def __call__(self, batch: Any) -> Any:
        """Returns the batch with the columns of the results.

        Args:
            batch: a dict of lists or of NumPy arrays, a pandas ``DataFrame``, a ``pyarrow.Table``, or an iterator of
                such batches, of which an iterator is returned.

        Raises:
            ValueError: when there is no column of texts, or one that has the name of a result; or when the model
                cannot be loaded. No row raises an error.
        """
        if isinstance(batch, Iterator):
            return map(self, batch)
        if taken := [name for name in (*self.kinds, *_ABOUT) if name in names_of(batch)]:
            raise ValueError(f"there is a column {taken[0]!r} already; rename or drop it.")
        texts = values_of(batch, self.text_column)
        questions = [None] * len(texts)
        if self.question_column is not None:
            questions = values_of(batch, self.question_column)
        with _lock, quiet():
            if os.getpid() != _process:  # a fork has no threads of OpenMP, and would wait for its parent's
                torch.set_num_threads(1)
            task = _load(self.spec)
            rows = self._results(task, texts, questions)
        kinds = self._kinds(task) | _ABOUT
        return with_columns(
            batch, [Column(name, kind, [row.get(name) for row in rows]) for name, kind in kinds.items()]
        )

    def _results(self, task: Task, texts: list[Any], questions: list[Any]) -> list[dict[str, Any]]:
        """Returns the values of each row's new columns, those that are not missing."""
        rows: list[dict[str, Any]] = [{} for _ in texts]
        documents: list[Document] = []
        for number, (text, question) in enumerate(zip(texts, questions, strict=True)):
            try:
                documents.append(self._document(number, text, question))
            except ValueError as error:
                rows[number]["error"] = f"the row {error}"
        for outcome in run_documents(task, documents, **self.limits):
            document, result, about = outcome
            assert isinstance(document, Document)  # all that were handed in are
            failed = isinstance(result, Exception)
            rows[int(document.id)] = {"error": outcome.problem} if failed else result | about
        return rows

    def _document(self, number: int, text: Any, question: Any) -> Document:
        """Returns what is to be read of a row.

        Raises:
            ValueError: with the end of a sentence on what is wrong with it.
        """
        parts = parts_of({self.text_column: text}, self.text_column, "text_column")
        if self.question_column is not None and not (isinstance(question, str) and question.strip()):
            raise ValueError(f"has no question in {self.question_column!r}; give a string that is not blank.")
        check_encodable([*parts, question or ""])
        size = sum(len(part.encode()) for part in parts)
        document = Document.of_parts(number, "the text", list(map(str, parts)), size)
        if size > MAX_BYTES:
            raise ValueError(too_much())
        return Row(**vars(document), question=question)

    def _kinds(self, task: Task) -> dict[str, Kind]:
        """Returns what the columns of the results hold."""
        return self.kinds


class Summarizer(_OnBatches):
    """Adds ``summary`` to batches of texts, and ``tokens``, ``pieces``, ``truncated`` and ``error``.

    It is what ``map_batches`` of ray.data, ``datasets.map(batched=True)`` and Spark's ``mapInPandas`` call. It can be
    pickled: the model is loaded at the first call, once in a process, which keeps the one that was loaded last. A row
    whose text is missing, no text, too long or overflows has its sentence in ``error`` and ``None`` in the other new
    columns, and spoils no other row; ``error`` is ``None`` in all others. A text may be a list of strings, the parts
    of one document.

    Args:
        model: directory of a checkpoint with its tokenizer, or hub id.
        text_column: of the texts.
        revision, device, dtype, load_in_4bit, load_in_8bit, long, global_tokens, batch_tokens, batch_size: as the
            flags of ``led summarize``; ``dtype`` is a name or one of torch.
        generation: as the flags of ``led summarize`` that are about writing: ``max_new_tokens``,
            ``min_new_tokens``, ``num_beams``, ``length_penalty``, ``no_repeat_ngram_size``, ``do_sample``,
            ``temperature``, ``top_k``, ``top_p`` and ``seed``.

    Raises:
        TypeError: for a setting of another name. Values are checked where the model is loaded.
        ValueError: for another choice of ``long`` or ``dtype``.
    """

    kinds: ClassVar[dict[str, Kind]] = {"summary": STRING}

    def __init__(
        self,
        model: str,
        *,
        text_column: str = "text",
        revision: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        long: str = "error",
        global_tokens: int = 1,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        **generation: Any,
    ) -> None:
        _check_choice("long", long, (*_LONG, "condense"))
        spec = TaskSpec(
            "summarize", str(model), revision, device, _dtype(dtype), load_in_4bit, load_in_8bit, long, global_tokens,
            generation=_checked(generation),
        )  # fmt: skip
        super().__init__(spec, text_column, None, batch_limits(batch_tokens, batch_size, generation))


class Answerer(_OnBatches):
    """Adds ``answer`` to batches of texts, and ``score``, ``start`` and ``end`` where the model finds it in the text.

    It is otherwise as :class:`Summarizer`. ``score`` is also there where a model writes answers from several pieces.

    Args:
        question: one about all texts.
        question_column: instead of it, the column of a question about each text.
    """

    kinds: ClassVar[dict[str, Kind]] = {"answer": STRING, "score": NUMBER, "start": INTEGER, "end": INTEGER}

    def __init__(
        self,
        model: str,
        *,
        question: str | None = None,
        question_column: str | None = None,
        text_column: str = "text",
        revision: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        long: str = "error",
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        **generation: Any,
    ) -> None:
        if (question is None) == (question_column is None):
            raise ValueError(
                "give either a question, about all texts, or a question_column, and not "
                f"{'both' if question is not None else 'neither'}."
            )
        _check_choice("long", long, _LONG)
        spec = TaskSpec(
            "answer", str(model), revision, device, _dtype(dtype), load_in_4bit, load_in_8bit, long,
            question=question, generation=_checked(generation),
        )  # fmt: skip
        limits = batch_limits(batch_tokens, batch_size, generation)
        super().__init__(spec, text_column, question_column, limits)


class Classifier(_OnBatches):
    """Adds ``label`` and ``probabilities`` by label to batches of texts; otherwise it is as :class:`Summarizer`.

    ``label`` is the likeliest, a list of all that apply if the model gives several, and numbers by name if it is one
    of regression, which has no probabilities.
    """

    kinds: ClassVar[dict[str, Kind]] = {"label": STRING, "probabilities": Kind("struct")}

    def __init__(
        self,
        model: str,
        *,
        text_column: str = "text",
        revision: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        long: str = "error",
        global_tokens: int = 1,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        _check_choice("long", long, _LONG)
        spec = TaskSpec(
            "classify", str(model), revision, device, _dtype(dtype), load_in_4bit, load_in_8bit, long, global_tokens
        )  # fmt: skip
        super().__init__(spec, text_column, None, batch_limits(batch_tokens, batch_size, {}))

    def _kinds(self, task: Task) -> dict[str, Kind]:
        assert isinstance(task, tasks.Classifier)
        numbers = Kind("struct", tuple(task.labels))
        if task.is_regression:
            return {"label": numbers}
        return {"label": STRINGS if task.gives_several else STRING, "probabilities": numbers}


def _checked(generation: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name in generation:
        if name not in GENERATION_FLAGS:
            raise TypeError(f"there is no setting {name!r}; give some of {', '.join(GENERATION_FLAGS)}.")
    return tuple((name, value) for name, value in generation.items() if value is not None)


def _dtype(dtype: str | torch.dtype | None) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    _check_choice("dtype", name, tuple(DTYPES))
    return name


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(choices)}.")
