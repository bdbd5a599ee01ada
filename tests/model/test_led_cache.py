"""Decoding step by step over the static cache gives what one pass gives."""

from __future__ import annotations

import pytest
import torch

from led_model import StaticKVCache
from tests.model.small import random_inputs


@pytest.fixture
def decoder_and_inputs(small_model):
    model = small_model(0, decoder_layers=2)
    inputs = random_inputs(0, target=12)
    with torch.no_grad():
        encoded = model.led.encode(inputs["input_ids"], inputs["attention_mask"])
        cross = model.led.decoder.cross_keys_values(encoded)
    return model, inputs["decoder_input_ids"], cross, inputs["attention_mask"][:, None, None, :] != 0


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 5], [12]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_one_pass(decoder_and_inputs, steps, padded):
    model, ids, cross, cross_mask = decoder_and_inputs
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, 2:5] = 0
        mask[2, 6] = 0
    expected = model.led.decoder(ids, cross, cross_mask=cross_mask, attention_mask=mask)
    cache = StaticKVCache(model.config, batch=3, max_length=20)
    cache.keys.fill_(1e4)  # a position that is not filled yet must not be seen
    cache.values.fill_(1e4)
    outputs, start = [], 0
    for count in steps:
        stop = start + count
        outputs.append(
            model.led.decoder(
                ids[:, start:stop],
                cross,
                cross_mask=cross_mask,
                attention_mask=None if mask is None else mask[:, :stop],
                cache=cache,
                position=torch.arange(start, stop),
            )
        )
        start = stop
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cache_never_moves(decoder_and_inputs):
    model, ids, cross, cross_mask = decoder_and_inputs
    cache = StaticKVCache(model.config, batch=3, max_length=5)
    before = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape)
    for i in range(5):
        model.led.decoder(
            ids[:, i : i + 1], cross, cross_mask=cross_mask, cache=cache, position=cache.positions[i : i + 1]
        )
    assert (cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape) == before
    assert cache.keys.ne(0).any(-1).all()  # every position of every layer, row and head was written


@torch.no_grad()
def test_position_past_the_cache_is_refused(decoder_and_inputs):
    model, ids, cross, _ = decoder_and_inputs
    cache = StaticKVCache(model.config, batch=3, max_length=5)
    with pytest.raises(ValueError, match="position holds 5; give 0 to 4"):
        model.led.decoder(ids[:, :1], cross, cache=cache, position=torch.tensor([5]))


def test_cache_takes_dtype_and_shape_from_the_config(small_model):
    model = small_model(1)
    config = model.config
    cache = StaticKVCache(config, batch=2, max_length=7, dtype=torch.bfloat16)
    heads = config.decoder_attention_heads
    assert cache.keys.shape == (config.decoder_layers, 2, heads, 7, config.d_model // heads)
    assert cache.values.dtype == torch.bfloat16
    assert cache.max_length == 7
