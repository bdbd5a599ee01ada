"""Finding and reading documents, cutting long ones, and the file of results."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from led_model.batch.documents import Document, Unreadable
from led_model.batch.pieces import split
from led_model.cli.finding import find_sources
from led_model.cli.results import ResultFile

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
    sources, problems = find_sources(["gone.txt", "docs/b*.txt", "*.md", "empty"], leave_out="docs/b.txt")
    assert not sources
    for problem, message in zip(
        problems, ["gone.txt is not there", "names nothing but the --output", "matches no file", "holds no .txt"],
        strict=True,
    ):  # fmt: skip
        assert message in problem
    with pytest.raises(ValueError, match=r"docs/b\.txt is the --output, too"):
        find_sources(["docs", "docs/../docs/b.txt"], leave_out="docs/b.txt")
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
    assert len(documents) == len(JSON_LINES) - 1
    for document, expected in zip(documents, [e for _, e in JSON_LINES if e is not None], strict=True):
        if isinstance(expected, tuple):
            assert isinstance(document, Document)
            assert (document.id, document.text) == expected
        else:
            assert isinstance(document, Unreadable)
            assert expected in document.message
            assert str(path) in document.message
            assert document.message.count("\n") == 0
    assert sum(document.size for document in documents) == source.size - 3  # without the blank line


def test_what_cannot_be_opened(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    [source], _ = find_sources([str(path)])
    path.unlink()
    path.mkdir()
    assert source.size == 0
    [document] = source.read()
    assert "cannot be read (Is a directory)" in document.message


def test_a_pipe_is_read_once(tmp_path):
    """As the shell's ``<(command)``: whoever asks for its size takes nothing away."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(
        target=path.write_bytes, args=[b'{"text": "one"}\n{"text": "two"}\n'], daemon=True
    )
    writer.start()
    [source], _ = find_sources([str(path)], jsonl=True)
    assert source.size == 0
    assert not source.is_file
    assert [document.text for document in source.read()] == ["one", "two"]
    writer.join()


def document(document_id: str | int = "a.txt", source: str = "a.txt", text: str = "text") -> Document:
    return Document(document_id, source, text, len(text))


MADE_BY = {"command": "summarize", "model": "./led", "model's fingerprint": "12ab", "--long": "error"}


def line_of(text: str, name: str = "a.txt", **others) -> bytes:
    """Returns a record as it is written."""
    record = {"led": "summarize", "id": name, "source": name, "summary": "ü\n☕"}
    record |= {"document": document(name, name, text).key, "made_by": MADE_BY} | others
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def test_results_are_found_again(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(str(path), MADE_BY) as results:
        for text in ("one", "two"):
            results.append(document(text=text), {"summary": "ü\n☕"})
            assert path.read_bytes().endswith(line_of(text))
    with ResultFile(str(path), MADE_BY | {"model": "/elsewhere/led"}) as results:
        assert results.count == 2
        record = results.take(document("b.txt", "/home/b.txt", "two"))  # by its text, whatever its name
        assert record == json.loads(line_of("two"))
        assert not results.take(document("b.txt", "b.txt", "two"))  # which one record is not enough for
        assert results.has_changed(document(text="three"))
        assert not results.take(document(text="three"))
        assert not results.has_changed(document("b.txt", "b.txt", "three"))


def test_documents_with_ids_of_their_own_keep_them(tmp_path):
    """Two of one text are two."""
    path = str(tmp_path / "out.jsonl")
    same = [Document(name, "c.jsonl", "text", 9, has_own_id=True) for name in ("x", "y", 7)]
    with ResultFile(path, MADE_BY) as results:
        results.append(same[1], {"summary": ""})
    with ResultFile(path, MADE_BY) as results:
        assert [results.take(one) is not None for one in same] == [False, True, False]


def test_a_cut_line_is_dropped_once_the_next_result_is_there(tmp_path):
    path, whole, next_line = tmp_path / "out.jsonl", line_of("one"), line_of("two", "b.txt")
    for size in range(len(next_line)):
        path.write_bytes(whole + next_line[:size])
        with ResultFile(str(path), MADE_BY) as results:
            assert results.count == 1 + (size == len(next_line) - 1)  # all but the newline is a result
        assert path.read_bytes() == whole + next_line[:size]
        with ResultFile(str(path), MADE_BY) as results:
            if not results.take(document("b.txt", "b.txt", "two")):
                results.append(document("b.txt", "b.txt", "two"), {"summary": "ü\n☕"})
            results.append(document(text="three"), {"summary": "ü\n☕"})
        assert path.read_bytes() == whole + next_line + line_of("three")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no JSON\n", "line 1 is no result of this program"),
        (b'{"id":1,"text":"only copy"}', "line 1 is no result of this program"),
        (b'{"id": 1, "source": "a", "summary": ""}\n', "line 1 is no result of this program"),
        (b"my notes, without an end of line", "line 1 is no result of this program"),
        (line_of("one") + b"[]\n", "line 2 is no result of this program"),
        (line_of("one") + b'{"id":1,"text":"only copy"}', "line 2 is no result of this program"),
        (b"[" * 10**5, "line 1 is no result of this program"),
        (line_of("one", made_by=MADE_BY | {"--long": "chunk"}), "line 1 was made with --long 'chunk' and this run"),
        (line_of("one", made_by=MADE_BY | {"--dtype": "float16"}), "--dtype 'float16' and this run has None"),
        (line_of("one", made_by=MADE_BY | {"model's fingerprint": "0"}), "give --overwrite to begin it anew"),
    ],
)  # fmt: skip
def test_other_files_are_left_alone(tmp_path, content, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        ResultFile(str(path), MADE_BY)
    assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", line_of("three")[:40]], ids=["whole", "torn"])
def test_overwrite_replaces_once_there_is_something_to_replace_by(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    earlier = line_of("one") + line_of("two", made_by={"--long": "chunk"}) + torn
    path.write_bytes(earlier)
    with ResultFile(str(path), MADE_BY, overwrite=True) as results:
        assert not results.take(document(text="one"))
        assert path.read_bytes() == earlier
        results.append(document(text="one"), {"summary": "ü\n☕"})
    assert path.read_bytes() == line_of("one")


@pytest.mark.parametrize(
    "content",
    [b"anything", line_of("one") + b"my notes\n", b'{"led": "blue", "on": true}', b'{"led": "summarize"}'],
)
def test_overwrite_is_no_leave_to_lose_what_is_not_ours(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is no result of this program"):
            ResultFile(str(path), MADE_BY, overwrite=overwrite)
    assert path.read_bytes() == content


def test_a_link_to_nothing_is_not_taken_away(tmp_path):
    link = tmp_path / "out.jsonl"
    link.symlink_to("there.jsonl")
    with ResultFile(str(link), MADE_BY):
        pass
    assert link.is_symlink()
    assert not link.exists()
    with ResultFile(str(link), MADE_BY) as results:
        results.append(document(text="one"), {"summary": "ü\n☕"})
    assert (tmp_path / "there.jsonl").read_bytes() == line_of("one")


@pytest.mark.parametrize(
    "change", [lambda d: d[:-5], lambda d: d + b"{}\n", lambda d: b""], ids=["cut", "longer", "empty"]
)
def test_what_another_program_does_to_the_output_is_noticed(tmp_path, change):
    path = tmp_path / "out.jsonl"
    path.write_bytes(line_of("one") + line_of("two")[:30])  # of which the next result would cut off the rest
    with ResultFile(str(path), MADE_BY) as results:
        damaged = change(path.read_bytes())
        path.write_bytes(damaged)
        for use in (
            lambda: results.append(document(text="three"), {"summary": ""}),
            lambda: results.take(document(text="one")),
            results.check_unchanged,
        ):
            with pytest.raises(OSError, match="was changed by another program during the run"):
                use()
    assert path.read_bytes() == damaged


def test_an_output_that_cannot_be_locked_is_said_to_be(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with ResultFile(str(tmp_path / "out.jsonl"), MADE_BY) as results:
        results.append(document(text="one"), {"summary": ""})
    assert "cannot be locked (No locks available); let no other run write into it" in capsys.readouterr().err


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the directory of --output .* is not there"):
        ResultFile(str(tmp_path / "gone" / "out.jsonl"), MADE_BY)
    for path in (str(tmp_path), "/dev/null", "/dev/full", "/dev/zero", "-"):
        with pytest.raises(OSError, match="is no regular file; give one"):
            ResultFile(path, MADE_BY)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_got_nothing_is_not_left(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultFile(str(path), MADE_BY):
        assert path.exists()
    assert not path.exists()
    path.touch()
    with ResultFile(str(path), MADE_BY):
        pass
    assert path.exists()  # but it is not ours to take away


def test_two_runs_on_one_output(tmp_path):
    path = str(tmp_path / "out.jsonl")
    with (
        ResultFile(path, MADE_BY),
        pytest.raises(OSError, match="is being written by another process; wait for it"),
    ):
        ResultFile(path, MADE_BY)
    with ResultFile(path, MADE_BY):
        pass


def test_the_second_of_two_runs_that_began_at_once_takes_nothing_away(tmp_path, monkeypatch):
    """Neither saw the file when it looked."""
    path = tmp_path / "out.jsonl"
    with ResultFile(str(path), MADE_BY) as results:
        monkeypatch.setattr("os.path.exists", lambda path: False)
        with pytest.raises(OSError, match="is being written by another process"):
            ResultFile(str(path), MADE_BY)
        results.append(document(text="one"), {"summary": "ü\n☕"})
    assert path.read_bytes() == line_of("one")


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_an_output_that_goes_during_the_run(tmp_path, how):
    path = tmp_path / "out.jsonl"
    with ResultFile(str(path), MADE_BY) as results:
        results.append(document(text="one"), {"summary": ""})
        path.unlink()
        if how == "replaced":
            path.write_text("of another")
        with pytest.raises(OSError, match="was deleted, moved or replaced during the run"):
            results.append(document(text="two"), {"summary": ""})
    assert path.exists() == (how == "replaced")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    with ResultFile(str(path), MADE_BY) as results:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr("os.fsync", Mock(side_effect=full))
        with pytest.raises(
            OSError, match=r"--output .*out\.jsonl cannot be written \(No space left on device\)"
        ):
            results.append(document(text="one"), {"summary": ""})


def test_results_of_another_question_do_not_count(tmp_path):
    path = str(tmp_path / "out.jsonl")
    with ResultFile(path, MADE_BY, "Who?") as results:
        results.append(document(), {"question": "Who?", "answer": "I"})
    with ResultFile(path, MADE_BY, "When?") as results:
        assert results.count == 0
    with ResultFile(path, MADE_BY, "Who?") as results:
        assert results.take(document())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.7 ...", "is a PDF; run pdftotext on it"),
        (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
        (b"PK\x03\x04....", "is an archive or an office document"),
    ],
)
def test_other_formats_are_named(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    ((source,), _) = find_sources([str(path)])
    (unreadable,) = source.read()
    assert isinstance(unreadable, Unreadable)
    assert message in unreadable.message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_byte_order_marks(tmp_path, encoding):
    path = tmp_path / "a.txt"
    mark = "" if encoding in ("utf-16", "utf-8-sig") else "\ufeff"
    path.write_bytes((mark + "Grüße ☕").encode(encoding))
    ((source,), _) = find_sources([str(path)])
    (read,) = source.read()
    assert read.text == "Grüße ☕"


def test_endless_inputs_are_read_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("led_model.batch.documents.MAX_BYTES", 2**16)
    monkeypatch.setattr("led_model.batch.documents._MAX_SKIPPED", 2**18)
    for jsonl in (False, True):
        ((source,), _) = find_sources(["/dev/zero"], jsonl=jsonl)
        first, *others = source.read()
        assert "MiB of text; split it" in first.message
        assert ["what may follow is not read" in one.message for one in others] == [True] * jsonl


def test_a_line_that_is_too_long_takes_no_other_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("led_model.batch.documents.MAX_BYTES", 2**16)
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 2**17 + '"}\n{"text": "c"}\n')
    ((source,), _) = find_sources([str(path)])
    first, long, last = source.read()
    assert (first.text, last.text) == ("a", "c")
    assert "line 2 holds more than" in long.message


@pytest.mark.parametrize(
    ("line", "faults"),
    [("no JSON\n", 20), ('{"body": "text"}\n', 20), ("\n", 0)],
    ids=["text", "field", "blank"],
)
def test_a_file_of_no_documents_is_read_no_further(tmp_path, line, faults):
    path = tmp_path / "no.jsonl"
    path.write_text(line * 20_000 + '{"text": "a"}\n')
    ((source,), _) = find_sources([str(path)])
    *each, last = source.read()
    assert len(each) == faults
    assert "holds no document in" in last.message
    path.write_text('{"text": "a"}\n' + line * 30 + '{"text": "b"}\n')
    assert [one.text for one in source.read() if isinstance(one, Document)] == ["a", "b"]


def test_lines_without_ids_do_not_clash_with_ids(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 2, "text": "a"}\n{"text": "b"}\n')
    ((source,), _) = find_sources([str(path)])
    assert [one.text for one in source.read()] == ["a", "b"]


def test_nul_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    for data in (b"\0" * 9, "text".encode("utf-16-le"), b"text\0"):
        path.write_bytes(data)
        ((source,), _) = find_sources([str(path)])
        assert "holds NUL at character" in next(source.read()).message


def test_a_pipe_that_nobody_writes_into_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("led_model.batch.pipe._WAIT_MILLISECONDS", 50)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    ((source,), _) = find_sources([str(path)])
    assert "is a pipe that nobody writes into" in next(source.read()).message


def test_a_slow_writer_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("led_model.batch.pipe._WAIT_MILLISECONDS", 50)
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("w") as pipe:
            time.sleep(0.3)
            pipe.write("a text")

    writer = threading.Thread(target=write)
    end = os.open(path, os.O_RDWR)  # so that there is a writer from the beginning
    writer.start()
    ((source,), _) = find_sources([str(path)])
    reader = source.read()
    threading.Timer(0.5, os.close, [end]).start()
    assert next(reader).text == "a text"
    writer.join()


def test_links_are_followed_once(tree):
    """Also where they lead back, which makes as many ways as there are links to the power of the depth."""
    for name in ("one", "two", "three"):
        os.symlink(".", f"docs/{name}")
    os.symlink("sub", "docs/linked")
    expected = ["docs/b.txt", "docs/sub/deep/d.txt"]
    for item in ("docs/**/*.txt", "**/*.txt"):
        sources, problems = find_sources([item])
        assert sorted(os.path.realpath(source.path) for source in sources) == [
            os.path.realpath(p) for p in expected
        ]
        assert not problems
    sources, problems = find_sources(["docs"])
    assert len(sources) == 4
    assert not problems
    os.link("docs/b.txt", "docs/hard.txt")
    assert len(find_sources(["docs"])[0]) == 4


def test_what_cannot_be_looked_into_is_said(tree, monkeypatch):
    os.symlink("nowhere", "docs/gone.txt")
    os.symlink("circle.txt", "docs/circle.txt")
    listdir = os.listdir

    def refusing(path: str) -> list[str]:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listdir(path)

    monkeypatch.setattr("os.listdir", refusing)
    sources, problems = find_sources(["docs"])
    assert [source.path for source in sources] == ["docs/a.MD", "docs/b.txt"]
    assert any("docs/sub cannot be looked into (Permission denied)" in problem for problem in problems)
    assert sum("leads to no file that can be reached" in problem for problem in problems) == 2
    sources, problems = find_sources(["docs/**/*.txt"])
    assert [source.path for source in sources] == ["docs/b.txt"]
    assert problems == ["docs/sub cannot be looked into (Permission denied); check its permissions."]


def test_the_output_is_no_input_by_any_name(tree):
    os.link("docs/b.txt", "hard.txt")
    os.symlink("docs/b.txt", "soft.txt")
    for name in ("hard.txt", "soft.txt", "./docs/b.txt"):
        for item in ("docs/b.txt", "hard.txt", "soft.txt"):
            with pytest.raises(ValueError, match="is the --output, too"):
                find_sources([item], leave_out=name)
        assert find_sources(["*.txt"], leave_out=name) == (
            [],
            ["*.txt names nothing but the --output itself; give another."],
        )


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
