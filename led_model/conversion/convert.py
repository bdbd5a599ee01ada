"""Reads a checkpoint, converts it and writes the result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from led_kernels.positions import check_num_positions
from led_model.checkpoint.checkpoint import most_common_dtype, write_json
from led_model.checkpoint.files import read_json
from led_model.checkpoint.hub import Fetch, checkpoint_files
from led_model.checkpoint.weight_formats import write_file
from led_model.checkpoint.weights import read_tensors, required
from led_model.conversion.converted import Converted, Reach, Request
from led_model.conversion.led import led_from_bart, longer_led
from led_model.conversion.longformer import longer_longformer, longformer_from_bert
from led_model.conversion.new_directory import check_output, new_directory
from led_model.conversion.tokenizer_files import TOKENIZER_FILES, carry_tokenizer, sep_token_id
from led_model.schema import EVEN, quoted

CONVERTIBLE = ("bart", "led", "roberta", "xlm-roberta", "camembert", "bert", "longformer")
_OWN_FILES = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER_FILES)
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # counters that old checkpoints hold
_REASONS = {
    "albert": "its layers share one set of weights, and Longformer's do not",
    "blenderbot": "its norms stand before attention, and LED's stand after it",
    "deberta": "its positions are relative, and Longformer's are absolute",
    "deberta-v2": "its positions are relative, and Longformer's are absolute",
    "distilbert": "it has no token types and other layers than Longformer",
    "electra": "its embeddings may have another width than its layers",
    "m2m_100": "its norms stand before attention, and LED's stand after it",
    "marian": "its positions are computed, and LED's are a table",
    "mbart": "its norms stand before attention, and LED's stand after it",
    "pegasus": "its norms stand before attention, and LED's stand after it",
    "roberta-prelayernorm": "its norms stand before attention, and Longformer's stand after it",
    "t5": "its positions are relative, and LED's are absolute",
}


@dataclass
class Conversion:
    """Says what was written.

    Args:
        architecture: transformers' class of the model.
        reach: how many tokens a text may have, and up to how many it gives what the source gives.
        num_bytes: the size of the weights.
        has_tokenizer: whether the source had one.
        notes: a sentence on each thing that the source has and the result has not.
    """

    architecture: str
    reach: Reach
    num_bytes: int
    has_tokenizer: bool
    notes: list[str]


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_positions: int | None = None,
    max_decoder_positions: int | None = None,
    attention_window: int | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes a checkpoint that reads long texts, made of one that reads short ones.

    BART becomes LED; RoBERTa, XLM-RoBERTa, CamemBERT and BERT become Longformer, with the head that they have; an LED
    or a Longformer stays what it is. Attention over bands as wide as a text, and global attention by projections that
    start as copies of the local ones, compute what the source computes. Positions that the source lacks are copies of
    its own, repeated; it takes training on long texts for them to mean something.

    Args:
        source: directory with config.json and weights, or hub id.
        output: directory to make. Nothing is there before all is written.
        max_positions: how many tokens a text may have; default: for a source without bands 16,384 for LED and 4,096 for
            Longformer, else as many as now.
        max_decoder_positions: how many tokens LED's decoder may write; default: as many as the source's.
        attention_window: the even total width of the bands; default: what the source has, else as many tokens as it
            has positions.
        dtype: of the weights; default: as they are.
        revision: branch, tag or commit on the hub.
        overwrite: replace a checkpoint at ``output``.

    Raises:
        FileNotFoundError: when a file is not there.
        OSError: when one cannot be read or written.
        ValueError: for a source of another kind or with settings that the result cannot compute, for weights that do
            not fit their config, and for an ``output`` that holds anything else.
    """
    request = Request(max_positions, max_decoder_positions, attention_window)
    for name in ("max_positions", "max_decoder_positions"):
        if getattr(request, name) is not None:
            check_num_positions(name, getattr(request, name))
    if attention_window is not None and not EVEN.accepts(attention_window):
        raise ValueError(f"attention_window is {attention_window}; give a positive even number.")
    output = Path(output)
    check_output(output, overwrite, _OWN_FILES)
    fetch = checkpoint_files(source, revision)
    if Path(source).is_dir() and output.exists() and output.samefile(source):
        raise ValueError(f"--output {output} is the source; name another directory.")
    stored = read_json(required(fetch, "config.json", source))
    converted = _convert(fetch, stored, request, source)
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in converted.tensors.items()}
    for name, tensor in _sharing(tensors):
        tensors[name] = tensor.clone()  # a file of safetensors holds no number twice
    converted.config["dtype"] = str(most_common_dtype(tensors.values())).removeprefix("torch.")

    with new_directory(output) as directory:
        write_file(tensors, directory / "model.safetensors")
        write_json(directory / "config.json", converted.config)
        if (path := fetch("generation_config.json")) is not None:
            shutil.copyfile(path, directory / path.name)
        longest = converted.reach.positions
        has_tokenizer = carry_tokenizer(fetch, directory, stored["model_type"], longest)
    return Conversion(
        architecture=converted.config["architectures"][0],
        reach=converted.reach,
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        has_tokenizer=has_tokenizer,
        notes=converted.notes,
    )


def _convert(
    fetch: Fetch, stored: Mapping[str, Any], request: Request, source: str | os.PathLike[str]
) -> Converted:
    """Returns the converted checkpoint of the files that ``fetch`` finds, of the config.json ``stored``."""
    model_type = stored.get("model_type")
    if model_type not in CONVERTIBLE:
        reason = _REASONS.get(str(model_type))
        raise ValueError(
            f"{source} cannot be converted: model_type in its config.json is {quoted(model_type)}"
            + (f", and {reason}." if reason else f"; give one of {', '.join(CONVERTIBLE)}.")
        )
    is_led = model_type in ("bart", "led")
    if request.max_decoder_positions is not None and not is_led:
        raise ValueError(f"max_decoder_positions is for LED, and {model_type} has no decoder; leave it out.")
    tensors = read_tensors(fetch, source, _BUFFERS)
    if is_led:
        return (led_from_bart if model_type == "bart" else longer_led)(stored, tensors, request, source)
    if model_type == "longformer":
        return longer_longformer(stored, tensors, request, source)
    if model_type == "bert":
        separator = sep_token_id(fetch)
    else:
        ends = stored.get("eos_token_id", 2)
        separator = ends[0] if isinstance(ends, list) and ends else ends
    return longformer_from_bert(stored, tensors, request, source, separator)


def _sharing(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Returns the tensors that begin where another one before them does, as untied embeddings do in old checkpoints."""
    first: dict[int, str] = {}
    return [item for item in tensors.items() if first.setdefault(item[1].data_ptr(), item[0]) != item[0]]


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns a tensor as it goes into a file.

    Raises:
        ValueError: when ``dtype`` does not reach its numbers.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor.contiguous()
    cast = tensor.to(dtype)
    if bool((cast.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max()
        raise ValueError(
            f"{name} holds numbers up to {largest:g}, which {dtype} does not reach; give another --dtype."
        )
    return cast.contiguous()
