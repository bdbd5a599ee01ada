"""What the tensors of a mask must be, so that no kernel reads outside of what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from led_kernels.eager import is_eager

if TYPE_CHECKING:
    from led_kernels.mask import LongformerMask

PADDING, LOCAL, GLOBAL = 0, 1, 2  # kinds of tokens


def check_structure(mask: LongformerMask) -> None:
    """Dtypes, shapes, strides and devices of the tensors.

    Raises:
        TypeError: for something that is no tensor, or a tensor of another dtype.
        ValueError: for a shape, strides or a device that does not go with the others.
    """
    for name in ("seq_start", "seq_len", "token_kind", "padding_before", "global_index", "num_globals"):
        if not isinstance(x := getattr(mask, name), Tensor):
            raise TypeError(f"{name} of a mask is a {type(x).__name__}; give a torch.Tensor.")
    kind, batch = mask.token_kind, mask.seq_len
    tensors = {
        "seq_start": (mask.seq_start, torch.int32, batch),
        "seq_len": (batch, torch.int32, None),
        "token_kind": (kind, torch.uint8, None),
        "padding_before": (mask.padding_before, torch.int32, kind),
        "global_index": (mask.global_index, torch.int32, None),
        "num_globals": (mask.num_globals, torch.int32, batch),
    }
    for name, (x, dtype, like) in tensors.items():
        if x.dtype != dtype:
            raise TypeError(f"{name} of a mask has dtype {x.dtype}; give {dtype}.")
        if x.device != kind.device:
            raise ValueError(
                f"{name} of a mask is on {x.device} and token_kind on {kind.device}; move both to one device."
            )
        if not x.is_contiguous():
            raise ValueError(f"{name} of a mask is not contiguous; call .contiguous() on it.")
        if like is not None and x.shape != like.shape:
            raise ValueError(f"{name} of a mask has shape {tuple(x.shape)}; give {tuple(like.shape)}.")
    if batch.dim() != 1:
        raise ValueError(f"seq_len of a mask has shape {tuple(batch.shape)}; give it as [batch].")
    if mask.global_index.dim() != 2 or mask.global_index.shape[0] != batch.shape[0]:
        raise ValueError(
            f"global_index of a mask has shape {tuple(mask.global_index.shape)}; give it as [batch, max_globals] with "
            f"a batch of {batch.shape[0]}."
        )
    if (kind.dim() == 2 and kind.shape != (batch.shape[0], mask.max_seqlen)) or kind.dim() not in (1, 2):
        raise ValueError(
            f"token_kind of a mask has shape {tuple(kind.shape)}; give it as [batch, max_seqlen] = "
            f"[{batch.shape[0]}, {mask.max_seqlen}], or [total_rows] of packed sequences."
        )


def is_checkable(*tensors: Tensor) -> bool:
    """Whether looking at the values costs no wait for a device."""
    return all(x.device.type == "cpu" for x in tensors) and is_eager(*tensors)


def check_values(mask: LongformerMask) -> None:
    """Lengths, positions and counts of a mask on the CPU.

    Raises:
        ValueError: naming the tensor that holds what it must not.
    """
    start, length, kind = mask.seq_start, mask.seq_len, mask.token_kind
    index, counts = mask.global_index, mask.num_globals
    end = length if mask.is_packed else torch.zeros_like(length)
    last = kind.shape[-1] if mask.is_packed else 0
    slot = torch.arange(index.shape[1])
    used = slot < counts[:, None]  # bool [batch, max_globals]
    inside = (index >= 0) & (index < length[:, None])
    ascends = torch.nn.functional.pad(index[:, 1:] > index[:, :-1], (1, 0), value=True)
    good = {
        "seq_len": ((length >= 0) & (length <= mask.max_seqlen)).all(),
        # in int64, where no sum of two wraps around
        "seq_start": ((start >= 0) & (start.long() + end.long() <= last)).all(),
        "token_kind": (kind <= GLOBAL).all(),
        "num_globals": ((counts >= 0) & (counts <= index.shape[1])).all(),
        "global_index": torch.where(used, inside & ascends, index == -1).all(),
    }
    if not mask.is_packed:
        is_padding = (kind == PADDING).to(torch.int32)
        good["padding_before"] = (mask.padding_before == is_padding.cumsum(-1) - is_padding).all()
    for name, is_good in zip(good, torch.stack(list(good.values())).tolist(), strict=True):
        if not is_good:
            raise ValueError(
                f"{name} of a mask holds values that do not go with its other tensors; build it with "
                "LongformerMask.from_padding, from_lengths or packed."
            )
