"""The tensors of a mask have their names and their layout here, and are built from positions of global tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from led_kernels.argument_checks import as_integers

PADDING, LOCAL, GLOBAL, HALO = 0, 1, 2, 3  # values of token_kind


class MaskTensors(NamedTuple):
    """Names the eight tensors of a mask in the order in which operators and kernels take them.

    :class:`led_kernels.LongformerMask` documents each of them.
    """

    seq_start: Tensor
    seq_len: Tensor
    token_kind: Tensor
    padding_before: Tensor
    global_index: Tensor
    num_globals: Tensor
    position_offset: Tensor
    global_position: Tensor


def build_tensors(
    kind: Tensor,
    seq_start: Tensor,
    seq_len: Tensor,
    positions: Tensor,
    counts: Tensor,
    max_globals: int,
    position_offset: int = 0,
    global_position: Tensor | None = None,
) -> MaskTensors:
    """Converts what a constructor of masks has found out to the layout that kernels read.

    Args:
        kind: ``[batch, seqlen]`` or ``[total_rows]``, of any integer dtype.
        seq_start, seq_len, counts: ``[batch]``; ``counts`` are the numbers of global tokens.
        positions: ``[batch, n]``, ascending positions of the global tokens, and values past the end behind them.
        max_globals: the capacity of ``global_index``.
        position_offset, global_position: of a piece of longer sequences; the latter is ``[batch, max_globals]``.

    Raises:
        ValueError: for a negative ``max_globals``.
    """
    if max_globals < 0:
        raise ValueError(f"max_globals is {max_globals}; give the capacity, 0 or more.")
    kind = kind.contiguous()  # Kernels take no strides of it.
    # It is padded before it is cut, so that a traced length need not be compared with max_globals.
    positions = torch.nn.functional.pad(positions, (0, max_globals))[:, :max_globals]
    slot = torch.arange(max_globals, device=kind.device)
    is_padding = (kind == PADDING).to(torch.int32)

    def slots(values: Tensor) -> Tensor:
        return torch.where(slot < counts[:, None], values, -1).to(torch.int32).contiguous()

    index = slots(positions)
    seq_len = seq_len.to(torch.int32).contiguous()
    return MaskTensors(
        seq_start=seq_start.to(torch.int32).contiguous(),
        seq_len=seq_len,
        token_kind=kind.to(torch.uint8),
        padding_before=(is_padding.cumsum(-1) - is_padding).to(torch.int32),
        global_index=index,
        num_globals=counts.clamp(max=max_globals).to(torch.int32).contiguous(),
        position_offset=torch.full_like(seq_len, position_offset),
        global_position=index if global_position is None else slots(global_position),
    )


def as_global_index(global_index: Tensor | Sequence | None, batch: int, device: torch.device) -> Tensor:
    """Returns positions of global tokens, given in any form that a constructor takes, as int64 ``[batch, n]``.

    Raises:
        TypeError, ValueError: for positions that are no integers, or another shape.
    """
    if global_index is None:
        return torch.empty(batch, 0, dtype=torch.int64, device=device)
    index = as_integers(global_index, "global_index").to(device)
    if index.dim() == 1:
        index = index.expand(batch, -1)
    if index.dim() != 2 or index.shape[0] != batch:
        raise ValueError(f"global_index has shape {tuple(index.shape)}; give it as [{batch}, n] or [n].")
    return index


def index_of_marks(marks: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns the positions of marked rows in their sequences, int64 ``[batch, most]``, filled with -1.

    Args:
        marks: ``[total_rows]``, true where a row is marked.
        cu_seqlens: int64 ``[batch + 1]``, 0 and then ascending to the number of rows.
    """
    rows = marks.nonzero()[:, 0]
    batch = cu_seqlens.shape[0] - 1
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1  # the last that begins here or before
    # Not bincount, which reads the largest value back from a GPU.
    counts = torch.zeros(batch, dtype=torch.int64, device=rows.device).scatter_add_(
        0, sequence, torch.ones_like(sequence)
    )
    slot = torch.arange(rows.shape[0], device=rows.device) - (counts.cumsum(0) - counts)[sequence]
    most = int(counts.max()) if counts.numel() else 0
    index = torch.full((batch, most), -1, device=rows.device)
    index[sequence, slot] = rows - cu_seqlens[sequence]
    return index


def sort_unique(index: Tensor, lengths: Tensor, beyond: int = 2**62) -> tuple[Tensor, Tensor]:
    """Sorts positions and drops duplicates and those outside of their sequence.

    Args:
        index: int64 ``[batch, n]``.
        lengths: int64 ``[batch]``.
        beyond: the value, no less than any length, that fills the rest of a row.

    Returns:
        int64 ``[batch, n]``, and how many of each row are positions, ``[batch]``.
    """
    index = torch.where((index >= 0) & (index < lengths[:, None]), index, beyond).sort(dim=1).values
    repeated = (
        torch.nn.functional.pad(index[:, 1:] == index[:, :-1], (1, 0)) if index.shape[1] else index.bool()
    )
    index = torch.where(repeated, beyond, index).sort(dim=1).values
    return index, (index < lengths[:, None]).sum(dim=1)
