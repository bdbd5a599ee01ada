"""What trainers and wrappers of models ask of led_model, without transformers."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils import _pytree as pytree

import led_model
from led_model import GenerationConfig, LEDConfig, LEDForConditionalGeneration
from tests.model.small import random_inputs, small_config

CLASSES = [
    led_model.LEDModel,
    led_model.LEDForConditionalGeneration,
    led_model.LEDForQuestionAnswering,
    led_model.LEDForSequenceClassification,
]


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_argument_has_a_name(model_class):
    parameters = inspect.signature(model_class.forward).parameters
    assert "global_attention_mask" in parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_outputs_are_dicts_whose_tensors_wrappers_find(small_model):
    model, inputs = small_model(0), random_inputs(0)
    output = model(**inputs, labels=inputs["decoder_input_ids"])
    leaves, structure = pytree.tree_flatten(output)
    assert [id(leaf) for leaf in leaves] == [id(value) for value in output.to_tuple()]
    assert leaves[0] is output.loss
    again = pytree.tree_unflatten(leaves, structure)
    assert type(again) is type(output)
    assert list(again) == list(output) == ["loss", "logits", "encoder_last_hidden_state"]
    assert type(output)(dict(output)).logits is output.logits
    assert output.cross_attentions is output["cross_attentions"] is None
    with pytest.raises(TypeError, match="has no field 'logit'; it has loss, logits"):
        type(output)(logit=1)
    with pytest.raises(AttributeError, match="holds what a model returned"):
        output.loss = None
    with pytest.raises(KeyError, match="logit"):
        output["logit"] = 1


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_two_tensors_of_a_state_dict_share_memory_and_it_loads(tied, model_class):
    torch.manual_seed(0)
    config = LEDConfig(**small_config(0, tie_word_embeddings=tied))
    model = model_class(config)
    state = model.state_dict()
    addresses = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(addresses)) == len(addresses)
    everything = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert (len(everything) > len(state)) == tied
    for given, assign in ((state, False), (state, True), (everything, False)):
        other = model_class(config)
        other.load_state_dict(given, assign=assign)
        for name, tensor in other.named_parameters(remove_duplicate=False):
            assert torch.equal(tensor, everything[name]), name
    del state["led.shared.weight" if model_class is not led_model.LEDModel else "shared.weight"]
    with pytest.raises(RuntimeError, match=r"shared\.weight"):
        other.load_state_dict(state)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen-embeddings"])
def test_both_stacks_are_computed_again(frozen, reentrant, small_model):
    model = small_model(5, dropout=0.1, attention_dropout=0.1, decoder_layers=2).train()
    model.led.shared.requires_grad_(not frozen)
    for stack in (model.led.encoder, model.led.decoder):
        stack.embed_positions.requires_grad_(not frozen)
        stack.layernorm_embedding.requires_grad_(not frozen)
    inputs = random_inputs(5)
    labels = inputs.pop("decoder_input_ids")
    calls, results = [], []
    for layer in (*model.led.encoder.layers, *model.led.decoder.layers):
        layer.register_forward_pre_hook(lambda module, *_: calls.append(module))
    for every in (0, 1, 2):
        if every:
            model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert len(calls) == {0: 4, 1: 8, 2: 6}[every]
        calls.clear()
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="every_n_layers is 0"):
        model.activation_checkpointing_enable(every_n_layers=0)
    with pytest.raises(ValueError, match="offload is True"):
        model.activation_checkpointing_enable(offload=True)


def test_decoder_over_the_encoders_output(small_model):
    """It is taken for the keys and values that each layer makes of it, and not together with them."""
    model, inputs = small_model(1), random_inputs(1)
    decoder, encoded = model.led.decoder, model.led.encode(inputs["input_ids"])
    ids = inputs["decoder_input_ids"]
    made = decoder.cross_keys_values(encoded)
    torch.testing.assert_close(decoder(ids, encoder_hidden_states=encoded), decoder(ids, made))
    with pytest.raises(ValueError, match="cross_keys_values and encoder_hidden_states are both given"):
        decoder(ids, made, encoder_hidden_states=encoded)
    with pytest.raises(ValueError, match="decoder_input_ids has 1 rows and the encoder's output 3"):
        decoder(ids[:1], encoder_hidden_states=encoded)


def test_settings_of_another_class_are_taken(small_model):
    model = small_model(0)

    class Settings:
        def to_dict(self):
            return {"max_new_tokens": 3, "eos_token_id": None}

    model.generation_config = Settings()
    assert isinstance(model.generation_config, GenerationConfig)
    assert model.generation_config.max_new_tokens == 3
    inputs = random_inputs(0)
    ids = model.generate(inputs["input_ids"], labels=inputs["input_ids"], synced_gpus=True)
    assert ids.shape[1] <= 4
    assert isinstance(LEDForConditionalGeneration.accepts_loss_kwargs, bool)
    with pytest.raises(ValueError, match="return_dict is False; leave it out and call to_tuple"):
        model(**inputs, return_dict=False)
