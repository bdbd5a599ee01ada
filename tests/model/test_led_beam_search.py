"""Beam search against transformers' with its dynamic cache: tokens, and scores to 1e-4."""

from __future__ import annotations

import random

import pytest
import torch

from led_kernels.gemv import decode_attention
from led_model import LEDForConditionalGeneration
from led_model.generation import step as decoder_step
from led_model.generation.cache import BeamKVCache
from tests.model.small import VOCAB_SIZE, random_inputs

SCORES = {"return_dict_in_generate": True, "output_scores": True}


def encoder_inputs(seed: int, **shape) -> dict[str, torch.Tensor]:
    inputs = random_inputs(seed, **shape)
    del inputs["decoder_input_ids"]
    return inputs


def assert_same_beams(stock, ours: LEDForConditionalGeneration, inputs, **settings):
    expected = stock.generate(**inputs, **SCORES, **settings)
    output = ours.generate(**inputs, return_dict_in_generate=True, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    # the sum of log-probabilities is good to 1e-4; a penalty below 0 multiplies it, and its error
    atol = 1e-4 * max(1.0, settings["max_new_tokens"] ** -settings.get("length_penalty", 1.0))
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, atol=atol, rtol=0)
    return output


def random_settings(seed: int) -> dict:
    draw = random.Random(seed)
    beams = draw.choice([2, 3, 4, 5])
    settings = {
        "num_beams": beams,
        "num_return_sequences": draw.choice([1, 2, beams]),
        "max_new_tokens": draw.choice([3, 10, 25, 40]),
        "length_penalty": draw.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
        "early_stopping": draw.choice([False, True, "never"]),
        "eos_token_id": draw.choice([2, 2, [2, 7], list(range(2, 12))]),
    }
    if draw.random() < 0.3:
        settings["min_length"] = draw.choice([2, 8, 60])
    if draw.random() < 0.3:
        settings["no_repeat_ngram_size"] = draw.choice([1, 2, 3])
    if draw.random() < 0.3:
        settings["repetition_penalty"] = draw.choice([0.7, 1.5])
    if draw.random() < 0.2:
        settings["forced_bos_token_id"] = 0
    if draw.random() < 0.2:
        settings["forced_eos_token_id"] = 2
    if draw.random() < 0.2:
        settings["decoder_start_token_id"] = 5
    if draw.random() < 0.2:
        settings["bad_words_ids"] = [[draw.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 1, 2, 2, 3)]
    return settings


@pytest.mark.parametrize("seed", range(24))
def test_tokens_and_scores_equal_transformers(led_pair, seed):
    assert_same_beams(*led_pair(seed % 6), encoder_inputs(seed, batch=1 + seed % 4), **random_settings(seed))


def test_documents_end_at_different_lengths(led_pair):
    stock, ours = led_pair(5)
    settings = {"num_beams": 3, "max_new_tokens": 40, "eos_token_id": list(range(2, VOCAB_SIZE // 3))}
    sequences = assert_same_beams(stock, ours, encoder_inputs(5, batch=6), **settings).sequences
    padding = (sequences == 1).sum(1)
    assert padding.min() < padding.max()


@pytest.mark.parametrize("pad", [0, 3, None])
def test_padding_and_no_end_at_all(led_pair, pad):
    stock, ours = led_pair(1)
    inputs = encoder_inputs(1)
    for model in (stock, ours):
        model.generation_config.pad_token_id = pad
    assert_same_beams(stock, ours, inputs, num_beams=3, max_new_tokens=12, eos_token_id=list(range(2, 20)))
    for model in (stock, ours):
        model.generation_config.eos_token_id = None
    assert_same_beams(stock, ours, inputs, num_beams=3, max_new_tokens=12)


@pytest.mark.parametrize("settings", [{}, {"top_k": 0, "top_p": 0.8, "temperature": 1.5}], ids=str)
def test_drawn_beams_equal_transformers(led_pair, settings):
    stock, ours = led_pair(2)
    inputs = encoder_inputs(2)
    settings |= {"do_sample": True, "num_beams": 3, "max_new_tokens": 20}
    torch.manual_seed(11)
    expected = stock.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, seed=11, **settings), expected)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_looking_for_the_end_now_and_then_changes_nothing(small_model, monkeypatch, early_stopping):
    model, inputs = small_model(5), encoder_inputs(5, batch=2)
    settings = {"num_beams": 3, "max_new_tokens": 40, "eos_token_id": list(range(2, VOCAB_SIZE - 5))}
    settings |= {"early_stopping": early_stopping, "return_dict_in_generate": True}
    steps = []
    expected = model.generate(**inputs, on_token=steps.append, **settings)
    monkeypatch.setattr(decoder_step.Search, "should_stop", lambda self, ended, length: False)
    output = model.generate(**inputs, **settings)
    assert len(steps) < 40
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.sequences_scores, expected.sequences_scores)


def test_listener_hears_the_last_token_of_every_beam(small_model):
    model, inputs = small_model(0), encoder_inputs(0, batch=2)
    heard = []
    model.generate(**inputs, num_beams=3, max_new_tokens=5, on_token=heard.append)
    assert {tuple(tokens.shape) for tokens in heard} == {(6,)}


def test_cross_attention_is_held_once_per_document(small_model, monkeypatch):
    """Keys and values of the source have the batch of the documents, whatever the number of beams."""
    model, inputs = small_model(0), encoder_inputs(0, batch=2)
    seen = []

    def spy(q, k, *args):
        seen.append((q.shape, k.shape))
        return decode_attention(q, k, *args)

    monkeypatch.setattr("led_model.modeling.attention.decode_attention", spy)
    model.generate(**inputs, num_beams=4, max_new_tokens=3)
    cross = [(q, k) for q, k in seen if k[2] == inputs["input_ids"].shape[1]]
    assert cross
    assert all((q[0], q[2], k[0]) == (2, 4, 2) for q, k in cross)


@torch.no_grad()
def test_cache_never_moves_and_ancestry_alone_is_reordered(small_model):
    """After random reorderings each beam's output is that of its own tokens in one pass."""
    model = small_model(0, decoder_layers=2)
    inputs = random_inputs(0, batch=2)
    batch, beams, steps = 2, 3, 7
    cross = model.led.decoder.cross_keys_values(model.led.encode(inputs["input_ids"]))
    cache = BeamKVCache(model.config, batch, beams, max_length=9)
    cache.keys.fill_(1e4)  # a position that is not filled yet must not be seen
    cache.values.fill_(1e4)
    before = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.ancestry.data_ptr())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(batch, beams, 0, dtype=torch.int64)
    for step in range(steps):
        new = torch.randint(4, VOCAB_SIZE, (batch, beams), generator=generator)
        tokens = torch.cat([tokens, new[..., None]], dim=2)
        position = cache.positions[step : step + 1]
        hidden = model.led.decoder(new, cross, cache=cache, position=position)
        for beam in range(beams):
            expected = model.led.decoder(tokens[:, beam], cross)[:, -1]
            torch.testing.assert_close(hidden[:, beam], expected, atol=1e-5, rtol=0)
        parents = torch.randint(0, beams, (batch, beams), generator=generator)
        filled = cache.keys.clone()
        cache.reorder(parents, position)
        assert torch.equal(cache.keys, filled)
        tokens = tokens.take_along_dim(parents[..., None], dim=1)
    assert (cache.keys.data_ptr(), cache.values.data_ptr(), cache.ancestry.data_ptr()) == before
