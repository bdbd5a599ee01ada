"""An output that is interrupted, cut, shared, full or taken away: no result is lost, and none is there twice."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from led_model.batch.documents import Document
from led_model.cli.parser import main
from led_model.cli.results import ResultFile
from tests.hostile.documents import prepare
from tests.hostile.processes import Ended, Process, Trial, in_process

_DOCUMENTS = 40
_COMMAND = "summarize docs.jsonl --model ../model --max-new-tokens 20 --output out.jsonl --long truncate"
_OUTPUT = Path("out.jsonl")
_MADE_BY = {"command": "summarize"}


def _write_documents() -> None:
    lines = [json.dumps({"id": f"d{n}", "text": f"The text number {n}. " * 5}) for n in range(_DOCUMENTS)]
    Path("docs.jsonl").write_text("\n".join(lines))


def _run() -> int:
    return main(_COMMAND.split())


def _lines() -> int:
    """Returns the complete lines that the output holds."""
    return _OUTPUT.read_bytes().count(b"\n") if _OUTPUT.exists() else 0


def _fault_of_end(ended: Ended, status: int, says: str = "") -> str | None:
    if ended.fault_of_command or ended.status != status or says not in ended.err:
        return f"{ended.fault_of_command or ''} status {ended.status}, not {status} with {says!r}: {ended.err[-800:]}"
    return None


def _fault_of_output(expected: bytes | None = None) -> str | None:
    """Tells what is wrong, unless a last run finds all documents done once, as a run without interruption does."""
    if fault := _fault_of_end(in_process(_run), 0):
        return fault
    ids = [json.loads(line)["id"] for line in _OUTPUT.read_bytes().splitlines()]
    if sorted(ids) != sorted(f"d{n}" for n in range(_DOCUMENTS)):
        return f"the output holds {ids}"
    if expected is not None and sorted(_OUTPUT.read_bytes().splitlines()) != sorted(expected.splitlines()):
        return "the output differs from that of a run without interruption"
    return None


def _whole() -> bytes:
    in_process(_run)
    content = _OUTPUT.read_bytes()
    _OUTPUT.unlink()
    return content


def _kills(number: int) -> str | None:
    """Makes ``number`` runs on one output, each ended by kill -9 when it has made another result or two."""
    expected, draw = _whole(), random.Random(number)
    kills = 0
    while kills < number and _lines() < _DOCUMENTS:
        process, before = Process(_run), _lines()
        deadline = time.monotonic() + 30
        while _lines() <= before and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01))
        process.end(signal.SIGKILL)
        if process.wait().status != -signal.SIGKILL:
            return f"{kills} kills, then a run that had come to its end"
        kills += 1
    return _fault_of_output(expected) or (None if kills == number else f"only {kills} kills")


def _cuts(number: int) -> str | None:
    """Takes up ``number`` outputs of which the end is missing, as a crash or a full disk leaves them.

    Each process takes up a hundred.
    """
    texts = {f"d{n}": f"text ☕ {n}" for n in range(40)}
    documents = [Document(name, "docs.jsonl", text, 9, has_own_id=True) for name, text in texts.items()]

    def go_on() -> None:
        with ResultFile(str(_OUTPUT), _MADE_BY) as results:
            for document in documents:
                if results.take(document) is None:
                    results.append(document, {"summary": document.text})

    def check(cuts: range) -> None:
        for cut in cuts:
            _OUTPUT.write_bytes(whole[: cut * len(whole) // number])
            go_on()
            if _OUTPUT.read_bytes() != whole:
                raise RuntimeError(
                    f"{cut * len(whole) // number} bytes of {len(whole)} became another output"
                )

    go_on()
    whole = _OUTPUT.read_bytes()
    for first in range(0, number, 100):
        if fault := in_process(partial(check, range(first, first + 100))).fault:
            return fault
    return None


def _commands_on_cuts(number: int) -> str | None:
    """Does as :func:`_cuts`, by the command itself."""
    whole = _whole()
    for cut in range(number):
        _OUTPUT.write_bytes(whole[: (2 * cut + 1) * len(whole) // (2 * number)])
        if fault := _fault_of_output(whole):
            return f"cut {cut}: {fault}"
    return None


def _writers(number: int) -> str | None:
    """Runs that begin at once: one writes, and the others are refused or find all done."""
    expected = _whole()
    ends = [process.wait() for process in [Process(_run) for _ in range(number)]]
    for ended in ends:
        if fault := ended.fault_of_command:
            return fault
        if ended.status and "is being written by another process" not in ended.err:
            return ended.err
    return _fault_of_output(expected) if 0 in [ended.status for ended in ends] else "no run came to its end"


def _full_disk(size: int) -> str | None:
    """Makes an output that may have ``size`` bytes and no more, until there is room again."""
    expected = _whole()

    def without_room() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return _run()

    return _fault_of_end(in_process(without_room), 1, "out.jsonl cannot be written") or _fault_of_output(
        expected
    )


def _meddled(change: Callable[[], object], says: str, is_kept: bool) -> str | None:
    """Makes a run during which somebody meddles with the output. ``is_kept``: what is there then is not touched."""
    process = Process(_run)
    deadline = time.monotonic() + 30
    while _lines() < 3 and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.end(signal.SIGSTOP)
    change()
    left = _OUTPUT.read_bytes() if _OUTPUT.exists() else None
    process.end(signal.SIGCONT)
    if fault := _fault_of_end(process.wait(), 1, says):
        return fault
    now = _OUTPUT.read_bytes() if _OUTPUT.exists() else None
    return "it wrote on" if is_kept and now != left else None


def _replace() -> None:
    Path("other").write_text("only copy")
    os.replace("other", _OUTPUT)


def _append() -> None:
    with _OUTPUT.open("a") as file:
        file.write("my own line\n")


def trials(scratch: Path) -> Iterator[Trial]:
    prepare(scratch)
    deleted, changed = "was deleted, moved or replaced", "was changed by another program"
    cases: dict[str, Callable[[], str | None]] = {
        "20 kills": partial(_kills, 20),
        "1,000 cuts": partial(_cuts, 1000),
        "5 cuts and commands": partial(_commands_on_cuts, 5),
        "two writers": partial(_writers, 2),
        "five writers": partial(_writers, 5),
        "deleted": partial(_meddled, _OUTPUT.unlink, deleted, False),
        "moved": partial(_meddled, lambda: _OUTPUT.rename("moved.jsonl"), deleted, False),
        "replaced": partial(_meddled, _replace, deleted, True),
        "emptied": partial(_meddled, lambda: os.truncate(_OUTPUT, 0), changed, True),
        "cut": partial(_meddled, lambda: os.truncate(_OUTPUT, _OUTPUT.stat().st_size - 9), changed, True),
        "written by another": partial(_meddled, _append, changed, True),
    }
    cases |= {f"a full disk at {size} bytes": partial(_full_disk, size) for size in (100, 700, 5000, 9001)}
    for name, case in cases.items():
        yield name, partial(_in_folder, case, scratch)


def _in_folder(case: Callable[[], str | None], scratch: Path) -> tuple[str, str | None]:
    directory, before = scratch / "case", Path.cwd()
    directory.mkdir()
    os.chdir(directory)
    try:
        _write_documents()
        fault = case()
        return "lost something" if fault else "lost nothing", fault
    finally:
        os.chdir(before)
        shutil.rmtree(directory)
