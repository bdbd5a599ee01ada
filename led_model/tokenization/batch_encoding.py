"""Defines a batch of encoded texts, and pads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from led_model.tokenization.text_checks import check_lengths, columns_of

PADDING = ("longest", "max_length", "do_not_pad")


class BatchEncoding(dict[str, Any]):
    """Holds token ids and masks by name, also as attributes: lists, or tensors if these were asked for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the batch has no {name}; it has {', '.join(self)}.") from None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """Returns a copy with its tensors on ``device``."""
        return BatchEncoding({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()})


def pad_encoded(
    encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    pad_token_id: int,
    padding: bool | str,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    return_tensors: str | None,
    padding_side: str = "right",
) -> BatchEncoding:
    """Pads sequences to one length; see ``LEDTokenizer.pad``."""
    check_lengths(max_length, pad_to_multiple_of)
    columns = {name: _as_lists(values) for name, values in columns_of(encoded).items()}
    if "input_ids" not in columns:
        raise ValueError("encoded has no input_ids; give what the tokenizer returned.")
    single = any(isinstance(row, int) for row in columns["input_ids"][:1])
    if single:
        columns = {name: [row] for name, row in columns.items()}
    lengths = [len(row) for row in columns["input_ids"]]
    columns.setdefault("attention_mask", [[1] * length for length in lengths])
    target = _padded_length(
        lengths, strategy_name("padding", padding, PADDING), max_length, pad_to_multiple_of
    )
    fill = {
        "input_ids": pad_token_id,
        "attention_mask": 0,
        "special_tokens_mask": 1,
        "offset_mapping": (0, 0),
        "global_attention_mask": -1,
    }
    for name in columns.keys() & fill.keys():
        if [len(row) for row in columns[name]] != lengths:
            raise ValueError(f"{name} and input_ids differ in length; give one element per token in both.")
        padding_rows = ([fill[name]] * (target - length) for length in lengths)
        columns[name] = [
            row + extra if padding_side == "right" else extra + row
            for row, extra in zip(columns[name], padding_rows, strict=True)
        ]
    if return_tensors is None:
        return BatchEncoding({name: rows[0] if single else rows for name, rows in columns.items()})
    if return_tensors != "pt":
        raise ValueError(f"return_tensors is {return_tensors!r}; give 'pt' or None.")
    try:
        return BatchEncoding({name: torch.tensor(rows) for name, rows in columns.items()})
    except (ValueError, TypeError):
        raise ValueError("the sequences differ in length and make no tensor; set padding=True.") from None


def strategy_name(name: str, value: bool | str, known: tuple[str, ...]) -> str:
    """Returns the name of a strategy; ``True`` means the first of those ``known``, ``False`` the last."""
    strategy = known[0 if value else -1] if isinstance(value, bool) else value
    if strategy not in known:
        raise ValueError(f"{name} is {value!r}; give True, False or one of {', '.join(known)}.")
    return strategy


def _padded_length(lengths: Sequence[int], how: str, max_length: int | None, multiple: int | None) -> int:
    """Returns the length that shorter rows are padded to; 0 for no padding."""
    if how == "do_not_pad":
        return 0
    target = max(lengths, default=0)
    if how == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length; give one, or padding=True.")
        target = max_length
    return -(-target // multiple) * multiple if multiple else target


def _as_lists(values: Any) -> Any:
    """Returns the rows as lists, whether they are lists, arrays or tensors."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [row.tolist() if hasattr(row, "tolist") else row for row in values]
