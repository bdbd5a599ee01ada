"""A tensor on another device than the model is named: lookups on ``meta`` return memory that nobody has written."""

from __future__ import annotations

import pytest
import torch

from led_model import BeamKVCache, LEDForQuestionAnswering, LEDForSequenceClassification, StaticKVCache
from tests.model.small import random_inputs


@pytest.fixture
def model(small_model):
    return small_model(0, activation_function="gelu")


def moved(arguments: dict, name: str) -> dict:
    return arguments | {name: arguments[name].to("meta")}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "input_ids", "attention_mask", "global_attention_mask", "decoder_input_ids", "decoder_attention_mask",
        "inputs_embeds", "decoder_inputs_embeds", "labels",
    ],
)  # fmt: skip
def test_forward_names_what_is_elsewhere(model, name, grad):
    arguments = random_inputs(0)
    arguments["decoder_attention_mask"] = torch.ones_like(arguments["decoder_input_ids"])
    arguments["labels"] = arguments["decoder_input_ids"]
    for ids in ("input_ids", "decoder_input_ids"):
        if name == ids.replace("ids", "embeds").replace("input_", "inputs_"):
            arguments[name] = model.led.shared(arguments.pop(ids))
    said = name.removeprefix("decoder_") if name == "decoder_attention_mask" else name
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"^{said} is .*on meta"):
        model(**moved(arguments, name))


@pytest.mark.parametrize(
    "name",
    [
        "input_ids",
        "attention_mask",
        "global_attention_mask",
        "encoder_hidden_states",
        "decoder_input_ids",
        "decoder_attention_mask",
    ],
)
@torch.no_grad()
def test_generate_names_what_is_elsewhere(model, name):
    arguments = random_inputs(0)
    arguments["decoder_attention_mask"] = torch.ones_like(arguments["decoder_input_ids"])
    if name == "encoder_hidden_states":
        arguments["encoder_hidden_states"] = model.led.encode(arguments["input_ids"])
    with pytest.raises(ValueError, match=f"^{name} is .*on meta"):
        model.generate(**moved(arguments, name), max_new_tokens=2)


@torch.no_grad()
def test_the_decoder_names_what_is_elsewhere(model):
    inputs = random_inputs(0)
    ids = inputs["decoder_input_ids"][:, :2]
    keys_values = model.led.decoder.cross_keys_values(model.led.encode(inputs["input_ids"]))
    with pytest.raises(ValueError, match=r"^encoder_hidden_states is on meta"):
        model.led.decoder.cross_keys_values(model.led.encode(inputs["input_ids"]).to("meta"))
    place = {"position": torch.arange(2), "cache": StaticKVCache(model.config, 3, 8)}
    for name, change in (
        ("cross_keys_values", {"cross_keys_values": [(k, v.to("meta")) for k, v in keys_values]}),
        ("cross_mask", {"cross_mask": torch.ones(3, 1, 1, 37, dtype=torch.bool, device="meta")}),
        ("attention_mask", {"attention_mask": torch.ones_like(ids, device="meta")}),
        ("attention_mask", place | {"attention_mask": torch.ones(3, 8, device="meta")}),
        ("position", place | {"position": torch.arange(2, device="meta")}),
        ("cache", place | {"cache": StaticKVCache(model.config, 3, 8, device="meta")}),
        ("cache", place | {"cache": StaticKVCache(model.config, 3, 8, dtype=torch.float64)}),
        ("cache", {"position": torch.arange(1), "cache": BeamKVCache(model.config, 3, 2, 8, device="meta")}),
    ):
        with pytest.raises(ValueError, match=f"^{name} "):
            model.led.decoder(ids, **{"cross_keys_values": keys_values} | change)


@pytest.mark.parametrize("head", [LEDForQuestionAnswering, LEDForSequenceClassification])
def test_heads_name_labels_that_are_elsewhere(small_model, head):
    model = head(small_model(0).config).eval()
    ids = torch.full((2, 6), 7).index_fill(1, torch.tensor([5]), 2)
    names = ("start_positions", "end_positions") if head is LEDForQuestionAnswering else ("labels",)
    for name in names:
        labels = dict.fromkeys(names, torch.ones(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"^{name} is .*on meta"):
            model(ids, **moved(labels, name))


def test_a_model_on_meta_still_tells_shapes(model):
    inputs = {name: value.to("meta") for name, value in random_inputs(0).items()}
    logits = model.to("meta")(**inputs, max_globals=4).logits
    assert (logits.device.type, logits.shape[:2]) == ("meta", (3, 9))
