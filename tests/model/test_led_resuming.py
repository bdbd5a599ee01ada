"""The output of a run, which the same command goes on from: nothing twice, nothing mixed, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from led_model.checkpoint.fingerprint import fingerprint
from led_model.cli.results import ResultFile
from tests.model.commands import PARAGRAPHS, TEXT, TEXTS, inputs, led, records


def test_interruption(save, documents, capsys, monkeypatch):
    """Ctrl-C while the third result is on its way; the same command finishes the work."""
    arguments = [
        "docs.jsonl",
        "--text-field",
        "body",
        "--model",
        save(),
        "--max-new-tokens",
        3,
        "--output",
        "out.jsonl",
    ]
    append = ResultFile.append

    def interrupted(results: ResultFile, *record: object) -> None:
        if results.count == 2:
            raise KeyboardInterrupt
        append(results, *record)

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "append", interrupted)
        assert led("summarize", *arguments, "--batch-size", 4) == 130
    error = capsys.readouterr().err
    assert "interrupted; out.jsonl holds 2 results. Give the same command again" in error
    assert led("summarize", *arguments) == 0
    assert sorted(record["id"] for record in records()) == ["d0", "d1", "d2", "d3"]
    monkeypatch.setattr("led_model.cli.run.load_task", None)  # nothing is left to do
    assert led("summarize", *arguments) == 0
    assert len(records()) == 4


def test_kill(save, tmp_path):
    """SIGKILL somewhere in a run, and a line cut as a crash may cut it: each document is there once in the end."""
    ids = [f"d{i}" for i in range(120)]
    lines = [json.dumps({"id": document_id, "text": TEXT}) for document_id in ids]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "led_model",
        "summarize",
        "many.jsonl",
        "--output",
        "out.jsonl",
        "--batch-size",
        "3",
    ]
    command += ["--model", str(save()), "--max-new-tokens", "20"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    killed = output.read_bytes()
    assert 5 <= killed.count(b"\n") < len(ids)
    whole = killed[: killed.rindex(b"\n") + 1]
    output.write_bytes(whole[:-9])

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert f"holds {whole.count(bytes([10])) - 1} results already" in done.stderr
    assert sorted(record["id"] for record in records(output)) == sorted(ids)
    assert output.read_bytes().startswith(whole)


def summaries(directory: Path, *arguments: object) -> int:
    return led("summarize", *arguments, "--model", directory, "--max-new-tokens", 3, "--output", "out.jsonl")


def test_a_record_says_what_made_it(save, documents):
    directory = save()
    Path("long.txt").write_text("".join(PARAGRAPHS))
    assert summaries(directory, "docs/0.txt", "long.txt", "--long", "truncate") == 0
    short, long = records()
    assert short["led"] == "summarize"
    assert short["made_by"] == long["made_by"]
    assert short["made_by"]["--max-new-tokens"] == 3
    assert short["made_by"]["--long"] == "truncate"
    assert (short["truncated"], long["truncated"]) == (False, True)
    assert short["tokens"] == inputs(directory, TEXTS[0])["input_ids"].shape[1] - 2
    assert (short["pieces"], long["pieces"]) == (1, 1)


def test_results_of_other_settings_and_models_are_not_mixed(save, documents, capsys):
    directory = save()
    assert summaries(directory, "docs") == 0
    before = Path("out.jsonl").read_bytes()
    assert summaries(directory, "docs", "--num-beams", 2) == 1
    assert "was made with --num-beams None and this run has 2; give --overwrite" in capsys.readouterr().err
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert summaries(directory, "docs") == 1
    assert "was made with model's fingerprint" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == before
    assert summaries(directory, "docs/0.txt", "--overwrite") == 0
    assert len(records()) == 1


def test_documents_are_known_by_their_text(save, documents, capsys):
    """By whatever name they come, wherever their line is; an edited one is read again."""
    directory = save()
    lines = [json.dumps({"text": text}) for text in TEXTS[:2]]
    Path("papers.jsonl").write_text("\n".join(lines))
    assert summaries(directory, "papers.jsonl", "docs/2.txt") == 0
    Path("papers.jsonl").write_text("\n".join([json.dumps({"text": "A new one."}), *lines]))
    assert summaries(directory, Path("papers.jsonl").resolve(), Path("docs/2.txt").resolve()) == 0
    assert len(records()) == 4
    assert records()[-1]["id"] == 1
    capsys.readouterr()
    Path("docs/2.txt").write_text("An edited one.")
    assert summaries(directory, "papers.jsonl", "docs/2.txt") == 0
    assert len(records()) == 5
    assert "docs/2.txt has changed since its result was made; it is read again" in capsys.readouterr().err


def test_an_output_that_is_not_ours_survives_any_error(save, documents, capsys):
    Path("mine.jsonl").write_text('{"id":1,"text":"only copy"}')
    for arguments in (
        ["docs/0.txt", "--model", "./nowhere"],
        ["docs/0.txt", "--model", save()],
        ["mine.jsonl", "--model", save()],
    ):
        assert led("summarize", *arguments, "--output", "mine.jsonl") == 1
        assert Path("mine.jsonl").read_text() == '{"id":1,"text":"only copy"}'
        assert capsys.readouterr().err.count("\n") == 1


def test_an_output_deleted_during_the_run_is_no_success(save, documents, capsys, monkeypatch):
    append = ResultFile.append

    def deleting(results: ResultFile, *record: object) -> None:
        append(results, *record)
        Path("out.jsonl").unlink(missing_ok=True)

    monkeypatch.setattr(ResultFile, "append", deleting)
    assert summaries(save(), "docs/0.txt") == 1
    assert "was deleted, moved or replaced during the run" in capsys.readouterr().err


def test_a_moved_document_is_printed_under_its_name_and_said_to_be(save, documents, capsys):
    directory = save()
    assert summaries(directory, "docs/0.txt", "docs/1.txt") == 0
    Path("docs/0.txt").rename("docs/z.txt")
    capsys.readouterr()
    assert summaries(directory, "docs/1.txt", "docs/z.txt", "--format", "jsonl") == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["source"] for line in printed.out.splitlines()] == ["docs/1.txt", "docs/z.txt"]
    assert "1 of the results in out.jsonl stand under names that their documents had before" in printed.err
    assert len(records()) == 2


def test_chance_falls_by_the_batch(save, documents, capsys):
    directory = save()
    flags = ["docs", "--do-sample", "--seed", 1]
    assert summaries(directory, *flags, "--batch-size", 2) == 0
    assert summaries(directory, *flags) == 1
    assert "was made with --batch-size 2 and this run has 1" in capsys.readouterr().err


def test_one_document_that_overflows_takes_no_other_with_it(save, documents, capsys):
    """The longest, as no other reaches the position of its last token."""
    directory = save()
    lengths = [inputs(directory, text)["input_ids"].shape[1] for text in TEXTS]
    weights = load_file(directory / "model.safetensors")
    weights["led.encoder.embed_positions.weight"][max(lengths) - 1] = 1e30
    save_file(weights, directory / "model.safetensors")
    assert summaries(directory, "docs", "--batch-size", 3) == 3
    longest = f"docs/{lengths.index(max(lengths))}.txt"
    assert f"{longest}: the model's numbers overflowed" in capsys.readouterr().err
    assert sorted(record["source"] for record in records()) == [
        f"docs/{n}.txt" for n in range(4) if f"docs/{n}.txt" != longest
    ]


@pytest.mark.parametrize("place", [0, 2**20 + 5, 3 * 2**20 + 12345, -1])
def test_every_byte_of_the_weights_counts(tmp_path, place):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    data = bytearray(4 * 2**20 + 7)
    weights.write_bytes(data)
    before = fingerprint(str(tmp_path))
    data[place] ^= 1
    weights.write_bytes(data)
    assert fingerprint(str(tmp_path)) != before
