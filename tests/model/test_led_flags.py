"""Flags that the commands on documents share: chance, smaller weights, threads, silence and the dry run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from led_kernels import __version__
from led_model import LEDForConditionalGeneration, LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.cli.parser import main
from tests.model.commands import LIMIT, TEXT, inputs, led, records, written

SIZES = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
SIZES |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # bitsandbytes compiles code for odd ones
ASK = ["--question", "Who reads?"]


@pytest.fixture(autouse=True)
def text_file(tmp_path, monkeypatch):
    """The working directory has a.txt."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"led {__version__}\n"


SAMPLING = {"temperature": 0.7, "top_k": 4, "top_p": 0.8, "seed": 3}


def test_sampling(save, capsys):
    """Every flag arrives: without one of them the text is another."""
    directory = save()
    flags = [word for name, value in SAMPLING.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = ["summarize", "a.txt", "--model", directory, "--max-new-tokens", 24]
    assert led(*command, "--do-sample", *flags) == 0
    expected = written(directory, TEXT, max_new_tokens=24, do_sample=True, **SAMPLING)
    assert capsys.readouterr().out == expected + "\n"
    for name, other in {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": 4}.items():
        settings = SAMPLING | {name: other}
        assert written(directory, TEXT, max_new_tokens=24, do_sample=True, **settings) != expected, name


def test_a_checkpoint_that_samples_can_be_told_not_to(save, capsys):
    directory = save()
    (directory / "generation_config.json").write_text('{"do_sample": true}')
    command = ["summarize", "a.txt", "--model", directory, "--max-new-tokens", 9]
    assert led(*command, "--no-do-sample") == 0
    assert capsys.readouterr().out == written(directory, TEXT, max_new_tokens=9, do_sample=False) + "\n"
    assert led(*command, "--seed", 5) == 0
    assert capsys.readouterr().out == written(directory, TEXT, max_new_tokens=9, seed=5) + "\n"


@pytest.mark.parametrize(("name", "value"), SAMPLING.items())
def test_chance_without_sampling_is_refused(save, capsys, name, value):
    flag = f"--{name.replace('_', '-')}"
    assert led("summarize", "a.txt", "--quiet", "--model", save(), flag, value) == 1
    error = capsys.readouterr().err
    assert error == f"led summarize: {flag} would change nothing; give --do-sample too, or leave it out.\n"


def test_a_model_that_writes_nothing_leaves_nothing_to_chance(save, capsys):
    directory = save(LEDForQuestionAnswering)
    assert led("answer", "a.txt", "--model", directory, *ASK, "--do-sample") == 1
    assert "--do-sample is for models that write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "0"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--temperature", "1e-320"],
        ["--temperature", "1e300"],
        ["--top-k", "-1"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-p", "nan"],
        ["--seed", "much"],
        ["--seed", str(2**64)],
        ["--threads", "0"],
        ["--threads", str(10**9)],
        ["--load-in-4bit", "--load-in-8bit"],
    ],
    ids=" ".join,
)
def test_values_without_meaning(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        led("summarize", "a.txt", "--model", "nowhere", *flags)
    assert stop.value.code == 2
    assert f"argument {flags[-2] if len(flags) > 1 and not flags[1].startswith('--') else flags[1]}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("temperature", [0.001, 1000])
def test_the_ends_of_temperature(save, temperature):
    flags = ["--do-sample", "--temperature", temperature, "--seed", 1, "--max-new-tokens", 5]
    assert led("summarize", "a.txt", "--model", save(), *flags) == 0


@pytest.mark.parametrize(("flag", "package"), [("4bit", "bitsandbytes"), ("8bit", "torchao")])
def test_smaller_weights(save, capsys, flag, package):
    """The model that the command loads, of every head, is the one that from_pretrained gives."""
    pytest.importorskip(package, reason=f"{package} is not installed; pip install '.[quant]'")
    loading = {f"load_in_{flag}": True}
    directory = save(LEDForConditionalGeneration, **SIZES)
    flags = ["--model", directory, f"--load-in-{flag}"]
    assert led("summarize", "a.txt", *flags, "--max-new-tokens", 20) == 0
    expected = written(directory, TEXT, loading=loading, max_new_tokens=20)
    assert capsys.readouterr().out == expected + "\n"

    directory = save(LEDForSequenceClassification, **SIZES)
    command = ["classify", "a.txt", "--model", directory, "--output", "out.jsonl"]
    assert led(*command, f"--load-in-{flag}") == 0
    with torch.no_grad():
        model = LEDForSequenceClassification.from_pretrained(directory, **loading)
        probabilities = model(**inputs(directory, TEXT)).logits[0].softmax(-1).tolist()
        full = LEDForSequenceClassification.from_pretrained(directory)
        assert full(**inputs(directory, TEXT)).logits[0].softmax(-1).tolist() != pytest.approx(probabilities)
    assert list(records()[0]["probabilities"].values()) == pytest.approx(probabilities, abs=1e-5)
    assert led(*command) == 1  # full weights would give other results than those in the file
    assert f"--load-in-{flag}" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "package"), [("4bit", "bitsandbytes"), ("8bit", "torchao")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_smaller_weights_of_a_broken_checkpoint(save, capsys, flag, package, value):
    """A number that is none is still found once it is in a few bits."""
    pytest.importorskip(package, reason=f"{package} is not installed; pip install '.[quant]'")
    directory = save(**SIZES)
    model = LEDForConditionalGeneration.from_pretrained(directory)
    with torch.no_grad():
        model.led.decoder.layers[0].fc1.weight[1, 2] = value
    model.save_pretrained(directory)
    assert led("summarize", "a.txt", "--model", directory, f"--load-in-{flag}") == 1
    assert "holds NaN or infinity; give a sound checkpoint" in capsys.readouterr().err


def test_smaller_weights_need_a_package(save, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert led("summarize", "a.txt", "--quiet", "--model", save(), "--load-in-8bit") == 1
    error = capsys.readouterr().err
    assert error.startswith("led summarize: load_in_8bit needs torchao; ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("there", "taken"), [(64, 3), (2, 2)])
def test_threads(save, monkeypatch, capsys, there, taken):
    """As many as are wanted, and there."""
    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr("os.cpu_count", lambda: there)
    monkeypatch.setattr(
        "led_model.modeling.model.LEDModel.encode",
        lambda *_, **__: seen.append(torch.get_num_threads()) or 1 / 0,
    )
    directory = save()
    try:
        with pytest.raises(ZeroDivisionError):
            led("summarize", "a.txt", "--model", directory, "--threads", 3)
    finally:
        torch.set_num_threads(before)
    assert seen == [taken]
    assert ("--threads is 3 and there are 2 processors" in capsys.readouterr().err) == (taken < 3)


def test_quiet(save, capsys, monkeypatch):
    """Nothing but the failure is said, and on a terminal nothing is drawn."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    Path("long.txt").write_text(TEXT * 9)
    Path("empty.txt").write_text(" ")
    command = ["summarize", "a.txt", "long.txt", "empty.txt", "--model", save(), "--max-new-tokens", 3]
    command += ["--long", "chunk"]
    assert led(*command) == 3
    loud = capsys.readouterr()
    assert "in 2 pieces" in loud.err
    assert "loading" in loud.err
    assert "documents" in loud.err
    assert "layer" in loud.err
    assert led(*command, "--quiet") == 3
    output = capsys.readouterr()
    assert output.out == loud.out
    assert output.err == "led summarize: empty.txt holds no text; give one.\n"


def length(directory: Path, *texts: str) -> int:
    return inputs(directory, *texts)["input_ids"].shape[1]


def test_dry_run(save, capsys, monkeypatch):
    """Counts what the model would read; no weights are there to be loaded, and --output stays as it is."""
    directory = save()
    (directory / "model.safetensors").unlink()
    Path("long.txt").write_text(TEXT * 9)
    Path("empty.txt").write_text(" ")
    Path("out.jsonl").write_text("not ours")
    tokens = [length(directory, TEXT), length(directory, TEXT * 9)]
    flags = ["--model", directory, "--dry-run", "--output", "out.jsonl"]
    command = ["summarize", "a.txt", "long.txt"]
    fates = {
        "error": (3, "would be left out"),
        "truncate": (0, f"the first {LIMIT} would be read"),
        "chunk": (0, "would be read in 2 pieces"),
    }
    for long, (status, fate) in fates.items():
        assert led(*command, *flags, "--long", long) == status
        output = capsys.readouterr()
        assert output.err == ""
        assert output.out == (
            f"long.txt has {tokens[1]} tokens: {fate}.\n"
            f"2 documents, {sum(tokens)} tokens, at most {tokens[1]} in one; 1 longer than the {LIMIT} that the "
            "model reads, 0 that cannot be read.\n"
        )
    assert led(*command, "empty.txt", "gone.txt", *flags, "--long", "chunk") == 3
    output = capsys.readouterr()
    assert "2 that cannot be read" in output.out
    assert re.fullmatch(
        r"led summarize: gone.txt is not there.*\nled summarize: empty.txt holds no text.*\n", output.err
    )
    assert Path("out.jsonl").read_text() == "not ours"


@pytest.mark.parametrize(
    ("command", "model_class", "decides"),
    [
        ("summarize", LEDForConditionalGeneration, False),
        ("answer", LEDForConditionalGeneration, False),
        ("answer", LEDForQuestionAnswering, True),
        ("classify", LEDForSequenceClassification, True),
    ],
)
def test_the_decoder_bounds_what_a_head_reads(save, capsys, command, model_class, decides):
    directory = save(model_class, max_decoder_position_embeddings=20)
    flags = ASK if command == "answer" else []
    assert led(command, "a.txt", "--model", directory, "--dry-run", *flags) == (3 if decides else 0)
    output = capsys.readouterr().out
    assert f" {length(directory, *ASK[1:][: len(flags)], TEXT)} tokens" in output
    assert f"longer than the {20 if decides else LIMIT} that" in output
