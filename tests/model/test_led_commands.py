"""``led summarize``, ``led answer`` and ``led classify``, as a user types them, against the models themselves."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from led_model import (
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
)
from led_model.batch.writers import mean_log_probs
from led_model.tokenization.tokenizer import LEDTokenizer
from tests.model.commands import LIMIT, PARAGRAPHS, TEXT, TEXTS, inputs, led, records, written

QUESTION = "Who reads?"
COMMANDS = {
    "summarize": (LEDForConditionalGeneration, ["--max-new-tokens", "12"]),
    "answer": (LEDForConditionalGeneration, ["--question", QUESTION, "--max-new-tokens", "12"]),
    "answer with a span": (LEDForQuestionAnswering, ["--question", QUESTION, "--max-new-tokens", "12"]),
    "classify": (LEDForSequenceClassification, []),
}


def cut(directory: Path, texts: Sequence[str]) -> list[str]:
    """Returns the texts, after making sure that one fits the model and two do not."""
    for pair in pairwise(texts):
        lengths = [inputs(directory, text)["input_ids"].shape[1] for text in (pair[0], "".join(pair))]
        assert lengths[0] <= LIMIT < lengths[1]
    return list(texts)


@pytest.mark.parametrize("global_tokens", [0, 1, 5])
def test_summarize(save, documents, capsys, global_tokens):
    directory = save()
    flags = ["--max-new-tokens", 20, "--global-tokens", global_tokens, "--device", "cpu"]
    assert led("summarize", "docs/0.txt", "--model", directory, *flags) == 0
    output = capsys.readouterr()
    assert output.out == written(directory, TEXTS[0], num_globals=global_tokens, max_new_tokens=20) + "\n"
    assert len(output.out) > 10
    assert re.search(
        r"read [\d,]+ tokens in [\d.]+ s, wrote [\d,]+ in [\d.]+ s \([\d.]+ tokens/s\)", output.err
    )
    assert "\r" not in output.err  # no bar where there is no terminal


def test_generation_flags(save, documents, capsys):
    directory = save()
    settings = {
        "max_new_tokens": 15,
        "min_new_tokens": 5,
        "num_beams": 3,
        "length_penalty": 0.2,
        "no_repeat_ngram_size": 2,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert led("summarize", "docs/0.txt", "--model", directory, *flags) == 0
    expected = written(directory, TEXTS[0], **settings)
    assert capsys.readouterr().out == expected + "\n"
    for name in settings.keys() - {"max_new_tokens", "length_penalty", "min_new_tokens"}:
        assert written(directory, TEXTS[0], **{k: v for k, v in settings.items() if k != name}) != expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(save, documents, capsys, monkeypatch):
    """The bars are drawn, and change nothing."""
    directory = save()
    bars = Terminal()
    monkeypatch.setattr("sys.stderr", bars)
    monkeypatch.setattr("led_model.terminal.tqdm.update", lambda bar, n=1: True)  # as when it redraws
    flags = ["--model", directory, "--max-new-tokens", 20]
    assert led("summarize", "docs/0.txt", *flags) == 0
    assert capsys.readouterr().out == written(directory, TEXTS[0], max_new_tokens=20) + "\n"
    assert re.search(r"reading [\d,]+ tokens: +0%.*layer", bars.getvalue())
    assert re.search(r"writing: +0%.*token", bars.getvalue())
    assert "documents" not in bars.getvalue()
    assert led("summarize", "docs", *flags) == 0
    assert re.search(r"0 of 4 documents +0%\|.*left", bars.getvalue())


def test_stdin_in_a_process(save):
    directory = save()
    command = [sys.executable, "-m", "led_model", "summarize", "-", "--model", str(directory)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "8"], input=TEXT.encode(), capture_output=True, check=True
    )
    assert done.stdout.decode() == written(directory, TEXT, max_new_tokens=8) + "\n"


def test_json_lines_of_stdin(save, documents, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("docs.jsonl").read_bytes())))
    assert (
        led("classify", "-", "--jsonl", "--text-field", "body", "--model", save(LEDForSequenceClassification))
        == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["id"], line["source"]) for line in lines] == [(f"d{i}", "stdin") for i in range(4)]


def test_the_checkpoints_length_and_what_is_left_out(save, documents, capsys):
    directory = save()
    settings = {"max_length": 6, "num_beams": 4, "typical_p": 0.5, "num_return_sequences": 2}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    assert led("summarize", "docs/0.txt", "--model", directory) == 0
    output = capsys.readouterr()
    expected = written(directory, TEXTS[0], max_length=6, num_beams=4, num_return_sequences=1)
    assert output.out == expected + "\n"
    assert "asks for typical_p=0.5; decoding without it" in output.err


def test_bfloat16(save, documents, capsys):
    assert (
        led("summarize", "docs/1.txt", "--model", save(), "--dtype", "bfloat16", "--max-new-tokens", 4) == 0
    )
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_batches_change_nothing(save, documents, command):
    """Documents of very different length, whole and in pieces, with tags that look like special tokens."""
    model_class, flags = COMMANDS[command]
    directory = save(model_class)
    Path("docs/4.txt").write_text("".join(PARAGRAPHS))
    results = {}
    for batch_size in (1, 2, 3, 16):
        output = f"{batch_size}.jsonl"
        arguments = [
            "docs",
            "--model",
            directory,
            "--output",
            output,
            "--long",
            "chunk",
            "--batch-size",
            batch_size,
        ]
        assert led(command, *arguments, *flags) == 0
        results[batch_size] = sorted(records(output), key=lambda record: record["source"])
    assert len(results[1]) == 5
    for batch_size, found in results.items():
        for record, expected in zip(found, results[1], strict=True):
            assert record.keys() == expected.keys()
            for key, value in expected.items():
                if key in ("probabilities", "score"):
                    value = pytest.approx(value, abs=1e-5)
                assert record[key] == value, batch_size


def test_long_summaries(save, documents, capsys):
    directory = save()
    Path("long.txt").write_text("".join(cut(directory, PARAGRAPHS)))
    command = ["summarize", "long.txt", "--model", directory, "--max-new-tokens", 6]
    assert led(*command) == 3
    assert re.fullmatch(
        r"led summarize: long.txt has [\d,]+ tokens but the model reads at most 136; .*--long chunk do so.\n",
        capsys.readouterr().err,
    )
    assert led(*command, "--long", "truncate") == 0
    output = capsys.readouterr()
    assert "reading the first 136 of" in output.err
    batch = inputs(directory, "".join(PARAGRAPHS))
    ids = torch.cat([batch.input_ids[:, : LIMIT - 1], batch.input_ids[:, -1:]], dim=1)
    model = LEDForConditionalGeneration.from_pretrained(directory)
    mask = torch.eye(LIMIT, dtype=torch.int64)[:1]
    truncated = model.generate(ids, global_attention_mask=mask, max_new_tokens=6)
    decode = LEDTokenizer.from_pretrained(directory).decode
    assert output.out == decode(truncated[0], skip_special_tokens=True).strip() + "\n"
    assert led(*command, "--long", "chunk") == 0
    output = capsys.readouterr()
    assert "in 4 pieces" in output.err
    assert output.out.splitlines() == [written(directory, text, max_new_tokens=6) for text in PARAGRAPHS]


def test_written_answers(save, documents, capsys):
    directory = save()
    command = ["answer", "--question", QUESTION, "--model", directory, "--max-new-tokens", 9]
    assert led(*command, "docs/0.txt") == 0
    assert capsys.readouterr().out == written(directory, QUESTION, TEXTS[0], max_new_tokens=9) + "\n"

    Path("long.txt").write_text("".join(cut(directory, PARAGRAPHS)))
    assert led(*command, "long.txt", "--long", "chunk", "--output", "out.jsonl") == 0
    model = LEDForConditionalGeneration.from_pretrained(directory)
    answers = {}
    for text in PARAGRAPHS:
        batch = inputs(directory, QUESTION, text)
        ids = model.generate(**batch, max_new_tokens=9)
        with torch.no_grad():
            loss = model(**batch, labels=ids[:, 1:]).loss  # no sequence has ended before the last token here
        answers[-float(loss)] = written(directory, QUESTION, text, max_new_tokens=9)
    assert len(set(answers.values())) > 1
    [record] = records()
    assert record["score"] == pytest.approx(max(answers), abs=1e-5)
    assert record["answer"] == answers[max(answers)]
    assert record["question"] == QUESTION


def test_a_score_ends_with_its_sequence(save):
    """What is behind the first end, padding or not, does not count."""
    directory = save()
    model = LEDForConditionalGeneration.from_pretrained(directory)
    tokenizer = LEDTokenizer.from_pretrained(directory)
    batch = tokenizer([TEXT, TEXT * 2, "The text"], padding=True, return_tensors="pt")
    sequences = torch.tensor([[2, 9, 8, 2, 1, 1], [2, 9, 8, 7, 6, 5], [2, 2, 7, 2, 2, 1]])
    lengths = (3, 5, 1)
    with torch.no_grad():
        scores = mean_log_probs(model, model.led.encode(**batch), batch.attention_mask, sequences)
        for row, length in enumerate(lengths):
            alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            loss = model(**alone, labels=sequences[row : row + 1, 1 : 1 + length]).loss
            assert float(scores[row]) == pytest.approx(-float(loss), abs=1e-5)


def test_found_answers(save, documents, capsys):
    directory = save(LEDForQuestionAnswering)
    model = LEDForQuestionAnswering.from_pretrained(directory)
    tokenizer = LEDTokenizer.from_pretrained(directory)

    def best(text: str, longest: int) -> tuple[float, str]:
        batch = inputs(directory, QUESTION, text)
        output = model(**batch)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        ids = batch.input_ids[0].tolist()
        first, last = ids.index(2) + 2, len(ids) - 1
        spans = [
            (start[i] + end[j], i, j) for i in range(first, last) for j in range(i, min(i + longest, last))
        ]
        score, i, j = max(spans)
        return score, tokenizer.decode(ids[i : j + 1]).strip()

    assert led("answer", "--question", QUESTION, "docs/0.txt", "--model", directory) == 0
    assert capsys.readouterr().out == best(TEXTS[0], 64)[1] + "\n"
    for longest in (1, 3):
        flags = ["--max-new-tokens", longest, "--output", f"{longest}.jsonl", "--question", QUESTION]
        assert led("answer", "docs/0.txt", "--model", directory, *flags) == 0
        [record] = records(f"{longest}.jsonl")
        score, answer = best(TEXTS[0], longest)
        assert record["score"] == pytest.approx(score, abs=1e-4)
        assert record["answer"] == answer
        assert TEXTS[0][record["start"] : record["end"]] == record["answer"]

    Path("long.txt").write_text("".join(cut(directory, PARAGRAPHS)))
    flags = ["--long", "chunk", "--output", "out.jsonl", "--question", QUESTION]
    assert led("answer", "long.txt", "--model", directory, *flags) == 0
    [record] = records()
    score, answer = max(best(text, 64) for text in PARAGRAPHS)
    assert record["score"] == pytest.approx(score, abs=1e-4)
    assert record["answer"] == answer
    assert "".join(PARAGRAPHS)[record["start"] : record["end"]] == answer


def logits(directory: Path, text: str) -> torch.Tensor:
    with torch.no_grad():
        return LEDForSequenceClassification.from_pretrained(directory)(**inputs(directory, text)).logits[0]


def test_classes(save, documents, capsys):
    directory = save(LEDForSequenceClassification, num_labels=3, id2label={0: "no", 1: "yes", 2: "maybe"})
    assert led("classify", "docs/0.txt", "--model", directory) == 0
    probabilities = dict(
        zip(("no", "yes", "maybe"), logits(directory, TEXTS[0]).softmax(-1).tolist(), strict=True)
    )
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    assert capsys.readouterr().out == "".join(f"{label}\t{value:.4f}\n" for label, value in ranked)

    Path("long.txt").write_text("".join(cut(directory, PARAGRAPHS)))
    assert led("classify", "long.txt", "--model", directory, "--long", "chunk", "--output", "out.jsonl") == 0
    log_probs = torch.stack([logits(directory, text).log_softmax(-1) for text in PARAGRAPHS]).mean(0)
    [record] = records()
    assert list(record["probabilities"].values()) == pytest.approx(log_probs.softmax(-1).tolist(), abs=1e-5)
    assert record["label"] == ["no", "yes", "maybe"][log_probs.argmax()]


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_other_kinds_of_labels(save, documents, kind):
    directory = save(LEDForSequenceClassification, num_labels=3, problem_type=kind)
    assert led("classify", "docs/0.txt", "--model", directory, "--output", "out.jsonl") == 0
    [record] = records()
    expected = logits(directory, TEXTS[0])
    if kind == "regression":
        assert list(record["label"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    else:
        assert list(record["probabilities"].values()) == pytest.approx(expected.sigmoid().tolist(), abs=1e-5)
        assert record["label"] == [f"LABEL_{i}" for i in range(3) if expected[i] > 0]


def test_bad_documents_are_named_and_the_others_done(save, documents, capsys):
    Path("docs/bad.txt").write_bytes(b"abc\xff")
    Path("docs/empty.md").write_text(" \n")
    Path("docs/long.md").write_text(TEXT * 30)
    Path("docs/lines.jsonl").write_text('{"id": "x", "text": "A text."}\n{bad\n{"text": "Another."}\n')
    arguments = ["docs", "gone.txt", "--model", save(), "--max-new-tokens", 3, "--output", "out.jsonl"]
    assert led("summarize", *arguments) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("led summarize: ")]
    for error, message in zip(
        errors,
        ["gone.txt is not there", "bad.txt is not UTF-8", "empty.md holds no", "lines.jsonl line 2", "long.md has"],
        strict=True,
    ):  # fmt: skip
        assert message in error
    done = [(record["source"], record["id"]) for record in records()]
    texts = [(f"docs/{i}.txt", f"docs/{i}.txt") for i in range(4)]
    assert sorted(done, key=str) == sorted(
        [*texts, ("docs/lines.jsonl", "x"), ("docs/lines.jsonl", 3)], key=str
    )

    Path("docs/bad.txt").write_text("repaired")
    assert led("summarize", *arguments) == 3
    assert "out.jsonl holds 6 results already" in capsys.readouterr().err
    assert [record["source"] for record in records()[6:]] == ["docs/bad.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; give a text file, a directory, or - for stdin"),
        (b"\xe9\xfe\x00", "is not UTF-8 at byte 0"),
        (b" \n", "holds no text"),
    ],
)
def test_bad_text_is_one_sentence(tmp_path, capsys, content, message):
    """Said without loading a model: here is none."""
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert led("summarize", path, "--model", tmp_path) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_wrong_models_and_flags(save, documents, capsys, monkeypatch):
    monkeypatch.setattr(
        "led_model.modeling.model.LEDModel.encode", None
    )  # nothing is read before the refusal
    writer, finder = save(), save(LEDForQuestionAnswering)
    small = save(LEDForSequenceClassification, vocab_size=20)
    asked, writing = ["--model", finder, "--question", "a"], ["--model", writer]
    for message, arguments in {
        "is no directory": ["summarize", "docs", "--model", "nowhere"],
        "has no classification head": ["classify", "docs", "--model", writer],
        "the tokenizer has 300 tokens and the model 20": ["classify", "docs", "--model", small],
        "--num-beams is for models that write": ["answer", "docs", *asked, "--num-beams", 2],
        "137 new tokens are asked for but the decoder": ["summarize", "docs", *writing, "--max-new-tokens", 137],
        "--question takes 154 of the 136 tokens": ["answer", "docs", *writing, "--question", "a" * 151],
        "docs.jsonl line 1 is no result": ["summarize", "docs", *writing, "--output", "docs.jsonl"],
    }.items():  # fmt: skip
        assert led(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_directories_that_training_leaves(save, documents, capsys):
    """Of a tokenizer they may hold nothing, and it is read first."""
    Path("output").mkdir()
    save().rename("output/checkpoint-20")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("empty").mkdir()
    for directory, remedy in {
        "output": "it is a Trainer's output directory: give output/checkpoint-20, its newest checkpoint.",
        "adapter": "it is an adapter: load it with peft, merge it into its model by merge_and_unload() and save that.",
        "empty": "copy the tokenizer's files there.",
    }.items():
        assert led("summarize", "docs/0.txt", "--model", directory) == 1
        error = capsys.readouterr().err
        assert error.endswith(f"{remedy}\n")
        assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_no_numbers(save, documents, capsys, command):
    model_class, flags = COMMANDS[command]
    directory = save(model_class)
    model = model_class.from_pretrained(directory)
    model.led.decoder.layers[0].fc1.weight.data[0, 0] = float("nan")
    model.save_pretrained(directory)
    assert led(command, "docs/0.txt", "--model", directory, *flags, "--output", "out.jsonl") == 1
    output = capsys.readouterr()
    assert "led.decoder.layers.0.fc1.weight holds NaN or infinity" in output.err
    assert not output.out
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "model_class"),
    [
        ("summarize", LEDForQuestionAnswering),
        ("summarize", LEDForSequenceClassification),
        ("answer", LEDForSequenceClassification),
    ],
)
def test_heads_that_were_never_trained_do_not_write(save, documents, capsys, command, model_class):
    flags = ["--question", QUESTION] if command == "answer" else []
    assert led(command, "docs/0.txt", "--model", save(model_class), *flags) == 1
    head = "qa_outputs" if model_class is LEDForQuestionAnswering else "classification_head"
    assert f"is a checkpoint with {head}, whose head" in capsys.readouterr().err


def test_long_texts_are_read_in_windows(save, documents, monkeypatch):
    """As many tokens as by reading them at once, and of a text that is cut no more than is needed."""
    directory = save()
    Path("long.txt").write_text("".join(PARAGRAPHS) * 3)
    assert led("summarize", "long.txt", "--model", directory, "--long", "chunk", "--output", "a.jsonl") == 0
    monkeypatch.setattr("led_model.batch.pieces._WINDOW", 50)
    assert led("summarize", "long.txt", "--model", directory, "--long", "chunk", "--output", "b.jsonl") == 0
    assert records("a.jsonl") == records("b.jsonl")
    encoded = []
    call = LEDTokenizer.__call__
    monkeypatch.setattr(
        LEDTokenizer, "__call__", lambda self, text, **k: encoded.append(text) or call(self, text, **k)
    )
    monkeypatch.setattr("led_model.batch.pieces._WINDOW", 500)
    Path("longer.txt").write_text(TEXT * 1000)
    assert led("summarize", "longer.txt", "--model", directory, "--long", "truncate") == 0
    assert len(encoded) <= 3


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "nonsense", "cpu:x"])
def test_devices_that_are_not_here(documents, capsys, device):
    if device != "meta" and getattr(getattr(torch, device, None), "is_available", bool)():
        device = "meta"
    with pytest.raises(SystemExit) as stop:
        led("summarize", "docs/0.txt", "--model", ".", "--device", device)
    assert stop.value.code == 2
    message = capsys.readouterr().err.split("argument --device: ")[1]
    assert 0 < len(message) < 250


def test_only_what_is_about_memory_is_said_to_be(monkeypatch, documents, capsys):
    of_memory = [
        torch.OutOfMemoryError("no"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ]
    errors = [RuntimeError("the memory of this is bad"), *of_memory]

    def fails(args):
        raise errors.pop()

    monkeypatch.setattr("led_model.cli.engines.run_on_documents", fails)
    for _ in of_memory:
        assert led("summarize", "docs/0.txt", "--model", ".") == 1
        assert "memory ran out" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="is bad"):
        led("summarize", "docs/0.txt", "--model", ".")


def test_a_head_reads_as_far_as_its_decoder_and_says_so(save, documents, capsys):
    directory = save(LEDForSequenceClassification, max_decoder_position_embeddings=20)
    assert led("classify", "docs/0.txt", "--model", directory) == 3
    message = (
        "but the model reads at most 20, the positions of its decoder, which the head sits on; cut it, or"
    )
    assert message in capsys.readouterr().err
