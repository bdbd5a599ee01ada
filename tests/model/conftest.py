"""Random small LED models: one of transformers and ours, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from led_model import LEDConfig, LEDForConditionalGeneration
from led_model.checkpoint.tensor_names import to_hf_state_dict
from led_model.tokenization.tokenizer import LEDTokenizer
from tests.model.commands import LIMIT, TEXTS
from tests.model.small import randomize, small_config


@pytest.fixture
def led_pair(tmp_path: Path):
    """A function: seed and config overrides to (transformers' model, ours), same weights, in eval mode."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()

    def make(seed: int = 0, **overrides):
        stock = transformers.LEDForConditionalGeneration(
            transformers.LEDConfig(**small_config(seed, **overrides))
        )
        randomize(stock, seed)
        directory = tmp_path / f"pair-{len(list(tmp_path.iterdir()))}"
        stock.save_pretrained(directory)
        return stock.eval(), LEDForConditionalGeneration.from_pretrained(directory)

    return make


@pytest.fixture
def small_model():
    """A function: seed and config overrides to our model in eval mode."""

    def make(seed: int = 0, **overrides) -> LEDForConditionalGeneration:
        model = LEDForConditionalGeneration(LEDConfig(**small_config(seed, **overrides)))
        randomize(model, seed)
        return model.eval()

    return make


@pytest.fixture
def save_checkpoint():
    """A function that writes our model as transformers would: config.json and model.safetensors."""

    def save(model: LEDForConditionalGeneration, directory: Path, **settings) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        config = vars(model.config) | {"model_type": "led"} | settings
        (directory / "config.json").write_text(json.dumps(config))
        tied = {"led.encoder.embed_tokens.weight", "led.decoder.embed_tokens.weight", "lm_head.weight"}
        tensors = {
            name: tensor.clone()
            for name, tensor in to_hf_state_dict(model.state_dict()).items()
            if name not in tied
        }
        save_file(tensors, directory / "model.safetensors")
        return directory

    return save


@pytest.fixture
def tokenizer_files(tmp_path: Path) -> Path:
    """A directory with vocab.json and merges.txt of a small byte-level BPE with BART's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    text = "The encoder reads the whole text and the decoder writes a short one. " * 3
    bpe.train_from_iterator(
        [text],
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    bpe.save_model(str(directory))
    return directory


@pytest.fixture
def save(tokenizer_files, tmp_path):
    """A function: a class to the directory of a small random checkpoint of it, with its tokenizer."""

    def make(model_class=LEDForConditionalGeneration, **overrides) -> Path:
        tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
        settings = {"max_encoder_position_embeddings": LIMIT, "max_decoder_position_embeddings": LIMIT}
        settings |= {"vocab_size": len(tokenizer)} | overrides
        model = model_class(LEDConfig(**small_config(5, **settings)))
        randomize(model, 5)
        directory = tmp_path / model_class.__name__
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """The working directory has docs/0.txt to docs/3.txt and the same texts in docs.jsonl."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    for number, text in enumerate(TEXTS):
        Path(f"docs/{number}.txt").write_text(text)
    lines = [json.dumps({"id": f"d{number}", "body": text}) for number, text in enumerate(TEXTS)]
    Path("docs.jsonl").write_text("\n".join(lines))
