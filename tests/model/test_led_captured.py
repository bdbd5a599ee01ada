"""Steps whose kernel calls are captured give what steps without capture give."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from led_kernels.capture import CapturedCalls
from led_model.generation.captured import ModuleGuards
from led_model.modeling.decoder import LEDDecoder
from led_model.modeling.layers import DecoderLayer
from tests.backends import needs_extension
from tests.model.small import random_inputs

pytestmark = needs_extension


@pytest.fixture
def captured(monkeypatch):
    """Tells whether each generation's step was captured."""
    made = []
    capture = CapturedCalls.capture

    def spy(function):
        calls = capture(function)
        made.append(calls is not None)
        return calls

    monkeypatch.setattr(CapturedCalls, "capture", spy)
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


def _optimizer(model, other):
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

    model.undo = torch.nn.modules.module.register_module_forward_hook(hook).remove


def _forward(model, other):
    fc1 = model.led.decoder.layers[0].fc1
    own = fc1.forward
    fc1.forward = lambda x: own(x) * 1.5


def _transposed(model, other):
    weight = model.led.decoder.layers[0].encoder_attn.q_proj.weight
    weight.data = weight.data.t()  # the same address


def _transposed_in_place(model, other):
    model.led.decoder.layers[0].encoder_attn.q_proj.weight.t_()


def _eps(model, other):
    model.led.decoder.layers[0].final_layer_norm.eps = 1.0


def _activation(model, other):
    model.led.decoder.layers[0].activation = F.relu


def _feed_forward(model, other):
    layer = model.led.decoder.layers[0]
    own = layer.feed_forward
    layer.feed_forward = lambda x: own(x) * 1.5


def _run_layers(model, other):
    own = model.led.decoder.run_layers
    model.led.decoder.run_layers = lambda *args: own(*args) * 1.5


def _logits(model, other):
    own = model.logits
    model.logits = lambda hidden: -own(hidden)


def _class(model, other):
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    model.led.decoder.layers[0].fc1.__class__ = Louder


def _method_of_class(model, other):
    patch = pytest.MonkeyPatch()
    model.undo = patch.undo
    own = DecoderLayer.forward
    patch.setattr(DecoderLayer, "forward", lambda *args: own(*args) * 1.5)


def _autocast(model, other):
    context = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    context.__enter__()
    model.undo = lambda: context.__exit__(None, None, None)


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        return -out if function is torch.ops.aten.addmm.default else out


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        return -out if function is F.layer_norm else out


def _dispatch_mode(model, other):
    mode = _Dispatched()
    mode.__enter__()
    model.undo = lambda: mode.__exit__(None, None, None)


def _function_mode(model, other):
    mode = _Functions()
    mode.__enter__()
    model.undo = lambda: mode.__exit__(None, None, None)


CHANGES = [
    _assign, _data, _in_place, _optimizer, _layer, _decoder, _head, _lora, _hook, _global_hook, _forward,
    _transposed, _transposed_in_place, _eps, _activation, _feed_forward, _run_layers, _logits, _class,
    _method_of_class, _autocast, _dispatch_mode, _function_mode,
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
            if hasattr(model, "undo"):
                model.undo()

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
    monkeypatch.setattr(CapturedCalls, "capture", lambda function: None)
    expected = tokens()
    assert torch.equal(followed, expected)


@torch.no_grad()
def test_a_mode_that_ends_leaves_the_recording_in_use(small_model, captured):
    model, inputs, heard = small_model(0, activation_function="gelu"), random_inputs(0), []
    del inputs["decoder_input_ids"]
    expected = model.generate(**inputs, max_new_tokens=12, eos_token_id=None)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            heard.append(function)
            return function(*args, **kwargs or {})

    mode, seen = Counting(), []

    def on_token(token):
        seen.append(len(heard))
        if len(seen) == 4:
            mode.__enter__()
        if len(seen) == 8:
            mode.__exit__(None, None, None)

    tokens = model.generate(**inputs, max_new_tokens=12, eos_token_id=None, on_token=on_token)
    assert torch.equal(tokens, expected)
    assert captured == [True, True]
    per_step = [after - before for before, after in pairwise(seen)]
    assert min(per_step[3:7]) > 20
    assert max(per_step[8:]) == 0


@pytest.mark.parametrize("cls", [DecoderLayer, LEDDecoder])
@torch.no_grad()
def test_a_patched_class_is_called_at_every_step(small_model, monkeypatch, cls):
    model, inputs, calls = small_model(0, activation_function="gelu"), random_inputs(0), []
    del inputs["decoder_input_ids"]
    own = cls.forward

    def counting(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", counting)
    model.generate(**inputs, max_new_tokens=6, eos_token_id=None)
    inside = [module for module in model.led.decoder.modules() if type(module) is cls]
    assert [sum(call is module for call in calls) for module in inside] == [6] * len(inside)


def _half(model):
    model.half()


def _shorter(model):
    model.led.decoder.layers = model.led.decoder.layers[:1]


def _freed(model):
    model.led.decoder.layers[0].fc1.weight.untyped_storage().resize_(0)


def _emptied(model):
    model.led.decoder.layers[0].fc1.weight.data = torch.empty(0)


@pytest.mark.parametrize("change", [_half, _shorter, _freed, _emptied])
def test_what_a_generation_cannot_follow_is_told(small_model, change):
    model, inputs = small_model(0, activation_function="gelu", decoder_layers=2), random_inputs(0)
    del inputs["decoder_input_ids"]
    with pytest.raises(ValueError, match=r"while it generates|while the model generates|began to generate"):
        model.generate(**inputs, max_new_tokens=6, eos_token_id=None, on_token=lambda _: change(model))


@torch.no_grad()
def test_looking_for_changes_costs_little(small_model):
    """At most 1 % of a step of a base model, 20 ms: 0.2 ms, on a machine that may be five times slower."""
    model = small_model(0, decoder_layers=6)
    parts = (model.led.decoder, model.lm_head)
    guards = ModuleGuards(parts)
    times = []
    for _ in range(200):
        began = perf_counter()
        assert not guards.failed(parts)
        times.append(perf_counter() - began)
    assert min(times) < 1e-3
