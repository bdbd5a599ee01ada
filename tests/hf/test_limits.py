"""Fused models do what transformers refuses: any window, lengths near the position limit, half precision."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from hf_cases import BUILDERS, PAD, HFCase, fused, led_model, longformer_model, true_fp64
from torch import nn

CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))


def encoder_states(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(**inputs, output_hidden_states=True)[
            "encoder_last_hidden_state" if model.config.is_encoder_decoder else "last_hidden_state"
        ]


def padded(inputs: dict, seqlen: int) -> dict:
    values = {"input_ids": PAD, "attention_mask": 0, "global_attention_mask": 0}
    return {
        name: nn.functional.pad(inputs[name], (0, seqlen - inputs[name].shape[1]), value=value)
        for name, value in values.items()
    }


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_windows_that_do_not_divide_each_other(build):
    case = replace(CASE, windows=(8, 12), seqlen=11)
    stock, inputs = build(case), case.inputs()
    with pytest.raises(AssertionError):
        encoder_states(stock, inputs)
    expected = encoder_states(stock, padded(inputs, 24))[:, : case.seqlen]  # 24 serves both windows
    torch.testing.assert_close(encoder_states(fused(stock), inputs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_window_of_two(build):
    case = replace(CASE, windows=(2,))
    stock = build(case)
    with pytest.raises(RuntimeError):
        encoder_states(stock, case.inputs())
    assert encoder_states(fused(stock), case.inputs()).isfinite().all()


@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeds"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_lengths_up_to_the_last_position(build, embedded):
    """transformers pads past the table of positions; with a longer table it gives the same states."""
    short, long = replace(CASE, positions=19), replace(CASE, positions=24)
    roomy, stock = build(long), build(short)
    weights = roomy.state_dict()
    for name, weight in stock.state_dict().items():
        weight.copy_(weights[name][: weight.shape[0]])
    inputs = CASE.inputs()
    if embedded:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(0))
        if stock.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.full((2, 3), 5)
    expected = encoder_states(roomy, inputs)
    if stock.config.is_encoder_decoder or embedded:  # Longformer's padding tokens all share one position
        with pytest.raises(IndexError):
            encoder_states(stock, inputs)
    torch.testing.assert_close(encoder_states(fused(stock), inputs), expected, rtol=0, atol=2e-5)


def test_past_the_last_position_says_so():
    case = replace(CASE, positions=18)
    with pytest.raises(IndexError, match=r"19 tokens and the model 18 .*truncate"):
        encoder_states(fused(led_model(case)), case.inputs())


def test_ids_or_embeds():
    encoder = fused(led_model(CASE)).get_encoder()
    with pytest.raises(ValueError, match="give one of them"):
        encoder()
    with pytest.raises(ValueError, match="give one of them"):
        encoder(input_ids=torch.zeros(1, 2).long(), inputs_embeds=torch.zeros(1, 2, 32))


def test_head_mask_is_refused():
    encoder = fused(led_model(CASE)).get_encoder()
    with pytest.raises(ValueError, match="head_mask"):
        encoder(**CASE.inputs(), head_mask=torch.ones(2, 4))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_no_attention_mask_and_merged_masks(build):
    stock = build(CASE)
    ids = CASE.inputs()["input_ids"]
    ours = fused(stock)
    only = {"input_ids": ids.clamp(min=3)}
    torch.testing.assert_close(encoder_states(ours, only), encoder_states(stock, only), rtol=0, atol=2e-5)
    inputs = CASE.inputs()
    merged = inputs["attention_mask"] * (1 + inputs["global_attention_mask"])
    if stock.config.is_encoder_decoder:  # the decoder takes the mask too, and knows no 2
        stock, ours = stock.get_encoder(), ours.get_encoder()
    with torch.no_grad():
        for dtype in (torch.int32, torch.float32):
            given = {"input_ids": inputs["input_ids"], "attention_mask": merged.to(dtype)}
            torch.testing.assert_close(ours(**given)[0], stock(**given)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_tokenizers_padding_value_in_the_global_mask(build):
    inputs = CASE.inputs()
    inputs["global_attention_mask"][inputs["attention_mask"] == 0] = -1
    stock = build(CASE)
    torch.testing.assert_close(
        encoder_states(fused(stock), inputs), encoder_states(stock, inputs), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_outputs_have_the_stock_form(build, return_dict):
    stock = build(CASE)
    for flags in ({}, {"output_attentions": True}, {"output_hidden_states": True}):
        for case in (CASE, replace(CASE, globals_per_row=((), ()))):
            with torch.no_grad():
                expected, actual = (
                    m.base_model(**case.inputs(), **flags, return_dict=return_dict)
                    for m in (stock, fused(stock))
                )
            assert type(actual) is type(expected)
            assert len(actual) == len(expected)
            if return_dict:
                assert actual.keys() == expected.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_half_precision_is_as_near_to_fp64_as_stock(build, dtype):
    stock, inputs = build(CASE), CASE.inputs()
    with true_fp64():
        expected = encoder_states(copy.deepcopy(stock).double(), inputs)
    stock = stock.to(dtype)
    error = (encoder_states(stock, inputs).double() - expected).abs()
    ours = (encoder_states(fused(stock), inputs).double() - expected).abs()
    assert ours.dtype == error.dtype
    assert ours.mean() <= 1.2 * error.mean()
    assert ours.max() <= 2 * error.max()


def test_fp16_overflow_is_clamped_and_nan_kept():
    model = led_model(CASE).half()
    layer = model.get_encoder().layers[0]
    layer.final_layer_norm.weight.data.fill_(65504)
    layer.final_layer_norm.bias.data[0] = float("nan")
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).half()
    mask = torch.zeros(1, 8).half()
    masks = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": False}
    if "layer_head_mask" in inspect.signature(layer.forward).parameters:  # transformers 4 demands it
        masks["layer_head_mask"] = None
    with torch.no_grad():
        (expected,) = layer(hidden, mask, **masks)
        (actual,) = fused(layer)(hidden, mask)
    assert expected.abs().nan_to_num().max() == torch.finfo(torch.float16).max - 1000
    assert torch.equal(actual.isnan(), expected.isnan())
    saturated = expected.abs() == expected.abs().nan_to_num().max()
    assert torch.equal(actual[saturated], expected[saturated])


def test_longformer_feed_forward_chunks():
    stock = longformer_model(CASE, chunk_size_feed_forward=1)
    torch.testing.assert_close(
        encoder_states(fused(stock), CASE.inputs()), encoder_states(stock, CASE.inputs()), rtol=0, atol=2e-5
    )
