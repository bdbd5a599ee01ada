"""What is printed and in which form, on a terminal while it is written, and summaries of summaries."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest
import torch

from led_model import LEDForConditionalGeneration, LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.batch.streaming import TextStreamer
from led_model.cli.parser import main
from led_model.cli.results import ResultFile
from led_model.tokenization.tokenizer import LEDTokenizer
from tests.model.commands import LIMIT, PARAGRAPHS, TEXTS, inputs, led, records, written

ASK = ["--question", "Who reads?"]


class Terminal(io.StringIO):
    """Remembers what was printed by each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


@pytest.fixture(autouse=True)
def long_file(documents):
    """The working directory has long.txt besides, which is read in four pieces."""
    Path("long.txt").write_text("".join(PARAGRAPHS))


def on_a_terminal(monkeypatch) -> Terminal:
    """It is stdout and stderr from now on."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    return terminal


def test_one_document_as_json(save, capsys):
    directory = save()
    flags = ["--model", directory, "--max-new-tokens", 9]
    assert led("summarize", "docs/0.txt", *flags, "--format", "jsonl") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["source"] == "docs/0.txt"
    assert record["summary"] == written(directory, TEXTS[0], max_new_tokens=9)


def test_several_documents_as_text(save, capsys):
    directory = save()
    flags = ["--text-field", "body", "--model", directory, "--max-new-tokens", 9, "--format", "text"]
    assert led("summarize", "docs/0.txt", "docs.jsonl", *flags) == 0
    names = ["docs/0.txt", *(f"docs.jsonl, document d{number}" for number in range(4))]
    texts = [written(directory, text, max_new_tokens=9) for text in [TEXTS[0], *TEXTS]]
    assert capsys.readouterr().out == "".join(
        f"==> {name} <==\n{text}\n\n" for name, text in zip(names, texts, strict=True)
    )


@pytest.mark.parametrize(
    ("command", "model_class"),
    [
        ("summarize", LEDForConditionalGeneration),
        ("answer", LEDForConditionalGeneration),
        ("answer", LEDForQuestionAnswering),
        ("classify", LEDForSequenceClassification),
    ],
)
def test_printed_beside_the_output(save, capsys, monkeypatch, command, model_class):
    """Also what an earlier run made, for which no model is loaded."""
    arguments = ["--model", save(model_class), *(ASK if command == "answer" else [])]
    texts = []
    for name in ("docs/0.txt", "docs/1.txt"):
        assert led(command, name, *arguments, "--format", "text") == 0
        texts.append(f"==> {name} <==\n{capsys.readouterr().out}\n")

    arguments += ["--output", "out.jsonl"]
    assert led(command, "docs/0.txt", *arguments) == 0
    assert capsys.readouterr().out == ""
    assert led(command, "docs/0.txt", "docs/1.txt", *arguments, "--format", "text") == 0
    assert capsys.readouterr().out == "".join(texts)
    monkeypatch.setattr("led_model.cli.run.load_task", None)
    assert led(command, "docs/1.txt", "docs/0.txt", *arguments, "--format", "text") == 0
    assert capsys.readouterr().out == "".join(reversed(texts))
    assert led(command, "docs/0.txt", "docs/1.txt", *arguments, "--format", "jsonl") == 0
    assert capsys.readouterr().out == Path("out.jsonl").read_text()


@pytest.mark.parametrize("long", ["error", "chunk"])
def test_a_terminal_sees_it_written(save, monkeypatch, long):
    """In many parts, which are the text; nothing else is drawn between them."""
    terminal = on_a_terminal(monkeypatch)
    directory = save()
    name = "docs/0.txt" if long == "error" else "long.txt"
    texts = [TEXTS[0]] if long == "error" else PARAGRAPHS
    lines = [written(directory, text, max_new_tokens=30) for text in texts]
    arguments = [name, "--model", directory, "--max-new-tokens", 30, "--long", long]
    assert led("summarize", *arguments, "--quiet") == 0
    assert terminal.getvalue() == "\n".join(lines) + "\n"
    assert sum(bool(part.strip()) for part in terminal.writes) > 5 * len(lines)
    assert led("summarize", *arguments) == 0
    assert "writing" not in terminal.getvalue()
    assert terminal.getvalue().count("\n".join(lines[-1:]) + "\n") == 2


@pytest.mark.parametrize(
    ("flags", "parts"),
    [(["summarize", "docs/0.txt", "--num-beams", 2], 1), (["answer", "long.txt", *ASK, "--long", "chunk"], 1)],
    ids=["beams", "pieces that compete"],
)  # fmt: skip
def test_what_may_still_change_is_printed_at_the_end(save, monkeypatch, flags, parts):
    terminal = on_a_terminal(monkeypatch)
    assert led(flags[0], *flags[1:], "--model", save(), "--max-new-tokens", 30, "--quiet") == 0
    assert len(terminal.getvalue()) > 20
    assert sum(bool(part.strip()) for part in terminal.writes) == parts


@pytest.mark.parametrize("flags", [["--num-beams", "2"], ["--batch-size", "3"]], ids=" ".join)
def test_pieces_are_printed_when_they_are_written(save, monkeypatch, flags):
    """Each batch of them at once, where there is nothing to see of single tokens; the last batch is of one piece."""
    terminal = on_a_terminal(monkeypatch)
    directory = save()
    arguments = [
        "long.txt",
        "--model",
        directory,
        "--max-new-tokens",
        9,
        "--long",
        "chunk",
        "--quiet",
        *flags,
    ]
    assert led("summarize", *arguments) == 0
    beams = 2 if "--num-beams" in flags else 1
    lines = [written(directory, text, max_new_tokens=9, num_beams=beams) for text in PARAGRAPHS]
    assert terminal.getvalue() == "\n".join(lines) + "\n"
    parts = [part for part in terminal.writes if part.strip()]
    assert len(parts) == 4 if beams == 2 else parts[0] == "\n".join(lines[:3]) + "\n"


def test_a_result_that_is_printed_beside_the_output_is_streamed(save, monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    flags = [
        "--model",
        save(),
        "--max-new-tokens",
        30,
        "--quiet",
        "--output",
        "out.jsonl",
        "--format",
        "text",
    ]
    assert led("summarize", "docs/0.txt", *flags) == 0
    [record] = records()
    assert terminal.getvalue() == record["summary"] + "\n"
    assert len(terminal.writes) > 5


def test_what_is_cut_off_ends_its_line(save, monkeypatch):
    terminal = on_a_terminal(monkeypatch)

    def interrupted(streamer: TextStreamer, tokens: torch.Tensor) -> None:
        put(streamer, tokens)
        if len(terminal.writes) > 8:
            raise KeyboardInterrupt

    put = TextStreamer.put
    monkeypatch.setattr(TextStreamer, "put", interrupted)
    directory = save()
    flags = ["docs/0.txt", "--model", str(directory), "--max-new-tokens", "30", "--quiet"]
    assert main(["summarize", *flags]) == 130
    text, message, rest = terminal.getvalue().split("\n")
    assert written(directory, TEXTS[0], max_new_tokens=30).startswith(text)
    assert len(text) > 5
    assert (message, rest) == ("led summarize: interrupted.", "")


@pytest.mark.parametrize("seed", range(50))
def test_streamed_parts_are_the_text(tokenizer_files, seed):
    """For any tokens, those that are no whole character or special among them; a prefix at any time."""
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
    draw = random.Random(seed)
    whole = tokenizer(" ö ☕ \n 🎉", add_special_tokens=False).input_ids
    ids = [draw.choice([*whole, draw.randrange(300), tokenizer.pad_token_id]) for _ in range(20)] + whole
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    terminal = Terminal()
    streamer = TextStreamer(tokenizer, terminal)
    streamer.put(torch.tensor([[2]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
        assert text.startswith(terminal.getvalue())
    streamer.end()
    streamer.finish(text)
    assert terminal.getvalue() == text + "\n"


def test_a_text_that_turns_out_otherwise_is_printed_whole(tokenizer_files):
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
    terminal = Terminal()
    streamer = TextStreamer(tokenizer, terminal)
    streamer.put(torch.tensor([[2]]))
    for token in tokenizer("The text", add_special_tokens=False).input_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    streamer.finish("Another")
    assert terminal.getvalue() == "The text\nAnother\n"


def rounds(directory: Path, new_tokens: int) -> list[str]:
    """The summaries of long.txt's pieces, joined, and the summaries of what is joined, by hand."""
    texts, joined = PARAGRAPHS, []
    while True:
        joined.append("\n".join(written(directory, text, max_new_tokens=new_tokens) for text in texts))
        if len(texts) == 1:
            return joined
        assert inputs(directory, joined[-1])["input_ids"].shape[1] <= LIMIT
        texts = [joined[-1]]


def test_summaries_of_summaries(save, capsys):
    directory = save()
    flags = ["--model", directory, "--max-new-tokens", 9, "--long"]
    assert led("summarize", "long.txt", *flags, "chunk") == 0
    chunked = capsys.readouterr().out
    assert led("summarize", "long.txt", *flags, "condense") == 0
    condensed = capsys.readouterr().out
    expected = rounds(directory, 9)
    assert [chunked, condensed] == [text + "\n" for text in expected]
    assert chunked != condensed
    assert led("summarize", "long.txt", "docs/0.txt", *flags, "condense", "--output", "out.jsonl") == 0
    long, short = records()
    assert (long["summary"], long["pieces"]) == (expected[-1], 4)
    assert (short["summary"], short["pieces"]) == (written(directory, TEXTS[0], max_new_tokens=9), 1)
    assert led("summarize", "long.txt", *flags, "chunk", "--output", "out.jsonl") == 1  # another setting
    assert "was made with --long 'condense' and this run has 'chunk'" in capsys.readouterr().err


def test_summaries_that_are_long_are_condensed_in_rounds(save, capsys):
    """Four pieces, then two, then one."""
    directory = save()
    flags = ["--model", directory, "--max-new-tokens", 20, "--long", "condense"]
    assert led("summarize", "long.txt", *flags) == 0
    output = capsys.readouterr()
    assert re.search("long.txt: reading [0-9]+ tokens in 4 pieces", output.err)
    assert "long.txt: summarizing 4 summaries, in 2 pieces." in output.err
    assert "long.txt: summarizing 2 summaries, in 1 piece." in output.err
    assert output.out.count("\n") == 1


def test_summaries_that_do_not_get_shorter_are_joined(save, capsys):
    """An end that never comes is not waited for."""
    directory = save()
    flags = ["--model", directory, "--max-new-tokens", LIMIT, "--min-new-tokens", LIMIT - 1, "--long"]
    assert led("summarize", "long.txt", *flags, "chunk") == 0
    chunked = capsys.readouterr().out
    assert led("summarize", "long.txt", *flags, "condense") == 0
    output = capsys.readouterr()
    assert output.out == chunked
    assert "long.txt: the summaries of its pieces are no shorter than these, and are joined." in output.err


def test_only_the_last_summary_is_streamed(save, monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    directory = save()
    flags = ["--model", directory, "--max-new-tokens", 9, "--long", "condense", "--quiet"]
    assert led("summarize", "long.txt", *flags) == 0
    assert terminal.getvalue() == rounds(directory, 9)[-1] + "\n"
    assert len(terminal.writes) > 5


def test_dry_run_of_summaries_of_summaries(save, capsys):
    assert led("summarize", "long.txt", "--model", save(), "--dry-run", "--long", "condense") == 0
    assert "would be read in 4 pieces, and their summaries again." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["answer", "classify"])
def test_only_summaries_are_condensed(command, capsys):
    with pytest.raises(SystemExit) as stop:
        led(command, "long.txt", "--model", ".", "--long", "condense", *(ASK if command == "answer" else []))
    assert stop.value.code == 2
    assert "argument --long: invalid choice: 'condense'" in capsys.readouterr().err


def test_a_record_without_a_result_is_none(tmp_path):
    made_by = {"command": "summarize"}
    line = {"led": "summarize", "id": 1, "source": "a", "document": "0", "made_by": made_by}
    Path("out.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="line 1 is no result of this program"):
        ResultFile("out.jsonl", made_by)
