"""The parser, ``led info`` and ``led demo``, as a user types them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from led_model.cli.demo import demo_ids
from led_model.cli.memory import lower_high_water_mark
from led_model.cli.parser import main


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["summarize"],
        ["summarize", "x", "--model", "y", "--max-new-tokens", "0"],
        ["summarize", "x", "--model", "y", "--global-tokens", "many"],
        ["summarize", "x", "--model", "y", "--long", "cut"],
        ["answer", "x", "--model", "y"],
        ["answer", "x", "--model", "y", "--question", " "],
        ["classify", "x", "--model", "y", "--batch-size", "0"],
        ["classify", "x", "--model", "y", "--num-beams", "4"],
        ["demo", "--tokens", "-1"],
        ["demo", "--device", "abacus"],
        ["convert", "bart"],
        ["convert", "bart", "--output", " "],
        ["convert", "bart", "--output", "led", "--max-positions", "0"],
        ["convert", "bart", "--output", "led", "--attention-window", "511"],
        ["convert", "bart", "--output", "led", "--dtype", "int8"],
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: led" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["convert"], ["demo"], ["info"]], ids=str)
def test_help(command, capsys):
    help_text = help_of(command, capsys)
    assert "usage: led" in help_text
    if command in (["convert"], ["demo"]):
        assert "example" in help_text
        assert f"led {command[0]} " in help_text.split("example")[1]


@pytest.mark.parametrize("command", ["summarize", "answer", "classify"])
def test_help_teaches(command, capsys):
    help_text = help_of([command], capsys)
    for word in (
        "examples:",
        f"led {command} ",
        ".jsonl",
        "exit status: 0",
        "goes on where it stopped",
        "pieces",
    ):
        assert word in help_text


def help_of(command, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for word in ("python", "torch", "triton", "transformers", "threads", "processor", torch.__version__):
        assert word in output
    for backend in ("reference", "torch", "cpu", "triton", "cuda"):
        assert re.search(rf"^  {backend} +(usable|no: .+)", output, re.MULTILINE)


def test_info_reports_settings_that_cannot_be_met(capsys, monkeypatch):
    monkeypatch.setenv("LED_KERNELS_BACKEND", "nonsense")
    monkeypatch.setenv("LED_KERNELS_CPU_ISA", "nonsense")
    assert main(["info"]) == 0
    assert "backend is 'nonsense'; give one of" in capsys.readouterr().out


def test_demo_ids_are_the_same_everywhere():
    ids = demo_ids(6, 50265)
    assert ids.shape == (1, 6)
    assert ids[0, 0] == 0
    assert torch.equal(ids, demo_ids(9, 50265)[:, :6])
    assert demo_ids(200_000, 100).shape == (1, 200_000)
    assert demo_ids(200_000, 100).max() < 100


def test_demo_compares_with_transformers(capfd):
    pytest.importorskip("transformers")
    if not lower_high_water_mark():  # with it, memory is measured without psutil
        pytest.importorskip("psutil")
    flags = "--tokens 256 --compare-tokens 256 --layers 1 --window 64 --new-tokens 3"
    assert main(["demo", *flags.split()]) == 0
    output = capfd.readouterr().out
    assert "the weights are random" in output
    difference = re.search(r"largest difference over 256 tokens +(\S+) in values up to (\S+)", output)
    assert float(difference[1]) < 1e-4 < float(difference[2])
    assert re.search(r"encoder time +[\d.]+ s +[\d.]+ s", output)
    assert re.search(r"peak memory above weights +[\d,]+ MiB +[\d,]+ MiB", output)
    assert "speed-up over transformers" in output
    assert re.search(r"decoding after 256 tokens +[\d.]+ tokens per second", output)


def test_demo_without_transformers(capfd, monkeypatch):
    monkeypatch.setattr("led_model.cli.demo.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("led_model.cli.demo._in_own_process", lambda function, *args: function(*args))
    flags = "--tokens 128 --compare-tokens 64 --layers 1 --window 64 --new-tokens 1"
    assert main(["demo", *flags.split()]) == 0
    output = capfd.readouterr().out
    assert "pip install '.[demo]'" in output
    assert re.search(r"input tokens +128 +64\n", output)


def test_interrupted_while_it_is_imported(tmp_path):
    """One line, no traceback."""
    code = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def interrupt(name, *args):\n"
        "    if name == 'torch':\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *args)\n"
        "builtins.__import__ = interrupt\n"
        "from led_model.__main__ import main\n"
        "sys.exit(main())\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "led: interrupted.\n")
