"""The README's training example, as it stands there: ten lines after the imports, that make a model better."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from led_model import LEDDataCollator, LEDForConditionalGeneration, LEDTokenizer
from tests.model.finetuning import write_examples

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_ten_lines_train_a_model(save, tmp_path):
    (code,) = re.findall(r"^<!-- training -->\n```python\n(.*?)```$", README, flags=re.DOTALL | re.MULTILINE)
    _, lines = code.split("\n\n")
    assert len(lines.splitlines()) == 10
    directory = save(dropout=0.1)
    examples = write_examples(tmp_path / "train.jsonl", 16)
    pairs = [(example["text"], example["summary"]) for example in examples]
    names = {"directory": directory, "pairs": pairs, "output": tmp_path / "tuned"}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)

    tokenizer = LEDTokenizer.from_pretrained(directory)
    batch = LEDDataCollator(tokenizer)([tokenizer(text, text_target=target) for text, target in pairs])
    with torch.no_grad():
        before, after = (
            LEDForConditionalGeneration.from_pretrained(folder)(**batch).loss.item()
            for folder in (directory, tmp_path / "tuned")
        )
    assert after < 0.99 * before
