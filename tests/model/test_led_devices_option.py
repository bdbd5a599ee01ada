"""``--devices N``: the text of one process, each document once, whatever dies in the middle."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from led_model.batch import Document
from led_model.batch.loading import TaskSpec
from led_model.batch.worker_processes import ProcessDied, Processes
from led_model.cli.results import ResultFile
from tests.model.commands import PARAGRAPHS, TEXT, TEXTS, led, records
from tests.model.deadly import Deadly

ROOT = Path(__file__).parents[2]
COUNT = 90
pytestmark = pytest.mark.usefixtures("two_processors")


@pytest.fixture
def two_processors(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.fixture
def many(tmp_path, monkeypatch) -> str:
    """A file of documents of different length, of which three cannot be read."""
    monkeypatch.chdir(tmp_path)
    texts = [TEXT * (1 + number % 3) for number in range(COUNT)]
    lines = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate(texts)]
    lines[10], lines[40] = "{", json.dumps({"id": "d40"})
    lines[70] = json.dumps({"id": "d70", "text": "".join(PARAGRAPHS)})
    Path("many.jsonl").write_text("\n".join(lines))
    return "many.jsonl"


GOOD = {f"d{number}" for number in range(COUNT)} - {"d10", "d40", "d70"}


def ids(path: str = "out.jsonl") -> Counter:
    return Counter(record["id"] for record in records(path))


def test_the_text_is_that_of_one_process(save, many, capsys):
    flags = [many, "--model", save(), "--max-new-tokens", 8]
    assert led("summarize", *flags, "--output", "one.jsonl") == 3
    problems = set(capsys.readouterr().err.splitlines()[:-1])
    assert len(problems) == 3
    assert led("summarize", *flags, "--devices", 2, "--output", "two.jsonl") == 3
    *told, done = capsys.readouterr().err.splitlines()
    assert set(told) == problems
    assert done.startswith("led: 87 documents done, 3 failed; 2 processes read 4,")

    def by_id(path: str) -> list:
        return sorted(records(path), key=lambda record: record["id"])

    assert by_id("two.jsonl") == by_id("one.jsonl")
    assert multiprocessing.active_children() == []


def test_printed_in_order(save, many, capsys):
    flags = [many, "--model", save(), "--max-new-tokens", 2, "--long", "truncate", "--quiet"]
    assert led("summarize", *flags, "--devices", 2) == 3
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 2  # what cannot be read is told, and nothing else
    printed = [json.loads(line)["id"] for line in output.out.splitlines()]
    assert printed == [f"d{number}" for number in range(COUNT) if number not in (10, 40)]


def test_messages_of_the_processes(save, documents, capsys):
    Path("docs/4.txt").write_text("".join(PARAGRAPHS))
    flags = ["docs", "--model", save(), "--max-new-tokens", 2, "--devices", 2, "--long", "truncate"]
    assert led("summarize", *flags) == 0
    assert "led: docs/4.txt: reading the first 136 of" in capsys.readouterr().err


def test_a_process_is_killed(save, many, capsys, monkeypatch):
    append, killed = ResultFile.append, []

    def kill_one(results: ResultFile, *record: object) -> dict:
        if results.count == 5:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()
        return append(results, *record)

    monkeypatch.setattr(ResultFile, "append", kill_one)
    flags = ["--max-new-tokens", 8, "--batch-size", 2, "--devices", 2, "--output", "out.jsonl"]
    assert led("summarize", many, "--model", save(), *flags) == 3
    assert killed
    assert ids() == Counter(GOOD)
    error = capsys.readouterr().err
    assert "led: the process of cpu was ended by signal 9 and is replaced" in error
    assert "87 documents done, 3 failed" in error


def outcomes(spec: TaskSpec, documents, **flags):
    limits = {"batch_tokens": None, "batch_size": None}
    return list(Processes(spec, ["cpu", "cpu"], 1, limits).run(documents, **flags))


def test_a_document_that_kills_is_reported_and_no_other(save):
    texts = [TEXTS[number % 4] for number in range(30)]
    texts[7] = texts[8] = "poison"
    documents = [Document(number, "many", text, 1) for number, text in enumerate(texts)]
    spec = Deadly("summarize", str(save()), generation=(("max_new_tokens", 3),))
    found = outcomes(spec, documents, in_order=True)
    assert [outcome.document for outcome in found] == documents
    failed = [outcome for outcome in found if isinstance(outcome.result, Exception)]
    assert [outcome.document.id for outcome in failed] == [7, 8]
    assert all(isinstance(outcome.result, ProcessDied) for outcome in failed)
    assert failed[0].problem == (
        "many, document 7: the process that read it died, and died again when it read that alone (ended by signal "
        "9); memory may not suffice for it, or the text makes it crash: leave it out."
    )


def test_a_model_that_cannot_be_loaded(save, many, capsys):
    directory = save()
    assert led("classify", many, "--model", directory, "--devices", 2) == 1
    assert f"led classify: {directory} has no classification head" in capsys.readouterr().err
    spec = Deadly("summarize", str(directory), question="dies")
    with pytest.raises(ChildProcessError, match=r"3 processes died while they loaded the model, .* status 7"):
        outcomes(spec, [Document(1, "a", TEXT, 1)])
    assert multiprocessing.active_children() == []


def test_what_reading_raises_comes_after_what_was_read(save):
    def documents():
        yield Document(1, "a", TEXT, 1)
        yield Document(2, "a", TEXT, 1)
        raise OSError("the disk is gone.")

    spec = TaskSpec("summarize", str(save()), generation=(("max_new_tokens", 2),))
    running = Processes(spec, ["cpu"], 1, {"batch_tokens": None, "batch_size": None}).run(documents())
    assert [next(running).document.id for _ in range(2)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(running)


def started(save, many: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Returns a run in a process group of its own, and its processes, once each has read a portion."""
    command = [sys.executable, "-m", "led_model", "summarize", many, "--model", str(save())]
    command += ["--max-new-tokens", "100", "--batch-size", "1", "--devices", "2", "--output", "out.jsonl"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests are a job in the background, processes would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not Path("out.jsonl").exists() or Path("out.jsonl").read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    return process, children


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_parent_is_ended(save, many, how):
    """No process is left behind, and the same command finishes the work: each document is there once."""
    process, children = started(save, many)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does for Ctrl-C
    else:
        process.send_signal(how)
    _, error = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in error
        assert "results. Give the same command again to go on with the others." in error
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    done = ids()
    assert 5 <= len(done) < len(GOOD)
    flags = ["--max-new-tokens", 100, "--batch-size", 1, "--devices", 2, "--output", "out.jsonl"]
    assert led("summarize", many, "--model", process.args[6], *flags) == 3
    assert ids() == Counter(GOOD)


def test_what_is_refused(save, documents, capsys, monkeypatch):
    flags = ["docs", "--model", save(), "--devices", 3]
    assert led("summarize", *flags) == 1
    assert "--devices is 3 and there are 2 processors; give at most 2." in capsys.readouterr().err
    assert led("summarize", *flags, "--join") == 1
    assert (
        "--join makes one document, which one device reads; leave --devices out." in capsys.readouterr().err
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert led("summarize", *flags) == 1
    assert "--devices is 3 and there are 1 GPUs; give at most 1." in capsys.readouterr().err
