"""Serves sequences that are stored one after another without padding: their bounds, positions and attention."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from led_model.checks import describe, is_dense


@dataclass(frozen=True)
class PackedLengths:
    """Holds the lengths of packed sequences of queries, and of the keys that belong to each of them."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        """Returns attention of each sequence's queries over its own keys, ``[1, heads, total_queries, head_dim]``.

        ``q`` is ``[1, heads, total_queries, head_dim]``, and ``k`` and ``v`` are ``[1, heads, total_keys, head_dim]``.
        """
        pieces = zip(
            q.split(self.queries, 2), k.split(self.keys, 2), v.split(self.keys, 2), strict=True
        )  # of one sequence each
        attended = [
            F.scaled_dot_product_attention(*piece, dropout_p=dropout_p, is_causal=is_causal)
            for piece in pieces
        ]
        return torch.cat(attended, 2)


@dataclass(frozen=True)
class PackedTargets:
    """Says where the decoder's sequences begin and end, and how long the document of each is.

    ``cu_seqlens`` is int ``[batch + 1]``, 0 and then the running total of the lengths.
    """

    cu_seqlens: Tensor
    source_lengths: tuple[int, ...]


def packed_lengths(name: str, cu_seqlens: Any, total: int, of: str) -> tuple[int, ...]:
    """Returns how many tokens each packed sequence has, once it is sure that they are ``total`` together.

    Args:
        name: what ``cu_seqlens``, int ``[batch + 1]``, is called.
        of: what holds the ``total`` tokens.

    Raises:
        ValueError: for something else, and for sequences without a token.
    """
    if (
        not is_dense(cu_seqlens)
        or cu_seqlens.dim() != 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"{name} {describe(cu_seqlens)}; give int32 or int64 [batch + 1].")
    bounds = cu_seqlens.tolist()  # one wait for a device
    lengths = tuple(end - start for start, end in pairwise(bounds))
    if not lengths or bounds[0] != 0 or min(lengths) < 1 or bounds[-1] != total:
        raise ValueError(
            f"{name} is {reprlib.repr(bounds)} for the {total} tokens of {of}; "
            "give 0 and then the running total of the lengths, each 1 or more."
        )
    return lengths


def packed_positions(seq_start: Tensor, seq_len: Tensor, total: int) -> Tensor:
    """Returns the position of each row in its sequence, int64 ``[total]``.

    ``seq_start`` and ``seq_len`` are int ``[batch]``, where the sequences begin and how long they are.
    """
    starts = torch.repeat_interleave(seq_start.long(), seq_len.long(), output_size=total)
    return torch.arange(total, device=starts.device) - starts


def check_packing(
    cu_seqlens: Tensor | None,
    decoder_cu_seqlens: Tensor | None,
    decoder_attention_mask: Tensor | None,
    is_recorded: bool | None,
) -> None:
    """Checks that documents and targets are packed both or neither, and that nothing is asked for that needs padding.

    Raises:
        ValueError: naming the arguments.
    """
    if cu_seqlens is None and decoder_cu_seqlens is None:
        return
    if cu_seqlens is None:
        raise ValueError("decoder_cu_seqlens is given and cu_seqlens is not; pack the documents, too.")
    if decoder_attention_mask is not None:
        raise ValueError(
            "decoder_attention_mask and cu_seqlens are both given; packed sequences have no padding."
        )
    if is_recorded:
        raise ValueError(
            "output_attentions and output_hidden_states are not served with cu_seqlens; give padded documents."
        )


def packed_inputs(ids_name: str, ids: Any, embeds_name: str, embeds: Any) -> tuple[str, Tensor]:
    """Returns packed ids ``[total]`` or embeddings ``[total, d_model]``, whichever are given, with their name.

    Raises:
        ValueError: for both or neither given, and for another number of dimensions.
    """
    if (ids is None) == (embeds is None):
        both = "missing" if ids is None else "given"
        raise ValueError(f"{ids_name} and {embeds_name} are both {both}; give one of them.")
    name, given, shape = (
        (ids_name, ids, "[total]") if embeds is None else (embeds_name, embeds, "[total, d_model]")
    )
    if not is_dense(given) or given.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} {describe(given)}; give {shape}, as the sequences are packed.")
    return name, given
