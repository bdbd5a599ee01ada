"""Reads and writes Hugging Face checkpoints: finds files, maps tensor names, and names what does not fit.

:func:`hf_names` is the one place that knows what our parameters are called in a checkpoint; reading and
:func:`to_hf_state_dict` both follow it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from led_model.config import LEDConfig
from led_model.files import read_json
from led_model.generation_config import GenerationConfig
from led_model.hub import checkpoint_files
from led_model.quantization import Quantize, quantizable_linears
from led_model.weights import read_tensors, required

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
    hub_options: Mapping[str, Any] | None = None,
) -> Model:
    """Builds ``model_class`` from a checkpoint; see ``LEDPreTrainedModel.from_pretrained``."""
    fetch = checkpoint_files(path_or_id, revision, hub_options)
    stored = read_json(required(fetch, "config.json", path_or_id))
    if settings and "num_labels" in settings and "id2label" not in settings:
        stored.pop("id2label", None)
    stored |= settings or {}
    with _said_of(f"config.json of {path_or_id}"):
        config = LEDConfig.from_dict(stored)
    tensors = _named_as_head_model(read_tensors(fetch, path_or_id))
    _check_size(config, tensors, path_or_id)
    _fill_embeddings(tensors, config.tie_word_embeddings, path_or_id)
    tensors.setdefault("final_logits_bias", torch.zeros(1, 1).expand(1, config.vocab_size))

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
        with _said_of(f"generation settings of {path_or_id}"):
            model.generation_config = GenerationConfig.from_dict(vars(config) | stored)
            model.generation_config.check_ids(config.vocab_size)
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


def _named_as_head_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bare LEDModel's checkpoint has the same tensors without the prefix."""
    bare = not any(name.startswith("led.") for name in tensors)
    return {f"led.{name}": tensor for name, tensor in tensors.items()} if bare else dict(tensors)


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _check_size(config: LEDConfig, tensors: Mapping[str, Tensor], source: object) -> None:
    """Whether config.json is of a model as large as the weights: asked before one of its size is built."""
    problems = []
    for side in ("encoder", "decoder"):
        layers = {m[1] for name in tensors if (m := re.match(rf"led\.{side}\.layers\.(\d+)\.", name))}
        wanted = getattr(config, f"{side}_layers")
        if len(layers) < wanted:
            problems.append(f"has {len(layers)} {side} layers instead of {wanted}")
    positions = {
        f"led.{side}.embed_positions.weight": getattr(config, f"max_{side}_position_embeddings")
        for side in ("encoder", "decoder")
    }
    for name, rows in positions.items() | dict.fromkeys(_EMBEDDINGS, config.vocab_size).items():
        shape = (rows, config.d_model)
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"has {name} {tuple(tensors[name].shape)} instead of {shape}")
    _raise_misfit(problems, source)


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
    _raise_misfit(problems, source)


def _raise_misfit(problems: Sequence[str], source: object) -> None:
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
