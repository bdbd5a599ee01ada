"""A run of ``led finetune`` that is killed anywhere goes on to the same weights, bit by bit, and repeats nothing."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from tests.model.finetuning import arguments, finish, write_examples

pytest.importorskip("transformers")


def contents(directory: Path) -> dict[str, bytes]:
    """Returns what a result is, but for its picture, whose bytes may hold a date."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "loss.png"}


@pytest.fixture
def run(save, tmp_path, monkeypatch):
    """The arguments of a run with dropout, into a directory of a name; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    model = save(dropout=0.1)
    write_examples(tmp_path / "train.jsonl", 20)
    write_examples(tmp_path / "dev.jsonl", 3, seed=1)

    def make(output: str, *others: object) -> list[str]:
        dev = ("--validation", tmp_path / "dev.jsonl", "--best-by", "loss", "--eval-every", 4)
        return arguments(model, tmp_path / "train.jsonl", tmp_path / output, *dev, *others)

    return make


@pytest.mark.parametrize("event", ["call", "sync"])
def test_killed_anywhere(run, tmp_path, event):
    """Each third of a run is killed somewhere, and so is what goes on with it, if it gets that far."""
    settings = ("--max-steps", 8, "--save-every", 3, "--learning-rate", 1e-3, "--quiet")
    assert finish(run("whole", *settings), counts=tmp_path / "counts.json") == 0
    count = json.loads((tmp_path / "counts.json").read_text())[f"{event}s"]
    draw = random.Random(0)
    for third in range(3):
        output = tmp_path / f"killed-{third}"
        argv = run(output.name, *settings)
        first = int(count * (third + draw.uniform(0.02, 0.98)) / 3)
        assert finish(argv, **{f"kill_at_{event}": first}) == -signal.SIGKILL
        assert finish(argv, **{f"kill_at_{event}": draw.randint(1, count)}) in (0, -signal.SIGKILL)
        assert finish(argv) == 0
        assert contents(output) == contents(tmp_path / "whole")
        log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 9))
        assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 8]
        assert not [path for path in output.iterdir() if path.is_dir() or path.name.startswith(".")]


def test_a_full_disk(run):
    """It is told in a sentence, whichever file is cut short; a later run goes on."""
    settings = ("--max-steps", 4, "--quiet")
    sizes = {"model.safetensors": 50_000, "optimizer.pt": 700_000}  # of 365 kB, and of twice that
    for size in sizes.values():
        assert finish(run("full", *settings), largest=size) == 1
        assert "full cannot be written (" in (error := Path("stderr.txt").read_text())
        assert "make room and give the same command again" in error
        assert {path.name for path in Path("full").iterdir()} == {
            "finetune.json",
            "training_log.jsonl",
        }
    assert finish(run("full", *settings)) == 0
