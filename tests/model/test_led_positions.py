"""Models that get more positions, or fewer, than they were trained with."""

from __future__ import annotations

import pytest
import torch

from led_model import LEDForConditionalGeneration, LEDModel
from tests.model.small import VOCAB_SIZE

ENCODER = {"max_encoder_position_embeddings": 20, "max_decoder_position_embeddings": 12}


def test_new_positions_are_copies(small_model):
    model = small_model(**ENCODER)
    encoder, decoder = (stack.embed_positions for stack in (model.led.encoder, model.led.decoder))
    old = encoder.weight.detach().clone(), decoder.weight.detach().clone()
    ids = torch.randint(4, VOCAB_SIZE, (2, 20))
    expected = model(ids, decoder_input_ids=ids[:, :12]).logits
    model.resize_position_embeddings(50, max_decoder_positions=30)
    assert (encoder.num_embeddings, decoder.num_embeddings) == encoder.weight.shape[
        :1
    ] + decoder.weight.shape[:1]
    assert torch.equal(encoder.weight, old[0].repeat(3, 1)[:50])
    assert torch.equal(decoder.weight, old[1].repeat(3, 1)[:30])
    assert encoder.weight.requires_grad
    assert model.config.max_encoder_position_embeddings == 50
    assert model.config.max_decoder_position_embeddings == 30
    assert torch.equal(model(ids, decoder_input_ids=ids[:, :12]).logits, expected)
    long = torch.randint(4, VOCAB_SIZE, (2, 50))
    model(long, decoder_input_ids=long[:, :30]).logits.sum().backward()
    assert encoder.weight.grad.abs().sum(1).all()
    assert model.generate(long, max_new_tokens=29, min_new_tokens=29).shape[1] == 30


def test_one_side_alone(small_model):
    model = small_model(**ENCODER)
    model.resize_position_embeddings(max_decoder_positions=15)
    assert model.led.encoder.embed_positions.num_embeddings == 20
    model.resize_position_embeddings(7)  # fewer
    assert model.led.encoder.embed_positions.num_embeddings == 7
    assert model.led.decoder.embed_positions.num_embeddings == 15
    with pytest.raises(ValueError, match="8 tokens"):
        model(torch.full((1, 8), 5))


def test_loads_and_saves_longer(small_model, save_checkpoint, tmp_path):
    source = save_checkpoint(small_model(**ENCODER), tmp_path / "source")
    for model_class in (LEDForConditionalGeneration, LEDModel):
        model = model_class.from_pretrained(source, max_positions=64, dtype=torch.bfloat16)
        table = model.base_model.encoder.embed_positions.weight
        assert table.shape[0] == model.config.max_encoder_position_embeddings == 64
        assert table.dtype == torch.bfloat16
        model.save_pretrained(tmp_path / "longer")
        again = model_class.from_pretrained(tmp_path / "longer")
        assert torch.equal(again.base_model.encoder.embed_positions.weight, table)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "both missing"),
        ({"max_positions": 0}, ValueError, "max_positions is 0; give"),
        ({"max_positions": "many"}, TypeError, "max_positions is 'many'; give a whole number"),
        ({"max_positions": True}, TypeError, "max_positions is True"),
        ({"max_positions": 64, "max_decoder_positions": -1}, ValueError, "max_decoder_positions is -1"),
    ],
)
def test_misuse_changes_nothing(arguments, error, message, small_model):
    model = small_model(**ENCODER)
    with pytest.raises(error, match=message):
        model.resize_position_embeddings(**arguments)
    assert model.led.encoder.embed_positions.weight.shape[0] == 20


def test_from_pretrained_refuses_before_it_looks(tmp_path):
    with pytest.raises(ValueError, match="max_positions is -4; give"):
        LEDForConditionalGeneration.from_pretrained(tmp_path / "nowhere", max_positions=-4)
