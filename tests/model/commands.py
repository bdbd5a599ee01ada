"""The commands on documents as a user types them, and what the models themselves make of the same texts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from led_model import LEDForConditionalGeneration
from led_model.cli.parser import main
from led_model.tokenization.tokenizer import LEDTokenizer

LIMIT = 136  # tokens that the models of the fixture ``save`` read
TEXT = "The encoder reads a long text. The decoder writes a short one.\n"
TEXTS = [TEXT * 3, "The encoder reads.\n", TEXT + "The <s> text </s> has </s> tags.", "A short one. " * 7]
PARAGRAPHS = [f"{number} {TEXT * 5}\n" for number in ("One", "Two", "Three", "Four")]


def led(command: str, *arguments: object) -> int:
    return main([command.split()[0], *map(str, arguments)])


def records(path: str | Path = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def inputs(directory: Path, text: str, pair: str | None = None, num_globals: int = 1) -> dict:
    """Returns what the model shall see of a text whose special tokens are text; of a pair, the first part is global."""
    tokenizer = LEDTokenizer.from_pretrained(directory)
    batch = tokenizer(text, pair, split_special_tokens=True, return_tensors="pt")
    if pair is not None:
        num_globals = batch.input_ids[0].tolist().index(tokenizer.sep_token_id)
    batch["global_attention_mask"] = (torch.arange(batch.input_ids.shape[1]) < num_globals).long()[None]
    return batch


def written(
    directory: Path, *texts: str, num_globals: int = 1, loading: dict | None = None, **settings
) -> str:
    model = LEDForConditionalGeneration.from_pretrained(directory, **loading or {})
    ids = model.generate(**inputs(directory, *texts, num_globals=num_globals), **settings)
    return LEDTokenizer.from_pretrained(directory).decode(ids[0], skip_special_tokens=True).strip()
