"""Reads and writes Hugging Face checkpoints: finds files, maps tensor names, and names what does not fit.

:func:`hf_names` is the one place that knows what our parameters are called in a checkpoint; reading and
:func:`to_hf_state_dict` both follow it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from led_model.config import GenerationConfig, LEDConfig, read_json
from led_model.quantization import Quantize, quantizable_linears

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_EMBEDDINGS = (
    "led.shared.weight",
    "led.encoder.embed_tokens.weight",
    "led.decoder.embed_tokens.weight",
    "lm_head.weight",
)
_HEADS = ("lm_head.", "final_logits_bias", "qa_outputs.", "classification_head.")
_ENCODER_ATTENTION = re.compile(r"((?:led\.)?encoder\.layers\.\d+\.self_attn)\.(qkv|\w+_global)\.(\w+)")
_DECODER_QKV = re.compile(r"((?:led\.)?decoder\.layers\.\d+\.self_attn)\.qkv\.(\w+)")

Model = TypeVar("Model", bound=nn.Module)
Fetch = Callable[[str], Path | None]  # a file of the checkpoint by name, None when it has no such file


def hf_names(name: str) -> list[str]:
    """The tensors of a Hugging Face checkpoint that, stacked along dimension 0, are our tensor ``name``."""
    if match := _ENCODER_ATTENTION.fullmatch(name):
        layer, module, kind = match.groups()
        modules = ("query", "key", "value") if module == "qkv" else (module,)
        return [f"{layer}.longformer_self_attn.{m}.{kind}" for m in modules]
    if match := _DECODER_QKV.fullmatch(name):
        layer, kind = match.groups()
        return [f"{layer}.{m}.{kind}" for m in ("q_proj", "k_proj", "v_proj")]
    return [name]


def to_hf_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names, fused projections as views of their parts."""
    renamed = {}
    for name, tensor in state_dict.items():
        parts = hf_names(name)
        renamed.update(zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True))
    return renamed


def load_pretrained(
    model_class: type[Model],
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    quantize: Quantize | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """Builds ``model_class`` from a checkpoint; see ``LEDPreTrainedModel.from_pretrained``."""
    fetch = checkpoint_files(path_or_id, revision)
    stored = read_json(_required(fetch, "config.json", path_or_id))
    if settings and "num_labels" in settings:
        stored.pop("id2label", None)
    stored |= settings or {}
    config = LEDConfig.from_dict(stored)
    tensors = _named_as_head_model(_read_tensors(fetch, path_or_id))
    _fill_embeddings(tensors, config.tie_word_embeddings, path_or_id)
    tensors.setdefault("final_logits_bias", torch.zeros(1, config.vocab_size))

    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    tensors = _without_other_heads(tensors, expected, model.base_prefix)
    new_heads = _missing_heads(expected, tensors)
    _check_tensors({n: t for n, t in expected.items() if not n.startswith(new_heads)}, tensors, path_or_id)
    model.to(dtype or tensors[f"{model.base_prefix}shared.weight"].dtype)
    to_quantize = quantizable_linears(model) if quantize else {}
    for module in set(model.modules()).difference(to_quantize.values()):
        module.to_empty(device=device, recurse=False)
    model.tie_weights()
    _copy_into(model.state_dict(), tensors)
    while to_quantize:  # one by one: never are all there in full precision
        name, linear = to_quantize.popitem()
        linear.to_empty(device=device)
        _copy_into(linear.state_dict(prefix=f"{name}."), tensors)
        model.set_submodule(name, quantize(linear))
    model.is_quantized = quantize is not None
    for head in new_heads:
        model.init_weights(model.get_submodule(head.removesuffix(".")))
        warnings.warn(
            f"{path_or_id} has no {head.removesuffix('.')}: it starts out random; train it.", stacklevel=3
        )

    if hasattr(model, "generation_config"):
        generation_file = fetch("generation_config.json")
        overrides = read_json(generation_file) if generation_file is not None else {}
        stored |= {key: value for key, value in overrides.items() if value is not None}
        model.generation_config = GenerationConfig.from_dict(vars(config) | stored)
    return model.eval()


def _copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Fills our own ``targets``, of which those on the meta device have no memory yet."""
    for name, target in to_hf_state_dict(targets).items():
        if name in tensors and not target.is_meta:
            target.copy_(tensors[name])  # into views of the fused projections: no second copy of the weights


def save_pretrained(model: nn.Module, directory: Path) -> None:
    """Writes ``model``; see ``LEDPreTrainedModel.save_pretrained``."""
    if model.is_quantized:
        raise ValueError(
            "the model's weights are quantised and cannot be saved; save it before, and quantise on loading."
        )
    config, prefix = model.config, model.base_prefix
    tensors = to_hf_state_dict(model.state_dict())
    shared = tensors[f"{prefix}shared.weight"]
    if config.tie_word_embeddings:
        for name in (n.removeprefix("led.") if not prefix else n for n in _EMBEDDINGS[1:]):
            tied = tensors.pop(name, shared)
            if tied.data_ptr() != shared.data_ptr() and not torch.equal(tied, shared):
                raise ValueError(
                    f"the config ties {name} to {prefix}shared.weight but they differ; call tie_weights() or "
                    "set config.tie_word_embeddings to False."
                )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    about = {"architectures": [type(model).__name__], "dtype": str(shared.dtype).removeprefix("torch.")}
    _write_json(directory / "config.json", config.to_dict() | about)
    if hasattr(model, "generation_config"):
        settings = {"bos_token_id": config.bos_token_id} | vars(model.generation_config)
        settings |= settings.pop("unsupported")
        settings = {key: value for key, value in settings.items() if value is not None and key != "seed"}
        _write_json(directory / "generation_config.json", settings)


def checkpoint_files(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Fetch:
    """A function from a file's name to its path: in a directory, or downloaded from the hub.

    Raises:
        FileNotFoundError: when ``path_or_id`` is neither a directory nor of the form ``owner/name``.
    """
    directory = Path(path_or_id)
    if directory.is_dir():
        return lambda name: path if (path := directory / name).is_file() else None
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path_or_id)) or directory.exists():
        raise FileNotFoundError(f"{path_or_id} is no directory; give one with a config.json, or a hub id.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"{path_or_id} is no directory, and fetching it from the hub needs huggingface_hub: "
            "pip install 'led-kernels[text]'."
        ) from None

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(str(path_or_id), name, revision=revision))
        except LocalEntryNotFoundError as error:  # no network and not in the cache
            raise FileNotFoundError(
                f"{path_or_id} is no directory, and {name} could not be fetched from the hub "
                f"({_first_line(error)}); check the path or the network."
            ) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise FileNotFoundError(
                f"{path_or_id} is no directory, and the hub refused {name} ({_first_line(error)}); "
                "check the name."
            ) from None

    return fetch


def _required(fetch: Fetch, name: str, source: object) -> Path:
    path = fetch(name)
    if path is None:
        raise FileNotFoundError(f"{source} holds no {name}; give a complete checkpoint.")
    return path


def _read_tensors(fetch: Fetch, source: object) -> dict[str, Tensor]:
    for name in _WEIGHT_FILES:
        path = fetch(name)
        if path is None:
            continue
        if not name.endswith(".index.json"):
            return _read_file(path)
        shards = sorted(set(read_json(path).get("weight_map", {}).values()))
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{path} names a shard outside its directory, {shard!r}; fetch it again.")
            tensors.update(_read_file(_required(fetch, shard, source)))
        return tensors
    raise FileNotFoundError(f"{source} holds no weights; it needs one of {', '.join(_WEIGHT_FILES)}.")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} holds no readable weights ({_first_line(error)}); fetch it again."
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds no plain dict of tensors; save the model's state_dict.")
    return tensors


def _named_as_head_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bare LEDModel's checkpoint has the same tensors without the prefix."""
    bare = not any(name.startswith("led.") for name in tensors)
    return {f"led.{name}": tensor for name, tensor in tensors.items()} if bare else dict(tensors)


def _fill_embeddings(tensors: dict[str, Tensor], tied: bool, source: object) -> None:
    """Gives all four names their table: checkpoints keep any one of those that are tied, or all of them."""
    if not tied:  # only the head is sure to be apart; before version 5, transformers always shared the others
        for name in _EMBEDDINGS[1:3]:
            if name not in tensors and _EMBEDDINGS[0] in tensors:
                tensors[name] = tensors[_EMBEDDINGS[0]]
        return
    present = [name for name in _EMBEDDINGS if name in tensors]
    for name in present[1:]:
        if not torch.equal(tensors[name], tensors[present[0]]):
            raise ValueError(
                f"config.json of {source} ties {name} to {present[0]} but they differ; "
                "set tie_word_embeddings to false in it, or drop one."
            )
    for name in _EMBEDDINGS if present else ():
        tensors[name] = tensors[present[0]]


def _without_other_heads(
    tensors: Mapping[str, Tensor], expected: Iterable[str], prefix: str
) -> dict[str, Tensor]:
    """The tensors, named from a base model's view if it is one, without heads that the model does not have."""
    own = tuple(head for head in _HEADS if any(name.startswith(head) for name in expected))
    foreign = tuple(head for head in _HEADS if head not in own)
    return {
        name if prefix else name.removeprefix("led."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(foreign)
    }


def _missing_heads(expected: Iterable[str], tensors: Iterable[str]) -> tuple[str, ...]:
    """Heads to be trained of which a checkpoint has nothing."""
    names = list(tensors)
    return tuple(
        head
        for head in ("qa_outputs.", "classification_head.")
        if any(name.startswith(head) for name in expected)
        and not any(name.startswith(head) for name in names)
    )


def _check_tensors(ours: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    expected = {}
    for name, tensor in ours.items():
        parts = hf_names(name)
        expected.update({part: (tensor.shape[0] // len(parts), *tensor.shape[1:]) for part in parts})
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"lacks {_listed(missing)}")
    if extra := tensors.keys() - expected.keys():
        problems.append(f"has unexpected {_listed(extra)}")
    shapes = {name: tuple(tensors[name].shape) for name in expected.keys() & tensors.keys()}
    if misshapen := [f"{n} {shapes[n]} instead of {expected[n]}" for n in shapes if shapes[n] != expected[n]]:
        problems.append(f"has {_listed(misshapen)}")
    if problems:
        raise ValueError(
            f"the weights of {source} do not fit its config.json: the file {' and '.join(problems)}; "
            "use the config.json that was saved with the weights."
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
