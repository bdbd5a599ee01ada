"""The commands, as a user types them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
import torch

from led_model.cli import main
from led_model.demo import demo_ids
from led_model.tokenizer import LEDTokenizer

TEXT = "The encoder reads a long text. The decoder writes a short one.\n" * 3


@pytest.fixture
def checkpoint_dir(small_model, save_checkpoint, tokenizer_files):
    """A random model over the vocabulary of a small real tokenizer."""
    vocab = json.loads((tokenizer_files / "vocab.json").read_text())
    model = small_model(5, vocab_size=len(vocab), max_encoder_position_embeddings=256)
    return save_checkpoint(model, tokenizer_files)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def expected_summary(directory, global_tokens: int = 1, text: str = TEXT, **settings) -> str:
    from led_model import LEDForConditionalGeneration

    tokenizer = LEDTokenizer.from_pretrained(directory)
    input_ids = torch.tensor([tokenizer.encode(text)])
    global_attention_mask = torch.zeros_like(input_ids)
    global_attention_mask[:, :global_tokens] = 1
    model = LEDForConditionalGeneration.from_pretrained(directory)
    ids = model.generate(
        input_ids, torch.ones_like(input_ids), global_attention_mask=global_attention_mask, **settings
    )
    return tokenizer.decode(ids[0].tolist()).strip() + "\n"


@pytest.mark.parametrize("global_tokens", [0, 1, 5])
def test_summarize(checkpoint_dir, text_file, capsys, global_tokens):
    flags = ["--max-new-tokens", "20", "--global-tokens", str(global_tokens), "--device", "cpu"]
    assert main(["summarize", str(text_file), "--model", str(checkpoint_dir), *flags]) == 0
    output = capsys.readouterr()
    assert output.out == expected_summary(checkpoint_dir, global_tokens, max_new_tokens=20)
    assert len(output.out) > 10
    assert re.search(
        r"read [\d,]+ tokens in [\d.]+ s, wrote [\d,]+ in [\d.]+ s \([\d.]+ tokens/s\)", output.err
    )
    assert "\r" not in output.err  # no bar where there is no terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(checkpoint_dir, text_file, capsys, monkeypatch):
    """The bars are drawn, and change nothing."""
    bars = Terminal()
    monkeypatch.setattr("sys.stderr", bars)
    monkeypatch.setattr("led_model.terminal.tqdm.update", lambda bar, n=1: True)  # as when it redraws
    command = ["summarize", str(text_file), "--model", str(checkpoint_dir), "--max-new-tokens", "20"]
    assert main(command) == 0
    assert capsys.readouterr().out == expected_summary(checkpoint_dir, max_new_tokens=20)
    assert re.search(r"reading [\d,]+ tokens: +0%.*layer", bars.getvalue())
    assert re.search(r"writing: +0%.*token", bars.getvalue())


def test_summarize_stdin_in_a_process(checkpoint_dir):
    command = [sys.executable, "-m", "led_model", "summarize", "-", "--model", str(checkpoint_dir)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "8"], input=TEXT.encode(), capture_output=True, check=True
    )
    assert done.stdout.decode() == expected_summary(checkpoint_dir, max_new_tokens=8)


def test_summarize_uses_the_checkpoints_length_and_says_what_it_leaves_out(checkpoint_dir, text_file, capsys):
    settings = {"max_length": 6, "num_beams": 4, "typical_p": 0.5}
    (checkpoint_dir / "generation_config.json").write_text(json.dumps(settings))
    assert main(["summarize", str(text_file), "--model", str(checkpoint_dir)]) == 0
    output = capsys.readouterr()
    assert output.out == expected_summary(checkpoint_dir, max_length=6, num_beams=4)
    assert "asks for typical_p=0.5; decoding without it" in output.err


def test_summarize_long_text(checkpoint_dir, text_file, capsys):
    text_file.write_text(TEXT * 20)
    command = ["summarize", str(text_file), "--model", str(checkpoint_dir), "--max-new-tokens", "4"]
    assert main(command) == 1
    assert re.fullmatch(
        r"led summarize: the text has [\d,]+ tokens but the model reads at most 256; .*--long truncate.*\n",
        capsys.readouterr().err,
    )
    assert main([*command, "--long", "truncate"]) == 0
    assert "reading the first 256 of" in capsys.readouterr().err


def test_summarize_in_bfloat16(checkpoint_dir, text_file, capsys):
    command = ["summarize", str(text_file), "--model", str(checkpoint_dir), "--dtype", "bfloat16"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; give a text file, or - for stdin"),
        (b"\xff\xfe\x00", "is not UTF-8 at byte 0"),
        (b" \n", "holds no text"),
    ],
)
def test_bad_text_is_one_sentence(checkpoint_dir, tmp_path, capsys, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["summarize", str(path), "--model", str(checkpoint_dir)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_model_is_one_sentence(text_file, tmp_path, capsys, monkeypatch):
    assert main(["summarize", str(text_file), "--model", str(tmp_path / "nowhere")]) == 1
    assert "is no directory" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["summarize", "-", "--model", str(tmp_path)]) == 1
    assert "stdin holds no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["summarize"],
        ["summarize", "x", "--model", "y", "--max-new-tokens", "0"],
        ["summarize", "x", "--model", "y", "--global-tokens", "many"],
        ["demo", "--tokens", "-1"],
        ["demo", "--device", "abacus"],
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: led" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["summarize"], ["demo"], ["info"]], ids=str)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert "usage: led" in help_text
    if command in (["summarize"], ["demo"]):
        assert "example" in help_text


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
    monkeypatch.setattr("led_model.demo.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("led_model.demo._in_own_process", lambda function, *args: function(*args))
    flags = "--tokens 128 --compare-tokens 64 --layers 1 --window 64 --new-tokens 1"
    assert main(["demo", *flags.split()]) == 0
    output = capfd.readouterr().out
    assert "pip install 'led-kernels[demo]'" in output
    assert re.search(r"input tokens +128 +64\n", output)
