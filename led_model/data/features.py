"""Reads a document with its labels as data sets hold it: lists, arrays or tensors, padded or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = (
    "input_ids", "attention_mask", "global_attention_mask", "labels", "label", "start_positions", "end_positions",
)  # fmt: skip
# What tokenizers return besides, and what transformers' Trainer groups documents by.
_UNUSED = (
    "token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "num_truncated_tokens",
    "overflowing_tokens", "length",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """Holds what a model reads and shall write of one document, without padding at its ends.

    Attributes:
        input_ids: int64 ``[seqlen]``.
        attention_mask: bool ``[seqlen]``, false for padding between tokens.
        global_attention_mask: bool ``[seqlen]``, or ``None`` where the feature has none.
        labels: int64 ``[target]`` for tokens; int64 or float32 ``[]`` or float32 ``[num_labels]`` for classes.
        positions: int64 ``[]`` by name, the first and last token of an answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    global_attention_mask: Tensor | None
    labels: Tensor | None
    positions: dict[str, Tensor]

    @property
    def has_token_labels(self) -> bool:
        """Returns whether the labels are tokens to write, not classes."""
        return self.labels is not None and self.labels.dim() == 1 and not self.labels.is_floating_point()


def read_document(feature: Any, number: int) -> Document:
    """Returns what ``feature``, the batch's ``number``-th, holds.

    Raises:
        TypeError: for values that are no numbers.
        ValueError: for names that are not known, other shapes and lengths, masks of other values, and no tokens.
    """
    if not isinstance(feature, Mapping):
        raise TypeError(f"feature {number} is a {type(feature).__name__}; give a mapping with input_ids.")
    given = {name: value for name, value in feature.items() if value is not None and name not in _UNUSED}
    unknown = given.keys() - set(NAMES)
    if unknown:
        raise ValueError(
            f"feature {number} holds {', '.join(sorted(map(str, unknown)))}; give {', '.join(NAMES)} only, by removing "
            "the other columns."
        )
    if "input_ids" not in given:
        raise ValueError(f"feature {number} has no input_ids; give what the tokenizer returned.")
    input_ids = _whole_numbers("input_ids", given["input_ids"], number)
    masks = {
        name: _mask(name, given[name], number, input_ids.shape[0])
        for name in ("attention_mask", "global_attention_mask")
        if name in given
    }
    is_global = masks.get("global_attention_mask")
    is_token = torch.ones_like(input_ids) if is_global is None else is_global != -1
    is_token = masks.get("attention_mask", is_token) == 1
    places = is_token.nonzero()
    if places.shape[0] == 0:
        raise ValueError(f"feature {number} has no tokens; leave empty documents out.")
    first, last = int(places[0]), int(places[-1])
    inside = slice(first, last + 1)
    return Document(
        input_ids[inside],
        is_token[inside],
        None if is_global is None else is_global[inside] == 1,
        _labels(given, number),
        {
            name: _position(name, given[name], number) - first
            for name in ("start_positions", "end_positions")
            if name in given
        },
    )


def _position(name: str, value: Any, number: int) -> Tensor:
    """Returns int64 ``[]``."""
    position = _tensor(name, value, number)
    if position.numel() != 1 or position.is_floating_point():
        raise ValueError(
            f"{name} of feature {number} has shape {tuple(position.shape)} and dtype {position.dtype}; give one place."
        )
    return position.long().reshape(())


def _labels(given: Mapping[str, Any], number: int) -> Tensor | None:
    name = "label" if "label" in given else "labels"
    if name not in given:
        return None
    labels = _tensor(name, given[name], number)
    if labels.dim() > 1 or 0 in labels.shape:
        raise ValueError(
            f"{name} of feature {number} has shape {tuple(labels.shape)}; give the ids to write, [target], or a class."
        )
    return labels.float() if labels.is_floating_point() else labels.long()


def _mask(name: str, value: Any, number: int, length: int) -> Tensor:
    mask = _whole_numbers(name, value, number)
    if mask.shape[0] != length:
        raise ValueError(
            f"{name} of feature {number} has {mask.shape[0]} elements for {length} input_ids; give one for each."
        )
    known = (0, 1) if name == "attention_mask" else (-1, 0, 1)
    wrong = mask[~torch.isin(mask, torch.tensor(known))]
    if wrong.numel():
        remedy = (
            "0 for padding and 1 for tokens" if name == "attention_mask" else "1 for global tokens and else 0"
        )
        raise ValueError(f"{name} of feature {number} holds {int(wrong[0])}; give {remedy}.")
    return mask


def _whole_numbers(name: str, value: Any, number: int) -> Tensor:
    """Returns int64 ``[length]``."""
    row = _tensor(name, value, number)
    if row.dim() != 1:
        raise ValueError(
            f"{name} of feature {number} has shape {tuple(row.shape)}; give one document's, [seqlen], which tokenizers "
            "return without return_tensors."
        )
    if row.is_floating_point() and row.numel():
        raise ValueError(f"{name} of feature {number} holds {row.dtype}; give whole numbers.")
    return row.long()


def _tensor(name: str, value: Any, number: int) -> Tensor:
    """Returns a list, array or tensor of real numbers as a tensor on the CPU."""
    try:
        row = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"{name} of feature {number} is no row of numbers; give a list, an array or a tensor."
        ) from None
    if row.is_complex():
        raise TypeError(f"{name} of feature {number} is complex; give whole numbers.")
    return row.cpu()
