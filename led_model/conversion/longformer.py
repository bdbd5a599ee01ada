"""Makes a Longformer of a RoBERTa or a BERT, or of a Longformer with fewer positions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from led_kernels.positions import with_positions
from led_model.checkpoint.tensor_names import check_tensors
from led_model.conversion.converted import PROVENANCE, Converted, Request, check_flags, reach_of
from led_model.conversion.longformer_layout import (
    BASE,
    TIED_DECODER,
    expected_tensors,
    head_of,
    longformer_config,
)
from led_model.schema import printable

_LONGFORMER_POSITIONS = 4096  # as allenai/longformer-base-4096 has
_REFUSED = {
    "position_embedding_type": ("absolute", "and Longformer's positions are absolute"),
    "is_decoder": (False, "and Longformer is an encoder"),
    "add_cross_attention": (False, "and Longformer has no cross-attention"),
}
_PREFIX = re.compile(r"^(roberta|bert|longformer)\.")
_POSITIONS = f"{BASE}embeddings.position_embeddings.weight"
_WORDS = f"{BASE}embeddings.word_embeddings.weight"
_PROJECTION = re.compile(r"(.+\.attention\.self\.(?:query|key|value))\.(weight|bias)")
# These are parts of names that BERT's checkpoints, and the first ones of all, have instead of Longformer's.
_RENAMED = (
    (re.compile(r"\bLayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"\bLayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"^cls\.predictions\.transform\.dense\."), "lm_head.dense."),
    (re.compile(r"^cls\.predictions\.transform\.LayerNorm\."), "lm_head.layer_norm."),
    (re.compile(r"^cls\.predictions\."), "lm_head."),
)


def longformer_from_bert(
    stored: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    request: Request,
    source: object,
    sep_token_id: int | None,
) -> Converted:
    """Returns the Longformer that computes what a BERT or a RoBERTa computes on texts that its window covers.

    Longformer counts the positions of tokens that are no padding, from ``pad_token_id + 1`` on, as RoBERTa does. BERT
    counts all tokens, from 0 on: its table gets rows of padding before its own, and the two agree on texts that are
    padded to the right.

    Args:
        stored: the contents of config.json.
        tensors: its tensors, by their names there.
        sep_token_id: what Longformer's question answering finds the question by.

    Raises:
        ValueError: for a model that Longformer cannot compute, and weights that do not fit the config.
    """
    check_flags(stored, _REFUSED, source)
    config = longformer_config(stored, source) | {"sep_token_id": sep_token_id}
    named, notes = _named_as_longformer(tensors)
    for name, tensor in list(named.items()):
        if match := _PROJECTION.fullmatch(name):
            named[f"{match[1]}_global.{match[2]}"] = tensor
    if stored["model_type"] == "bert":
        head = head_of(named, stored.get("architectures"), source)
        if (
            head == "ForSequenceClassification"
        ):  # BERT's classifier begins with the pooler, Longformer's with a layer
            for old, new in (
                (f"{BASE}pooler.dense", "classifier.dense"),
                ("classifier", "classifier.out_proj"),
            ):
                for kind in ("weight", "bias"):
                    if f"{old}.{kind}" in named:
                        named[f"{new}.{kind}"] = named.pop(f"{old}.{kind}")
        if head == "ForMaskedLM" and config["hidden_act"] != "gelu":
            notes.append(
                "The head of masked language modeling is left out: it uses "
                f"{printable(config['hidden_act'])}, and Longformer's uses gelu."
            )
            named = {name: tensor for name, tensor in named.items() if not name.startswith("lm_head.")}
    return _longformer(config, named, notes, stored, request, source)


def longer_longformer(
    stored: Mapping[str, Any], tensors: Mapping[str, Tensor], request: Request, source: object
) -> Converted:
    """Returns a Longformer with other positions or windows; the arguments are those of :func:`longformer_from_bert`."""
    config = {key: value for key, value in stored.items() if key not in PROVENANCE}
    config |= longformer_config(stored, source)
    named, notes = _named_as_longformer(tensors)
    return _longformer(config, named, notes, stored, request, source)


def _named_as_longformer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns tensors by the names of a Longformer with a head, and a sentence on what is left out."""
    is_bare = not any(_PREFIX.match(name) for name in tensors)
    named, notes = {}, []
    for name, tensor in tensors.items():
        for old, new in _RENAMED:
            name = old.sub(new, name)
        if name.startswith("cls.seq_relationship."):
            notes = [
                "The head that tells whether two sentences follow each other is left out: Longformer has none."
            ]
        else:
            named[f"{BASE}{name}" if is_bare else _PREFIX.sub(BASE, name)] = tensor
    return named, notes


def _longformer(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    notes: list[str],
    stored: Mapping[str, Any],
    request: Request,
    source: object,
) -> Converted:
    """Returns the checkpoint of Longformer's ``tensors`` with the positions and windows that are asked for.

    Args:
        config: all settings, for the tensors as they are; without ``attention_window`` if there is none yet.
        stored: the contents of the source's config.json.
    """
    head = head_of(tensors, stored.get("architectures"), source)
    check_tensors(expected_tensors(config, head, tensors), tensors, source)
    if config["tie_word_embeddings"]:
        for name, other in zip(TIED_DECODER, (_WORDS, "lm_head.bias"), strict=True):
            if name in tensors and not torch.equal(tensors.pop(name), tensors[other]):
                raise ValueError(
                    f"config.json of {source} ties {name} to {other} but they differ; set tie_word_embeddings to "
                    "false in it, or drop one."
                )
    num_reserved = config["pad_token_id"] + 1
    table = tensors[_POSITIONS]
    if stored["model_type"] == "bert":
        table = torch.cat([table.new_zeros(num_reserved, table.shape[1]), table])
    old = table.shape[0] - num_reserved
    reach = reach_of(
        request, old, _LONGFORMER_POSITIONS, config["num_hidden_layers"], config.get("attention_window")
    )
    tensors[_POSITIONS] = with_positions(table, reach.positions, num_reserved)
    config |= {
        "model_type": "longformer",
        "architectures": [f"Longformer{head}"],
        "max_position_embeddings": reach.positions + num_reserved,
        "attention_window": reach.windows,
    }
    if head == "Model":
        tensors = {name.removeprefix(BASE): tensor for name, tensor in tensors.items()}
    return Converted(config, tensors, reach, notes)
