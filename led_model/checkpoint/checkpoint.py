"""Reads and writes Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from led_kernels.processes import is_dtensor
from led_model.checkpoint.files import read_json
from led_model.checkpoint.hub import Fetch, checkpoint_files
from led_model.checkpoint.quantization import Quantize, quantizable_linears
from led_model.checkpoint.stored_model import StoredModel
from led_model.checkpoint.tensor_names import (
    ARCHITECTURE_OF,
    EMBEDDINGS,
    check_size,
    check_state_dict,
    check_tensors,
    expected_shapes,
    fill_embeddings,
    missing_heads,
    named_as_head_model,
    to_hf_state_dict,
    without_other_heads,
)
from led_model.checkpoint.weight_formats import write_file
from led_model.checkpoint.weights import read_tensors, required, tensor_names
from led_model.config import LEDConfig
from led_model.generation.generation_config import GenerationConfig

Model = TypeVar("Model", bound=StoredModel)


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
    config, stored = read_config(fetch, path_or_id, settings)
    tensors = named_as_head_model(read_tensors(fetch, path_or_id))
    check_size(config, tensors, path_or_id)
    fill_embeddings(tensors, config.tie_word_embeddings, path_or_id)
    tensors.setdefault("final_logits_bias", torch.zeros(1, 1).expand(1, config.vocab_size))

    expected = expected_shapes(model_class, config)
    tensors = without_other_heads(tensors, expected, model_class.base_prefix)
    new_heads = missing_heads(expected, tensors)
    check_tensors(
        {n: shape for n, shape in expected.items() if not n.startswith(new_heads)}, tensors, path_or_id
    )

    with torch.device("meta"):
        model = model_class(config)
    model.to(dtype or most_common_dtype(tensors.values()))
    to_quantize = quantizable_linears(model) if quantize else {}
    for module in set(model.modules()).difference(to_quantize.values()):
        module.to_empty(device=device, recurse=False)
    model.tie_weights()
    with errors_about(f"the weights of {path_or_id}"):
        _copy_into(model.state_dict(), tensors)
        if quantize is not None:
            while to_quantize:  # it is done one by one, so that not all are there in full precision
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
        model.generation_config = _generation_config(fetch, path_or_id, config, stored)
        if model.generation_config.unsupported:
            warnings.warn(
                f"{path_or_id} asks for {model.generation_config.describe_unsupported()}; generate decodes without it.",
                stacklevel=3,
            )
    return model.eval()


def read_config(
    fetch: Fetch, source: str | os.PathLike[str], settings: Mapping[str, Any] | None = None
) -> tuple[LEDConfig, dict[str, Any]]:
    """Returns the config of config.json with ``settings`` in place of its own, and all values of the file.

    Raises:
        FileNotFoundError, ValueError: when it is not there or has no meaning.
    """
    stored = read_json(required(fetch, "config.json", source))
    if settings and "num_labels" in settings and "id2label" not in settings:
        stored.pop("id2label", None)
    stored |= settings or {}
    with errors_about(f"config.json of {source}"):
        return LEDConfig.from_dict(stored), stored


def _generation_config(
    fetch: Fetch, source: str | os.PathLike[str], config: LEDConfig, stored: dict[str, Any]
) -> GenerationConfig:
    """Returns the settings of generation_config.json, and of config.json those that the former lacks."""
    path = fetch("generation_config.json")
    own = read_json(path) if path is not None else {}
    with errors_about(f"generation_config.json of {source}"):
        GenerationConfig.from_dict(vars(config) | own).check_ids(config.vocab_size)
    own = {key: value for key, value in own.items() if value is not None}
    with errors_about(f"config.json of {source}"):
        generation = GenerationConfig.from_dict(vars(config) | stored | own, own)
        generation.check_ids(config.vocab_size)
    return generation


def trained_head(path_or_id: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Returns which head the checkpoint's weights have, "qa_outputs" or "classification_head".

    It is ``None`` for a checkpoint that writes.

    Raises:
        ValueError: when its config.json says that there is one and there is none.
    """
    fetch = checkpoint_files(path_or_id, revision)
    names = tensor_names(fetch, path_or_id)
    for head in ARCHITECTURE_OF:
        if any(name.startswith(f"{head}.") for name in names):
            return head
    stated = read_json(required(fetch, "config.json", path_or_id)).get("architectures")
    for head, architecture in ARCHITECTURE_OF.items():
        if isinstance(stated, list) and architecture in stated:
            raise ValueError(
                f"config.json of {path_or_id} says that it is of {architecture}, but its weights have no {head}; give "
                "a checkpoint that was trained with one."
            )
    return None


def _copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Fills our own ``targets`` from a checkpoint's ``tensors``, except those on the meta device."""
    for name, target in to_hf_state_dict(targets).items():
        if name in tensors and not target.is_meta:
            source = tensors[name]
            target.copy_(source)  # the targets are views of the fused projections
            is_narrower = torch.finfo(target.dtype).max < torch.finfo(source.dtype).max
            if is_narrower and bool((target.isinf().to(source.device) & source.isfinite()).any()):
                raise ValueError(
                    f"{name} holds numbers up to {source[source.isfinite()].abs().max():g}, which {target.dtype} does "
                    f"not reach; load it as {source.dtype}."
                )


def most_common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the dtype of most numbers, as norms or the head may have been kept in another."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def save_pretrained(
    model: StoredModel, directory: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes ``model``'s checkpoint; see ``LEDPreTrainedModel.save_pretrained``."""
    if model.is_quantized:
        raise ValueError(
            "the model's weights are quantized and cannot be saved; save it before, and quantize on loading."
        )
    config, prefix = model.config, model.base_prefix
    weights = model.state_dict() if state_dict is None else state_dict
    _check_whole(weights)
    tensors = to_hf_state_dict(weights)
    if state_dict is not None:
        check_state_dict(expected_shapes(type(model), config), tensors, config.tie_word_embeddings)
    shared = tensors[f"{prefix}shared.weight"]
    if config.tie_word_embeddings:
        for name in (n.removeprefix("led.") if not prefix else n for n in EMBEDDINGS[1:]):
            tied = tensors.pop(name, shared)
            if tied.data_ptr() != shared.data_ptr() and not torch.equal(tied, shared):
                raise ValueError(
                    f"the config ties {name} to {prefix}shared.weight but they differ; call tie_weights() or "
                    "set config.tie_word_embeddings to False."
                )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(tensors, directory / "model.safetensors")
    about = {"architectures": [type(model).__name__], "dtype": str(shared.dtype).removeprefix("torch.")}
    write_json(directory / "config.json", config.to_dict() | about)
    if hasattr(model, "generation_config"):
        settings: dict[str, Any] = dict(vars(model.generation_config))
        settings |= settings.pop("unsupported")
        settings = {key: value for key, value in settings.items() if value is not None and key != "seed"}
        if config.bos_token_id is not None:
            settings.setdefault("bos_token_id", config.bos_token_id)
        write_json(directory / "generation_config.json", settings)


def _check_whole(state_dict: Mapping[str, Tensor]) -> None:
    """Checks that no process has but a part of a tensor.

    Raises:
        ValueError: when one does.
    """
    if sharded := next((name for name, tensor in state_dict.items() if is_dtensor(tensor)), None):
        raise ValueError(
            f"{sharded} is sharded over several processes; let all of them call "
            "led_kernels.distributed.full_state_dict(model), and one of them save with state_dict= what it returns."
        )


@contextmanager
def errors_about(what: str) -> Generator[None, None, None]:
    """Puts ``what`` before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file as transformers writes its config.json."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
