"""The model against transformers' with the same weights, and what only ours does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from led_kernels import LongformerMask
from led_model import LEDForConditionalGeneration
from led_model.checkpoint.tensor_names import to_hf_state_dict
from led_model.modeling import layers
from tests.model.small import random_inputs

TOLERANCE = {"atol": 1e-4, "rtol": 0}


def forward_both(stock, ours, **inputs):
    with torch.no_grad():
        return stock(**inputs), ours(**inputs)


def assert_same(expected, output) -> None:
    torch.testing.assert_close(
        output.encoder_last_hidden_state, expected.encoder_last_hidden_state, **TOLERANCE
    )
    torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)


@pytest.mark.parametrize("seed", range(6))
def test_matches_transformers(led_pair, seed):
    stock, ours = led_pair(seed)
    expected, output = forward_both(stock, ours, **random_inputs(seed, seqlen=[37, 5, 64, 1, 23, 100][seed]))
    assert expected.logits.abs().max() > 1
    assert_same(expected, output)


def test_without_masks_and_without_decoder_ids(led_pair):
    stock, ours = led_pair(1)
    assert_same(*forward_both(stock, ours, input_ids=random_inputs(1, seqlen=20)["input_ids"]))


@pytest.mark.parametrize("form", ["bool", "merged", "padding in the global mask"])
def test_forms_of_the_masks(led_pair, form):
    stock, ours = led_pair(2)
    inputs = random_inputs(2)
    if form == "bool":
        inputs["attention_mask"] = inputs["attention_mask"].bool()
    elif form == "merged":
        inputs["attention_mask"] = inputs["attention_mask"] * (inputs.pop("global_attention_mask") + 1)
    else:
        inputs["global_attention_mask"][:, -3:] = -1
    assert_same(*forward_both(stock, ours, **inputs))


def test_decoder_attention_mask(led_pair):
    stock, ours = led_pair(3)
    inputs = random_inputs(3, target=9)
    decoder_mask = torch.ones(3, 9, dtype=torch.int64)
    decoder_mask[0, 3:6] = 0
    decoder_mask[1, 7:] = 0
    assert_same(*forward_both(stock, ours, **inputs, decoder_attention_mask=decoder_mask))


def test_document_of_only_padding(led_pair):
    stock, ours = led_pair(4)
    inputs = random_inputs(
        4, seqlen=32
    )  # a multiple of the windows: transformers averages over its padding too
    inputs["attention_mask"][1] = 0
    assert_same(*forward_both(stock, ours, **inputs))


def test_left_padding_in_the_decoder_gives_no_nan(small_model):
    decoder_mask = torch.ones(3, 9, dtype=torch.int64)
    decoder_mask[2, :4] = 0
    with torch.no_grad():
        output = small_model()(**random_inputs(0), decoder_attention_mask=decoder_mask)
    assert output.logits.isfinite().all()


def test_loss_and_gradients(led_pair):
    stock, ours = led_pair(4, attention_window=[8, 8])
    inputs = random_inputs(4)
    labels = inputs.pop("decoder_input_ids")
    labels[0, 6:] = -100
    expected, output = stock.train()(**inputs, labels=labels), ours.train()(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss)
    expected.loss.backward()
    output.loss.backward()
    gradients = to_hf_state_dict({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
        )


def test_gradient_checkpointing(small_model):
    model = small_model(5, dropout=0.1, attention_dropout=0.1).train()
    inputs = random_inputs(5)
    labels = inputs.pop("decoder_input_ids")
    results = []
    for model.led.encoder.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])


def test_dropout_only_in_training(small_model):
    model = small_model(0, dropout=0.3, activation_dropout=0.3, attention_dropout=0.3)
    inputs = random_inputs(0)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_layerdrop_skips_layers(small_model):
    model = small_model(0, encoder_layerdrop=1.0, decoder_layerdrop=1.0).train()
    inputs = random_inputs(0)
    mask = LongformerMask.from_padding(inputs["attention_mask"])
    encoder = model.led.encoder
    embedded = encoder.embed_tokens(inputs["input_ids"]) + encoder.embed_positions.weight[:37]
    torch.testing.assert_close(encoder(inputs["input_ids"], mask), encoder.layernorm_embedding(embedded))


def test_feed_forward_in_pieces(small_model, monkeypatch):
    model = small_model(0)
    inputs = random_inputs(0)
    whole = model(**inputs).logits.detach()
    monkeypatch.setattr(layers, "_FEED_FORWARD_ROWS", 7)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole)


def test_fp16_overflow_is_clamped_and_nan_kept(small_model):
    model = small_model(0).half()
    inputs = random_inputs(0)
    model.led.encoder.layers[0].final_layer_norm.weight.data.fill_(60000)
    mask = LongformerMask.from_padding(torch.ones_like(inputs["input_ids"]))
    hidden = torch.randn(3, 37, model.config.d_model, dtype=torch.float16)
    with torch.no_grad():
        clamped = model.led.encoder.layers[0](hidden, mask)
        assert clamped.isfinite().all()
        assert clamped.abs().max() == torch.tensor(torch.finfo(torch.float16).max - 1000).half()
        assert model.led.encoder.layers[0](hidden.fill_(float("nan")), mask).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(small_model, dtype):
    model = small_model(1)
    inputs = random_inputs(1)
    with torch.no_grad():
        full = model(**inputs).logits
        half = model.to(dtype)(**inputs).logits
    assert half.dtype == dtype
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_autocast(small_model):
    model = small_model(1).train()
    inputs = random_inputs(1)
    labels = inputs.pop("decoder_input_ids")
    full = model(**inputs, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), full, rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("windows", [[8, 12], [2, 4]], ids=str)
def test_windows_and_lengths_that_transformers_rejects(small_model, windows):
    """Windows that do not divide each other or reach one token, and as many tokens as positions, unpadded."""
    model = small_model(0, attention_window=windows, max_encoder_position_embeddings=37)
    with torch.no_grad():
        assert model(**random_inputs(0)).logits.isfinite().all()


def test_one_mask_for_all_layers(small_model, monkeypatch):
    model = small_model(0)
    build, seen = LongformerMask.from_padding, []
    monkeypatch.setattr(LongformerMask, "from_padding", lambda *args: seen.append(build(*args)) or seen[-1])
    for layer in model.led.encoder.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        model(**random_inputs(0))
    assert len(seen) == 1 + len(model.led.encoder.layers)
    assert all(mask is seen[0] for mask in seen)


def test_encoder_leaves_its_arguments_alone(small_model):
    """Residuals are added and feed-forwards written in place: never into what the caller gave."""
    layer = small_model(0).led.encoder.layers[0]
    hidden = torch.randn(2, 30, layer.fc2.out_features)
    before = hidden.clone()
    with torch.no_grad():
        layer(hidden, LongformerMask.from_padding(torch.ones(2, 30)))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(1, 129, dtype=torch.int64)}, "input_ids has 129 tokens .* holds 128"),
        ({"input_ids": torch.zeros(9, dtype=torch.int64)}, r"input_ids is torch.int64 of shape \(9,\)"),
        ({"input_ids": torch.zeros(1, 9)}, "input_ids is torch.float32"),
        ({"input_ids": torch.full((1, 9), 40)}, "input_ids holds id 40, outside the vocabulary of 40"),
        ({"input_ids": torch.full((1, 9), -1)}, "input_ids holds id -1"),
        ({"decoder_input_ids": torch.zeros(1, 49, dtype=torch.int64)}, "decoder_input_ids has 49 tokens"),
        ({"attention_mask": torch.ones(1, 8)}, "."),
    ],
)
def test_bad_input_is_named(small_model, change, message):
    inputs = {"input_ids": torch.zeros(1, 9, dtype=torch.int64), "decoder_input_ids": torch.tensor([[2]])}
    with pytest.raises(ValueError, match=message):
        small_model()(**inputs | change)


def test_unknown_activation_is_named(small_model):
    with pytest.raises(ValueError, match="activation_function is 'xielu'; give one of gelu, "):
        small_model(activation_function="xielu")


def test_tied_weights_are_one_parameter(small_model):
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.led.shared.weight is tied.led.encoder.embed_tokens.weight
    assert untied.lm_head.weight is not untied.led.shared.weight
    assert isinstance(tied, LEDForConditionalGeneration)


def test_transformers_is_not_imported():
    code = "import sys, led_model.cli.parser; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
