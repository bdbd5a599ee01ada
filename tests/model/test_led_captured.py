"""Steps whose kernel calls are captured give what steps without capture give."""

from __future__ import annotations

import pytest
import torch

from led_kernels.decode import CapturedCalls
from tests.backends import needs_extension
from tests.model.small import random_inputs

pytestmark = needs_extension


@pytest.fixture
def captured(monkeypatch):
    """Whether each generation's step was captured."""
    made = []
    of = CapturedCalls.of

    def spy(function):
        calls = of(function)
        made.append(calls is not None)
        return calls

    monkeypatch.setattr(CapturedCalls, "of", spy)
    return made


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 1, "num_return_sequences": 3},
        {
            "decoder_input_ids": torch.tensor([[2, 7, 9]] * 3),
            "decoder_attention_mask": torch.tensor([[1, 0, 1]] * 3),
        },
    ],
    ids=lambda settings: "-".join(settings) or "greedy",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_equal_those_without_capture(small_model, captured, seed, settings, dtype):
    model = small_model(seed, activation_function="gelu").to(dtype)
    inputs = random_inputs(seed)
    del inputs["decoder_input_ids"]
    tokens = model.generate(**inputs, **settings, max_new_tokens=20)
    assert captured == [True]
    hook = model.led.decoder.register_forward_hook(lambda *_: None)  # which replaying would not call
    expected = model.generate(**inputs, **settings, max_new_tokens=20)
    hook.remove()
    assert captured == [True]
    assert torch.equal(tokens, expected)


@torch.no_grad()
@pytest.mark.parametrize("why", ["activation", "training", "rows", "hook"])
def test_steps_that_torch_computes_are_not_captured(small_model, captured, why):
    model = small_model(0, activation_function="relu" if why == "activation" else "gelu", dropout=0.1)
    inputs = random_inputs(0, batch=17 if why == "rows" else 3)
    del inputs["decoder_input_ids"]
    heard = []
    if why == "hook":
        layer = model.led.decoder.layers[0].fc2
        layer.register_forward_hook(lambda *_: heard.append(1))
    if why == "training":
        model.train()
    model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
    assert captured == ([] if why == "hook" else [False])
    assert len(heard) == (6 if why == "hook" else 0)


@torch.no_grad()
def test_a_second_generation_reads_changed_weights(small_model, captured):
    model = small_model(0, activation_function="gelu")
    inputs = random_inputs(0)
    del inputs["decoder_input_ids"]
    first = model.generate(**inputs, max_new_tokens=20)
    for parameter in model.led.decoder.parameters():
        parameter.mul_(1.5)
    second = model.generate(**inputs, max_new_tokens=20)
    assert captured == [True, True]
    assert not torch.equal(first, second)
