"""Generation is right in its less plain ways: with drafts, given states or caches, every output, a prefix."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from decoding import CASE, STATIC, STEPS, VERSION, decoding_model, generate, has_decoder_of_ours
from hf_cases import PAD, assert_close, fused, true_fp64
from torch import Tensor, nn
from transformers import EncoderDecoderCache, LEDForConditionalGeneration

from led_kernels.hf import apply_led_kernels
from led_kernels.hf.compat import cache_argument

CACHES = {"dynamic": {}, "static": STATIC, "none": {"use_cache": False}}
every_cache = pytest.mark.parametrize(
    "cache",
    [pytest.param(c, id=n, marks=has_decoder_of_ours if n == "static" else ()) for n, c in CACHES.items()],
)
CACHE = cache_argument(LEDForConditionalGeneration.forward)  # its name in this release
PROMPT = {
    "decoder_input_ids": torch.tensor([[2, 7, 9, 30], [PAD, PAD, 2, 8]]),
    "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
}


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    return decoding_model()


@pytest.fixture(scope="module")
def expected(stock) -> Tensor:
    """Returns greedy tokens of transformers without a cache, where it is right in every release."""
    return generate(stock, use_cache=False)[0]


def tokens(model: nn.Module, inputs: dict, **settings):
    with true_fp64():
        return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": STEPS} | settings)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("draft", ["stock assistant", "fused assistant", "same model", "prompt lookup"])
def test_drafts_are_accepted_and_cut_like_stock(draft, row, stock, expected):
    """Transformers drafts for a row at a time; tokens that are rejected leave the cache again."""
    ours, assistant = fused(stock), decoding_model()
    assistant.get_decoder().layers[1].fc1.weight.data *= 0.5  # right for some of the tokens
    settings = {
        "stock assistant": {"assistant_model": assistant},
        "fused assistant": {"assistant_model": fused(assistant)},
        "same model": {"assistant_model": ours},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }[draft]
    inputs = {name: value[row : row + 1] for name, value in CASE.inputs().items()}
    right = expected[row : row + 1]
    if draft == "prompt lookup":  # up to some release of 5 it stops at once, for stock and ours alike
        right = tokens(stock, inputs, **settings)
    widths = []
    ours.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    assert torch.equal(tokens(ours, inputs, **settings), right)
    assert right.shape[1] == 1 or max(widths) > 1  # several tokens at once


@every_cache
@pytest.mark.parametrize("given", ["encoder_outputs", "inputs_embeds"])
def test_states_instead_of_ids(given, cache, stock, expected):
    ours, inputs = fused(stock), CASE.inputs()
    with torch.no_grad():
        if given == "encoder_outputs":
            states = ours.get_encoder()(**inputs, return_dict=True)
            inputs = {given: states, "attention_mask": inputs["attention_mask"]}
        else:
            inputs[given] = ours.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(tokens(ours, inputs, **cache), expected)


@every_cache
def test_every_output_of_beams(cache, stock):
    settings = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 6,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
    }
    expected = tokens(stock, CASE.inputs(), **settings, use_cache=False)
    result = tokens(fused(stock), CASE.inputs(), **settings, **cache)
    assert result.keys() - {CACHE, "past_key_values"} == expected.keys() - {CACHE, "past_key_values"}
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.beam_indices, expected.beam_indices)
    assert_close(named(result), named(expected), 1e-6)


def named(result) -> dict[str, Tensor]:
    """Returns the floats of what ``generate`` returned; of the decoder those of each step's last token and keys."""
    values = {"sequences_scores": result.sequences_scores}
    for name in ("scores", "logits"):
        values |= {f"{name}[{step}]": value for step, value in enumerate(result[name])}
    for name in ("encoder_attentions", "encoder_hidden_states"):
        values |= {f"{name}[{layer}]": value for layer, value in enumerate(result[name])}
    for name in ("decoder_attentions", "cross_attentions", "decoder_hidden_states"):
        for step, layers in enumerate(result[name]):
            for layer, value in enumerate(layers):
                if name == "decoder_attentions":
                    assert not value[..., step + 1 :].any()  # positions that are still empty
                    value = value[..., : step + 1]
                values[f"{name}[{step}][{layer}]"] = value[..., -1, :]
    return values


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(CACHES["dynamic"], id="dynamic", marks=has_decoder_of_ours),
        pytest.param(STATIC, id="static", marks=has_decoder_of_ours),
        pytest.param(CACHES["none"], id="none"),
    ],
)
def test_continuing_a_padded_prompt(cache, stock):
    """Two fused calls with a cache give what one stock call gives without, which remembers the mask."""
    settings = {"return_dict_in_generate": True}
    expected = generate(stock, **PROMPT, use_cache=False)[0]
    ours = fused(stock)
    if cache == STATIC:  # it has the capacity that the first call needs, unless a longer one came before
        tokens(ours, CASE.inputs() | PROMPT, **cache)
    begun = tokens(ours, CASE.inputs() | PROMPT, **cache, **settings, max_new_tokens=5)
    mask = nn.functional.pad(PROMPT["decoder_attention_mask"], (0, 5), value=1)
    given = {"decoder_input_ids": begun.sequences, "decoder_attention_mask": mask}
    if cache != CACHES["none"]:
        given[CACHE] = begun[CACHE]
    rest = {"max_new_tokens": STEPS - 5} | ({} if cache == STATIC else cache)
    assert torch.equal(tokens(ours, CASE.inputs() | given, **rest), expected)


@pytest.mark.skipif(
    not hasattr(EncoderDecoderCache, "to_legacy_cache"), reason="transformers 5 has no tuples for caches"
)
@pytest.mark.parametrize("layers_hold", [pytest.param(2, marks=has_decoder_of_ours), 4])
def test_cache_in_tuples(layers_hold, stock):
    """Older code keeps a cache as a tuple per layer: key and value of the tokens, and perhaps of the document."""
    ids = torch.tensor([[2, 7, 9, 30, 11], [2, 8, 8, 41, 5]])
    ours = fused(stock)
    with torch.no_grad(), true_fp64():
        expected = stock(**CASE.inputs(), decoder_input_ids=ids).logits
        for model in (stock, ours):
            begun = model(**CASE.inputs(), decoder_input_ids=ids[:, :3], use_cache=True)
            legacy = begun.past_key_values
            if not isinstance(legacy, tuple):
                legacy = legacy.to_legacy_cache()
            if model is stock and layers_hold == 2:
                continue  # transformers expects four
            result = model(
                **CASE.inputs(),
                decoder_input_ids=ids[:, 3:],
                past_key_values=tuple(states[:layers_hold] for states in legacy),
                use_cache=True,
            )
            assert_close({"logits": result.logits}, {"logits": expected[:, 3:]}, 1e-6)
            assert result.past_key_values is not None


@has_decoder_of_ours
def test_whole_numbers_as_a_mask_of_four_dimensions_are_refused(stock):
    with pytest.raises(
        ValueError, match=r"decoder_attention_mask has four dimensions and holds torch\.int64"
    ):
        fused(stock)(
            **CASE.inputs(),
            decoder_input_ids=torch.full((2, 3), 5),
            decoder_attention_mask=torch.ones(2, 1, 3, 3).long(),
        )


@pytest.mark.skipif(
    VERSION < (4, 56), reason="the decoder of transformers before 4.56 fails on peft's prefixes"
)
@pytest.mark.parametrize("when", ["before fusing", "afterwards"])
def test_prefix_tuning(when, stock):
    """A tuned prefix gives the same loss, the same gradients of its own, and the same tokens."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")

    def adapted(is_fused: bool) -> nn.Module:
        model = decoding_model()
        if is_fused and when == "afterwards":
            apply_led_kernels(model)
        config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, config).double().eval()
        generator = torch.Generator().manual_seed(1)
        nn.init.normal_(model.prompt_encoder["default"].embedding.weight, generator=generator)
        if is_fused and when == "before fusing":
            apply_led_kernels(model)
        return model

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        with true_fp64():
            result = model(**CASE.inputs(), labels=CASE.inputs()["input_ids"][:, :7].contiguous())
            result.loss.backward()
        gradient = model.prompt_encoder["default"].embedding.weight.grad
        return {"loss": result.loss.detach(), "logits": result.logits.detach(), "d prefix": gradient}

    theirs, ours = adapted(False), adapted(True)
    expected = evaluate(theirs)
    assert expected["d prefix"].any()
    assert_close(evaluate(ours), expected, 1e-6)
    assert torch.equal(tokens(ours, CASE.inputs()), tokens(theirs, CASE.inputs()))
