"""Text to ids and back, from both forms of a tokenizer's files."""

from __future__ import annotations

import json

import pytest

from led_model.tokenizer import LEDTokenizer

TEXT = "The encoder reads the whole text; 12 words, naïve café ☕\n\n and two  spaces."


def test_both_forms_agree(tokenizer_files, tmp_path):
    from_parts = LEDTokenizer.from_pretrained(tokenizer_files)
    ids = from_parts.encode(TEXT)
    assert ids[0] == 0
    assert ids[-1] == 2
    assert len(ids) < len(TEXT.encode())  # merges are used
    assert from_parts.decode(ids) == TEXT
    from_parts.tokenizer.enable_truncation(4)  # what a saved tokenizer may ask for
    from_parts.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert LEDTokenizer.from_pretrained(tmp_path).encode(TEXT) == ids


def test_equals_transformers(tokenizer_files):
    transformers = pytest.importorskip("transformers")
    stock = transformers.LEDTokenizer.from_pretrained(tokenizer_files)
    ours = LEDTokenizer.from_pretrained(tokenizer_files)
    for text in (TEXT, "", " leading", "a <mask> and </s> inside", "\x00\ufffd\U0001f642"):
        ids = stock(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == stock.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"vocab.json": None}, FileNotFoundError, "holds no tokenizer.json, nor vocab.json with merges.txt"),
        ({"tokenizer.json": "{}"}, ValueError, "is no readable tokenizer"),
        ({"vocab.json": "{"}, ValueError, "are no readable BPE"),
        (
            {"vocab.json": json.dumps({"a": 0}), "merges.txt": "#version"},
            ValueError,
            "lacks <s>, <pad>, </s>",
        ),
    ],
)
def test_damage_is_named(tokenizer_files, files, error, message):
    for name, content in files.items():
        path = tokenizer_files / name
        path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        LEDTokenizer.from_pretrained(tokenizer_files)


def test_without_the_library(tokenizer_files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install 'led-kernels\\[text\\]'"):
        LEDTokenizer.from_pretrained(tokenizer_files)
