"""Every task model of Longformer and LED computes the same, also in configurations in the manner of PRIMERA."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from hf_cases import HFCase, assert_parity, assert_same_function, fused, varied
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LongformerForMaskedLM,
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    LongformerModel,
)

CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))
SPAN = {"start_positions": torch.tensor([3, 4]), "end_positions": torch.tensor([5, 9])}
SEPARATOR = 2

HEADS = {
    LongformerModel: {},
    LongformerForMaskedLM: {"labels": torch.arange(38).view(2, 19)},
    LongformerForSequenceClassification: {"labels": torch.tensor([0, 1])},
    LongformerForTokenClassification: {"labels": torch.arange(38).view(2, 19) % 2},
    LongformerForQuestionAnswering: SPAN,
    LongformerForMultipleChoice: {"labels": torch.tensor([1])},
    LEDForQuestionAnswering: SPAN,
}
CHOOSE_GLOBAL_TOKENS = (
    LongformerForSequenceClassification,
    LongformerForQuestionAnswering,
    LongformerForMultipleChoice,
)


def build(head: type[nn.Module]) -> nn.Module:
    return varied(head(CASE.led_config() if head.__name__.startswith("LED") else CASE.longformer_config()))


def evaluate(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns every output but attentions, and the gradient of every parameter that has one."""
    model.zero_grad()
    result = model(**inputs, output_hidden_states=True)
    named = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    for states in (name for name in result if name.endswith("hidden_states")):
        named |= {f"{states}[{layer}]": value for layer, value in enumerate(result[states])}
    loss = result.loss if "loss" in result else sum(value.square().mean() for value in named.values())
    loss.backward()
    named |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize(("head", "labels"), HEADS.items(), ids=[head.__name__ for head in HEADS])
def test_head(head, labels):
    inputs = CASE.inputs()
    if head is LongformerForMultipleChoice:
        inputs = {name: value[None] for name, value in inputs.items()}  # [batch, choices, seqlen]
    assert_same_function(build(head), lambda model: evaluate(model, inputs | labels))


@pytest.mark.parametrize("head", CHOOSE_GLOBAL_TOKENS, ids=[head.__name__ for head in CHOOSE_GLOBAL_TOKENS])
def test_head_that_chooses_its_own_global_tokens(head):
    ids = CASE.inputs()["input_ids"]
    ids[:, [6, 7, 18]] = SEPARATOR  # question </s> </s> text </s>
    if head is LongformerForMultipleChoice:
        ids = ids[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | HEADS[head]
    assert_same_function(build(head), lambda model: evaluate(model, inputs))


PRIMERA = HFCase(
    windows=(16, 16),
    seqlen=61,
    globals_per_row=((0, 17, 31, 52), (0, 40)),  # <s> and each <doc-sep>
    padding=("none", "right"),
)


@pytest.fixture
def primera(tmp_path) -> LEDForConditionalGeneration:
    """Loads a model from a config.json with the keys of PRIMERA's, some of which transformers' LED does not know."""
    varied(LEDForConditionalGeneration(PRIMERA.led_config())).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {
        "attention_dilation": [1, 1],
        "attention_mode": "sliding_chunks",
        "autoregressive": False,
        "attention_probs_dropout_prob": 0.0,
        "gradient_checkpointing": False,
    }
    path.write_text(json.dumps(config))
    return AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()


def test_primera(primera):
    assert primera.config.attention_mode == "sliding_chunks"
    assert_parity(PRIMERA, primera)


def test_primera_generates_like_stock(primera):
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = primera.generate(**PRIMERA.inputs(), **settings)
    assert torch.equal(fused(primera).generate(**PRIMERA.inputs(), **settings), expected)
