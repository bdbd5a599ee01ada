"""This suite measures how fast many documents are read, whose lengths are lognormal, in batches of different kinds.

The encoder of a small model reads them: one at a time, in the order of the file by 8 and by 32 as batches of a fixed
size are, and as ``led`` does. Times include tokenizing. The column ``flop`` counts the operations of the linear layers
over all rows that are computed, padding among them; of one at a time these are the real ones.
"""

from __future__ import annotations

import functools
import json
import random
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import FORWARD, Call, Case, Group
from benchmarks.harness.figures import Figure, Run, ratio, seqlen_of
from benchmarks.harness.shapes import SMOKE, Shape
from benchmarks.harness.suite import Suite
from benchmarks.suites import encoder
from led_model import LEDConfig, LEDForConditionalGeneration, LEDTokenizer
from led_model.batch import Document, run_documents
from led_model.batch.pieces import Piece
from led_model.batch.tasks import Result, Task
from led_model.terminal import quiet
from led_model.tokenization.batch_encoding import BatchEncoding

OWN, ALONE = "led_model", "one at a time"
FILE_ORDER = {size: f"file order, batch {size}" for size in (8, 32)}
SHAPE = Shape(seqlen=4096, heads=4, head_dim=48, window=32, layers=2, ffn_dim=768)
_DOCUMENTS, _MEDIAN, _SIGMA = 256, 160, 1.0  # of the documents' lengths, in tokens


class Reader(Task[LEDForConditionalGeneration]):
    """Returns the state of each document's first token, which is global and sees all of it, float ``[d_model]``."""

    writes = True  # so that the encoder's positions bound what is read

    def _run(self, pieces: Sequence[Piece], inputs: BatchEncoding) -> list[Result]:
        return [{"state": states[0]} for states in self.model.led.encode(**inputs)]

    def join(self, document: Document, found: Sequence[Result]) -> Result:
        return found[0]


class _Counter(Reader):
    """Reads nothing: only its ``work`` is of interest."""

    def _run(self, pieces: Sequence[Piece], inputs: BatchEncoding) -> list[Result]:
        return [{} for _ in pieces]


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else SHAPE
    cases = [
        Case("read", name, FORWARD, functools.partial(_prepare, read), truth, flop=_flop(shape, read))
        for name, read in PROVIDERS.items()
    ]
    return [Group(f"documents_{shape.seqlen}", shape, tuple(cases))]


@functools.lru_cache(maxsize=1)
def documents(shape: Shape) -> list[Document]:
    """Returns texts of lognormal lengths, of a token a letter."""
    draw = random.Random(0)
    texts = []
    for _ in range(_DOCUMENTS if shape == SHAPE else 20):
        length = min(shape.seqlen, max(8, int(_MEDIAN * draw.lognormvariate(0, _SIGMA))))
        texts.append("".join(draw.choices(string.ascii_lowercase, k=length - 2)))
    return [Document(number, "corpus", text, len(text)) for number, text in enumerate(texts)]


@functools.lru_cache(maxsize=1)
def truth(shape: Shape) -> dict[str, Tensor]:
    """Returns the states in fp64, of documents that were read one at a time."""
    return {"states": _stacked(_one_at_a_time(_task(shape, Reader, torch.float64), documents(shape)))}


def _prepare(read: Callable[[Task, list[Document]], list[Result]], shape: Shape) -> Call:
    task = _task(shape, Reader)
    return lambda: {"states": _stacked(read(task, documents(shape)))}


def _stacked(results: list[Result]) -> Tensor:
    return torch.stack([result["state"] for result in results])


def _flop(shape: Shape, read: Callable[[Task, list[Document]], list[Result]]) -> int:
    """Counts the operations of the linear layers over the rows that ``read`` computes."""
    task = _task(shape, _Counter)
    read(task, documents(shape))
    per_row = shape.layers * (4 * shape.d_model**2 + 2 * shape.d_model * shape.ffn_dim)
    return 2 * per_row * task.work.padded_tokens


def _task(shape: Shape, task_class: type[Reader], dtype: torch.dtype = torch.float32) -> Reader:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = _make_tokenizer(Path(directory))
    config = LEDConfig(**encoder.config_of(shape) | {"vocab_size": len(tokenizer)})
    return task_class(LEDForConditionalGeneration(config).to(dtype).eval(), tokenizer)


def _make_tokenizer(directory: Path) -> LEDTokenizer:
    """Returns a tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return LEDTokenizer.from_pretrained(directory)


def _in_file_order(batch_size: int, task: Task, texts: list[Document]) -> list[Result]:
    """Reads batches of a fixed size, and tokenizes each before it is read."""
    found: list[Result] = []
    for begin in range(0, len(texts), batch_size):
        batch = texts[begin : begin + batch_size]
        found += task.run([piece for text in batch for piece in task.reader.pieces(text)])
    return found


_one_at_a_time = functools.partial(_in_file_order, 1)


def _as_led_does(task: Task, texts: list[Document]) -> list[Any]:
    with quiet():
        return [outcome.result for outcome in run_documents(task, texts, in_order=True)]


PROVIDERS: dict[str, Callable[[Task, list[Document]], list[Result]]] = {
    OWN: _as_led_does,
    ALONE: _one_at_a_time,
    **{name: functools.partial(_in_file_order, size) for size, name in FILE_ORDER.items()},
}


def figures(run: Run) -> Iterator[Figure]:
    for group in run.groups("documents"):
        seqlen = seqlen_of(group)
        own, alone = run.row(group, "read", OWN), run.row(group, "read", ALONE)
        rows = ratio(own, alone, "flop")
        yield Figure("documents (led_model), rows computed ÷ real", seqlen, 1.05, rows, is_limit=True)
        fixed = run.row(group, "read", FILE_ORDER[8])
        yield Figure(f"documents (led_model) vs {FILE_ORDER[8]}", seqlen, 2.0, ratio(fixed, own), unit=" ×")


def floors(run: Run) -> list[str]:
    """Returns for each kind of batches how many times the real rows it computes, and its time."""
    lines = []
    for group in run.groups("documents"):
        alone = run.row(group, "read", ALONE)
        for name in PROVIDERS:
            row = run.row(group, "read", name)
            if (rows := ratio(row, alone, "flop")) is not None and row is not None:
                lines.append(f"{name:24}{rows:8.3f}{row.median_ms:12.1f}")
    return ["documents: rows computed ÷ real, time (ms, median)", *lines] if lines else []


SUITE = Suite("documents", "many documents of lognormal lengths through one encoder", groups, figures, floors)
