"""These functions check masks: their tensors must be such that no kernel reads outside of what it is given."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from led_kernels.argument_checks import check_marks, check_size, check_storage, whole_numbers
from led_kernels.eager import is_eager
from led_kernels.mask_tensors import GLOBAL, HALO, LOCAL, PADDING, MaskTensors, index_of_marks
from led_kernels.philox import KEYS_PER_DRAW

_DTYPES = {name: torch.uint8 if name == "token_kind" else torch.int32 for name in MaskTensors._fields}


def check_structure(tensors: MaskTensors, max_seqlen: int) -> None:
    """Checks dtypes, shapes, strides and devices of the tensors, without looking at their values.

    Raises:
        TypeError: for something that is no tensor, or a tensor of another dtype.
        ValueError: for a shape, strides or a device that does not go with the others.
    """
    kind, lengths, index = tensors.token_kind, tensors.seq_len, tensors.global_index
    check_size(max_seqlen, "max_seqlen of a mask")
    for name, x in tensors._asdict().items():
        dtype = _DTYPES[name]
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} of a mask is a {type(x).__name__}; give a torch.Tensor.")
        if x.dtype != dtype:
            raise TypeError(f"{name} of a mask has dtype {x.dtype}; give {dtype}.")
        if not x.is_contiguous():
            raise ValueError(f"{name} of a mask is not contiguous; call .contiguous() on it.")
    like = dict.fromkeys(("seq_start", "num_globals", "position_offset"), lengths)
    for name, other in (like | {"padding_before": kind}).items():
        _check_shape(tensors, name, other.shape)
    device = kind.device
    for name, x in tensors._asdict().items():
        if x.device != device:
            raise ValueError(
                f"{name} of a mask is on {x.device} and token_kind on {device}; move both to one device."
            )
    if lengths.dim() != 1:
        raise ValueError(f"seq_len of a mask has shape {tuple(lengths.shape)}; give it as [batch].")
    batch = lengths.shape[0]
    if index.dim() != 2 or index.shape[0] != batch:
        raise ValueError(
            f"global_index of a mask has shape {tuple(index.shape)}; give it as [batch, max_globals] with a batch of "
            f"{batch}."
        )
    _check_shape(tensors, "global_position", index.shape)
    if (kind.dim() == 2 and kind.shape != (batch, max_seqlen)) or kind.dim() not in (1, 2):
        raise ValueError(
            f"token_kind of a mask has shape {tuple(kind.shape)}; give it as [batch, max_seqlen] = "
            f"[{batch}, {max_seqlen}], or [total_rows] of packed sequences."
        )


def _check_shape(tensors: MaskTensors, name: str, shape: torch.Size) -> None:
    if (x := getattr(tensors, name)).shape != shape:
        raise ValueError(f"{name} of a mask has shape {tuple(x.shape)}; give {tuple(shape)}.")


def is_checkable(*tensors: Tensor) -> bool:
    """Tells whether the values of tensors can be looked at without waiting for a device."""
    return all(x.device.type == "cpu" for x in tensors) and is_eager(*tensors)


def check_values(tensors: MaskTensors, max_seqlen: int) -> None:
    """Checks lengths, positions and counts of a mask, whose structure was checked, on the CPU.

    Raises:
        ValueError: naming the tensor that holds what it must not.
    """
    for name, x in tensors._asdict().items():
        check_storage(f"{name} of a mask", x)
    start, length, kind, padding_before, index, counts, offset, position_of_global = tensors
    is_packed = kind.dim() == 1
    end = length if is_packed else torch.zeros_like(length)
    last = kind.shape[-1] if is_packed else 0
    slot = torch.arange(index.shape[1], device=index.device)
    used = slot < counts[:, None]  # bool [batch, max_globals]
    inside = (index >= 0) & (index < length[:, None])
    ascends = torch.nn.functional.pad(index[:, 1:] > index[:, :-1], (1, 0), value=True)
    good = {
        "max_seqlen": torch.as_tensor(max_seqlen >= 0, device=kind.device),
        "seq_len": ((length >= 0) & (length <= max_seqlen)).all(),
        # The sum is in int64, where it does not wrap around.
        "seq_start": ((start >= 0) & (start.long() + end.long() <= last)).all(),
        "token_kind": (kind <= HALO).all(),
        "num_globals": ((counts >= 0) & (counts <= index.shape[1])).all(),
        "global_index": torch.where(used, inside & ascends, index == -1).all(),
        "position_offset": (offset % KEYS_PER_DRAW == 0).all(),
        "global_position": torch.where(used, position_of_global >= 0, position_of_global == -1).all(),
    }
    _require(good)
    # The rows that these point to exist, and can be looked at.
    at = (start[:, None] + index if is_packed else index).clamp(min=0).long()  # [batch, max_globals]
    if is_packed:
        ends = (start + length)[:-1]
        good = {"seq_start": (start[1:] >= ends).all()}  # so that no two sequences write one row
        marked = kind[at] if kind.numel() else torch.zeros_like(at)
        counted = (kind == GLOBAL).sum() == counts.sum()
    else:
        is_padding = (kind == PADDING).to(torch.int32)
        good = {"padding_before": (padding_before == is_padding.cumsum(-1) - is_padding).all()}
        position = torch.arange(kind.shape[1], device=kind.device)
        good["seq_len"] = (torch.where(kind == PADDING, 0, position + 1).amax(1) == length).all()
        stands = (kind != LOCAL) & (kind != HALO) | (position + offset[:, None] >= 0)
        good["position_offset"] = stands.all()
        marked = kind.gather(1, at)
        counted = ((kind == GLOBAL).sum(1) == counts).all()
    good["global_index"] = torch.where(used, marked == GLOBAL, True).all()
    good["num_globals"] = counted
    _require(good)


def _require(good: dict[str, Tensor]) -> None:
    """Raises for the first of these tensors' names whose condition, bool without dimensions, does not hold."""
    for name, is_good in zip(good, torch.stack(list(good.values())).tolist(), strict=True):
        if not is_good:
            raise ValueError(
                f"{name} of a mask holds values that do not go with its other tensors; build it with "
                "LongformerMask.from_padding, from_lengths or packed."
            )


def check_rank(x: Tensor, name: str, rank: int, shape: str) -> None:
    """Checks that ``x`` has ``rank`` dimensions, which ``shape`` names, and columns if it has two.

    Raises:
        ValueError: otherwise.
    """
    if x.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give it as {shape}.")
    if rank == 2 and x.shape[1] < 1:
        raise ValueError(f"{name} has no columns; a sequence holds at least 1 position.")


def check_ascending(is_ascending: int) -> None:
    """Checks what was read of the bounds of packed sequences.

    Raises:
        ValueError: when they are no running total.
    """
    if not is_ascending:
        raise ValueError("cu_seqlens does not start at 0 and ascend; give the running total of the lengths.")


def check_index(is_inside: int) -> None:
    """Checks that no global position lies outside of its sequence, as a constructor has found.

    Raises:
        ValueError: otherwise.
    """
    if not is_inside:
        raise ValueError(
            "global_index holds a position outside its sequence; give 0 … length - 1, or -1 for none."
        )


def global_index_of(marks: Tensor, global_index: object, cu_seqlens: Tensor) -> Tensor:
    """Returns the positions that ``global_attention_mask`` marks in packed sequences, int64 ``[batch, most]``.

    Raises:
        TypeError: for marks that are no tensor of real numbers.
        ValueError: for another shape or device than that of the rows, other marks than 0 and 1, bounds that do not
            ascend, and positions that are given twice.
    """
    check_marks(marks, "global_attention_mask")
    if global_index is not None:
        raise ValueError("global_attention_mask and global_index are both given; give one of them.")
    if marks.device != cu_seqlens.device:
        raise ValueError(
            f"global_attention_mask is on {marks.device} and cu_seqlens on {cu_seqlens.device}; move both to one."
        )
    ascending = (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all()
    total, valid, is_ascending = read_values(cu_seqlens[-1], whole_numbers(marks, 0, 1)[1], ascending)
    if marks.shape != (total,):
        raise ValueError(
            f"global_attention_mask has shape {tuple(marks.shape)}; give a mark for each of the {total} rows."
        )
    if not valid:
        raise ValueError("global_attention_mask holds another value than 0 and 1; use these only.")
    check_ascending(is_ascending)
    return index_of_marks(marks != 0, cu_seqlens)


def check_capacity(max_globals: int | None) -> None:
    """Checks that a capacity, if one is given, is an int.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if max_globals is not None:
        check_size(max_globals, "max_globals")


def capacity_for(most: int, max_globals: int | None, at_least: int = 0) -> int:
    """Returns the capacity of ``global_index`` for sequences with up to ``most`` global tokens.

    It is ``max_globals``, or by default what they need, and ``at_least`` that many.

    Raises:
        ValueError: when ``max_globals`` is too small.
    """
    if max_globals is None:
        return max(most, at_least)
    if 0 <= max_globals < most:
        raise ValueError(f"max_globals is {max_globals} but a sequence has {most} global tokens; raise it.")
    return max_globals


def read_values(*values: Tensor) -> list[int]:
    """Returns the values of tensors without dimensions, by the one device-to-host copy of a constructor.

    Raises:
        ValueError: for tensors on ``meta``.
    """
    if any(v.is_meta for v in values):
        raise ValueError(
            "a mask on meta has no values to count; give max_globals, and total_rows of packed sequences."
        )
    return torch.stack([v.to(torch.int64) for v in values]).tolist()


def largest(values: Tensor) -> Tensor:
    """Returns the maximum of a vector that may be empty; it is 0 if no value is larger."""
    return torch.nn.functional.pad(values, (0, 1)).amax()


def debug_assert(condition: Tensor, message: str) -> None:
    """Asserts on the device, under ``LED_KERNELS_DEBUG=1``, what the host does not look at."""
    if os.environ.get("LED_KERNELS_DEBUG") == "1":
        torch._assert_async(condition, message)
