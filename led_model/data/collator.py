"""Defines the collator, which makes a batch of tokenized documents, padded or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from led_kernels.loss import IGNORED
from led_model.data.features import Document, read_document
from led_model.data.global_tokens import GlobalRule, rule_of
from led_model.packing import pack, shift_right
from led_model.schema import BOOLEAN, LARGEST, check_values, integer
from led_model.tokenization.batch_encoding import BatchEncoding

_RULES = {
    "max_length": integer(2).optional,
    "max_target_length": integer(1).optional,
    "packing": BOOLEAN,
    "pad_to_multiple_of": integer(1).optional,
    "label_pad_token_id": integer(-(2**31)),
}


class LEDDataCollator:
    """Makes a batch of documents, as a tokenizer returned them, and of the labels that the model shall write.

    It works in torch's ``DataLoader``, also with workers, and in transformers' ``Trainer``, with the models and
    tokenizers of either library.

    >>> collate = LEDDataCollator(tokenizer, max_length=16384, max_target_length=512)
    >>> loader = torch.utils.data.DataLoader(features, batch_size=4, shuffle=True, collate_fn=collate)
    >>> loss = model(**next(iter(loader))).loss

    A feature has ``input_ids`` and may have ``attention_mask``, ``global_attention_mask`` and ``labels``: lists,
    arrays or tensors, ``[seqlen]`` and ``[target]``. Padding at either end is removed first, and at the end of labels
    also the padding token, unless it is the one that ends a text. Other columns are refused, but for what tokenizers
    return besides. ``labels`` may be classes instead, and ``start_positions`` with ``end_positions`` an answer.

    Args:
        tokenizer: an ``LEDTokenizer`` of this library or of transformers; its special tokens are read.
        global_tokens: which tokens are global in features without a ``global_attention_mask`` of their own, one of
            "first", "question" (all before the first ``sep_token`` of a pair), "separators" (``<doc-sep>`` where the
            tokenizer has it, else ``sep_token``) and "none"; a number of first tokens; :class:`EveryKthToken`,
            :class:`TokensWithId` or another function of the ids; or a list of these, whose tokens are all global.
        max_length, max_target_length: longer documents and labels lose their end, but keep the token that ends a
            text, as tokenizers truncate.
        packing: whether sequences are stored one after another without padding, which led_model's models take.
        pad_to_multiple_of: padded lengths are rounded up to a multiple of this.
        label_pad_token_id: pads the labels; models leave -100 out of the loss.
        model: whose ``config`` says how labels become ``decoder_input_ids``. These are needed only where the loss is
            not the model's own, as with ``label_smoothing_factor`` of transformers' Trainer. It is not kept, so that
            workers get no copy.

    Returns:
        When called with a list of features, int64 tensors by name: ``input_ids``, ``attention_mask`` and
        ``global_attention_mask``, ``[batch, seqlen]``, and ``labels``, ``[batch, target]``, padded to the right, the
        global mask with -1 as tokenizers do. Packed: ``input_ids`` and ``global_attention_mask``, ``[total]``,
        ``labels``, ``[total_target]``, and int32 ``cu_seqlens`` and ``decoder_cu_seqlens``, ``[batch + 1]``: document
        ``b`` is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``; see :func:`unpack`.

    Raises:
        TypeError, ValueError: for settings that are not as above, and for features, with their number in the batch.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        global_tokens: Any = "first",
        max_length: int | None = None,
        max_target_length: int | None = None,
        packing: bool = False,
        pad_to_multiple_of: int | None = None,
        label_pad_token_id: int = IGNORED,
        model: Any = None,
    ) -> None:
        self.max_length = max_length
        self.max_target_length = max_target_length
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self.label_pad_token_id = label_pad_token_id
        check_values(vars(self), _RULES)
        if packing and pad_to_multiple_of is not None:
            raise ValueError("pad_to_multiple_of has no effect on packed batches; leave one of the two out.")
        self.is_global: GlobalRule = rule_of(global_tokens, tokenizer)
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token; set one.")
        self.pad_token_id: int = tokenizer.pad_token_id
        self.last_token_ids = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        self.decoder_ids = None if model is None else _decoder_ids(model)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        if not features:
            raise ValueError("features is empty; give one document at least.")
        documents = [
            self._prepared(read_document(feature, number), number) for number, feature in enumerate(features)
        ]
        batch = self._packed(documents) if self.packing else self._padded(documents)
        labels = batch.get("labels")
        if self.decoder_ids is not None and labels is not None and documents[0].has_token_labels:
            batch["decoder_input_ids"] = shift_right(
                labels, *self.decoder_ids, batch.get("decoder_cu_seqlens")
            )
        return BatchEncoding(batch)

    def _prepared(self, document: Document, number: int) -> Document:
        """Returns the document cut to the greatest lengths, with the tokens that are global."""
        kept = self._kept(document.input_ids, self.max_length)
        input_ids, attention_mask = document.input_ids[kept], document.attention_mask[kept]
        if document.global_attention_mask is not None:
            is_global = document.global_attention_mask[kept]
        else:
            try:
                is_global = torch.as_tensor(self.is_global(input_ids))
            except ValueError as error:
                raise ValueError(f"feature {number}: {error}") from None
            if is_global.shape != input_ids.shape:
                raise ValueError(
                    f"the rule of global_tokens returned shape {tuple(is_global.shape)} for {input_ids.shape[0]} ids; "
                    "return one bool for each."
                )
        # An answer that was cut off lies behind the end, where models leave it out of the loss.
        whole = int((kept == torch.arange(kept.shape[0])).sum())
        positions = {
            name: place.masked_fill(place >= whole, LARGEST) for name, place in document.positions.items()
        }
        labels = document.labels
        if labels is not None and document.has_token_labels:
            labels = self._without_padding(labels)
            labels = labels[self._kept(labels, self.max_target_length)]
        if self.packing and not bool(attention_mask.all()):
            raise ValueError(
                f"attention_mask of feature {number} has padding between tokens, which packed batches cannot hold; "
                "remove it, or set packing=False."
            )
        return replace(
            document,
            input_ids=input_ids,
            attention_mask=attention_mask,
            global_attention_mask=is_global.bool(),
            labels=labels,
            positions=positions,
        )

    def _kept(self, ids: Tensor, longest: int | None) -> Tensor:
        """Returns the places of the tokens that truncation keeps, int64 ``[kept]``."""
        places = torch.arange(ids.shape[0])
        if longest is None or ids.shape[0] <= longest:
            return places
        if int(ids[-1]) in self.last_token_ids:
            return torch.cat([places[: longest - 1], places[-1:]])
        return places[:longest]

    def _without_padding(self, labels: Tensor) -> Tensor:
        """Returns the labels without padding at their end; one at least, which may be it."""
        padding = {IGNORED, self.label_pad_token_id, self.pad_token_id} - self.last_token_ids
        kept = (~torch.isin(labels, torch.tensor(sorted(padding)))).nonzero()
        return labels[: int(kept[-1]) + 1 if kept.shape[0] else 1]

    def _padded(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        columns = {
            "input_ids": ([document.input_ids for document in documents], self.pad_token_id),
            "attention_mask": ([document.attention_mask.long() for document in documents], 0),
            "global_attention_mask": ([_global_mask(document) for document in documents], -1),
        }
        batch = {name: self._stacked(rows, fill) for name, (rows, fill) in columns.items()}
        labels = _all_or_none("labels", [document.labels for document in documents])
        if labels is not None:
            are_tokens = documents[0].has_token_labels
            if any(
                document.has_token_labels != are_tokens or row.dim() != labels[0].dim()
                for document, row in zip(documents, labels, strict=True)
            ):
                raise ValueError(
                    "labels are ids to write in some features and classes in others; give one kind."
                )
            batch["labels"] = (
                self._stacked(labels, self.label_pad_token_id) if are_tokens else torch.stack(labels)
            )
        for name in ("start_positions", "end_positions"):
            positions = _all_or_none(name, [document.positions.get(name) for document in documents])
            if positions is not None:
                batch[name] = torch.stack(positions)
        return batch

    def _packed(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        if any(
            document.positions or (document.labels is not None and not document.has_token_labels)
            for document in documents
        ):
            raise ValueError("packed batches hold ids to write as labels, not classes; set packing=False.")
        input_ids, cu_seqlens = pack([document.input_ids for document in documents])
        global_attention_mask, _ = pack([_global_mask(document) for document in documents])
        batch = {
            "input_ids": input_ids, "cu_seqlens": cu_seqlens, "global_attention_mask": global_attention_mask,
        }  # fmt: skip
        labels = _all_or_none("labels", [document.labels for document in documents])
        if labels is not None:
            batch["labels"], batch["decoder_cu_seqlens"] = pack(labels)
        return batch

    def _stacked(self, rows: Sequence[Tensor], fill: int) -> Tensor:
        """Returns rows ``[length]`` padded at their ends, ``[batch, longest]``."""
        longest, multiple = max(row.shape[0] for row in rows), self.pad_to_multiple_of or 1
        length = -(-longest // multiple) * multiple
        return torch.stack([F.pad(row, (0, length - row.shape[0]), value=fill) for row in rows])


def _global_mask(document: Document) -> Tensor:
    assert document.global_attention_mask is not None  # the collator has made one by its rule
    return document.global_attention_mask.long()


def _all_or_none(name: str, values: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Returns the values if all features have one, and ``None`` if none has.

    Raises:
        ValueError: when some have.
    """
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        missing = next(number for number, value in enumerate(values) if value is None)
        raise ValueError(f"feature {missing} has no {name}, and others have; give all of them or none.")
    return present or None


def _decoder_ids(model: Any) -> tuple[int, int]:
    """Returns the token with which the decoder starts and the one that stands for ignored labels in its input."""
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or padding is None:
        raise ValueError("the model's config has no decoder_start_token_id or no pad_token_id; set both.")
    return start, padding
