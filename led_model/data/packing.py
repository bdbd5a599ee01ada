"""Stores sequences one after another, without padding between them, and takes them apart again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


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
