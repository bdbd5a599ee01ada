"""Arguments that do not go with each other are named, and neither end the process nor give numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from led_model import BeamKVCache, LEDForQuestionAnswering, StaticKVCache
from tests.model.small import VOCAB_SIZE

BATCH, SOURCE = 4, 20


@pytest.fixture
def model(small_model):
    return small_model(0, activation_function="gelu")


def ids(batch: int = BATCH, length: int = SOURCE) -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_hidden_states", lambda m: m.led.encode(ids(1))),
        ("encoder_hidden_states", lambda m: m.led.encode(ids(BATCH, 19))),
        ("encoder_hidden_states", lambda m: torch.zeros(BATCH, SOURCE, 7)),
        ("encoder_hidden_states", lambda m: m.led.encode(ids())[0]),
        ("encoder_hidden_states", lambda m: m.led.encode(ids()).long()),
        ("encoder_hidden_states", lambda m: m.led.encode(ids()).half()),
        ("encoder_hidden_states", lambda m: [1]),
        ("attention_mask", lambda m: ones(1, SOURCE)),
        ("attention_mask", lambda m: ones(BATCH, SOURCE + 1)),
        ("attention_mask", lambda m: ones(SOURCE)),
        ("attention_mask", lambda m: ids().tolist()),
        ("global_attention_mask", lambda m: ones(1, SOURCE)),
        ("global_attention_mask", lambda m: ones(BATCH, 3)),
        ("decoder_input_ids", lambda m: ids(1, 3)),
        ("decoder_input_ids", lambda m: ids(BATCH, 3)[0]),
        ("decoder_input_ids", lambda m: ids(BATCH, 3) + VOCAB_SIZE),
        ("decoder_attention_mask", lambda m: ones(BATCH, 3)),
        ("input_ids", lambda m: ids().tolist()),
        ("input_ids", lambda m: ids() - 99),
        ("input_ids", lambda m: ids()[0]),
        ("input_ids", lambda m: None),
    ],
)
@pytest.mark.parametrize("with_encoded", [False, True])
@torch.no_grad()
def test_generate_names_what_does_not_fit(model, name, value, with_encoded):
    arguments = {"input_ids": ids()} | (
        {"encoder_hidden_states": model.led.encode(ids())} if with_encoded else {}
    )
    with pytest.raises(ValueError, match=f"^{name} "):
        model.generate(**arguments | {name: value(model)}, max_new_tokens=2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", ones(1, SOURCE)),
        ("attention_mask", ones(BATCH, 3)),
        ("global_attention_mask", ones(BATCH, 3)),
        ("decoder_attention_mask", ones(1, 5)),
        ("decoder_attention_mask", ones(BATCH, 6)),
        ("decoder_input_ids", ids(1, 5)),
        ("decoder_input_ids", [1]),
        ("labels", ids(1, 5)),
        ("labels", ids(BATCH, 4)),
        ("inputs_embeds", torch.zeros(BATCH, SOURCE, 7)),
    ],
)
def test_forward_names_what_does_not_fit(model, name, value, grad):
    arguments = {"input_ids": ids(), "decoder_input_ids": ids(BATCH, 5)} | {name: value}
    if name == "inputs_embeds":
        del arguments["input_ids"]
    named = {
        "decoder_attention_mask": "attention_mask",
        "decoder_input_ids": "(decoder_input_ids|cross_keys)",
    }
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"^{named.get(name, name)}"):
        model(**arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cross_keys_values", lambda kv: [(k[:1], v[:1]) for k, v in kv]),
        ("cross_keys_values", lambda kv: [(k, v[:, :, :3]) for k, v in kv]),
        ("cross_keys_values", lambda kv: [(k[..., :1], v[..., :1]) for k, v in kv]),
        ("cross_keys_values", lambda kv: [(k[:, :, :0], v) for k, v in kv]),
        ("cross_keys_values", lambda kv: kv[:0]),
        ("cross_keys_values", lambda kv: [(None, None) for _ in kv]),
        ("cross_keys_values", lambda kv: kv[0]),
        ("cross_keys_values", lambda kv: kv[0][0]),
        ("cross_keys_values", lambda kv: None),
        ("cross_mask", lambda kv: torch.ones(BATCH, 1, 1, SOURCE + 1, dtype=torch.bool)),
        ("cross_mask", lambda kv: torch.ones(2, 1, 1, SOURCE, dtype=torch.bool)),
        ("cross_mask", lambda kv: torch.ones(BATCH, SOURCE, dtype=torch.bool)),
        ("attention_mask", lambda kv: ones(BATCH, 2)),
        ("position", lambda kv: ones(2)),
        ("position", lambda kv: torch.ones(3)),
        ("position", lambda kv: torch.tensor([0, 1, 48])),
        ("position", lambda kv: torch.tensor([0, 1, -1])),
    ],
)
def test_the_decoder_names_what_does_not_fit(model, name, change, grad):
    with torch.set_grad_enabled(grad):
        keys_values = model.led.decoder.cross_keys_values(model.led.encode(ids()))
        arguments = {"cross_keys_values": keys_values} | {name: change(keys_values)}
        with pytest.raises(ValueError, match=f"^{name} "):
            model.led.decoder(ids(BATCH, 3), **arguments)


@torch.no_grad()
def test_the_decoder_holds_a_cache_against_its_input(model, small_model):
    decoder, config = model.led.decoder, model.config
    keys_values = decoder.cross_keys_values(model.led.encode(ids()))
    step = {"cross_keys_values": keys_values, "position": torch.tensor([0])}
    others = [StaticKVCache(config, 1, 8), StaticKVCache(small_model(0, decoder_layers=3).config, BATCH, 8)]
    for cache in (*others, BeamKVCache(config, 2, 3, 8)):
        with pytest.raises(ValueError, match=r"^cache has "):
            decoder(ids(BATCH, 1), cache=cache, **step)
    cache = StaticKVCache(config, BATCH, 8)
    for change, name in (
        ({"position": None}, "position"),
        ({"position": torch.tensor([8])}, "position"),
        ({"attention_mask": ones(BATCH, 9)}, "attention_mask"),
        ({"attention_mask": ones(1, 8)}, "attention_mask"),
    ):
        with pytest.raises(ValueError, match=f"^{name} "):
            decoder(ids(BATCH, 1), cache=cache, **step | change)
    with pytest.raises(ValueError, match=r"^encoder_hidden_states is .* \(4, 20, 7\)"):
        decoder.cross_keys_values(torch.zeros(BATCH, SOURCE, 7))


@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_of_no_documents(model, grad):
    with torch.set_grad_enabled(grad):
        assert model(ids(0), decoder_input_ids=ids(0, 3)).logits.shape == (0, 3, VOCAB_SIZE)
        for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
            assert model.generate(ids(0), max_new_tokens=3, **settings).shape == (0, 1)


@torch.no_grad()
def test_more_sequences_than_positions(model):
    tokens = model.generate(ids(1), max_new_tokens=2, do_sample=True, num_return_sequences=60, seed=0)
    assert tokens.shape[0] == 60 > model.config.max_decoder_position_embeddings


@torch.no_grad()
def test_positions_extended_in_memory(model):
    """As PRIMERA's recipe does: the table's present size decides, whatever config.json said."""
    short = ids(1, 128)
    expected = model.led.encode(short)
    for stack in (model.led.encoder, model.led.decoder):
        stack.embed_positions.weight = nn.Parameter(stack.embed_positions.weight.repeat(2, 1))
    torch.testing.assert_close(model.led.encode(short), expected)
    assert model(ids(1, 200), decoder_input_ids=ids(1, 90)).logits.shape == (1, 90, VOCAB_SIZE)
    assert model.generate(ids(1, 200), max_new_tokens=80, eos_token_id=None).shape == (1, 81)
    with pytest.raises(ValueError, match="has 257 tokens but the position table holds 256"):
        model.led.encode(ids(1, 257))


def test_a_head_names_the_mask(small_model):
    model = LEDForQuestionAnswering(small_model(0).config).eval()
    with pytest.raises(ValueError, match=r"^attention_mask "):
        model(ids(), ones(1, SOURCE))
