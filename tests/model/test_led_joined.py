"""Documents of several parts, from ``--join`` and from JSON lines, with PRIMERA's ``<doc-sep>`` and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from led_model import LEDForConditionalGeneration, LEDForQuestionAnswering
from led_model.batch.documents import Document
from led_model.batch.pieces import Reader
from led_model.tokenization.tokenizer import LEDTokenizer
from tests.model.commands import TEXT, led, records, written

PARTS = ["The first text.", "A <doc-sep> in </s> a text.", "The last one."]


@pytest.fixture
def save_primera(save):
    """``save``, whose tokenizer has ``<doc-sep>`` besides, with id 300."""

    def make(model_class=LEDForConditionalGeneration) -> Path:
        directory = save(model_class, vocab_size=301)
        tokenizer = LEDTokenizer.from_pretrained(directory)
        tokenizer.tokenizer.add_special_tokens(["<doc-sep>"])
        tokenizer.save_pretrained(directory)
        assert LEDTokenizer.from_pretrained(directory).doc_sep_token_id == 300
        return directory

    return make


@pytest.fixture(autouse=True)
def part_files(tmp_path, monkeypatch):
    """The working directory has 0.txt, 1.txt and 2.txt, and the same parts as the one line of parts.jsonl."""
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(PARTS):
        Path(f"{number}.txt").write_text(text)
    Path("parts.jsonl").write_text(json.dumps({"id": "p", "text": PARTS}))


def separated(directory: Path, num_globals: int) -> dict[str, torch.Tensor]:
    """Returns what a PRIMERA model reads: the parts' own ids, in which nothing is special, with 300 between them."""
    tokenizer = LEDTokenizer.from_pretrained(directory)
    ids = [tokenizer.cls_token_id]
    for part in PARTS:
        own = tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids
        assert 300 not in own
        ids += [*own, 300]
    ids[-1] = tokenizer.sep_token_id
    is_global = [index < num_globals or token == 300 for index, token in enumerate(ids)]
    assert sum(is_global) == 2 + num_globals
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "global_attention_mask": torch.tensor([is_global]).long(),
    }


@pytest.mark.parametrize("num_globals", [0, 1])
def test_separators(save_primera, capsys, num_globals):
    directory = save_primera()
    batch = separated(directory, num_globals)
    ids = LEDForConditionalGeneration.from_pretrained(directory).generate(**batch, max_new_tokens=20)
    expected = LEDTokenizer.from_pretrained(directory).decode(ids[0], skip_special_tokens=True).strip() + "\n"
    flags = ["--model", directory, "--max-new-tokens", 20, "--global-tokens", num_globals]
    assert led("summarize", "0.txt", "1.txt", "2.txt", "--join", *flags) == 0
    assert capsys.readouterr().out == expected
    assert led("summarize", "parts.jsonl", *flags) == 0
    assert capsys.readouterr().out == expected


def test_a_tokenizer_without_separators(save, capsys):
    directory = save()
    flags = ["--model", directory, "--max-new-tokens", 20]
    assert led("summarize", "0.txt", "1.txt", "2.txt", "--join", *flags) == 0
    assert capsys.readouterr().out == written(directory, "\n\n".join(PARTS), max_new_tokens=20) + "\n"


def test_batches_of_documents_with_and_without_parts(save_primera):
    """Separators are global in their own row only."""
    tokenizer = LEDTokenizer.from_pretrained(save_primera())
    reader = Reader(tokenizer, 999)
    documents = [Document.of_parts(1, "x", PARTS, 0), Document.of_parts(2, "x", [TEXT * 2], 0)]
    batch = reader.batch([piece for d in documents for piece in reader.pieces(d)], "cpu")
    separators = batch.input_ids == 300
    assert separators.sum(1).tolist() == [2, 0]
    expected = separators.long()
    expected[:, 0] = 1
    assert torch.equal(batch.global_attention_mask.clamp(min=0), expected)


def test_characters_of_tokens(save_primera):
    """Offsets count in the whole text, also behind a separator: an answer is found where it is."""
    tokenizer = LEDTokenizer.from_pretrained(save_primera())
    document = Document.of_parts(1, "x", PARTS, 0)
    [piece] = Reader(tokenizer, 999).pieces(document)
    assert [begin for begin, _ in piece.offsets] == sorted(begin for begin, _ in piece.offsets)
    for token, (begin, end) in zip(piece.input_ids[piece.first :], piece.offsets, strict=False):
        text = "\n\n" if token == 300 else tokenizer.decode([token])
        assert document.text[begin:end].strip() == text.strip()


def test_an_answer_from_parts(save_primera):
    directory = save_primera(LEDForQuestionAnswering)
    flags = ["--model", directory, "--question", "Who?", "--output", "out.jsonl"]
    assert led("answer", "parts.jsonl", *flags) == 0
    [record] = records()
    assert record["answer"]
    assert "\n\n".join(PARTS)[record["start"] : record["end"]] == record["answer"]


def test_long_parts_are_cut_between(save_primera):
    """A piece ends where a part does, if it can."""
    tokenizer = LEDTokenizer.from_pretrained(save_primera())
    parts = ["One. Two. Three. Four. " + "a" * 20, "Five. " * 9]
    first = len(tokenizer(parts[0]).input_ids) + 1  # with the separator
    pieces = Reader(tokenizer, first + 6, "chunk").pieces(Document.of_parts(1, "x", parts, 0))
    assert len(pieces) > 1
    assert pieces[0].input_ids[-2] == 300
    assert all(300 not in piece.input_ids for piece in pieces[1:])
    assert sum(len(piece.offsets) for piece in pieces) == first - 2 + len(
        tokenizer(parts[1], add_special_tokens=False).input_ids
    )


def test_a_missing_part_joins_nothing(save, capsys):
    Path("1.txt").write_bytes(b"\xff\xfe\x00")
    flags = ["--join", "--model", save(), "--output", "out.jsonl"]
    assert led("summarize", "0.txt", "1.txt", "2.txt", *flags) == 3
    error = capsys.readouterr().err
    assert "1.txt is not UTF-16" in error
    assert "nothing is joined, for a part is missing" in error
    assert led("summarize", "0.txt", "gone.txt", "2.txt", *flags) == 3
    assert "gone.txt is not there" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_a_joined_record(save):
    """It names its files, and the same command has nothing left to do."""
    command = ["summarize", "0.txt", "parts.jsonl", "--join", "--model", save(), "--max-new-tokens", 3]
    for _ in range(2):
        assert led(*command, "--output", "out.jsonl") == 0
        [record] = records()
        assert record["id"] == record["source"] == "0.txt + parts.jsonl"


@pytest.mark.parametrize("text", [[], ["a", " "], ["a", 5], ["a", ["b"]]], ids=str)
def test_lists_that_are_no_texts(save, capsys, text):
    Path("bad.jsonl").write_text(json.dumps({"text": text}))
    assert led("summarize", "bad.jsonl", "--model", save()) == 3
    assert "bad.jsonl line 1 has no text in 'text'; give a string that is not blank, or a list" in (
        capsys.readouterr().err
    )


def test_parts_are_known_from_the_same_text_in_one():
    """The one is read with separators and the other without: a result of one is none of the other."""
    documents = [
        Document.of_parts(1, "x", parts, 0) for parts in (["a", "b", "c"], ["a\n\nb", "c"], ["a\n\nb\n\nc"])
    ]
    assert len({document.text for document in documents}) == 1
    assert len({document.key for document in documents}) == 3


def test_long_parts_are_cut_short(save_primera, capsys):
    """As many tokens as the model reads, from parts of which the last is not encoded at all."""
    tokenizer = LEDTokenizer.from_pretrained(save_primera())
    parts = ["One. " * 9, "Two. " * 9, "Three. " * 9]
    whole = Reader(tokenizer, 999).pieces(Document.of_parts(1, "x", parts, 0))[0].input_ids
    room = whole.index(300) + 5
    [piece] = Reader(tokenizer, room, "truncate").pieces(Document.of_parts(1, "x", parts, 0))
    assert piece.input_ids == [*whole[: room - 1], tokenizer.sep_token_id]
    assert piece.is_truncated
    assert f"reading the first {room} of more than {room} tokens" in capsys.readouterr().err
