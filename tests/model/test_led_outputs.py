"""Hidden states, attention probabilities and embeddings as input, against transformers' eager attention."""

from __future__ import annotations

import pytest
import torch

from led_model import Seq2SeqModelOutput
from led_model.modeling.outputs import Seq2SeqOutput
from tests.model.small import random_inputs

TOLERANCE = {"atol": 1e-4, "rtol": 0}
FIELDS = {
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
    "encoder_global_attentions",
}
ASK = {"output_attentions": True, "output_hidden_states": True}


def assert_same_outputs(expected, output: Seq2SeqOutput, inputs: dict[str, torch.Tensor]) -> None:
    """Compares every field of transformers' output but its cache, in number, shape and value."""
    names = [name for name in expected if name not in ("past_key_values", "cache")]
    ours = set(output)
    assert ours == set(names)
    for name in names:
        theirs = expected[name] if isinstance(expected[name], tuple) else (expected[name],)
        own = output[name] if isinstance(output[name], tuple) else (output[name],)
        assert len(own) == len(theirs) > 0, name
        for a, b in zip(own, theirs, strict=True):
            if name == "encoder_global_attentions":
                b = own_globals(b, inputs)
            torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def own_globals(weights: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Leaves out rows of padding to the window, and puts zeros in the columns past a row's own global tokens:
    transformers leaves both."""
    counts = (inputs["attention_mask"] * inputs["global_attention_mask"]).sum(1)
    unused = torch.arange(weights.shape[-1]) >= counts[:, None]
    return weights[:, :, : inputs["attention_mask"].shape[1]].masked_fill(unused[:, None, None, :], 0)


@pytest.mark.parametrize("seed", range(6))
def test_everything_that_can_be_asked_for(led_pair, seed):
    stock, ours = led_pair(seed)
    inputs = random_inputs(seed, seqlen=[37, 5, 64, 1, 23, 100][seed])
    with torch.no_grad():
        expected, output = stock(**inputs, **ASK), ours(**inputs, **ASK)
    assert all(output[name] is not None for name in FIELDS)
    assert_same_outputs(expected, output, inputs)
    assert max(weights.max() for weights in expected.encoder_attentions) > 0.3  # far from uniform


def test_the_models_without_a_head(led_pair):
    stock, ours = led_pair(1)
    inputs = random_inputs(1)
    with torch.no_grad():
        expected, output = stock.led(**inputs, **ASK), ours.led(**inputs, **ASK)
    assert isinstance(output, Seq2SeqModelOutput)
    assert_same_outputs(expected, output, inputs)


def test_without_global_tokens(led_pair):
    stock, ours = led_pair(2)
    inputs = random_inputs(2)
    inputs["global_attention_mask"].zero_()
    with torch.no_grad():
        output = ours(**inputs, **ASK)
        assert_same_outputs(stock(**inputs, **ASK), output, inputs)
    assert output.encoder_global_attentions is None


def test_decoder_padding_and_no_masks(led_pair):
    stock, ours = led_pair(3)
    inputs = random_inputs(3, target=9)
    decoder_mask = torch.ones(3, 9, dtype=torch.int64)
    decoder_mask[0, 3:6] = 0
    decoder_mask[1, 7:] = 0
    with torch.no_grad():
        both = [model(**inputs, decoder_attention_mask=decoder_mask, **ASK) for model in (stock, ours)]
        assert_same_outputs(*both, inputs)
        ids = {name: inputs[name] for name in ("input_ids", "decoder_input_ids")}
        both = [model(**ids, **ASK) for model in (stock, ours)]
        assert_same_outputs(*both, inputs)


def test_document_of_only_padding(led_pair):
    stock, ours = led_pair(4)
    inputs = random_inputs(4, seqlen=32)
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        assert_same_outputs(stock(**inputs, **ASK), ours(**inputs, **ASK), inputs)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_only_what_is_asked_for(small_model, asked):
    model, inputs = small_model(0), random_inputs(0)
    with torch.no_grad():
        plain, output = model(**inputs), model(**inputs, **{asked: True})
    assert set(plain) == {"logits", "encoder_last_hidden_state"}
    assert torch.equal(output.logits, plain.logits)
    kind = asked.removeprefix("output_")
    given = {n for n in FIELDS - {"encoder_last_hidden_state"} if getattr(output, n) is not None}
    assert given == {n for n in FIELDS if n.endswith(kind)}


def test_weights_are_what_the_result_was_made_with(small_model):
    """Cross-attention's probabilities times its values, projected, are the module's own output."""
    model, inputs = small_model(0), random_inputs(0)
    attention = model.led.decoder.layers[0].encoder_attn
    seen = []
    attention.register_forward_hook(
        lambda *call: seen.append(call[2].clone())
    )  # the residual is added in place
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
        values = attention.v_proj(output.encoder_last_hidden_state)
        values = values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        attended = (output.cross_attentions[0] @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.out_proj(attended), seen[0])


def test_gradients_through_every_output(led_pair):
    stock, ours = led_pair(4, attention_window=[8, 8])
    inputs = random_inputs(4)
    gradients = []
    for model in (stock, ours):
        output = model(**inputs, **ASK)
        score = sum(w.square().sum() for w in output.encoder_attentions + output.decoder_attentions)
        score = score + sum(w.square().sum() for w in output.cross_attentions)
        score = score + sum(h.square().sum() for h in output.encoder_hidden_states)
        score.backward()
        gradients.append(model.led.shared.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-2 * gradients[0].std().item())


def test_layerdrop_leaves_attentions_out(small_model):
    model = small_model(0, encoder_layerdrop=1.0, decoder_layerdrop=1.0).train()
    output = model(**random_inputs(0), **ASK)
    assert output.encoder_attentions == output.decoder_attentions == output.cross_attentions == ()
    assert len(output.encoder_hidden_states) == 1 + model.config.encoder_layers
    assert len(output.decoder_hidden_states) == 1 + model.config.decoder_layers


def test_embeddings_as_input(led_pair):
    stock, ours = led_pair(5)
    inputs = random_inputs(5)
    embeddings = {
        "inputs_embeds": torch.randn(3, 37, ours.config.d_model),
        "decoder_inputs_embeds": torch.randn(3, 9, ours.config.d_model),
    }
    given = {name: tensor.clone() for name, tensor in embeddings.items()}
    masks = {name: inputs[name] for name in ("attention_mask", "global_attention_mask")}
    with torch.no_grad():
        expected, output = stock(**masks, **given), ours(**masks, **given)
        torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)
        assert all(torch.equal(given[name], embeddings[name]) for name in given)
        from_ids = ours(**inputs).logits
        looked_up = {
            "inputs_embeds": ours.led.shared(inputs["input_ids"]),
            "decoder_inputs_embeds": ours.led.shared(inputs["decoder_input_ids"]),
        }
        assert torch.equal(ours(**masks, **looked_up).logits, from_ids)


def test_labels_shift_unless_the_decoder_has_input(led_pair):
    stock, ours = led_pair(5)
    inputs = random_inputs(5)
    labels = inputs.pop("decoder_input_ids")
    embeds = torch.randn(3, 9, ours.config.d_model)
    with torch.no_grad():
        for extra in ({}, {"decoder_inputs_embeds": embeds}):
            expected, output = stock(**inputs, labels=labels, **extra), ours(**inputs, labels=labels, **extra)
            torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input_ids and inputs_embeds are both missing"),
        ({"inputs_embeds": torch.zeros(1, 9, 8)}, "input_ids and inputs_embeds are both given"),
        ({"decoder_inputs_embeds": torch.zeros(1, 9, 8)}, "decoder_inputs_embeds are both given"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 9, 3)},
            r"\(1, 9, 3\); give \[batch, length, d_m",
        ),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(9, 3)},
            r"inputs_embeds is .* of shape \(9, 3\); give",
        ),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 129, 10)}, "inputs_embeds has 129 tokens"),
        ({"input_ids": None, "decoder_input_ids": None}, "there are no input_ids to shift"),
    ],
)
def test_bad_embeddings_are_named(small_model, change, message):
    model = small_model(0, d_model=12, encoder_attention_heads=1, decoder_attention_heads=1)
    if "inputs_embeds" in change and change["inputs_embeds"].shape[-1] == 10:
        change = change | {"inputs_embeds": torch.zeros(1, 129, 12)}
    inputs = {"input_ids": torch.zeros(1, 9, dtype=torch.int64), "decoder_input_ids": torch.tensor([[2]])}
    with pytest.raises(ValueError, match=message):
        model(**inputs | change)


def test_outputs_can_be_indexed(led_pair):
    stock, ours = led_pair(0)
    inputs = random_inputs(0)
    labels = inputs["decoder_input_ids"]
    with torch.no_grad():
        output = ours(**inputs, labels=labels, **ASK)
    expected = stock(**inputs, labels=labels, **ASK)
    ordered = [name for name in expected if name != "past_key_values"]
    assert len(output.to_tuple()) == len(ordered)
    assert all(output[i] is getattr(output, name) for i, name in enumerate(ordered))
    assert output["loss"] is output[0]
    assert output[:2] == (output.loss, output.logits)
    with pytest.raises(KeyError):
        output["nothing"]
