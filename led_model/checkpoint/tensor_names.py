"""Translates the names of a checkpoint's tensors, and checks which of them a config wants and what does not fit.

:func:`hf_names` is the one place that knows what our parameters are called in a checkpoint; reading and
:func:`to_hf_state_dict` both follow it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from led_model.config import LEDConfig
from led_model.schema import printable

EMBEDDINGS = (
    "led.shared.weight",
    "led.encoder.embed_tokens.weight",
    "led.decoder.embed_tokens.weight",
    "lm_head.weight",
)
ARCHITECTURE_OF = {  # these are transformers' classes by the names of their heads
    "qa_outputs": "LEDForQuestionAnswering",
    "classification_head": "LEDForSequenceClassification",
}
_HEADS = ("lm_head.", "final_logits_bias", "qa_outputs.", "classification_head.")
_ENCODER_ATTENTION = re.compile(r"((?:led\.)?encoder\.layers\.\d+\.self_attn)\.(qkv|\w+_global)\.(\w+)")
_FIRST_LAYER = re.compile(r"(?:led\.)?(encoder|decoder)\.layers\.0\.")
_DECODER_QKV = re.compile(r"((?:led\.)?decoder\.layers\.\d+\.self_attn)\.qkv\.(\w+)")


def hf_names(name: str) -> list[str]:
    """Returns the tensors of a Hugging Face checkpoint that, stacked along dimension 0, are our tensor ``name``."""
    if match := _ENCODER_ATTENTION.fullmatch(name):
        layer, module, kind = match.groups()
        modules = ("query", "key", "value") if module == "qkv" else (module,)
        return [f"{layer}.longformer_self_attn.{m}.{kind}" for m in modules]
    if match := _DECODER_QKV.fullmatch(name):
        layer, kind = match.groups()
        return [f"{layer}.{m}.{kind}" for m in ("q_proj", "k_proj", "v_proj")]
    return [name]


def to_hf_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns our state dict under Hugging Face's names, with views of the parts of fused projections."""
    renamed = {}
    for name, tensor in state_dict.items():
        parts = hf_names(name)
        renamed.update(zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True))
    return renamed


def named_as_head_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by the names of a model with a head; a bare LEDModel's checkpoint lacks their prefix."""
    bare = not any(name.startswith("led.") for name in tensors)
    return {f"led.{name}": tensor for name, tensor in tensors.items()} if bare else dict(tensors)


def check_size(config: LEDConfig, tensors: Mapping[str, Tensor], source: object) -> None:
    """Checks that config.json describes a model as large as the weights, before a model of that size is built.

    Raises:
        ValueError: when it does not.
    """
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
    for name, rows in positions.items() | dict.fromkeys(EMBEDDINGS, config.vocab_size).items():
        shape = (rows, config.d_model)
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"has {name} {tuple(tensors[name].shape)} instead of {shape}")
    _raise_misfit(problems, source)


def fill_embeddings(tensors: dict[str, Tensor], tied: bool, source: object) -> None:
    """Gives all four embeddings their table, as checkpoints keep any one of those that are tied, or all of them.

    Raises:
        ValueError: when tied tables differ.
    """
    if not tied:  # the head alone is sure to be apart: before version 5 transformers always shared the others
        for name in EMBEDDINGS[1:3]:
            if name not in tensors and EMBEDDINGS[0] in tensors:
                tensors[name] = tensors[EMBEDDINGS[0]]
        return
    present = [name for name in EMBEDDINGS if name in tensors]
    for name in present[1:]:
        if not _are_same(tensors[name], tensors[present[0]]):
            raise ValueError(
                f"config.json of {source} ties {name} to {present[0]} but they differ; "
                "set tie_word_embeddings to false in it, or drop one."
            )
    if present:
        finest = max((tensors[name] for name in present), key=lambda tensor: tensor.dtype.itemsize)
        tensors.update(dict.fromkeys(EMBEDDINGS, finest))


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tables are the same, up to rounding one to the dtype of the other."""
    coarse = min(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.allclose(a.to(coarse), b.to(coarse), rtol=0, atol=0, equal_nan=True)


def without_other_heads(
    tensors: Mapping[str, Tensor], expected: Iterable[str], prefix: str
) -> dict[str, Tensor]:
    """Returns the tensors without heads that the model lacks, by its own names: a base model's have no ``led.``."""
    own = tuple(head for head in _HEADS if any(name.startswith(head) for name in expected))
    foreign = tuple(head for head in _HEADS if head not in own)
    return {
        name if prefix else name.removeprefix("led."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(foreign)
    }


def missing_heads(expected: Iterable[str], tensors: Iterable[str]) -> tuple[str, ...]:
    """Returns the heads that the model has and of which a checkpoint has no tensor."""
    names = list(tensors)
    return tuple(
        head
        for head in (f"{name}." for name in ARCHITECTURE_OF)
        if any(name.startswith(head) for name in expected)
        and not any(name.startswith(head) for name in names)
    )


def expected_shapes(model_class: type[nn.Module], config: LEDConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors that ``model_class`` has, by Hugging Face's names.

    They are read off a model of one layer a side, as the config may claim any number.
    """
    with torch.device("meta"):
        model = model_class(replace(config, encoder_layers=1, decoder_layers=1, attention_window=2))
    shapes = {}
    # Unlike the state dict, they have all names of tied tensors.
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        parts = hf_names(name)
        shape = (tensor.shape[0] // len(parts), *tensor.shape[1:])
        layer = _FIRST_LAYER.match(name)
        count = 1 if layer is None else getattr(config, f"{layer[1]}_layers")
        for part in parts:
            shapes |= {_of_layer(part, number): shape for number in range(count)}
    return shapes


def _of_layer(name: str, number: int) -> str:
    return name.replace(".layers.0.", f".layers.{number}.")


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: object
) -> None:
    """Checks that there are all tensors that are expected and no others, each of its shape.

    Raises:
        ValueError: naming those that do not fit.
    """
    _raise_misfit(_misfits(expected, tensors), source)


def check_state_dict(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], tied: bool
) -> None:
    """Checks a model's state dict as :func:`check_tensors` does a file; it may leave out what loading fills in.

    Raises:
        ValueError: naming the tensors that do not fit.
    """
    filled_in = EMBEDDINGS[1:] if tied else EMBEDDINGS[1:3]  # see fill_embeddings
    optional = {name.removeprefix(prefix) for name in filled_in for prefix in ("", "led.")}
    wanted = {name: shape for name, shape in expected.items() if name in tensors or name not in optional}
    if problems := _misfits(wanted, tensors):
        raise ValueError(
            f"state_dict {' and '.join(problems)}; give what led_kernels.distributed.full_state_dict returns for "
            "the model, or its state_dict()."
        )


def _misfits(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns what is missing among the tensors, or not expected, or of another shape than expected."""
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"lacks {_listed(missing)}")
    if extra := tensors.keys() - expected.keys():
        problems.append(f"has unexpected {_listed(extra)}")
    shapes = {name: tuple(tensors[name].shape) for name in expected.keys() & tensors.keys()}
    if misshapen := [f"{n} {shapes[n]} instead of {expected[n]}" for n in shapes if shapes[n] != expected[n]]:
        problems.append(f"has {_listed(misshapen)}")
    return problems


def _raise_misfit(problems: Sequence[str], source: object) -> None:
    if problems:
        raise ValueError(
            f"the weights of {source} do not fit its config.json: the file {' and '.join(problems)}; "
            "use the config.json that was saved with the weights."
        )


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more
