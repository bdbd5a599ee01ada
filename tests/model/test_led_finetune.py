"""``led finetune`` from examples to a result that led_model, transformers and ``led summarize`` read."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from led_model import LEDForConditionalGeneration, LEDTokenizer
from led_model.cli.parser import main
from tests.model.checkpoints import edit_tensors
from tests.model.commands import led, records
from tests.model.finetuning import arguments, write_examples

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model(save) -> Path:
    return save()


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The working directory has train.jsonl and dev.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path / "train.jsonl", 24)
    write_examples(tmp_path / "dev.jsonl", 4, seed=1)
    return tmp_path


def finetune(model: Path, *others: object, train: object = "train.jsonl", output: str = "out") -> int:
    return main(arguments(model, train, output, *others))


def log(output: str = "out") -> list[dict]:
    return records(f"{output}/training_log.jsonl")


def test_from_examples_to_a_summary(model, files, capsys):
    """The loss falls, the best checkpoint is the result, and everything reads it."""
    status = finetune(
        model, "--validation", "dev.jsonl", "--max-steps", 18, "--eval-every", 6, "--learning-rate", 3e-3
    )
    printed, told = capsys.readouterr()
    assert status == 0, told
    assert "next: led summarize FILE --model out --max-new-tokens 12" in printed
    assert "led finetune: update 6 of 18: validation loss" in told
    assert {path.name for path in Path("out").iterdir()} == {
        "finetune.json", "training_log.jsonl", "loss.png", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    }  # fmt: skip
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")

    losses = [entry["loss"] for entry in log() if "loss" in entry]
    assert len(losses) == 18
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    evaluations = [entry for entry in log() if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [6, 12, 18]
    best = max(evaluations, key=lambda entry: (entry["eval_rougeLsum"], -entry["eval_loss"]))
    assert (
        f"those after update {best['step']}: validation loss {best['eval_loss']:.4f}, ROUGE-1/2/L" in printed
    )

    text = json.loads(Path("dev.jsonl").read_text().splitlines()[0])["text"]
    Path("paper.txt").write_text(text)
    assert led("summarize", "paper.txt", "--model", "out", "--max-new-tokens", 12) == 0
    summary = capsys.readouterr().out.strip()
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained("out")
    assert stock.config.use_cache
    encoded = tokenizer(text, return_tensors="pt")
    global_attention_mask = torch.zeros_like(encoded.input_ids)
    global_attention_mask[:, 0] = 1
    ids = stock.generate(**encoded, global_attention_mask=global_attention_mask, max_new_tokens=12)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == summary

    assert finetune(model, "--validation", "dev.jsonl", "--max-steps", 18, "--eval-every", 6) == 1
    assert "was begun with --learning-rate 0.003 and this run has 5e-05" in capsys.readouterr().err


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_the_loss_is_that_of_all_tokens(model, files, smoothing):
    """Of the first update, and of an evaluation, whatever the batches are."""
    examples = [json.loads(line) for line in Path("dev.jsonl").read_text().splitlines()]
    tokenizer = LEDTokenizer.from_pretrained(model)
    led_model = LEDForConditionalGeneration.from_pretrained(model)
    rows, labels = [], []
    for example in examples:
        batch = tokenizer(example["text"], text_target=example["summary"], return_tensors="pt")
        batch["global_attention_mask"] = (torch.arange(batch.input_ids.shape[1]) == 0).long()[None]
        rows.append(led_model(**batch).logits[0])
        labels.append(batch["labels"][0])
    logits, targets = torch.cat(rows), torch.cat(labels)
    plain = torch.nn.functional.cross_entropy(logits, targets).item()
    smooth = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    grad_norm = torch.nn.utils.get_total_norm(
        torch.autograd.grad(smooth, list(led_model.parameters()))
    ).item()
    for size, accumulate in ((1, 4), (3, 2)):
        output = f"out{size}"
        changed = ("--batch-size", size, "--accumulate", accumulate, "--label-smoothing", smoothing)
        still = ("--validation", "dev.jsonl", "--max-steps", 1, "--learning-rate", 0, "--best-by", "loss")
        assert finetune(model, *still, *changed, "--quiet", train="dev.jsonl", output=output) == 0
        first, evaluation = log(output)
        assert first["loss"] == pytest.approx(smooth.item(), rel=1e-5)
        assert first["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
        assert evaluation["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_choices_about_memory_change_no_loss(model, files):
    """Layers that are computed twice give the same numbers, packed batches and bfloat16 nearly so."""
    dev = ("--validation", "dev.jsonl", "--quiet")

    def logged(output: str, *others: object) -> list[dict]:
        assert finetune(model, *dev, "--max-steps", 3, *others, output=output) == 0
        return log(output)

    once = logged("once", "--checkpointing", "off", "--packing", "off")
    assert logged("twice", "--checkpointing", "on", "--packing", "off") == once
    for name, others, bound in (
        ("packed", ("--packing", "on"), 1e-5),
        ("bfloat16", ("--packing", "off", "--dtype", "bfloat16", "--num-beams", 2), 0.02),
    ):
        for entry, same in zip(logged(name, *others), once, strict=True):
            (measured,) = {"loss", "eval_loss"} & same.keys()
            assert entry[measured] == pytest.approx(same[measured], rel=bound)
        assert log(name) != once
    assert LEDForConditionalGeneration.from_pretrained("bfloat16").dtype == torch.float32


def test_batches_of_tokens(model, files, capsys):
    """They hold as many examples as fit, each example once an epoch."""
    given = ("--model", model, "--train", "train.jsonl", "--output", "out", "--accumulate", 1)
    assert led("finetune", *given, "--batch-tokens", 200, "--epochs", 1, "--device", "cpu") == 0
    told = capsys.readouterr()
    updates = int(re.search(r"trained in (\d+) updates", told.out)[1])
    assert len([entry for entry in log() if "loss" in entry]) == updates < 24 / 2
    assert "batches of at most 200 tokens" in told.err
    assert "packing on" in told.err
    assert led("finetune", *given, "--batch-tokens", 10, "--overwrite") == 1
    assert "--batch-tokens is 10 and the longest text has" in capsys.readouterr().err
    assert led("finetune", *given, "--batch-tokens", 99, "--packing", "off") == 1
    assert "--batch-tokens packs, and --packing is off" in capsys.readouterr().err


def test_patience(model, files, capsys):
    """With a learning rate of 0 nothing gets better, so that the first evaluation is the best one."""
    settings = ("--validation-split", 0.25, "--best-by", "loss", "--patience", 2, "--eval-every", 1)
    assert finetune(model, *settings, "--learning-rate", 0, "--max-steps", 9) == 0
    assert "trained in 3 updates; out holds those after update 1:" in capsys.readouterr().out
    assert [entry["step"] for entry in log() if "eval_loss" in entry] == [1, 2, 3]


def test_interruption(model, files, capsys, monkeypatch):
    """Ctrl-C finishes the update and writes a checkpoint; the same command finishes the work."""
    from led_model.training.progress import Progress

    settings = ("--validation", "dev.jsonl", "--best-by", "loss", "--max-steps", 6)

    def interrupt(self, args, state, control, **_) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a job in the background ignores it
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_begin", interrupt)
        assert finetune(model, *settings) == 130
    error = capsys.readouterr().err
    assert "finishing this update, then a checkpoint" in error
    assert "interrupted; out has a checkpoint after update 3 of 6. Give the same command again" in error
    assert not Path("out/config.json").exists()
    LEDForConditionalGeneration.from_pretrained("out/checkpoint-3")
    assert signal.getsignal(signal.SIGINT) is before
    assert finetune(model, *settings) == 0
    assert [entry["step"] for entry in log() if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert "going on after update 3 of 6" in capsys.readouterr().err
    assert finetune(model, *settings) == 0
    assert "out is finished" in capsys.readouterr().err


def test_a_directory_of_something_else_is_not_touched(model, files, capsys):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    for others in ((), ("--overwrite",)):
        assert finetune(model, *others) == 1
        assert "out holds thesis.txt and is no output of led finetune" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]
    assert finetune(model, "--overwrite", output=str(model)) == 1
    assert "holds the --model itself" in capsys.readouterr().err
    assert finetune(model, output="there/out") == 1
    assert "the directory of --output there/out is not there" in capsys.readouterr().err


def test_two_runs_do_not_share_a_directory(model, files, capsys):
    from led_model.training.run_directory import RunDirectory

    with RunDirectory("out"):
        assert finetune(model) == 1
        assert "out is being written by another process" in capsys.readouterr().err
    assert not Path("out").exists()


def test_other_settings_and_examples_are_refused(model, files, capsys):
    settings = ("--max-steps", 1, "--validation", "dev.jsonl", "--best-by", "loss", "--quiet")
    assert finetune(model, *settings) == 0
    Path("out/config.json").unlink()  # as if the run were not finished
    write_examples(Path("train.jsonl"), 24, seed=2)
    assert finetune(model, *settings) == 1
    assert "was begun with the examples to train on" in capsys.readouterr().err
    assert finetune(model, *settings, "--overwrite") == 0
    assert Path("out/config.json").exists()
    assert finetune(model, *settings, "--seed", 1) == 1
    assert "was begun with --seed 0 and this run has 1; give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "A text."}', "has no 'summary' but 'text'; name the target with --target-field."),
        ('{"text": " ", "summary": "x"}', "has no text in 'text'; give a string that is not blank"),
        ('{"text": "A text.", "summary": 3}', "has no text in 'summary'"),
        ("[1]", "holds a list; give a JSON object with a 'text'."),
        ("{", "is not valid JSON"),
        ('{"text": "\\ud800", "summary": "x"}', "holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_and_left_out(model, files, capsys, line, reason):
    with open("train.jsonl", "a") as file:
        file.write(line)
    assert finetune(model, "--dry-run") == 3
    out, err = capsys.readouterr()
    assert f"led finetune: train.jsonl line 25 {reason}" in err
    assert "24 training examples" in out
    assert not Path("out").exists()


def test_an_endless_line_is_not_read(model, files, capsys):
    assert finetune(model, "--dry-run", train="/dev/zero") == 1
    error = capsys.readouterr().err
    assert "/dev/zero line 1 holds more than 32 MiB of text" in error
    assert "there is no example to train on" in error


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (("--train", "none.jsonl"), "--train: none.jsonl is not there; give .jsonl files, or a quoted glob."),
        (("--train", "-"), "--train - is stdin, which cannot be read twice"),
        (("--train", "."), "--train . is a directory; give .jsonl files"),
        (("--patience", 2), "--patience needs examples to validate on"),
        (("--max-source-length", 99_999), "--max-source-length is 99,999 and the model has 136 positions"),
        (("--global-tokens", "question"), "give --question-field, too"),
        (("--batch-tokens", 16, "--batch-size", 1), None),
        (("--global-tokens", "some"), None),
        (("--epochs", "nan"), None),
    ],
)
def test_what_cannot_be_is_refused(model, files, capsys, others, reason):
    if reason is None:
        with pytest.raises(SystemExit) as stop:
            finetune(model, *others)
        assert stop.value.code == 2
    else:
        assert finetune(model, *others) == 1
        assert reason in capsys.readouterr().err
    assert not Path("out").exists()


def test_dry_run(model, files, capsys):
    assert finetune(model, "--dry-run", "--max-source-length", 30, "--validation-split", 0.25) == 0
    out = capsys.readouterr().out
    assert "24 training examples," in out
    assert "at most 30 in one" in out
    assert "6 of them are kept for validation." in out
    assert "15 updates of 2 batches of at most 2 examples, 5 an epoch, in float32 on cpu." in out
    assert "checkpointing off: the largest batch," in out
    assert not Path("out").exists()


def test_what_is_cut_is_told(model, files, capsys):
    assert finetune(model, "--max-steps", 1, "--max-source-length", 30, "--max-target-length", 4) == 0
    told = capsys.readouterr().err
    assert re.search(r"\d+ of 24 training texts are longer than 30 tokens and lose their end", told)
    assert "24 of 24 training targets are longer than 4 tokens and lose their end" in told


@pytest.mark.parametrize("beams", [1, 4])
def test_one_summary_is_scored_whatever_the_checkpoint_asks_for(model, files, beams):
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_return_sequences": 2, "num_beams": 2}))
    validation = ("--validation", "dev.jsonl", "--num-beams", beams)
    assert finetune(model, *validation, "--max-steps", 1) == 0
    assert [entry for entry in log() if "eval_rougeLsum" in entry]


def test_questions_and_parts(model, files, capsys):
    """A question is read before the text, as by led answer; the target is what --target-field names."""
    rows = [
        {
            "body": ["The encoder reads.", "The decoder writes."],
            "answer": "The decoder",
            "ask": "Who writes?",
        },
        {"body": "The encoder reads.", "answer": "The encoder", "ask": "Who reads?"},
    ]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ("--text-field", "body", "--target-field", "answer", "--question-field", "ask")
    assert finetune(model, *fields, "--max-steps", 1, "--label-smoothing", 0.1, train="qa.jsonl") == 0
    assert "next: led answer FILE --question TEXT --model out" in capsys.readouterr().out

    from led_model.cli.examples import ExampleEncoder, find_examples

    tokenizer = LEDTokenizer.from_pretrained(model)
    sources = find_examples(["qa.jsonl"], "--train", "body", "answer", "ask")
    first, second = ExampleEncoder(tokenizer, 18, 5).encoded(sources, "examples")
    assert second.input_ids.tolist() == tokenizer("Who reads?", "The encoder reads.").input_ids
    assert second.labels.tolist() == tokenizer("The encoder", max_length=5, truncation=True).input_ids
    assert len(first.input_ids) == 18
    assert first.is_cut
    assert not second.is_cut


def test_a_loss_that_is_no_number_ends_the_run(model, files, capsys):
    """Before there is a checkpoint of it."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["led.encoder.layers.0.fc1.weight"][0, 0] = float("nan")

    edit_tensors(model, spoil)
    assert finetune(model, "--max-steps", 2, "--save-every", 1, "--quiet") == 1
    assert "loss is nan after update 1; look at the examples, or give --overwrite" in capsys.readouterr().err
    assert {path.name for path in Path("out").iterdir()} == {"finetune.json", "training_log.jsonl"}
    assert log() == []


def test_a_missing_package_is_named(model, files, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rouge_score" else name)
    assert finetune(model) == 1
    error = capsys.readouterr().err
    assert "led finetune needs rouge_score; run `pip install '.[train]'`" in error


def test_it_is_one_process(model, files, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert finetune(model) == 1
    assert "led finetune runs in one process" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "led finetune --train", "led summarize paper.txt --model ./mine", "exit status: 0",
                 "the same command goes on", "loss.png", "training_log.jsonl", "--dry-run"):  # fmt: skip
        assert word in text
