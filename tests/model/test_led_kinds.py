"""Arguments of another kind, dtype or layout than asked for are named in one sentence."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch

from led_model import (
    BeamKVCache,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
    StaticKVCache,
)
from tests.model.small import VOCAB_SIZE

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:.*Sparse.*")
IDS = torch.randint(4, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(0))


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([IDS[0], IDS[1, :9]], layout=layout)


NO_IDS = {
    "int8": IDS.to(torch.int8),
    "int16": IDS.to(torch.int16),
    "uint8": IDS.to(torch.uint8),
    "uint32": IDS.to(torch.uint32),
    "float": IDS.float(),
    "bool": IDS.bool(),
    "complex": IDS.to(torch.complex64),
    "sparse": IDS.to_sparse(),
    "nested": nested(torch.strided),
    "jagged": nested(torch.jagged),
    "list": IDS.tolist(),
    "array": IDS.numpy(),
    "text": "a text",
    "number": 3,
    "one row": IDS[0],
    "no tokens": IDS[:, :0],
    "three dimensions": IDS[None],
}


@pytest.fixture
def model(small_model):
    return small_model(0, activation_function="gelu")


@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
@pytest.mark.parametrize("how", ["forward", "shifted", "decoder", "labels", "generate", "prompt"])
def test_ids(model, ids, how):
    calls = {
        "forward": ("input_ids", lambda: model(ids, decoder_input_ids=IDS[:, :4])),
        "shifted": ("input_ids", lambda: model(ids)),
        "decoder": ("decoder_input_ids", lambda: model(IDS, decoder_input_ids=ids)),
        "labels": ("labels|decoder_input_ids", lambda: model(IDS, labels=ids)),
        "generate": ("input_ids", lambda: model.generate(ids, max_new_tokens=2)),
        "prompt": ("decoder_input_ids", lambda: model.generate(IDS, decoder_input_ids=ids, max_new_tokens=2)),
    }
    name, call = calls[how]
    if how == "prompt" and ids is NO_IDS["no tokens"]:  # the start token comes before them
        assert call().shape == (3, 3)
        return
    with pytest.raises(ValueError, match=f"^({name}) (is|has) "):
        call()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_will_do(model, dtype):
    ids = IDS.to(dtype)
    torch.testing.assert_close(model(ids, labels=ids[:, :5]).loss, model(IDS, labels=IDS[:, :5]).loss)
    assert torch.equal(model.generate(ids, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))


@pytest.mark.parametrize("value", [VOCAB_SIZE, -1, -99])
def test_labels_out_of_range(model, value):
    labels = IDS[:, :5].clone()
    labels[1, 2] = value
    with pytest.raises(ValueError, match=f"^labels holds {value}; give 0 to 39, or -100"):
        model(IDS, labels=labels, decoder_input_ids=IDS[:, :5])
    labels[1, 2] = -100
    assert model(IDS, labels=labels).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.bool])
def test_embeddings(model, dtype):
    embeds = torch.zeros(3, 20, model.config.d_model, dtype=dtype)
    for name in ("inputs_embeds", "decoder_inputs_embeds"):
        others = {"inputs_embeds": {"decoder_input_ids": IDS}, "decoder_inputs_embeds": {"input_ids": IDS}}[
            name
        ]
        with pytest.raises(ValueError, match=f"^{name} is {dtype} and the model torch.float32"):
            model(**others, **{name: embeds})


@torch.no_grad()
def test_narrow_embeddings_will_do(model):
    embeds = torch.randn(3, 20, model.config.d_model).bfloat16()
    got = model(inputs_embeds=embeds, decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, model(inputs_embeds=embeds.float(), decoder_input_ids=IDS).logits)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.5, 3.0, 1j])
@pytest.mark.parametrize("with_encoded", [False, True])
def test_masks(model, value, with_encoded):
    dtype = torch.complex64 if isinstance(value, complex) else torch.float32
    given = {"encoder_hidden_states": model.led.encode(IDS).detach()} if with_encoded else {}
    mask, prompt_mask = torch.ones(3, 20, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    mask[1, 3] = prompt_mask[1, 0] = value
    with pytest.raises(ValueError, match=r"^attention_mask (is|holds)"):
        model.generate(IDS, mask, **given, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"^decoder_attention_mask (is|holds)"):
        model.generate(
            IDS, **given, decoder_input_ids=IDS[:, :4], decoder_attention_mask=prompt_mask, max_new_tokens=2
        )
    with pytest.raises(ValueError, match=r"^attention_mask (is|holds)"):
        model(IDS, decoder_input_ids=IDS[:, :4], decoder_attention_mask=prompt_mask)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"on_token": 3}, TypeError, "on_token is a int"),
        ({"compiled": "x"}, ValueError, "compiled is 'x'"),
        ({"compiled": 1}, ValueError, "compiled is 1"),
        ({"return_dict_in_generate": "x"}, ValueError, "return_dict_in_generate is 'x'"),
        ({"streamer": 3}, TypeError, "streamer is a int"),
    ],
)
def test_what_is_called(model, arguments, kind, said):
    with pytest.raises(kind, match=f"^{re.escape(said)}"):
        model.generate(IDS, max_new_tokens=2, **arguments)


@torch.no_grad()
def test_caches(model):
    config, decoder = model.config, model.led.decoder
    keys_values = decoder.cross_keys_values(model.led.encode(IDS))
    step = {"cross_keys_values": keys_values, "position": torch.tensor([0])}

    def call(ids=IDS[:, :1], **changes):
        return lambda: decoder(ids, **step | changes)

    def pairs(change):
        return call(cross_keys_values=[change(k, v) for k, v in keys_values], position=None)

    for run, kind, said in (
        (call(cache=[1]), TypeError, "cache is a list"),
        (
            call(cache=StaticKVCache(config, 3, 8, dtype=torch.bfloat16)),
            ValueError,
            "cache is torch.bfloat16",
        ),
        (call(IDS[:, :2], cache=BeamKVCache(config, 3, 3, 8)), ValueError, "cache has 3 beams and"),
        (
            call(cache=StaticKVCache(config, 3, 8), position=torch.tensor([5])),
            ValueError,
            "position begins with 5",
        ),
        (pairs(lambda k, v: (k,)), ValueError, "cross_keys_values is a list"),
        (pairs(lambda k, v: (k, v, v)), ValueError, "cross_keys_values is a list"),
        (pairs(lambda k, v: None), ValueError, "cross_keys_values is a list"),
        (pairs(lambda k, v: (k.double(), v)), ValueError, "cross_keys_values holds what is torch.float64"),
        (lambda: StaticKVCache(config, 3, 0), ValueError, "max_length is 0; give a whole number from 1"),
        (lambda: StaticKVCache(config, 3, -1), ValueError, "max_length is -1"),
        (lambda: StaticKVCache(config, 3, 2.0), ValueError, "max_length is 2.0"),
        (lambda: StaticKVCache(config, 1.5, 2), ValueError, "batch is 1.5"),
        (lambda: BeamKVCache(config, 3, 0, 8), ValueError, "beams is 0; give a whole number from 1"),
        (lambda: BeamKVCache(config, 3, 2, 0), ValueError, "max_length is 0"),
    ):
        with pytest.raises(kind, match=f"^{re.escape(said)}"):
            run()
    hidden = torch.ones(3, 8)
    hidden[:, :5] = 0  # what is hidden may be empty
    assert (
        call(cache=StaticKVCache(config, 3, 8), position=torch.tensor([5]), attention_mask=hidden)()
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.bool, torch.complex64])
def test_answers(small_model, dtype):
    model = LEDForQuestionAnswering(small_model(0).config).eval()
    for name in ("start_positions", "end_positions"):
        positions = dict.fromkeys(("start_positions", "end_positions"), torch.ones(3, dtype=torch.int64))
        for wrong in (torch.ones(3, dtype=dtype), torch.ones(2, dtype=torch.int64), [1, 1, 1]):
            with pytest.raises(ValueError, match=f"^{name} is"):
                model(IDS, **positions | {name: wrong})
    narrow = dict.fromkeys(positions, torch.tensor([1, -5, 99], dtype=torch.int32))
    wide = {name: value.long() for name, value in narrow.items()}
    assert torch.equal(model(IDS, **narrow).loss, model(IDS, **wide).loss)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("single_label_classification", [torch.tensor([0, 2, -100]), torch.tensor([[0], [1], [2]]).int()],
         [torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2]), torch.ones(3), torch.ones(2).long(), [0, 1, 2]]),
        ("multi_label_classification", [torch.ones(3, 3), torch.ones(3, 3).long()],
         [torch.ones(3), torch.ones(3, 2), torch.ones(3, 3, dtype=torch.complex64), 3]),
        ("regression", [torch.ones(3, 3), torch.ones(3, 3).int()], [torch.ones(3), torch.ones(2, 3), "a"]),
    ],
)  # fmt: skip
def test_classes(small_model, kind, right, wrong):
    config = small_model(0, num_labels=3, problem_type=kind).config
    model = LEDForSequenceClassification(config).eval()
    ids = IDS.index_fill(1, torch.tensor([19]), 2)
    for labels in right:
        assert model(ids, labels=labels).loss.isfinite()
    for labels in wrong:
        with pytest.raises(ValueError, match=r"^labels (is|holds)"):
            model(ids, labels=labels)


def test_where_the_class_is_read(small_model):
    model = LEDForSequenceClassification(small_model(0).config).eval()
    ids = IDS.index_fill(1, torch.tensor([19]), 2)
    assert model(ids[:0]).logits.shape == (0, model.config.num_labels)
    for wrong in (None, [1], ids.float(), np.ones((3, 20))):
        with pytest.raises(ValueError, match=r"^input_ids is a |^input_ids is torch"):
            model(wrong)
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"^eos_token_id of the config is None; set it"):
        model(ids)
