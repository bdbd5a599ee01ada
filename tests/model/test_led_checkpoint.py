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
    LEDForConditionalGeneration,
)
from led_model.checkpoint import hub as led_hub
from led_model.checkpoint.tensor_names import EMBEDDINGS, hf_names, to_hf_state_dict
from tests.model.checkpoints import assert_same_weights, edit_tensors
from tests.model.small import random_inputs

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


def edit_config(directory: Path, **settings) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


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
    assert renamed.keys() | set(EMBEDDINGS) == expected.keys()
    assert all(torch.equal(renamed[name], expected[name]) for name in renamed)
    assert sorted(part for name in ours.state_dict() for part in hf_names(name)) == sorted(renamed)


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
