"""Every form a checkpoint comes in, and what is said of one that does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from led_model import (
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
    LEDModel,
)
from led_model import hub as led_hub
from led_model.tensor_names import EMBEDDINGS, hf_names, to_hf_state_dict
from tests.model.small import random_inputs, randomize, small_config

load = LEDForConditionalGeneration.from_pretrained


@pytest.fixture
def saved(small_model, save_checkpoint, tmp_path) -> tuple[LEDForConditionalGeneration, Path]:
    model = small_model(0)
    return model, save_checkpoint(model, tmp_path / "checkpoint")


def rewrite(directory: Path, form: str) -> None:
    """Turns model.safetensors into another form."""
    tensors = load_file(directory / "model.safetensors")
    if form == "safetensors":
        return
    os.remove(directory / "model.safetensors")
    if form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    suffix, stem, index = {
        "sharded safetensors": ("safetensors", "model", "model.safetensors.index.json"),
        "sharded bin": ("bin", "pytorch_model", "pytorch_model.bin.index.json"),
    }[form]
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"{stem}-{i % 3 + 1:05}-of-00003.{suffix}"
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, directory / shard) if suffix == "safetensors" else torch.save(part, directory / shard)
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_tensors(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **settings) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def assert_same_weights(a: LEDForConditionalGeneration, b: LEDForConditionalGeneration) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_reads_every_form(saved, form):
    model, directory = saved
    rewrite(directory, form)
    loaded = load(directory)
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


def test_reads_what_transformers_shards(led_pair, tmp_path):
    stock, ours = led_pair(0)
    stock.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path / "sharded"), ours)


def test_mapping_of_names_is_invertible(led_pair):
    stock, ours = led_pair(0)
    expected, renamed = stock.state_dict(), to_hf_state_dict(ours.state_dict())
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name], expected[name]) for name in expected)
    assert sorted(part for name in ours.state_dict() for part in hf_names(name)) == sorted(expected)


@pytest.mark.parametrize("name", ["led-base", "./checkpoints/led-base", "../led-base", "/led/base"])
def test_a_mistyped_path_is_not_looked_up(name, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("went to the hub"))
    with pytest.raises(FileNotFoundError, match="is no directory"):
        load(name)


def test_dtype(saved):
    model, directory = saved
    assert load(directory, dtype=torch.bfloat16).led.shared.weight.dtype == torch.bfloat16
    edit_tensors(directory, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    loaded = load(directory)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight.half())


@pytest.mark.parametrize(
    "kept", ["led.shared.weight", "led.decoder.embed_tokens.weight", "lm_head.weight", "all of them"]
)
def test_tied_embedding_under_any_name(saved, kept):
    """Converters keep whichever of the tied tensors comes first."""
    model, directory = saved

    def edit(tensors):
        table = tensors.pop("led.shared.weight")
        names = EMBEDDINGS if kept == "all of them" else [kept]
        tensors.update({name: table.clone() for name in names})

    edit_tensors(directory, edit)
    loaded = load(directory)
    assert_same_weights(loaded, model)
    assert loaded.lm_head.weight is loaded.led.shared.weight


def test_untied_embeddings(led_pair, small_model, save_checkpoint, tmp_path):
    stock, ours = led_pair(3, tie_word_embeddings=False)
    assert not torch.equal(ours.lm_head.weight, ours.led.shared.weight)
    with torch.no_grad():
        inputs = random_inputs(3)
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-4, rtol=0)

    directory = save_checkpoint(small_model(0, tie_word_embeddings=False), tmp_path / "old")
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight;"):
        load(directory)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": torch.ones_like(t["led.shared.weight"])}))
    loaded = load(directory)  # written before transformers 5: encoder and decoder share
    assert torch.equal(loaded.led.encoder.embed_tokens.weight, loaded.led.shared.weight)


def test_bare_model_and_missing_logits_bias(saved):
    model, directory = saved

    def edit(tensors):
        del tensors["final_logits_bias"]
        for name in list(tensors):
            tensors[name.removeprefix("led.")] = tensors.pop(name)

    edit_tensors(directory, edit)
    model.final_logits_bias.zero_()
    assert_same_weights(load(directory), model)


def test_generation_settings(saved):
    _, directory = saved
    edit_config(directory, max_length=77, num_beams=4, forced_bos_token_id=0)
    assert load(directory).generation_config.max_length == 77
    (directory / "generation_config.json").write_text(json.dumps({"max_length": 99, "eos_token_id": [2, 3]}))
    config = load(directory).generation_config
    assert (config.max_length, config.eos_token_id, config.forced_bos_token_id) == (99, [2, 3], 0)
    assert (config.num_beams, config.unsupported) == (4, {})


def test_names_missing_extra_and_misshapen_tensors(saved):
    _, directory = saved

    def edit(tensors):
        del tensors["led.encoder.layers.1.self_attn.longformer_self_attn.key.bias"]
        tensors["led.encoder.layers.9.fc1.weight"] = torch.zeros(2)
        tensors["led.decoder.layers.0.fc1.bias"] = torch.zeros(3)

    edit_tensors(directory, edit)
    with pytest.raises(ValueError, match=re.escape("do not fit its config.json")) as error:
        load(directory)
    message = str(error.value)
    assert "lacks led.encoder.layers.1.self_attn.longformer_self_attn.key.bias and" in message
    assert "has unexpected led.encoder.layers.9.fc1.weight and" in message
    assert "led.decoder.layers.0.fc1.bias (3,) instead of (" in message
    assert "\n" not in message


def test_tied_but_different(saved):
    _, directory = saved
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["led.shared.weight"] + 1}))
    with pytest.raises(
        ValueError, match=re.escape("ties lm_head.weight to led.shared.weight but they differ")
    ):
        load(directory)


class Payload:
    def __reduce__(self):
        return os.system, ("echo unsafe",)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: shutil.rmtree(d), FileNotFoundError, "is no directory"),
        (lambda d: os.remove(d / "config.json"), FileNotFoundError, "holds no config.json"),
        (
            lambda d: os.remove(d / "model.safetensors"),
            FileNotFoundError,
            "holds no weights; it needs one of",
        ),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), ValueError, "holds a list, not a JSON object"),
        (lambda d: edit_config(d, model_type="bart"), ValueError, "model_type in config.json is 'bart'"),
        (lambda d: edit_config(d, attention_window=[8]), ValueError, "attention_window lists 1 widths for 2"),
        (
            lambda d: edit_config(d, attention_window=7),
            ValueError,
            "attention_window is 7; give a positive even",
        ),
        (lambda d: edit_config(d, decoder_attention_heads=7), ValueError, "decoder_attention_heads is 7"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"x" * 100),
            ValueError,
            "holds no readable weights",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b""), ValueError, "holds no readable weights"),
    ],
)
def test_damage_is_named(saved, damage, error, message):
    _, directory = saved
    damage(directory)
    with pytest.raises(error, match=message):
        load(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"x": Payload()}, "holds no readable weights"), ([1], "no plain dict"), ({"x": 1}, "no plain dict")],
)
def test_pickles_are_not_trusted(saved, content, message, capfd):
    _, directory = saved
    os.remove(directory / "model.safetensors")
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load(directory)
    assert "unsafe" not in capfd.readouterr().out


def test_shards_are_found_or_named(saved):
    _, directory = saved
    rewrite(directory, "sharded safetensors")
    index = directory / "model.safetensors.index.json"
    os.remove(directory / "model-00002-of-00003.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match=re.escape(
            "holds no model-00002-of-00003.safetensors, which model.safetensors.index.json names"
        ),
    ):
        load(directory)
    for name in ("../elsewhere.safetensors", "x" * 5000 + ".bin", "ü" * 127 + ".bin", "weights.txt"):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match="which is no file of weights beside it"):
            load(directory)


def test_hub_id(saved, monkeypatch):
    """Files come one by one from huggingface_hub; those that are not there are skipped."""
    hub = pytest.importorskip("huggingface_hub")
    model, directory = saved
    rewrite(directory, "bin")
    asked = []

    def download(repo, name, revision):
        asked.append((repo, name, revision))
        if not (directory / name).exists():
            raise hub.errors.EntryNotFoundError("404")
        return str(directory / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(led_hub, "_asked", [True])
    monkeypatch.setattr(led_hub, "_unreachable", [])
    assert_same_weights(load("someone/led-small", revision="main"), model)
    assert ("someone/led-small", "pytorch_model.bin", "main") in asked

    def offline(repo, name, revision):
        raise hub.errors.LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched from the hub \(no network\)"):
        load("someone/led-small")


def test_a_hub_that_does_not_answer_is_asked_once(saved, monkeypatch):
    """hf_hub_download tries six times for every file; a mistyped directory must not wait for that."""
    hub = pytest.importorskip("huggingface_hub")
    asked, wanted = [], []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError("no route\nand more")

    def download(repo, name, revision, local_files_only=False):
        wanted.append((name, local_files_only))
        raise hub.errors.LocalEntryNotFoundError("a long text")

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(led_hub, "_asked", [])
    monkeypatch.setattr(led_hub, "_unreachable", [])
    for _ in range(2):
        with pytest.raises(
            FileNotFoundError, match=r"models/led is no directory, .* hub \(no route\); check"
        ):
            load("models/led")
    assert len(asked) == 1
    assert wanted == [("config.json", True)] * 2


def test_options_of_the_hub_are_handed_on(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    given = {}

    def download(repo, name, **options):
        given.update(options)
        raise hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError):
        load("owner/led", cache_dir="somewhere", local_files_only=True, token="t", revision="r")
    assert given == {"cache_dir": "somewhere", "local_files_only": True, "token": "t", "revision": "r"}


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
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / "b" / file.name).read_bytes(), file.name


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


@pytest.mark.parametrize("form", ["torch.bfloat16", "bfloat16", torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_by_either_name(saved, name, form):
    _, directory = saved
    loaded = load(directory, **{name: form}, device_map={"": "cpu"})
    assert loaded.dtype == loaded.led.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    assert loaded.device == torch.device("cpu")
    assert load(directory, **{name: "auto"}, device_map="cpu").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"load_in_4_bit": True}, TypeError, "no argument 'load_in_4_bit'; did you mean 'load_in_4bit'"),
        ({"nonsense": 3}, TypeError, "no argument 'nonsense'; it has"),
        ({"attn_implementation": "sdpa"}, TypeError, "no argument 'attn_implementation'"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; give 'auto' or one of float32"),
        ({"dtype": "bfloat61"}, ValueError, "dtype is 'bfloat61'"),
        ({"dtype": torch.float16, "torch_dtype": torch.float32}, ValueError, "give dtype alone"),
        ({"device_map": "balanced"}, ValueError, "device_map is 'balanced'; give \"auto\" or one device"),
        ({"device_map": {"led": 0, "lm_head": 1}}, ValueError, "device_map is {'led'"),
        ({"num_labels": "five"}, ValueError, "num_labels is 'five'"),
    ],
)
def test_unknown_arguments_are_refused(saved, arguments, error, message):
    with pytest.raises(error, match=message):
        load(saved[1], **arguments)


def test_what_trainers_and_peft_leave_behind_is_pointed_at(saved, tmp_path):
    _, directory = saved
    output = tmp_path / "output"
    for step in (500, 1000, 90):
        shutil.copytree(directory, output / f"checkpoint-{step}")
    with pytest.raises(FileNotFoundError, match=r"Trainer's output directory: give .*checkpoint-1000,"):
        load(output)
    shutil.copy(directory / "config.json", output)
    with pytest.raises(FileNotFoundError, match=r"holds no weights.*: give .*checkpoint-1000,"):
        load(output)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it is an adapter: .*merge_and_unload"):
        load(adapter)


def test_a_pickle_of_parameters(saved):
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    os.remove(directory / "model.safetensors")
    torch.save({k: torch.nn.Parameter(v) for k, v in tensors.items()}, directory / "pytorch_model.bin")
    assert_same_weights(load(directory), model)


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [
        ("led.encoder.layers.0.fc1.weight", torch.float32, 1e6),
        ("led.decoder.layers.0.fc1.bias", torch.float64, 1e300),
        ("final_logits_bias", torch.float64, -1e300),
    ],
)
def test_no_number_becomes_infinite(saved, name, dtype, value):
    _, directory = saved

    def edit(tensors):
        halves = {n: tensor.half() for n, tensor in tensors.items()}
        tensors.update(halves | {name: tensors[name].to(dtype).index_fill(-1, torch.tensor(0), value)})

    edit_tensors(directory, edit)
    with pytest.raises(
        ValueError, match=rf"{name} holds numbers up to .*, which torch.float16 does not reach"
    ):
        load(directory)
    assert load(directory, dtype=dtype).state_dict()[name].abs().max() == abs(value)


def test_dtype_of_most_numbers(saved):
    """Whichever tensor is in another."""
    model, directory = saved
    edit_tensors(directory, lambda t: t.update({"led.shared.weight": t["led.shared.weight"].half()}))
    loaded = load(directory)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.led.encoder.layers[0].fc1.weight, model.led.encoder.layers[0].fc1.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tied_in_two_dtypes(saved, dtype):
    model, directory = saved
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["led.shared.weight"].to(dtype)}))
    assert_same_weights(load(directory), model)


def test_generate_names_an_overflow(saved):
    _, directory = saved
    edit_tensors(directory, lambda t: t.update({n: x * 1e25 for n, x in t.items() if "decoder.layers" in n}))
    loaded = load(directory)
    for settings in ({}, {"num_beams": 2}, {"do_sample": True, "seed": 0}):
        with pytest.raises(ValueError, match="numbers overflowed float32; give a sound checkpoint"):
            loaded.generate(torch.tensor([[0, 5, 6, 2]]), max_new_tokens=3, **settings)
