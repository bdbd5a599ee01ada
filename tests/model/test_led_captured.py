"""Steps whose kernel calls are captured give what steps without capture give."""

from __future__ import annotations

from time import perf_counter

import pytest
import torch

from led_kernels.decode import CapturedCalls
from led_model.captured import Watched
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


def _assign(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def _data(model, other):
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = new.detach().clone()


def _in_place(model, other):
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.copy_(new)


def _optimiser(model, other):
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = parameter.detach() - new
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def _layer(model, other):
    model.led.decoder.layers[0].fc1 = other.led.decoder.layers[0].fc1


def _decoder(model, other):
    model.led.decoder = other.led.decoder


def _head(model, other):
    model.lm_head = other.lm_head


def _lora(model, other):
    fc1 = model.led.decoder.layers[0].fc1
    fc1.weight = torch.nn.Parameter(fc1.weight + other.led.decoder.layers[0].fc1.weight)


def _hook(model, other):
    model.led.decoder.layers[0].fc1.register_forward_hook(lambda *args: args[-1] * 1.5)


def _global_hook(model, other):
    def hook(module, inputs, output):
        return output * 1.5 if module is model.led.decoder.layers[0].fc1 else None

    model.handle = torch.nn.modules.module.register_module_forward_hook(hook)


def _forward(model, other):
    fc1 = model.led.decoder.layers[0].fc1
    own = fc1.forward
    fc1.forward = lambda x: own(x) * 1.5


CHANGES = [
    _assign, _data, _in_place, _optimiser, _layer, _decoder, _head, _lora, _hook, _global_hook, _forward,
]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changes_in_the_middle_are_followed(small_model, captured, monkeypatch, change, settings):
    """As steps that are never captured do, token for token."""
    inputs = random_inputs(1, target=1)
    del inputs["decoder_input_ids"]

    def tokens() -> torch.Tensor:
        model, other = (small_model(seed, **shape) for seed in (1, 2))
        heard = []

        @torch.no_grad()
        def on_token(token):
            heard.append(token)
            if len(heard) == 4:
                change(model, other)

        try:
            return model.generate(
                **inputs, **settings, max_new_tokens=16, eos_token_id=None, on_token=on_token
            )
        finally:
            if hasattr(model, "handle"):
                model.handle.remove()

    shape = {
        "activation_function": "gelu",
        "d_model": 24,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_layers": 2,
        "tie_word_embeddings": False,
    }
    followed = tokens()
    assert captured[0]
    monkeypatch.setattr(CapturedCalls, "of", lambda function: None)
    expected = tokens()
    assert torch.equal(followed, expected)


@torch.no_grad()
def test_looking_for_changes_costs_little(small_model):
    """At most 1 % of a step of a base model, 20 ms: 0.2 ms, on a machine that may be five times slower."""
    model = small_model(0, decoder_layers=6)
    parts = (model.led.decoder, model.lm_head)
    watched = Watched(parts)
    times = []
    for _ in range(200):
        began = perf_counter()
        assert not watched.changed(parts)
        times.append(perf_counter() - began)
    assert min(times) < 1e-3
