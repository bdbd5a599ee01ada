"""Weights that torch.func puts in for a call: they are used, and the model's own come back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from led_model import LEDConfig, LEDForConditionalGeneration
from tests.model.small import random_inputs, small_config


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_substituted_weights_leave_no_trace(small_model, tied):
    model = small_model(0, tie_word_embeddings=tied)
    inputs = random_inputs(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    owners = dict(model.named_parameters(remove_duplicate=False))
    expected_model = copy.deepcopy(model)
    for parameter in expected_model.parameters():
        parameter.mul_(1.5)
    substitutes = {name: parameter * 1.5 for name, parameter in model.named_parameters()}
    got = functional_call(model, substitutes, (), inputs).logits
    torch.testing.assert_close(got, expected_model(**inputs).logits, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is owners[name]


@torch.no_grad()
def test_models_are_mapped_over(small_model):
    models, inputs = [small_model(0), small_model(0)], random_inputs(0)
    for parameter in models[1].parameters():
        parameter.mul_(1.1)
    parameters, buffers = stack_module_state(models)
    before = models[0].led.shared.weight.clone()

    def logits(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (), inputs | {"max_globals": 8}).logits

    got = vmap(logits)(parameters, buffers)
    for model, mapped in zip(models, got, strict=True):
        torch.testing.assert_close(mapped, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(models[0].led.shared.weight, before)


@pytest.mark.parametrize("how", ["load", "assign", "deepcopy", "pickle", "half", "resize", "replaced"])
def test_one_table_stays_one(small_model, how):
    model = small_model(0)
    if how in ("load", "assign"):
        other = copy.deepcopy(model)
        nn.init.normal_(other.led.shared.weight)
        model.load_state_dict(other.state_dict(), assign=how == "assign")
        assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    elif how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "half":
        model = model.half()
    elif how == "resize":
        model.resize_token_embeddings(50)
    else:
        model.led.shared = nn.Embedding(60, model.config.d_model, 1)
        model.tie_weights()
    tables = [model.led.shared, model.led.encoder.embed_tokens, model.led.decoder.embed_tokens]
    assert all(table.weight is model.lm_head.weight for table in tables)
    assert len({(table.num_embeddings, table.padding_idx) for table in tables}) == 1
    assert {table.num_embeddings for table in tables} == {len(model.lm_head.weight)}


def test_a_table_of_a_callers_own_is_shared_whole(small_model):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    model = small_model(0)
    model.led.shared = Scaled(40, model.config.d_model)
    model.tie_weights()
    assert model.led.encoder.embed_tokens is model.led.decoder.embed_tokens is model.led.shared


@pytest.mark.parametrize("tied", [True, False])
def test_new_tables_are_drawn_once(tied):
    torch.manual_seed(0)
    model = LEDForConditionalGeneration(LEDConfig(**small_config(0, tie_word_embeddings=tied)))
    for table in (model.led.shared, model.led.encoder.embed_tokens):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert table.weight[1].abs().max() == 0
