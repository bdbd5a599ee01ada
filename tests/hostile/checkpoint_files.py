"""Checkpoints whose files are too large, of another kind than they seem, or contradict each other."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.damage import COMMAND, Case, edit, index, pickle, write

ANSWER = "answer {words} --model {model} --max-new-tokens 2 --question why"
CLASSIFY = "classify {words} --model {model}"
RESUMABLE = "summarize {words} --model {model} --max-new-tokens 2 --output {model}/out.jsonl"
DONE, FAILED = 0, 1
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json")


def cases() -> Iterator[Case]:
    yield from _large_files()
    yield from _large_weights()
    yield from _strange_weights()
    yield from _no_files()
    yield from _strange_names()
    yield from _tokenizers()
    yield from _contradictions()
    yield from _overflow()


def _large_files() -> Iterator[Case]:
    for name in (*SETTINGS, *TOKENIZER):
        yield Case(f"{name} of 3 GiB", partial(_lengthen, name), status=FAILED, says=name)
        yield Case(
            f"{name} of 3 GiB, with --output",
            partial(_lengthen, name),
            RESUMABLE,
            status=FAILED,
            says=name,
        )
    yield Case("10 million merges", partial(write, "merges.txt", "a a\n" * 10**7), status=FAILED)
    yield Case("6 million merges", partial(write, "merges.txt", "a a\n" * (6 * 10**6)), status=FAILED)
    for item in ("{}", "[]", "0", '""', "1e1"):
        content = f'{{"x": [{item}{f",{item}" * (24 * 10**6 // (len(item) + 1))}]}}'
        for name in ("config.json", "vocab.json", "tokenizer.json"):
            yield Case(f"{name} of many {item}", partial(write, name, content))
    added = [{"id": 300 + i, "content": f"<{i}>", "special": i % 2 == 0} for i in range(200_000)]
    yield Case("200,000 added tokens by turns", partial(_backend, {"added_tokens": added}), status=FAILED)


def _large_weights() -> Iterator[Case]:
    for count in (1000, 10_000):
        yield Case(f"{count} layers of one empty tensor", partial(_empty_layers, count), status=FAILED)
    for count in (300_000, 1_400_000):
        yield Case(f"{count:,} empty tensors", partial(_many_tensors, count), status=FAILED)
        yield Case(f"an archive of {count:,} entries", partial(_many_entries, count), status=FAILED)
    yield Case("a header of 4 GiB", _long_header, status=FAILED)
    yield Case("200 layers of one storage", _one_storage, status=FAILED)
    yield Case("a deflated archive", _deflated, status=FAILED)
    yield Case("a directory of 3 GiB in an archive", _long_directory, status=FAILED)


def _strange_weights() -> Iterator[Case]:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    yield Case(
        "a nested tensor", partial(_put, "led.shared.weight", nested), status=FAILED, says="nested tensor"
    )
    yield Case("TorchScript", _script, status=FAILED, says="state_dict as safetensors")
    for content in (
        b"\x80\x04cos\nsystem\n.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x02]q\x00.",
        b"(" * 10**6,
    ):
        says = "no readable weights"
        yield Case(f"a pickle {content[:9]!r}", partial(_replace_weights, content), status=FAILED, says=says)
    yield Case("a legacy file", _legacy, status=DONE)
    yield Case("a legacy file of 2**50 numbers", _large_legacy, status=FAILED)
    yield Case("a tensor in two shards", partial(_shards, True), status=FAILED, says="as another shard does")
    yield Case("a tensor in no shard", partial(_shards, False), status=FAILED, says="which no shard holds")


def _no_files() -> Iterator[Case]:
    """What is there but is no file would be missed only by its settings."""
    for name in (*SETTINGS, *TOKENIZER, "added_tokens.json", "model.safetensors"):
        for how, make in {
            "dangling": lambda path: path.symlink_to("nowhere"),
            "a loop": lambda path: path.symlink_to(path.name),
            "a directory": Path.mkdir,
            "a pipe": os.mkfifo,
            "a device": lambda path: path.symlink_to("/dev/zero"),
        }.items():
            yield Case(f"{name} {how}", partial(_remake, name, make), status=FAILED, says=name)
    yield Case(
        "config.json /proc/self/mem",
        partial(_remake, "config.json", _memory),
        status=FAILED,
        says="config.json",
    )


def _strange_names() -> Iterator[Case]:
    for name in ("\n", "\x1b[31m", "\0", "x" * 100_000, "\u202e", "a b"):
        shown = ascii(name[:9])
        yield Case(f"tensor {shown}", partial(_put, f"led.{name}", torch.ones(1)), status=FAILED)
        yield Case(f"pickled {shown}", partial(_put, name, torch.ones(1).long(), pickled=True), status=FAILED)
        yield Case(
            f"shard {shown}",
            partial(index, "model.safetensors.index.json", {"a": f"{name}.bin"}),
            status=FAILED,
        )
        named = {"architectures": [name]}
        yield Case(f"architecture {shown}", partial(edit, "config.json", named))
        yield Case(
            f"architecture {shown} of a classifier", partial(edit, "config.json", named), model="classifier"
        )
        yield Case(f"model_type {shown}", partial(edit, "config.json", {"model_type": name}), status=FAILED)
        for key in ("pad_token", "mask_token"):
            yield Case(f"{key} {shown}", partial(edit, "tokenizer_config.json", {key: name}))
        yield Case(
            f"added token {shown}",
            partial(write, "added_tokens.json", json.dumps({name: 777})),
            status=FAILED,
        )
        yield Case(f"merge {shown}", partial(write, "merges.txt", f"{name} {name}"))
        asked = partial(edit, "generation_config.json", {"suppress_tokens": [name] * 9, name: name})
        yield Case(f"generation setting {shown}", asked)


def _tokenizers() -> Iterator[Case]:
    replace = {"type": "Replace", "pattern": {"String": "."}, "content": "a" * 10}
    yield Case(
        "a normalizer that amplifies",
        partial(_backend, {"normalizer": {"type": "Sequence", "normalizers": [replace] * 7}}),
        status=FAILED,
    )
    for name, values in {
        "normalizer": [replace | {"pattern": {"Regex": ""}}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
        "decoder": [{"type": "Sequence", "decoders": [replace] * 6}, {"type": "Strip", "content": "x", "start": 9}],
        "pre_tokenizer": [{"type": "FixedLength", "length": 0}, {"type": "Sequence", "pretokenizers": []}],
        "model": [
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
            {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?", "continuing_subword_prefix": "##"},
            {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
            {"type": "BPE", "vocab": {"a": 0, "##b": 1}, "merges": ["a ##b"], "continuing_subword_prefix": "é"},
        ],
    }.items():  # fmt: skip
        for value in values:
            kind = value["type"]
            yield Case(
                f"{name} {kind}", partial(_backend, {name: value}), status=FAILED, says="tokenizer.json: "
            )
    ids = [True, "5", None, [5], 2**32 + 5, -1, 1.0, 2**31]
    for value in ids:
        change = partial(edit, "vocab.json", {"a": value})
        yield Case(f"vocab.json a={value}", change, status=FAILED, says="vocab.json: ")


def _contradictions() -> Iterator[Case]:
    swapped = {"bos_token": "</s>", "eos_token": "<s>", "cls_token": "</s>", "sep_token": "<s>"}
    yield Case(
        "swapped special tokens",
        partial(edit, "tokenizer_config.json", swapped),
        status=FAILED,
        says="bos_token_id",
    )
    yield Case(
        "pad_token a",
        partial(edit, "tokenizer_config.json", {"pad_token": "a"}),
        status=FAILED,
        says="pad_token",
    )
    for named in (["LEDForQuestionAnswering"], "LEDForQuestionAnswering", ["LEDForSequenceClassification"]):
        change = partial(edit, "config.json", {"architectures": named})
        yield Case(
            f"no head though {named}", change, ANSWER, status=FAILED if isinstance(named, list) else DONE
        )
    for named in ("LEDForConditionalGeneration", None, ["LEDModel"], [3], {}):
        change = partial(edit, "config.json", {"architectures": named})
        for model in ("qa", "classifier"):
            yield Case(f"summaries of {model}, {named}", change, status=FAILED, model=model)
        yield Case(f"answers of classifier, {named}", change, ANSWER, status=FAILED, model="classifier")
        yield Case(f"answers of qa, {named}", change, ANSWER, status=DONE, model="qa")
        yield Case(f"classes of qa, {named}", change, CLASSIFY, status=FAILED, model="qa")
        yield Case(f"classes, {named}", change, CLASSIFY, status=DONE, model="classifier")
    for labels in ({"0": "a", "1": "a"}, {"0": "a", "00": "b", "1": "c"}, {"0": "a", "٠": "b"}, {}):
        change = partial(edit, "config.json", {"id2label": labels})
        yield Case(f"labels {labels}", change, CLASSIFY, status=FAILED, says="id2label", model="classifier")


def _overflow() -> Iterator[Case]:
    for name in ("decoder.layers.0.fc2.weight", "decoder.embed_positions.weight"):
        change = partial(_edit_all, name, lambda t: torch.full_like(t, 1e38))
        for how in ("", " --num-beams 2", " --do-sample --top-k 5"):
            yield Case(f"{name} 1e38{how}", change, COMMAND + how, status=FAILED, says="overflow")
    yield Case("the decoder x 1e25", partial(_edit_all, "decoder.layers", lambda t: t * 1e25), status=FAILED)
    biases: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda t: t * float("nan"),
        "inf": lambda t: t + float("inf"),
        "-inf": lambda t: t - float("inf"),
    }
    for how, change in biases.items():
        yield Case(f"final_logits_bias {how}", partial(_edit_all, "final_logits_bias", change), status=FAILED)


def _put(name: str, tensor: torch.Tensor, directory: Path, *, pickled: bool = False) -> None:
    tensors = load_file(directory / "model.safetensors") | {name: tensor}
    if pickled or tensor.is_nested:
        pickle(tensors, directory)
    else:
        save_file(tensors, directory / "model.safetensors")


def _edit_all(part: str, change: Callable[[torch.Tensor], torch.Tensor], directory: Path) -> None:
    """Of all tensors in whose name ``part`` is."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: change(tensor) for name, tensor in tensors.items() if part in name}
    save_file(tensors, directory / "model.safetensors")


def _replace_weights(content: bytes, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(content)


def _script(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(directory / "pytorch_model.bin")


def _legacy(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _large_legacy(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save({"x": torch.ones(12345)}, path, _use_new_zipfile_serialization=False)
    count = b"\x8a\x07" + (2**50).to_bytes(7, "little")
    path.write_bytes(path.read_bytes().replace(b"M90", count))


def _shards(twice: bool, directory: Path) -> None:
    """Two of them, with a tensor in both, or none of a tensor that the index has."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    first, second = names[:9], names[9 - twice :]
    weight_map: dict[str, Any] = {}
    for shard, part in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({name: tensors[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    weight_map |= {} if twice else {"led.x": "a.safetensors"}
    write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}), directory)


def _remake(name: str, make: Callable[[Path], object], directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    make(directory / name)


def _memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


def _lengthen(name: str, directory: Path) -> None:
    with (directory / name).open("ab") as file:
        file.truncate(3 * 2**30)


def _backend(changes: dict[str, Any], directory: Path) -> None:
    """A tokenizer.json of the checkpoint's vocabulary, with some of its entries replaced."""
    from led_model.tokenizer import LEDTokenizer

    LEDTokenizer.from_pretrained(directory).save_pretrained(directory)
    edit("tokenizer.json", changes, directory)


def _empty_layers(count: int, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"led.encoder.layers.{i}.x": torch.empty(0) for i in range(2, count)}
    save_file(tensors, directory / "model.safetensors")
    edit("config.json", {"encoder_layers": count, "attention_window": 8}, directory)


def _many_tensors(count: int, directory: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"led.{i}": empty for i in range(count)}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _long_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("wb") as file:
        file.write((4 * 2**30).to_bytes(8, "little"))
        file.truncate(5 * 2**30)


def _many_entries(count: int, directory: Path) -> None:
    """A directory of a zip archive that says one small entry again and again."""
    pickle({"x": torch.ones(1)}, directory)
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    content = path.read_bytes()
    entry = content[start : content.index(b"PK\x01\x02", start + 4)]
    end = b"PK\x05\x06" + bytes(4) + min(count, 0xFFFF).to_bytes(2, "little") * 2
    end += (len(entry) * count).to_bytes(4, "little") + start.to_bytes(4, "little") + bytes(2)
    path.write_bytes(content[:start] + entry * count + end)


def _long_directory(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with (directory / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(3 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(
            b"PK\x05\x06" + bytes(4) + b"\1\0\1\0" + (3 * 2**30 - 8).to_bytes(4, "little") + b"\4" + bytes(5)
        )


def _one_storage(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    wide = torch.zeros(2**21)
    model = {f"led.encoder.layers.{i}.fc1.weight": wide.view(2**10, 2**11) for i in range(200)}
    pickle(tensors | model, directory)


def _deflated(directory: Path) -> None:
    pickle(load_file(directory / "model.safetensors") | {"x": torch.zeros(2**18)}, directory)
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
