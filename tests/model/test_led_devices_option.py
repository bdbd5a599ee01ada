"""``--devices N``: the text of one process, each document once, whatever dies in the middle."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from led_model.batch import Document, Outcome
from led_model.batch.ahead import ReadAhead
from led_model.batch.loading import TaskSpec
from led_model.batch.portions import Portions, to_the_end
from led_model.batch.worker_processes import ProcessDied, Processes, _Voice, _Worker
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


def test_a_document_that_kills_is_reported_and_no_other(save, capsys):
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
    told = [line for line in capsys.readouterr().err.splitlines() if "is replaced" in line]
    # A process dies of each of the two among others, or of both at once, and then of each alone.
    assert told.count("led: the process of cpu was ended by signal 9 and is replaced.") == 2
    assert all(
        "again, each by itself." in line or line.endswith(("replaced.", "read again.")) for line in told
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


def test_a_run_of_many_is_interrupted(save, tmp_path, monkeypatch):
    """Most documents are not read yet, and whoever reads them ends without a word."""
    monkeypatch.chdir(tmp_path)
    Path("many.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 20_000)
    process, children = started(save, "many.jsonl")
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "ignored" not in error
    assert "leaked" not in error
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def test_a_run_that_ends_leaves_nothing_to_say(save, many):
    """Neither processes that are ended nor their locks are complained of when Python ends."""
    command = [sys.executable, "-m", "led_model", "summarize", many, "--model", str(save()), "--quiet"]
    command += ["--max-new-tokens", "3", "--devices", "2", "--output", "out.jsonl"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, timeout=200
    )
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 3  # the bad documents


def test_a_process_that_cannot_be_started_leaves_no_other(save, monkeypatch):
    start = Processes._start
    begun = []

    def fails_at_last(self, device):
        if begun:
            raise OSError("no more processes")
        begun.append(start(self, device))
        return begun[0]

    monkeypatch.setattr(Processes, "_start", fails_at_last)
    with pytest.raises(OSError, match="no more processes"):
        outcomes(TaskSpec("summarize", str(save())), [Document(1, "a", TEXT, 1)])
    assert multiprocessing.active_children() == []


def test_a_voice_that_is_heard_while_it_speaks():
    """A warning of whatever sends a message waits for no lock that the message holds."""

    class Connection:
        def __init__(self):
            self.sent = []

        def send_bytes(self, data):
            if not self.sent:
                voice.write("a warning\n")
            self.sent.append(pickle.loads(data))

    voice = _Voice(connection := Connection())
    thread = threading.Thread(target=voice.send, args=("loaded", 5), daemon=True)
    thread.start()
    thread.join(20)
    assert connection.sent == [("loaded", 5), ("said", "a warning")]


def test_what_loading_has_to_say_is_said_once(save, many, capsys):
    directory = save()
    config = json.loads(Path(directory, "generation_config.json").read_text())
    Path(directory, "generation_config.json").write_text(json.dumps(config | {"typical_p": 0.5}))
    assert (
        led("summarize", many, "--model", directory, "--max-new-tokens", 3, "--devices", 2, "--output", "o")
        == 3
    )
    assert capsys.readouterr().err.count("typical_p") == 1


def test_what_any_process_has_to_say_is_said(capsys):
    """A process that loads its model more slowly than the others read all documents has said nothing yet."""
    processes = Processes(TaskSpec("summarize", "m"), ["cpu", "cpu"], 1, {})
    first, second = (_Worker("cpu", None, None) for _ in range(2))
    for worker, line in [(second, "a warning"), (first, "a warning"), (first, "another one")]:
        assert list(processes._heard(worker, ("said", line), None)) == []
    second.is_loaded = True
    list(processes._heard(second, ("said", "a warning"), None))
    assert capsys.readouterr().err.splitlines() == ["a warning", "another one", "a warning"]


def test_no_document_is_dealt_out_that_is_too_far_ahead():
    documents = [Document(number, "a", "text", 1) for number in range(10)]
    with ReadAhead(to_the_end(documents), lambda item: item, Portions.share) as ahead:
        portions = Portions(ahead, 2)
        portions.set_size(8, None, 1)
        while not portions.is_read:
            portions.fill()
        first = portions.take(before=3)
        assert 0 in first
        following = max(first) + 1
        assert portions.take(before=following) is None
        assert following in portions.take(before=following + 1)


def test_many_outcomes_that_need_no_model_are_handed_on_while_a_model_is_loaded(save):
    passed = [Outcome(Document(number, "a", "text", 1), {"summary": "done"}, {}) for number in range(5000)]
    spec = Deadly("summarize", str(save()), question="waits")
    running = Processes(spec, ["cpu"], 1, {"batch_tokens": None, "batch_size": None}).run(
        [*passed, Document(-1, "a", TEXT, 1)]
    )
    assert [next(running).document.id for _ in passed] == list(range(5000))
    running.close()


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
