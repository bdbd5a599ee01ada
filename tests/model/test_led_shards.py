"""``--shard``: several runs of one command that do all its documents together, and none twice."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest

from led_model.cli.finding import find_sources
from led_model.cli.results import ResultFile
from led_model.cli.shards import Shard, shard
from tests.model.commands import TEXT, inputs, led, records

FLAGS = ["--max-new-tokens", 3]


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> list[tuple[str, str | int]]:
    """The working directory has texts and JSON lines; returns all documents by source and id."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    found: list[tuple[str, str | int]] = []
    draw = random.Random(0)
    for number in range(7):
        Path(f"docs/{number}.txt").write_text(f"Text {number}.")
        found.append((f"docs/{number}.txt", f"docs/{number}.txt"))
    for name, count in (("a", 11), ("b", 1), ("c", 23)):
        lines = []
        for number in range(count):
            lines += [""] * draw.randint(0, 2) + [
                json.dumps({"id": f"{name}{number}", "text": f"{name} {number}"})
            ]
            found.append((f"docs/{name}.jsonl", f"{name}{number}"))
        Path(f"docs/{name}.jsonl").write_text("\n".join(lines))
    return found


def documents_of(part: Shard, *items: str) -> list[tuple[str, str | int]]:
    sources, problems = find_sources(items or ["docs"])
    assert not problems
    return [(one.source, one.id) for source in part.own(sources) for one in source.read()]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 60])
def test_each_document_belongs_to_one_shard(corpus, count):
    """And no shard has many more than another."""
    shares = [documents_of(Shard(number, count)) for number in range(1, count + 1)]
    assert sorted(document for share in shares for document in share) == sorted(corpus)
    sizes = list(map(len, shares))
    assert max(sizes) - min(sizes) <= 4  # files: those of text together, and three of JSON lines


def test_eight_files_are_one_for_each_of_eight(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(TEXT)
    shares = [documents_of(Shard(number, 8), str(tmp_path)) for number in range(1, 9)]
    assert [[source[-5] for source, _ in share] for share in shares] == [[str(n)] for n in range(8)]


def test_lines_of_other_shards_are_not_parsed(tmp_path):
    """Whatever they hold: they are no failures of this run, and the numbers of lines are those of the file."""
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "one"}', "{bad", '{"text": "three"}', "[" * 10**5, '{"text": "five"}', "\xff"]
    path.write_text("\n".join(lines), "latin-1")
    [source] = Shard(1, 2).own(find_sources([str(path)])[0])
    assert [(one.id, one.text) for one in source.read()] == [(1, "one"), (3, "three"), (5, "five")]
    [source] = Shard(2, 2).own(find_sources([str(path)])[0])
    assert [one.message.split()[2] for one in source.read()] == ["2", "4", "6"]
    assert source.size == path.stat().st_size // 2
    [source] = Shard(9, 9).own(find_sources([str(path)])[0])
    assert list(source.read()) == []


def test_shards_together_are_one_run(save, corpus, capsys):
    """The outputs have all documents once, and as one file they are an output that has nothing left to do."""
    directory = save()
    for number in (2, 1, 3):
        output = f"out{number}.jsonl"
        flags = ["--model", directory, *FLAGS, "--output", output, "--shard", f"{number}/3"]
        assert led("summarize", "docs", *flags) == 0
    parts = [records(f"out{number}.jsonl") for number in (1, 2, 3)]
    assert all(parts)
    assert sorted((r["source"], r["id"]) for part in parts for r in part) == sorted(corpus)
    whole = b"".join(Path(f"out{number}.jsonl").read_bytes() for number in (1, 2, 3))
    Path("all.jsonl").write_bytes(whole)
    assert led("summarize", "docs", "--model", directory, *FLAGS, "--output", "all.jsonl") == 0
    assert Path("all.jsonl").read_bytes() == whole
    assert led("summarize", "docs", "--model", directory, *FLAGS, "--output", "one.jsonl") == 0
    assert sorted(whole.splitlines()) == sorted(Path("one.jsonl").read_bytes().splitlines())


def test_a_shard_of_one_document_is_printed_as_the_others(save, corpus, capsys):
    assert led("summarize", "docs/a.jsonl", "--model", save(), *FLAGS, "--shard", "3/11") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "a2"


def test_a_shard_goes_on_where_it_stopped(save, corpus, capsys, monkeypatch):
    directory = save()
    append = ResultFile.append

    def interrupted(results: ResultFile, *record: object) -> dict:
        if results.count == 5:
            raise KeyboardInterrupt
        return append(results, *record)

    flags = ["--model", directory, *FLAGS, "--output", "out.jsonl", "--shard", "2/2"]
    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "append", interrupted)
        assert led("summarize", "docs", *flags) == 130
    assert led("summarize", "docs", *flags) == 0
    assert sorted((r["source"], r["id"]) for r in records()) == sorted(documents_of(Shard(2, 2)))


def test_two_shards_do_not_write_one_output_at_once(save, corpus, capsys):
    flags = ["--model", save(), *FLAGS, "--output", "out.jsonl", "--shard"]
    with ResultFile("out.jsonl", {"command": "summarize"}):
        assert led("summarize", "docs", *flags, "1/2") == 1
    assert "out.jsonl is being written by another process; wait for it" in capsys.readouterr().err
    for part in ("1/2", "2/2"):  # one after the other they may
        assert led("summarize", "docs", *flags, part) == 0
    assert sorted((r["source"], r["id"]) for r in records()) == sorted(corpus)


def test_dry_run_counts_the_documents_of_the_shard(save, corpus, capsys):
    assert led("summarize", "docs", "--model", save(), "--dry-run", "--shard", "1/3") == 0
    count = len(documents_of(Shard(1, 3)))
    assert capsys.readouterr().out.startswith(f"{count} documents, ")


@pytest.mark.parametrize(
    "text",
    ["0/4", "5/4", "0/0", "1/0", "-1/4", "1", "1/", "/4", "1/4/2", "1.0/4", " 1/4", "1/x", "٣/4", "", "9" * 5000],
)  # fmt: skip
def test_nonsense_is_refused_in_a_sentence(text, capsys):
    with pytest.raises(SystemExit) as stop:
        led("summarize", "a.txt", "--model", ".", f"--shard={text}")
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("led summarize: error: argument --shard: ")
    assert "1/" in error


def test_shards_count_from_one():
    assert [shard(text) for text in ("1/1", "1/4", "4/4")] == [(1, 1), (1, 4), (4, 4)]
    with pytest.raises(argparse.ArgumentTypeError, match="0/4 is none of 4; count from 1/4 to 4/4"):
        shard("0/4")


def test_parts_of_one_document_are_not_dealt_out(save, corpus, capsys):
    assert led("summarize", "docs", "--join", "--shard", "1/2", "--model", save()) == 1
    assert "--join makes one document, which --shard cannot deal out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("item", "output", "is_refused"),
    [
        ("docs", "docs/out.jsonl", True),
        (".", "out.jsonl", True),
        ("docs", "docs/deep/out.jsonl", True),
        ("docs", "out.jsonl", False),
        ("docs", "docs2/out.jsonl", False),
        ("docs", "docs/out.records", False),
        ("docs/*.jsonl", "docs/out.jsonl", True),
        ("docs/**/*.jsonl", "docs/out.jsonl", True),
        ("docs/**/*.jsonl", "docs/deep/out.jsonl", True),
        ("docs/*.txt", "docs/out.jsonl", False),
        ("docs/*.jsonl", "docs/deep/out.jsonl", False),
        ("docs/a.jsonl", "docs/out.jsonl", False),
    ],
)
def test_an_output_that_other_shards_would_read_is_refused(corpus, item, output, is_refused):
    """As its being there, and what it holds, would change which document is whose."""
    if not is_refused:
        Shard(1, 2).check_output(output, [item])
        return
    with pytest.raises(
        ValueError, match="looks for documents, and the other shards would read it; put it elsewhere"
    ):
        Shard(1, 2).check_output(output, [item])


def test_one_document_is_told_from_several_without_reading_all(save, tmp_path, monkeypatch, capsys):
    """One line is printed as text, two are not; no line is read twice."""
    monkeypatch.chdir(tmp_path)
    directory = save()
    line = json.dumps({"text": TEXT}) + "\n"
    for count, is_text in ((1, True), (2, False)):
        Path("a.jsonl").write_text(line * count)
        assert led("summarize", "a.jsonl", "--model", directory, *FLAGS) == 0
        output = capsys.readouterr()
        assert (not output.out.startswith("{")) == is_text
        tokens = count * (inputs(directory, TEXT)["input_ids"].shape[1])
        assert f"read {tokens:,} tokens" in output.err
