"""Checkpoints that we write, as we and transformers read them, of every class; resized vocabularies."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from led_model import (
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
    LEDModel,
)
from led_model.checkpoint.tensor_names import EMBEDDINGS, to_hf_state_dict
from tests.model.checkpoints import assert_same_weights, edit_tensors
from tests.model.small import random_inputs, randomize, small_config

load = LEDForConditionalGeneration.from_pretrained

CLASSES = [LEDModel, LEDForConditionalGeneration, LEDForQuestionAnswering, LEDForSequenceClassification]


def random_model(model_class, seed: int = 0, **overrides):
    model = model_class(LEDConfig(**small_config(seed, **overrides)))
    randomize(model, seed)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_bit_for_bit(model_class, tied, dtype, tmp_path):
    model = random_model(model_class, 1, tie_word_embeddings=tied, num_labels=3).to(dtype)
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = model_class.from_pretrained(tmp_path / "a" / "b")
    assert_same_weights(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert vars(loaded.config) == vars(model.config) | {"id2label": loaded.config.id2label}
    assert list(loaded.config.id2label) == [0, 1, 2]
    loaded.save_pretrained(tmp_path / "again")
    assert (
        len({file.stat().st_mode for file in (tmp_path / "again").iterdir()}) == 1
    )  # who may read one, may read all
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_a_state_dict_is_written_instead_of_the_models_own(model_class, tied, tmp_path):
    model = random_model(model_class, 1, tie_word_embeddings=tied)
    trained = copy.deepcopy(model)
    randomize(trained, 2)
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    assert_same_weights(model_class.from_pretrained(tmp_path), trained)


def test_a_state_dict_that_does_not_fit_is_refused(tmp_path):
    model = random_model(LEDForConditionalGeneration, tie_word_embeddings=False)
    weights = model.state_dict()
    lacks_one = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    name = "led.encoder.layers.0.fc1.bias"
    for error, wrong in {
        r"state_dict lacks lm_head\.weight; give what .*full_state_dict": lacks_one,
        r"state_dict has unexpected head\.weight": weights | {"head.weight": weights[name]},
        rf"state_dict has {name} \(1,\) instead of": weights | {name: weights[name][:1]},
    }.items():
        with pytest.raises(ValueError, match=error):
            model.save_pretrained(tmp_path / "none", state_dict=wrong)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_transformers_reads_what_is_saved_and_back(model_class, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    is_old = int(transformers.__version__.split(".")[0]) < 5
    if model_class is LEDForSequenceClassification and not is_old:
        pytest.skip("transformers 5 has no LEDForSequenceClassification")
    model = random_model(model_class, 2, tie_word_embeddings=tied, attention_window=[4, 16], num_labels=2)
    shares = is_old  # encoder and decoder always share there
    if shares and not tied:
        for stack in (model.base_model.encoder, model.base_model.decoder):
            stack.embed_tokens.load_state_dict(model.base_model.shared.state_dict())
    model.save_pretrained(tmp_path / "ours")
    stock, info = getattr(transformers, model_class.__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, renamed = stock.state_dict(), to_hf_state_dict(model.state_dict())
    renamed |= to_hf_state_dict(dict(model.named_parameters(remove_duplicate=False)))
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name], expected[name]) for name in expected)
    assert {key: getattr(stock.config, key) for key in small_config(2)} == {
        key: getattr(model.config, key) for key in small_config(2)
    }

    stock.save_pretrained(tmp_path / "theirs")
    assert_same_weights(model_class.from_pretrained(tmp_path / "theirs"), model)
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    if tied or not shares:
        assert ours.keys() == theirs.keys()  # tied tensors once, under the same name
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_generation_settings_are_saved(small_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model(0)
    model.generation_config.max_length = 17
    model.generation_config.forced_eos_token_id = 2
    model.save_pretrained(tmp_path)
    assert vars(load(tmp_path).generation_config) == vars(model.generation_config)
    settings = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (settings.max_length, settings.forced_eos_token_id, settings.pad_token_id) == (17, 2, 1)
    assert (settings.decoder_start_token_id, settings.eos_token_id, settings.bos_token_id) == (2, 2, 0)
    inputs = random_inputs(0)
    del inputs["decoder_input_ids"]
    stock = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(stock.generate(**inputs), load(tmp_path).generate(**inputs))


def test_labels_of_a_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {0: "bad", 1: "fair", 2: "good"}
    random_model(LEDForSequenceClassification, id2label=names, num_labels=3).save_pretrained(tmp_path)
    assert LEDForSequenceClassification.from_pretrained(tmp_path).config.id2label == names
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.id2label, config.num_labels, config.label2id["good"]) == (names, 3, 2)
    assert config.architectures == ["LEDForSequenceClassification"]


@pytest.mark.parametrize("source", CLASSES)
@pytest.mark.parametrize("wanted", CLASSES)
def test_any_class_starts_from_any_checkpoint(source, wanted, tmp_path, recwarn):
    model = random_model(source)
    model.save_pretrained(tmp_path)
    loaded = wanted.from_pretrained(tmp_path)
    base, loaded_base = model.base_model.state_dict(), loaded.base_model.state_dict()
    assert all(torch.equal(base[name], loaded_base[name]) for name in loaded_base)
    assert base.keys() == loaded_base.keys()
    new = [str(w.message) for w in recwarn if "starts out random" in str(w.message)]
    if source is wanted or wanted in (LEDModel, LEDForConditionalGeneration):
        assert not new
    else:
        assert len(new) == 1
        head = loaded.qa_outputs if wanted is LEDForQuestionAnswering else loaded.classification_head.out_proj
        assert not head.bias.any()
        assert 0 < head.weight.std() < 0.1  # init_std is 0.02


def test_number_of_labels_for_a_new_head(small_model, tmp_path):
    small_model(0).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no classification_head: it starts out random; train it\."):
        model = LEDForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    assert model.classification_head.out_proj.out_features == model.config.num_labels == 7


def test_half_a_head_is_refused(tmp_path):
    random_model(LEDForQuestionAnswering).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("qa_outputs.bias"))
    with pytest.raises(ValueError, match=r"lacks qa_outputs\.bias;"):
        LEDForQuestionAnswering.from_pretrained(tmp_path)


def test_tied_tensors_that_came_apart_are_not_dropped(small_model, tmp_path):
    model = small_model(0)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to led\.shared\.weight but they differ"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.tie_weights()
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [53, 40, 30])
def test_resized_vocabulary(led_pair, tied, rows, tmp_path):
    stock, ours = led_pair(4, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    table = ours.resize_token_embeddings(rows)
    assert table is ours.led.shared
    assert table.weight.shape[0] == table.num_embeddings == ours.config.vocab_size == rows
    assert (
        (ours.lm_head.weight is table.weight)
        is (ours.led.encoder.embed_tokens.weight is table.weight)
        is tied
    )
    kept = min(rows, 40)
    for name, tensor in ours.state_dict().items():
        if name == "final_logits_bias":
            assert tensor.shape == (1, rows)
            assert torch.equal(tensor[:, :kept], before[name][:, :kept])
            assert not tensor[:, kept:].any()
        elif name in EMBEDDINGS:
            assert torch.equal(tensor[:kept], before[name][:kept])
            torch.testing.assert_close(tensor[kept:], before[name].mean(0).expand(rows - kept, -1))
        else:
            assert torch.equal(tensor, before[name])

    inputs = {k: v.clamp(max=rows - 1) if k.endswith("input_ids") else v for k, v in random_inputs(4).items()}
    with torch.no_grad():
        if tied:
            stock.resize_token_embeddings(rows)  # draws new rows close to the mean
            expected = stock(**inputs).logits
            torch.testing.assert_close(ours(**inputs).logits, expected, atol=1e-2, rtol=0)
        ours.save_pretrained(tmp_path / "resized")
        assert torch.equal(load(tmp_path / "resized")(**inputs).logits, ours(**inputs).logits)


def test_resizing_keeps_what_parameters_are(small_model):
    model = random_model(LEDForQuestionAnswering).bfloat16()
    model.led.shared.weight.requires_grad_(False)
    assert model.resize_token_embeddings(41, pad_to_multiple_of=8).num_embeddings == 48
    assert not model.led.shared.weight.requires_grad
    assert model.led.shared.weight.dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match="new_num_tokens is 1 but the padding token has id 1; keep at least 2"
    ):
        small_model(0).resize_token_embeddings(1)
