"""What the tensors of a mask must be, so that no kernel reads outside of what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from led_kernels.argument_checks import check_size, check_storage
from led_kernels.eager import is_eager

if TYPE_CHECKING:
    from led_kernels.mask import LongformerMask

PADDING, LOCAL, GLOBAL = 0, 1, 2  # kinds of tokens

_DTYPES = {
    "seq_start": torch.int32,
    "seq_len": torch.int32,
    "token_kind": torch.uint8,
    "padding_before": torch.int32,
    "global_index": torch.int32,
    "num_globals": torch.int32,
}


def check_structure(mask: LongformerMask) -> None:
    """Dtypes, shapes, strides and devices of the tensors.

    Raises:
        TypeError: for something that is no tensor, or a tensor of another dtype.
        ValueError: for a shape, strides or a device that does not go with the others.
    """
    kind, batch = mask.token_kind, mask.seq_len
    check_size(mask.max_seqlen, "max_seqlen of a mask")
    for name, dtype in _DTYPES.items():
        x = getattr(mask, name)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} of a mask is a {type(x).__name__}; give a torch.Tensor.")
        if x.dtype != dtype:
            raise TypeError(f"{name} of a mask has dtype {x.dtype}; give {dtype}.")
        if not x.is_contiguous():
            raise ValueError(f"{name} of a mask is not contiguous; call .contiguous() on it.")
    for name, like in (("seq_start", batch), ("num_globals", batch), ("padding_before", kind)):
        if (x := getattr(mask, name)).shape != like.shape:
            raise ValueError(f"{name} of a mask has shape {tuple(x.shape)}; give {tuple(like.shape)}.")
    device = kind.device
    for x, name in zip(mask.tensors(), _DTYPES, strict=True):
        if x.device != device:
            raise ValueError(
                f"{name} of a mask is on {x.device} and token_kind on {device}; move both to one device."
            )
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
    for name in _DTYPES:
        check_storage(f"{name} of a mask", getattr(mask, name))
    start, length, kind = mask.seq_start, mask.seq_len, mask.token_kind
    index, counts = mask.global_index, mask.num_globals
    end = length if mask.is_packed else torch.zeros_like(length)
    last = kind.shape[-1] if mask.is_packed else 0
    slot = torch.arange(index.shape[1], device=index.device)
    used = slot < counts[:, None]  # bool [batch, max_globals]
    inside = (index >= 0) & (index < length[:, None])
    ascends = torch.nn.functional.pad(index[:, 1:] > index[:, :-1], (1, 0), value=True)
    good = {
        "max_seqlen": torch.as_tensor(mask.max_seqlen >= 0, device=kind.device),
        "seq_len": ((length >= 0) & (length <= mask.max_seqlen)).all(),
        # in int64, where no sum of two wraps around
        "seq_start": ((start >= 0) & (start.long() + end.long() <= last)).all(),
        "token_kind": (kind <= GLOBAL).all(),
        "num_globals": ((counts >= 0) & (counts <= index.shape[1])).all(),
        "global_index": torch.where(used, inside & ascends, index == -1).all(),
    }
    _require(good)
    # what follows looks where these point
    at = (start[:, None] + index if mask.is_packed else index).clamp(min=0).long()  # [batch, max_globals]
    if mask.is_packed:
        ends = (start + length)[:-1]
        good = {"seq_start": (start[1:] >= ends).all()}  # or two sequences would write the same row
        marked = kind[at] if kind.numel() else torch.zeros_like(at)
        counted = (kind == GLOBAL).sum() == counts.sum()
    else:
        is_padding = (kind == PADDING).to(torch.int32)
        good = {"padding_before": (mask.padding_before == is_padding.cumsum(-1) - is_padding).all()}
        position = torch.arange(kind.shape[1], device=kind.device)
        good["seq_len"] = ((kind == PADDING) | (position < length[:, None])).all()
        marked = kind.gather(1, at)
        counted = ((kind == GLOBAL).sum(1) == counts).all()
    good["global_index"] = torch.where(used, marked == GLOBAL, True).all()
    good["num_globals"] = counted
    _require(good)


def _require(good: dict[str, Tensor]) -> None:
    for name, is_good in zip(good, torch.stack(list(good.values())).tolist(), strict=True):
        if not is_good:
            raise ValueError(
                f"{name} of a mask holds values that do not go with its other tensors; build it with "
                "LongformerMask.from_padding, from_lengths or packed."
            )
