"""Serves sequences that are stored one after another without padding: bounds, positions, targets and attention."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from led_model.checks import check_traceable, describe, is_dense


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
    """Says where the decoder's sequences begin and end, how long they are and how long the document of each is.

    ``cu_seqlens`` is int ``[batch + 1]``, 0 and then the running total of the lengths.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    source_lengths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        sources: tuple[str, Tensor],
        decoder_cu_seqlens: Tensor,
        targets: tuple[str, Tensor],
    ) -> PackedTargets:
        """Returns the bounds of a batch, read before anything is computed: later a device would have to be waited for.

        Args:
            sources, targets: ids or embeddings ``[total, ...]`` of the documents and of the targets, with their names.

        Raises:
            ValueError: for bounds that do not fit these or each other.
        """
        (source_name, source), (target_name, target) = sources, targets
        source_lengths = packed_lengths("cu_seqlens", cu_seqlens, len(source), source_name)
        lengths = packed_lengths("decoder_cu_seqlens", decoder_cu_seqlens, len(target), target_name)
        if len(lengths) != len(source_lengths):
            raise ValueError(
                f"decoder_cu_seqlens has {len(lengths)} sequences and cu_seqlens {len(source_lengths)}; give one for "
                "each document."
            )
        return cls(decoder_cu_seqlens, lengths, source_lengths)


def packed_lengths(name: str, cu_seqlens: Any, total: int, of: str) -> tuple[int, ...]:
    """Returns how many tokens each packed sequence has, once it is sure that they are ``total`` together.

    Args:
        name: what ``cu_seqlens``, int ``[batch + 1]``, is called.
        of: what holds the ``total`` tokens.

    Raises:
        ValueError: for something else, and for sequences without a token.
    """
    check_traceable(f"the bounds in {name} are looked at", None, "give padded sequences")
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
    """Checks that targets are not packed without documents, and that nothing is asked for that needs padding.

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


def shift_right(ids: Tensor, start: int, padding: int | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Returns what a decoder reads to write ``ids``: a start token, then all but the last of them.

    Args:
        ids: int ``[batch, target]``, or ``[total]`` with ``cu_seqlens``, int ``[batch + 1]``.
        padding: takes the place of -100, if there is such a token.
    """
    shifted = torch.cat([torch.full_like(ids[..., :1], start), ids[..., :-1]], -1)
    if cu_seqlens is not None:
        shifted[cu_seqlens[:-1].long()] = start
    return shifted if padding is None else shifted.masked_fill(shifted == -100, padding)


def pack(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns rows ``[length]`` as one tensor ``[total]``, and where they lie in it.

    The latter, ``cu_seqlens``, is int32 ``[rows + 1]``: row ``b`` is ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
    """
    ends = accumulate((row.shape[0] for row in rows), initial=0)
    return torch.cat(list(rows)), torch.tensor(list(ends), dtype=torch.int32)


def unpack(packed: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Returns the rows of a packed tensor ``[total, ...]``, views ``[length, ...]``: ids, labels or logits.

    Args:
        cu_seqlens: int ``[rows + 1]``, as the collator returns it: ``cu_seqlens`` for what belongs to the documents,
            ``decoder_cu_seqlens`` for what belongs to the labels.

    Raises:
        ValueError: when they do not fit each other.
    """
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != packed.shape[0] or ends != sorted(ends):
        raise ValueError(
            f"cu_seqlens does not ascend from 0 to the {packed.shape[0]} rows of packed; give those of its batch."
        )
    return list(packed.split([end - start for start, end in pairwise(ends)]))
