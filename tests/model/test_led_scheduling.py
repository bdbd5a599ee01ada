"""Many documents through one model: batches of little padding, in bounded memory, each document once."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from led_model import LEDForSequenceClassification, LEDModel
from led_model.batch import Document, Outcome, run_documents
from led_model.batch import scheduling as scheduling_module
from led_model.batch.ahead import ReadAhead
from led_model.batch.cutting import cut_batches
from led_model.batch.documents import Unreadable
from led_model.batch.pieces import Piece
from led_model.batch.tasks import Classifier
from led_model.cli.results import ResultFile
from led_model.overflow import NotFinite
from led_model.terminal import _is_quiet, quiet
from led_model.tokenization.tokenizer import LEDTokenizer
from tests.model.commands import PARAGRAPHS, TEXT, inputs, led, records

LIMIT = 1000
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of that."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


class Counting:
    """Stands for a task. A document's text is the length of each of its pieces; its result is these lengths.

    ``fails`` raises for a batch of pieces that cannot be run.
    """

    streamer = None
    batch_cost = 256
    device = torch.device("cpu")

    def __init__(self, fails=lambda lengths: None) -> None:
        self.reader = self
        self.limit = LIMIT
        self.fails = fails
        self.batches: list[list[int]] = []
        self.read = 0

    def pieces(self, document: Document) -> list[Piece]:
        lengths = [int(word) for word in document.text.split()]
        if max(lengths) > LIMIT:
            raise ValueError(f"{document.name} has {max(lengths)} tokens")
        self.read += 1
        return [
            Piece(document, np.zeros(n - 2, np.int32), np.zeros((n - 2, 2), np.int32), [0], [2], 1, index, len(lengths),
                  sum(lengths), False)
            for index, n in enumerate(lengths)
        ]  # fmt: skip

    def run(self, pieces: Sequence[Piece]) -> list[dict]:
        lengths = [piece.length for piece in pieces]
        self.fails(lengths)
        self.batches.append(lengths)
        return [{"length": length} for length in lengths]

    def join(self, document: Document, found: Sequence[dict]) -> dict:
        return {"lengths": [piece["length"] for piece in found]}

    @property
    def rows_per_real_row(self) -> float:
        return sum(len(b) * max(b) for b in self.batches) / sum(map(sum, self.batches))


def numbered(texts: Sequence[object]) -> list[Document]:
    return [Document(number, "texts", str(text), 9) for number, text in enumerate(texts)]


def lognormal(count: int, median: float = 100, sigma: float = 1.0, longest: int = LIMIT) -> list[int]:
    draw = random.Random(0)
    return [
        min(longest, max(3, int(draw.lognormvariate(float(np.log(median)), sigma)))) for _ in range(count)
    ]


def fault_of(outcomes: Sequence[Outcome], lengths: Sequence[object]) -> None:
    """Fails unless each document has come once, with a result or an error of its own."""
    assert sorted(outcome.document.id for outcome in outcomes) == list(range(len(lengths)))
    for outcome in outcomes:
        if not isinstance(outcome.result, Exception):
            expected = [int(word) for word in str(lengths[outcome.document.id]).split()]
            assert outcome.result == {"lengths": expected}


@pytest.mark.parametrize("batch_cost", [256, 2048])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("median", [200, 1000, 4000])
@pytest.mark.parametrize("batch_size", [None, 8, 32])
def test_little_is_padding(median, sigma, batch_size, batch_cost):
    """Of lengths for which batches in the order of the file compute 2 to 7 times the rows that are there."""
    lengths = lognormal(4000, median, sigma, 16384)
    in_turn = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    assert sum(len(batch) * max(batch) for batch in in_turn) > 2 * sum(lengths)
    task = Counting()
    task.limit, task.batch_cost = 16384, batch_cost
    task.pieces = lambda document: [
        Piece(document, np.empty(int(document.text) - 2, np.int8), np.empty(0), [0], [2], 1, 0, 1, 0, False)
    ]
    outcomes = list(run_documents(task, numbered(lengths), batch_size=batch_size))
    fault_of(outcomes, lengths)
    assert task.rows_per_real_row <= 1.05
    assert all(len(batch) <= (batch_size or 32) for batch in task.batches)
    assert all(len(batch) * max(batch) <= 16384 * (batch_size or 1) for batch in task.batches)
    assert len(task.batches) < 0.9 * len(lengths)


@pytest.mark.parametrize("seed", range(30))
def test_batches_cost_least(seed):
    """Compared with all ways to cut the sorted lengths."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(9)]
    tokens, size, cost = draw.choice([40, 100, 1000]), draw.choice([1, 2, 4, 100]), draw.choice([0, 10, 100])
    ordered = sorted(lengths, reverse=True)

    def least(begin: int) -> float:
        if begin == len(ordered):
            return 0
        return min(
            rows * ordered[begin] + cost + least(begin + rows)
            for rows in range(1, min(size, len(ordered) - begin) + 1)
            if rows == 1 or rows * ordered[begin] <= tokens
        )

    batches = cut_batches(lengths, tokens, size, cost)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    assert sum(len(b) * max(lengths[i] for i in b) + cost for b in batches) == least(0)
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)
    assert all(batch == sorted(batch) for batch in batches)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fits", [60, 300, 1000])
def test_a_batch_that_runs_out_of_memory_is_halved(fits, error, capsys):
    """Until it fits; what does not fit alone is reported, and how much fits is not forgotten."""
    failures = []

    def fails(lengths: list[int]) -> None:
        if len(lengths) * max(lengths) > fits:
            failures.append(lengths)
            raise error

    lengths = lognormal(1500)
    task = Counting(fails)
    outcomes = list(run_documents(task, numbered(lengths)))
    fault_of(outcomes, lengths)
    failed = [outcome for outcome in outcomes if isinstance(outcome.result, Exception)]
    assert {outcome.document.id for outcome in failed} == {i for i, n in enumerate(lengths) if n > fits}
    assert all(outcome.result is error for outcome in failed)
    assert sum(len(batch) > 1 for batch in failures) <= 12
    assert "memory ran out for a batch of" in capsys.readouterr().err or fits == 1000
    if fits == 300:
        assert max(len(batch) for batch in task.batches) > 4


def test_memory_of_a_failed_batch_is_given_back():
    """No traceback keeps what the batch had allocated."""
    held = []

    def fails(lengths: list[int]) -> None:
        allocated = np.zeros(9)
        held.append(weakref.ref(allocated))
        if max(lengths) > 500:
            try:
                raise KeyError
            except KeyError:
                raise MemoryError from None

    outcomes = list(run_documents(Counting(fails), numbered([600, 600, 20])))
    gc.disable()
    try:
        assert sum(isinstance(outcome.result, MemoryError) for outcome in outcomes) == 2
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


def test_a_document_that_fails_takes_no_other_with_it():
    """Whatever it fails of, and once for all its pieces."""
    fatal = {77: NotFinite("the model's numbers overflowed"), 88: MemoryError()}
    attempts = []

    def fails(lengths: list[int]) -> None:
        attempts.append(lengths)
        for length in lengths:
            if length in fatal:
                raise fatal[length]

    texts = [50, "40 77 30", 60, 5000, " ".join(["88"] * 40), *lognormal(200, 50, 0.5, 70), "20 30"]
    outcomes = list(run_documents(Counting(fails), numbered(texts)))
    fault_of(outcomes, texts)
    errors = {o.document.id: o.result for o in outcomes if isinstance(o.result, Exception)}
    assert errors.keys() == {1, 3, 4}
    assert (errors[1], errors[4]) == (fatal[77], fatal[88])
    assert str(errors[3]) == "texts, document 3 has 5000 tokens"
    assert sum(88 in lengths for lengths in attempts) < 10


def test_other_errors_are_not_taken_for_those_of_a_document():
    def fails(lengths: list[int]) -> None:
        raise RuntimeError("a fault in the kernel")

    with pytest.raises(RuntimeError, match="a fault in the kernel"):
        list(run_documents(Counting(fails), numbered([5, 6])))
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("in_order", [False, True])
def test_pieces_that_lie_in_different_batches_are_joined_in_order(in_order):
    draw = random.Random(1)
    texts = [
        " ".join(str(draw.randint(3, LIMIT)) for _ in range(draw.choice([1, 2, 30]))) for _ in range(300)
    ]
    outcomes = list(run_documents(Counting(), numbered(texts), batch_size=5, in_order=in_order))
    fault_of(outcomes, texts)
    assert all(outcome.about["pieces"] == len(texts[outcome.document.id].split()) for outcome in outcomes)
    assert ([outcome.document.id for outcome in outcomes] == list(range(300))) == in_order


def test_a_document_twice_is_two():
    document = Document(0, "texts", "30 40", 9)
    outcomes = list(run_documents(Counting(), [document] * 5, in_order=True))
    assert [outcome.result for outcome in outcomes] == [{"lengths": [30, 40]}] * 5


def test_what_needs_no_model_is_handed_on_at_its_turn():
    unreadable = Outcome(Unreadable("no text", 9), ValueError("no text"), {})
    texts = [90, 30, 700, 35]
    documents: list = numbered(texts)
    documents.insert(1, unreadable)
    outcomes = list(run_documents(Counting(), documents, in_order=True))
    assert outcomes[1] is unreadable
    fault_of(outcomes[:1] + outcomes[2:], texts)
    assert unreadable in list(run_documents(Counting(), documents))


def test_one_after_another_for_a_batch_of_one():
    """In the order given, and no document waits for a later one."""
    lengths = lognormal(100)
    task = Counting()
    outcomes = list(run_documents(task, numbered(lengths), batch_size=1))
    assert task.batches == [[length] for length in lengths]
    assert [outcome.document.id for outcome in outcomes] == list(range(100))


def test_what_is_shown_while_it_is_written_is_not_sorted():
    task = Counting()
    task.streamer = object()
    [outcome] = run_documents(task, numbered(["900 10 20 30 800 40"]), batch_tokens=100)
    assert task.batches == [[900], [10, 20, 30], [800], [40]]
    assert outcome.result == {"lengths": [900, 10, 20, 30, 800, 40]}


@pytest.mark.parametrize(
    ("text", "limits", "bound"),
    [
        ("100", {}, 64 * LIMIT / 100),
        ("3", {}, 64 * 32),
        ("100", {"batch_tokens": 500, "read_ahead": 3}, 15),
        ("100", {"batch_size": 1}, 64),
        ("100" + " " * 2**20, {}, 16),
    ],
    ids=["tokens", "rows", "tokens of smaller batches", "alone", "characters"],
)
def test_read_ahead_is_bounded(text, limits, bound):
    """Whatever it is that takes the memory: one share is run, and another is read."""
    task = Counting()
    ahead = []
    documents = (Document(number, "texts", text, 9) for number in range(10**6))
    outcomes = run_documents(task, documents, **limits)
    for done, _ in zip(range(3 * int(bound)), outcomes, strict=False):
        time.sleep(0.2 * (done % int(bound) == 0))
        ahead.append(task.read - done)
    outcomes.close()
    assert max(ahead) <= 2 * bound + 3
    assert max(ahead) >= bound
    read = task.read
    time.sleep(0.05)
    assert task.read == read
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("name", ["batch_tokens", "batch_size", "read_ahead"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8"])
def test_limits_without_meaning(name, value):
    """Refused before anything is read."""
    with pytest.raises(ValueError, match=name):
        run_documents(Counting(), iter([]), **{name: value})


def test_pieces_are_made_while_the_model_runs():
    task = Counting(lambda lengths: None if is_read.wait(20) else pytest.fail("nobody reads"))
    is_read = threading.Event()

    def documents() -> Iterator[Document]:
        yield from numbered(["100"] * 700)  # more than a share of 640
        is_read.set()

    assert len(list(run_documents(task, documents()))) == 700


@pytest.mark.parametrize("error", [OSError("the file is gone"), ValueError("no"), KeyboardInterrupt()])
def test_errors_of_reading_arrive_once_what_was_read_is_done(error):
    def documents() -> Iterator[Document]:
        yield from numbered([30, 40])
        raise error

    outcomes = run_documents(Counting(), documents())
    assert [next(outcomes).document.id for _ in range(2)] == [0, 1]
    with pytest.raises(type(error)) as raised:
        next(outcomes)
    assert raised.value is error


def test_no_document_is_kept_waiting_for_one_that_does_not_come(monkeypatch):
    monkeypatch.setattr(scheduling_module, "_PATIENCE", 0.05)
    is_answered = threading.Event()

    def documents() -> Iterator[Document]:
        for document in numbered([30, 40, 50]):
            yield document
            assert is_answered.wait(20)
            is_answered.clear()

    for outcome in run_documents(Counting(), documents()):
        assert outcome.result
        is_answered.set()


def test_no_document_is_kept_waiting_by_a_steady_trickle(monkeypatch):
    """Each comes before the patience with it would end, and the window is far from full."""
    monkeypatch.setattr(scheduling_module, "_PATIENCE", 0.1)
    come = []

    def documents() -> Iterator[Document]:
        for document in numbered([30] * 40):
            come.append(document)
            yield document
            time.sleep(0.03)

    outcomes = run_documents(Counting(), documents())
    next(outcomes)
    assert len(come) < 30
    assert len(list(outcomes)) == 39


def test_a_thread_that_waits_for_a_pipe_is_left_behind(monkeypatch):
    monkeypatch.setattr("led_model.batch.ahead._LAST_WAIT", 0.05)
    end = threading.Event()

    def documents() -> Iterator[Document]:
        yield from numbered([30])
        end.wait(20)

    monkeypatch.setattr(scheduling_module, "_PATIENCE", 0.05)
    outcomes = run_documents(Counting(), documents())
    next(outcomes)
    start = time.monotonic()
    outcomes.close()
    assert time.monotonic() - start < 5
    end.set()


def test_a_thread_is_quiet_where_its_caller_is():
    with quiet(), ReadAhead([1], lambda _: _is_quiet.get(), lambda _: 0.1) as ahead:
        assert ahead.take() is True
    with ReadAhead([1], lambda _: _is_quiet.get(), lambda _: 0.1) as ahead:
        assert ahead.take() is False


def test_classes_do_not_depend_on_the_batch(save):
    """A library's use: texts through a model's task, in batches and alone."""
    directory = save(LEDForSequenceClassification)
    model = LEDForSequenceClassification.from_pretrained(directory)
    task = Classifier(model, LEDTokenizer.from_pretrained(directory), long="chunk")
    draw = random.Random(2)
    texts = ["The encoder reads. " * draw.randint(1, 60) for _ in range(40)]
    found = [
        [o.result["probabilities"] for o in run_documents(task, numbered(texts), in_order=True, **limits)]
        for limits in ({"batch_size": 1}, {"batch_tokens": 1000}, {"batch_size": 7})
    ]
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert list(other.values()) == pytest.approx(list(one.values()), abs=1e-5)
    assert any(len(set(one.values())) > 1 for one in found[0])


def corpus(count: int = 60) -> dict[str, str]:
    """Returns documents of many lengths by their ids, and writes them to corpus.jsonl."""
    draw = random.Random(3)
    texts = {f"d{n}": f"Text {n}. " + "A short one. " * draw.randint(0, 9) for n in range(count)}
    texts |= {"long": "".join(PARAGRAPHS), "longer": "".join(PARAGRAPHS * 3)}
    lines = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    Path("corpus.jsonl").write_text("\n".join(lines))
    return texts


def summaries(directory: Path, *flags: object) -> int:
    return led(
        "summarize", "corpus.jsonl", "--model", directory, "--max-new-tokens", 6, "--long", "chunk", *flags
    )


@pytest.mark.parametrize(
    "flags", [[], ["--batch-tokens", 1000], ["--batch-size", 3], ["--batch-size", 3, "--batch-tokens", 200]]
)
def test_summaries_are_those_of_one_at_a_time(save, documents, capsys, flags):
    """Also of documents in pieces, and printed in the order of the documents."""
    texts, directory = corpus(), save()
    assert summaries(directory, "--batch-size", 1) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["id"] for record in expected] == list(texts)
    assert [record["pieces"] for record in expected][-2:] == [4, 12]
    assert summaries(directory, *flags) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
    assert summaries(directory, "--output", "out.jsonl", *flags) == 0
    found = [{key: record[key] for key in expected[0]} for record in records()]
    assert sorted(found, key=lambda r: r["id"]) == sorted(expected, key=lambda r: r["id"])
    assert found != expected  # they are there as soon as they are done


def test_an_interruption_in_the_middle_and_the_rest(save, documents, capsys, monkeypatch):
    """Of a run that reads ahead: what was read and not done is read again, and what was done is not."""
    texts, directory = corpus(), save()
    append = ResultFile.append

    def interrupted(results: ResultFile, *record: object) -> dict:
        if results.count == 20:
            raise KeyboardInterrupt
        return append(results, *record)

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "append", interrupted)
        assert summaries(directory, "--output", "out.jsonl") == 130
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]
    before = Path("out.jsonl").read_bytes()
    assert summaries(directory, "--output", "out.jsonl") == 0
    assert Path("out.jsonl").read_bytes().startswith(before)
    assert sorted(record["id"] for record in records()) == sorted(texts)
    assert "holds 20 results already" in capsys.readouterr().err


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_document_for_which_memory_does_not_suffice_is_named(save, documents, capsys, monkeypatch, error):
    """And no other: the status is 3, and repaired it is done."""
    directory = save()
    Path("docs/4.txt").write_text("Not " + TEXT * 4)
    longest = inputs(directory, Path("docs/4.txt").read_text())["input_ids"].shape[1]
    encode = LEDModel.encode

    def too_large(model: LEDModel, input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if input_ids.numel() >= longest:
            raise error
        return encode(model, input_ids, *args, **kwargs)

    flags = ["--model", directory, "--max-new-tokens", 3, "--output", "out.jsonl", "--batch-tokens", 999]
    with monkeypatch.context() as patch:
        patch.setattr(LEDModel, "encode", too_large)
        assert led("summarize", "docs", *flags) == 3
    output = capsys.readouterr().err
    assert "led summarize: docs/4.txt: memory ran out" in output
    assert output.count("docs/") == 1
    assert sorted(record["source"] for record in records()) == [f"docs/{n}.txt" for n in range(4)]
    assert led("summarize", "docs", *flags) == 0
    assert len(records()) == 5


def test_a_line_is_answered_before_the_next_is_written(save, tmp_path):
    """By a pipe whose writer waits for the answer, and which Ctrl-C ends though nothing comes."""
    command = [sys.executable, "-m", "led_model", "summarize", "-", "--jsonl", "--model", str(save())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "3"], env=environment, cwd=tmp_path, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Where the tests are a job in the background, processes would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for number in range(2):
        process.stdin.write(json.dumps({"id": number, "text": TEXT}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == number
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130  # while its stdin is still open
    _, error = process.communicate()
    assert error.strip().endswith("led summarize: interrupted.")
    assert "Traceback" not in error
    assert "Fatal" not in error
