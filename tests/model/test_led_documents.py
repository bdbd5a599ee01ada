"""Finding and reading documents, cutting long ones, and the file of results."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from led_model.documents import Document, Unreadable, find_sources
from led_model.pieces import split
from led_model.results import ResultFile

NAMES = ["b.txt", "a.MD", "sub/c.jsonl", "sub/deep/d.txt", "sub/table.csv", ".hidden/e.txt"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in NAMES:
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["docs"], ["docs/a.MD", "docs/b.txt", "docs/sub/c.jsonl", "docs/sub/deep/d.txt"]),
        (["docs/b.txt", "./docs/sub/", "docs/**/*.txt"], ["docs/b.txt", "docs/sub/c.jsonl", "docs/sub/deep/d.txt"]),
        (["docs/**/*.txt"], ["docs/b.txt", "docs/sub/deep/d.txt"]),
        (["docs/*"], ["docs/a.MD", "docs/b.txt"]),
        (["docs/sub/table.csv", "-"], ["docs/sub/table.csv", "-"]),
    ],
)  # fmt: skip
def test_inputs(tree, inputs, expected):
    sources, problems = find_sources(inputs)
    assert [source.path for source in sources] == expected
    assert not problems
    assert [source.is_jsonl for source in sources] == [path.endswith(".jsonl") for path in expected]


def test_inputs_that_name_nothing(tree):
    os.mkdir("empty")
    sources, problems = find_sources(["gone.txt", "docs/b.txt", "*.md", "empty"], leave_out="docs/b.txt")
    assert not sources
    for problem, message in zip(
        problems, ["gone.txt is not there", "names nothing but the --output", "matches no file", "holds no .txt"],
        strict=True,
    ):  # fmt: skip
        assert message in problem
    sources, _ = find_sources(["docs"], leave_out="docs/b.txt")
    assert "docs/b.txt" not in [source.path for source in sources]
    assert len(sources) == 3


JSON_LINES = [
    (b'\xef\xbb\xbf{"id": "x", "text": "one"}', ("x", "one")),
    (b"  ", None),
    (b'{"text": "three", "id": null}', (3, "three")),
    (b"{bad", "line 4 is not valid JSON"),
    (b'{"text": "\xff"}', "line 5 is not UTF-8 at byte 10"),
    (b'{"id": "x", "text": "six"}', "line 6 has the id of line 1, 'x'"),
    (b'{"body": "seven"}', "line 7 has no 'text' but 'body'; name the text with --text-field"),
    (b"[1]", "line 8 holds a list"),
    (b'{"text": " "}', "line 9 has no text in 'text'"),
    (b'{"text": 5}', "line 10 has no text in 'text'"),
    (b'{"text": "\\ud800"}', "line 11 holds half of a surrogate pair"),
    (b'{"text": "a", "id": [1]}', "line 12 has the id"),
    (b'{"text": "\\ud83d\\ude42", "id": 3.5}', "line 13 has the id 3.5"),
    (b'{"text": "last, without a newline"}', (14, "last, without a newline")),
]


def test_json_lines(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in JSON_LINES))
    [source], _ = find_sources([str(path)])
    documents = list(source.read())
    assert source.extent[0] == len(documents) == len(JSON_LINES) - 1
    for document, expected in zip(documents, [e for _, e in JSON_LINES if e is not None], strict=True):
        if isinstance(expected, tuple):
            assert isinstance(document, Document)
            assert (document.id, document.text) == expected
        else:
            assert isinstance(document, Unreadable)
            assert expected in document.message
            assert str(path) in document.message
            assert document.message.count("\n") == 0
    assert sum(document.size for document in documents) == source.extent[1]


def test_what_cannot_be_opened(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    [source], _ = find_sources([str(path)])
    path.unlink()
    path.mkdir()
    assert source.extent[0] == 1
    [document] = source.read()
    assert "cannot be read (Is a directory)" in document.message


def test_a_pipe_is_read_once(tmp_path):
    """As the shell's ``<(command)``: what was counted is still there."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(
        target=path.write_bytes, args=[b'{"text": "one"}\n{"text": "two"}\n'], daemon=True
    )
    writer.start()
    [source], _ = find_sources([str(path)], jsonl=True)
    assert source.extent[0] == 2
    assert [document.text for document in source.read()] == ["one", "two"]
    writer.join()


def document(document_id: str | int = "a.txt", source: str = "a.txt") -> Document:
    return Document(document_id, source, "text", 4)


def test_results_are_found_again(tmp_path):
    path = str(tmp_path / "out.jsonl")
    records = [{"id": name, "source": "c.jsonl", "summary": "ü\n☕"} for name in ("x", 7)]
    with ResultFile(path, "summary") as results:
        for record in records:
            results.append(record)
            assert Path(path).read_text("utf-8").endswith(json.dumps(record, ensure_ascii=False) + "\n")
    with ResultFile(path, "summary") as results:
        assert results.has(document("x", "c.jsonl"))
        assert results.has(document(7, "c.jsonl"))
        assert not results.has(document("x", "d.jsonl"))
        assert not results.has(document())


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_cut_line_is_dropped(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    line = json.dumps({"id": "a.txt", "source": "a.txt", "summary": "a"}).encode() + b"\n"
    other = line.replace(b"a.txt", b"b.txt")
    path.write_bytes(line + other[:-cut])
    with ResultFile(str(path), "summary") as results:
        assert results.has(document())
        assert not results.has(document("b.txt", "b.txt"))
        results.append(json.loads(other))
    assert path.read_bytes() == line + other


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ("no JSON\n", "summary", "line 1 is no result of this command, with a 'summary'"),
        ('{"id": 1, "source": "a", "summary": ""}\n[]\n', "summary", "line 2 is no result"),
        ('{"id": 1, "source": "a", "summary": ""}\n', "label", "line 1 is no result of this command"),
    ],
)
def test_other_files_are_left_alone(tmp_path, content, field, message):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        ResultFile(str(path), field)
    assert path.read_text() == content


def test_output_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the directory of --output .* is not there"):
        ResultFile(str(tmp_path / "gone" / "out.jsonl"), "summary")
    with pytest.raises(OSError, match="cannot be written"):
        ResultFile(str(tmp_path), "summary")


def test_results_of_another_question_do_not_count(tmp_path):
    path = str(tmp_path / "out.jsonl")
    with ResultFile(path, "answer", "Who?") as results:
        results.append({"id": "a.txt", "source": "a.txt", "question": "Who?", "answer": "I"})
    with ResultFile(path, "answer", "When?") as results:
        assert not results.done
    with ResultFile(path, "answer", "Who?") as results:
        assert results.has(document())


def words(text: str) -> list[tuple[int, int]]:
    """Offsets of words as tokens: without the space before them, as the tokenizer's."""
    return [match.span() for match in re.finditer(r"\S+", text)]


@pytest.mark.parametrize(
    ("text", "room", "expected"),
    [
        ("a b c d", 4, ["a b c d"]),
        ("a b c d e f g h.", 4, ["a b c d", "e f g h."]),
        ("a b c d e f g. h i j k", 8, ["a b c d e f g.", "h i j k"]),
        ("a b c d e f g.\n\nh. i j k", 8, ["a b c d e f g.", "h. i j k"]),  # a paragraph before a sentence
        ("a b. c d e f g\nh i j", 8, ["a b. c d e f g", "h i j"]),  # the sentence's end comes too early
    ],
)
def test_cuts_are_at_boundaries(text, room, expected):
    offsets = words(text)
    spans = split(text, offsets, room)
    assert [text[offsets[start][0] : offsets[stop - 1][1]] for start, stop in spans] == expected


@given(text=st.text(alphabet="ab. \n", max_size=80), room=st.integers(1, 20), by_character=st.booleans())
def test_cuts_lose_nothing(text, room, by_character):
    offsets = [(i, i + 1) for i in range(len(text))] if by_character else words(text)
    spans = split(text, offsets, room)
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(len(offsets)))
    assert all(0 < stop - start <= room for start, stop in spans)
    assert all(4 * (stop - start) >= 3 * room for start, stop in spans[:-1])
