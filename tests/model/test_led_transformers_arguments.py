"""What callers of transformers' models and tokenizers hand over is taken, or refused by its name."""

from __future__ import annotations

import pytest
import torch

from led_model import GenerationConfig
from tests.model.small import random_inputs


def encoder_inputs(seed: int, batch: int = 3) -> dict[str, torch.Tensor]:
    inputs = random_inputs(seed, batch=batch)
    del inputs["decoder_input_ids"]
    return inputs


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 0}], ids=str)
def test_generate_under_autocast(small_model, settings):
    """Keys and values are narrower than what they are made of; a document of padding gives no NaN."""
    model = small_model(0, activation_function="gelu")
    inputs = encoder_inputs(0)
    inputs["attention_mask"][2] = 0
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(**inputs, **settings, max_new_tokens=6, eos_token_id=None)
        logits = model(**inputs, decoder_input_ids=tokens[:3]).logits
    assert tokens.shape == (3, 7)
    assert logits.isfinite().all()
    if not settings:
        best = logits[:, :-1].topk(2).values
        clear = best[..., 0] - best[..., 1] > 0.2  # where rounding cannot decide
        assert clear.any()
        assert torch.equal(logits[:, :-1].argmax(-1)[clear], tokens[:, 1:][clear])


class Streamer:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.got.append(value.clone())

    def end(self):
        self.ended += 1


def test_streamer(small_model):
    model, streamer, heard = small_model(0), Streamer(), []
    tokens = model.generate(**encoder_inputs(0), max_new_tokens=5, streamer=streamer, on_token=heard.append)
    assert torch.equal(streamer.got[0], tokens[:, :1])
    assert torch.equal(torch.stack(streamer.got[1:], 1), tokens[:, 1:])
    assert torch.equal(torch.stack(heard, 1), tokens[:, 1:])
    assert streamer.ended == 1
    with pytest.raises(ValueError, match="streamer is given with num_beams 2"):
        model.generate(**encoder_inputs(0), num_beams=2, streamer=streamer)
    with pytest.raises(TypeError, match=r"streamer is a list without put\(\)"):
        model.generate(**encoder_inputs(0), streamer=[])

    def fail(tokens):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.generate(**encoder_inputs(0), max_new_tokens=5, streamer=streamer, on_token=fail)
    assert streamer.ended == 2


def test_transformers_streamer_and_generation_config(led_pair):
    transformers = pytest.importorskip("transformers")
    stock, ours = led_pair(0)
    settings = transformers.GenerationConfig(num_beams=3, max_new_tokens=9, length_penalty=0.5)
    settings.bos_token_id, settings.pad_token_id, settings.eos_token_id = 0, 1, 2
    settings.decoder_start_token_id = 2
    expected = stock.generate(**encoder_inputs(0), generation_config=settings)
    assert torch.equal(
        ours.generate(**encoder_inputs(0), generation_config=settings, use_cache=False), expected
    )
    own = GenerationConfig(num_beams=3, max_new_tokens=9, length_penalty=0.5)
    assert torch.equal(ours.generate(**encoder_inputs(0), generation_config=own), expected)
    greedy = ours.generate(**encoder_inputs(0), generation_config=own, num_beams=1)
    assert torch.equal(greedy, ours.generate(**encoder_inputs(0), max_new_tokens=9))
    settings.min_p = 0.1
    with pytest.raises(ValueError, match="generation_config asks for min_p"):
        ours.generate(**encoder_inputs(0), generation_config=settings)
    with pytest.raises(TypeError, match="generation_config is a dict"):
        ours.generate(**encoder_inputs(0), generation_config={})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_beam": 3}, TypeError, "generate has no argument 'num_beam'; did you mean 'num_beams'"),
        ({"logits_processor": []}, TypeError, "generate has no argument 'logits_processor'"),
        ({"num_beams": "four"}, ValueError, "num_beams is 'four'"),
        ({"num_beams": True}, ValueError, "num_beams is True"),
        ({"use_cache": "no"}, ValueError, "use_cache is 'no'"),
        ({"length_penalty": 1e308, "num_beams": 2}, ValueError, "length_penalty is 1e"),
        ({"temperature": float("nan"), "do_sample": True}, ValueError, "temperature is nan"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens is 2.5"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id is -1"),
        ({"decoder_start_token_id": 40}, ValueError, "decoder_start_token_id holds id 40"),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind(small_model, settings, error, message):
    with pytest.raises(error, match=message):
        small_model(0).generate(**encoder_inputs(0), **settings)


def test_numbers_of_numpy_are_numbers(small_model):
    np = pytest.importorskip("numpy")
    model = small_model(0)
    expected = model.generate(**encoder_inputs(0), num_beams=2, max_new_tokens=4, length_penalty=0.5)
    tokens = model.generate(
        **encoder_inputs(0), num_beams=np.int64(2), max_new_tokens=np.int32(4), length_penalty=np.float32(0.5)
    )
    assert torch.equal(tokens, expected)


def test_what_a_model_says_of_itself(led_pair):
    stock, ours = led_pair(0)
    assert (ours.device, ours.dtype) == (stock.device, stock.dtype)
    assert ours.num_parameters() == stock.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == stock.num_parameters(exclude_embeddings=True)
    ours.led.encoder.requires_grad_(False)
    trainable = {p for p in ours.parameters() if p.requires_grad}
    assert ours.num_parameters(only_trainable=True) == sum(p.numel() for p in trainable)
    assert ours.bfloat16().dtype == torch.bfloat16


def test_gradient_checkpointing_is_switched(small_model):
    model = small_model(0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert model.led.encoder.gradient_checkpointing
    assert model.led.decoder.gradient_checkpointing
    with pytest.raises(TypeError, match="checkpointing has no argument 'use_reentrent'; did you mean"):
        model.gradient_checkpointing_enable({"use_reentrent": True})
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
