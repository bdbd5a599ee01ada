"""Hostile calls of led_model: models, heads, decoder, caches and ``generate`` with arguments of which some are wild."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from led_model import (
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
)
from led_model.generation.cache import StaticKVCache
from tests.model.small import random_inputs, small_config

WILD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 1.5, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "four", [], [1], [[1]], {}, (),
    object(),
)  # fmt: skip
SETTINGS = (
    "max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_beams", "num_return_sequences",
    "length_penalty", "early_stopping", "do_sample", "temperature", "top_k", "top_p", "seed", "repetition_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "eos_token_id", "pad_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "use_cache", "on_token", "streamer",
    "generation_config", "return_dict_in_generate", "nonsense",
)  # fmt: skip


@functools.cache
def model_of(model_class: type) -> Any:
    torch.manual_seed(0)
    return model_class(LEDConfig(**small_config(0, num_labels=3))).eval()


def model_call(rng: random.Random, hostile: Callable[[random.Random, Tensor], Tensor]) -> None:
    """Makes one of the public calls, of which one to three arguments are changed."""
    inputs: dict[str, Any] = random_inputs(
        rng.randrange(9), seqlen=rng.choice([3, 16, 37]), target=rng.choice([1, 4])
    )
    which = rng.choice(
        ["forward", "generate", "generate", "encode", "decoder", "cache", "classify", "answer"]
    )
    model = model_of(
        {"classify": LEDForSequenceClassification, "answer": LEDForQuestionAnswering}.get(
            which, LEDForConditionalGeneration
        )
    )
    encoded = None
    if which in ("generate", "decoder", "cache"):
        with torch.no_grad():
            encoded = model.led.encode(**{k: v for k, v in inputs.items() if not k.startswith("decoder")})
    if which in ("encode", "classify"):
        del inputs["decoder_input_ids"]
    if which == "generate":
        inputs |= {"max_new_tokens": 4} | ({"encoder_hidden_states": encoded} if rng.random() < 0.5 else {})
        for name in rng.sample(SETTINGS, rng.randrange(3)):
            inputs[name] = rng.choice(WILD)
    if which == "forward":
        labels = inputs["decoder_input_ids"].clone()
        inputs |= rng.choice([{}, {"labels": labels}, {"max_globals": rng.choice(WILD)}])
    if which == "decoder":
        inputs = {
            "input_ids": inputs["decoder_input_ids"],
            "cross_keys_values": model.led.decoder.cross_keys_values(encoded),
            "cross_mask": (inputs["attention_mask"] != 0)[:, None, None, :],
            "attention_mask": torch.ones_like(inputs["decoder_input_ids"]),
        }
    if which == "cache":
        cache = StaticKVCache(model.config, rng.choice([1, 3, 3]), rng.choice([0, 2, 6, 6]))
        inputs = {
            "input_ids": inputs["decoder_input_ids"],
            "cross_keys_values": model.led.decoder.cross_keys_values(encoded),
            "cache": cache,
            "position": torch.arange(inputs["decoder_input_ids"].shape[1]) + rng.choice([-1, 0, 5, 2**40]),
        }
    for name in rng.sample(list(inputs), rng.randint(1, min(3, len(inputs)))):
        value = inputs[name]
        if rng.random() < 0.15:
            inputs[name] = rng.choice(WILD)
        elif isinstance(value, Tensor):
            inputs[name] = hostile(rng, value)
        elif isinstance(value, list) and value:
            inputs[name] = [tuple(hostile(rng, x) for x in pair) for pair in value]
    call = {
        "generate": getattr(model, "generate", None),
        "encode": model.led.encode,
        "decoder": model.led.decoder,
        "cache": model.led.decoder,
    }.get(which, model)
    with torch.set_grad_enabled(rng.random() < 0.3):
        call(**inputs)
