"""Greedy tokens against transformers' with its dynamic cache."""

from __future__ import annotations

import pytest
import torch

from tests.model.small import VOCAB_SIZE, random_inputs


def generate_both(stock, ours, inputs, **settings):
    expected = stock.generate(**inputs, do_sample=False, num_beams=1, **settings)
    return expected, ours.generate(**inputs, **settings)


def encoder_inputs(seed: int, **shape) -> dict[str, torch.Tensor]:
    inputs = random_inputs(seed, **shape)
    del inputs["decoder_input_ids"]
    return inputs


@pytest.mark.parametrize("seed", range(8))
def test_tokens_equal_transformers(led_pair, seed):
    stock, ours = led_pair(seed)
    expected, tokens = generate_both(stock, ours, encoder_inputs(seed, batch=4), max_new_tokens=40)
    assert torch.equal(tokens, expected)


def test_rows_end_at_different_lengths(led_pair):
    """Ends are many when a third of the vocabulary is one; rows that have ended are padded."""
    stock, ours = led_pair(5)
    eos = list(range(2, VOCAB_SIZE // 3))
    expected, tokens = generate_both(
        stock, ours, encoder_inputs(5, batch=6), max_new_tokens=40, eos_token_id=eos
    )
    assert torch.equal(tokens, expected)
    ends = (tokens == 1).sum(1)
    assert ends.min() < ends.max()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 7},
        {"max_new_tokens": 1},
        {"max_new_tokens": 12, "forced_bos_token_id": 0},
        {"max_new_tokens": 12, "forced_eos_token_id": 2},
        {"max_new_tokens": 12, "forced_eos_token_id": [9, 2]},
        {"max_new_tokens": 1, "forced_bos_token_id": 0, "forced_eos_token_id": 2},
        {"max_new_tokens": 12, "decoder_start_token_id": 5},
        {"max_new_tokens": 12, "eos_token_id": None},
        {"max_new_tokens": 12, "eos_token_id": 7, "pad_token_id": 3},
        {},
    ],
    ids=str,
)
def test_settings_equal_transformers(led_pair, settings):
    stock, ours = led_pair(5)
    if settings.get("eos_token_id", 0) is None:  # transformers reads None as "not given"
        stock.generation_config.eos_token_id = None
        settings = {"max_new_tokens": 12}
        ours.generation_config.eos_token_id = None
    expected, tokens = generate_both(stock, ours, encoder_inputs(5), **settings)
    assert torch.equal(tokens, expected)


def test_settings_of_the_checkpoint(led_pair):
    stock, ours = led_pair(3)
    stock.generation_config.max_length = ours.generation_config.max_length = 9
    inputs = encoder_inputs(3)
    expected, tokens = generate_both(stock, ours, inputs)
    assert torch.equal(tokens, expected)
    expected, tokens = generate_both(stock, ours, inputs, max_new_tokens=14)
    assert torch.equal(tokens, expected)
    ours.generation_config.max_new_tokens = 5
    assert ours.generate(**inputs, max_length=8).shape[1] <= 8


def test_padding_ids_are_masked_by_default(led_pair):
    stock, ours = led_pair(4)
    input_ids = encoder_inputs(4)["input_ids"]
    input_ids[0, 20:] = 1
    expected, tokens = generate_both(stock, ours, {"input_ids": input_ids}, max_new_tokens=20)
    assert torch.equal(tokens, expected)
    mask = (input_ids != 1).long()
    assert torch.equal(ours.generate(input_ids, mask, max_new_tokens=20), tokens)


def test_whole_decoder_position_table_is_usable(led_pair):
    stock, ours = led_pair(0, max_decoder_position_embeddings=8)
    stock.generation_config.eos_token_id = ours.generation_config.eos_token_id = None
    expected, tokens = generate_both(stock, ours, encoder_inputs(0), max_new_tokens=8)
    assert torch.equal(tokens, expected)
    with pytest.raises(ValueError, match="asks for 9 new tokens but the decoder has 8 positions"):
        ours.generate(**encoder_inputs(0), max_new_tokens=9)


def test_encoded_and_on_token(small_model):
    model = small_model(0)
    inputs = encoder_inputs(0)
    tokens = model.generate(**inputs, max_new_tokens=10)
    with torch.no_grad():
        encoded = model.led.encode(**inputs)
    heard = []
    again = model.generate(
        inputs["input_ids"],
        inputs["attention_mask"],
        encoder_hidden_states=encoded,
        max_new_tokens=10,
        on_token=heard.append,
    )
    assert torch.equal(again, tokens)
    assert torch.equal(torch.stack(heard, dim=1), tokens[:, 1:])


def test_bad_settings_are_named(small_model):
    model = small_model(0)
    with pytest.raises(ValueError, match="allows 0 new tokens"):
        model.generate(**encoder_inputs(0), max_length=1)
    with pytest.raises(TypeError, match="beam_count"):
        model.generate(**encoder_inputs(0), beam_count=4)
