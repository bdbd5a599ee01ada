"""These functions check the arguments of the public attention functions, and fill in what was left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from led_kernels.argument_checks import check_number
from led_kernels.mask import LongformerMask


def check_dropout_p(dropout_p: float) -> None:
    """Checks that a number is a probability.

    Raises:
        ValueError: otherwise.
    """
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; give a probability from 0 to 1.")


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Draws a seed from torch's generator: int64 ``[1]``; None without dropout.

    Raises:
        ValueError: for a probability outside 0 … 1.
    """
    check_dropout_p(dropout_p)
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seed_of(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """Returns the seed that was given, by default one that is drawn; None without dropout.

    Raises:
        TypeError, ValueError: for something else than int64 ``[1]`` on ``device``, and as :func:`draw_seed`.
    """
    if seed is None:
        return draw_seed(dropout_p, device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed is a {getattr(seed, 'dtype', type(seed).__name__)}; give an int64 tensor.")
    if seed.shape != (1,) or seed.device != device:
        raise ValueError(f"seed has shape {tuple(seed.shape)} on {seed.device}; give [1] on {device}.")
    check_dropout_p(dropout_p)
    return None if dropout_p == 0 else seed


def softmax_scale_of(softmax_scale: float | None, q: Tensor) -> float:
    """Returns the scale that was given, by default ``1 / sqrt(head_dim)``."""
    if softmax_scale is None:
        return 1 / math.sqrt(q.shape[-1])
    return check_number(softmax_scale, "softmax_scale")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to the dtype of autocast where it is enabled, as scaled_dot_product_attention does; fp64 stays."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def check_qkv(tensors: dict[str, Tensor], mask: LongformerMask) -> None:
    """Checks that tensors with a row for every token are of one shape, dtype and device, and made for the mask.

    Raises:
        TypeError, ValueError: naming the argument and the remedy.
    """
    if not isinstance(mask, LongformerMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}; build a LongformerMask, for instance by LongformerMask.from_padding."
        )
    expected = "[total_rows, heads, head_dim]" if mask.is_packed else "[batch, seqlen, heads, head_dim]"
    first = None
    for name, x in tensors.items():
        _check_tensor(x, name)
        if x.dim() != (3 if mask.is_packed else 4):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give it as {expected} for this mask.")
        if x.shape[:-2] != mask.token_kind.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but the mask is for {tuple(mask.token_kind.shape)} "
                f"rows; give {expected} with these."
            )
        if x.device != mask.device:
            raise ValueError(
                f"{name} is on {x.device} and mask on {mask.device}; use mask.to({str(x.device)!r})."
            )
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name} has head_dim {x.shape[-1]}; 1 to 256 are supported.")
        first = first or name
        if x.shape != tensors[first].shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and {first} {tuple(tensors[first].shape)}; make them equal."
            )
    check_alike(tensors)


def check_q_global(q_global: Tensor, mask: LongformerMask, heads: int | None = None) -> None:
    """Checks that ``q_global`` is ``[batch, max_globals, heads, head_dim]``, with any number of heads by default.

    Raises:
        TypeError, ValueError: naming the argument and the remedy.
    """
    _check_tensor(q_global, "q_global")
    if not isinstance(mask, LongformerMask):
        raise TypeError(f"mask is a {type(mask).__name__}; build a LongformerMask.")
    heads = heads or (q_global.shape[2] if q_global.dim() == 4 else 1)
    if q_global.dim() != 4 or q_global.shape[:3] != (mask.batch, mask.max_globals, heads):
        raise ValueError(
            f"q_global has shape {tuple(q_global.shape)}; give [batch, max_globals, heads, head_dim] = "
            f"[{mask.batch}, {mask.max_globals}, {heads}, …] in the order of mask.global_index."
        )


def _check_tensor(x: Tensor, name: str) -> None:
    check_float(x, name)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has a non-contiguous last dimension (stride {x.stride(-1)}); call .contiguous() on it."
        )


def check_float(x: Tensor, name: str) -> None:
    """Checks that ``x`` is a dense tensor of floating-point numbers.

    Raises:
        TypeError: naming the argument and the remedy.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; give a torch.Tensor.")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {kind} tensor; give a dense one.")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; give float32, float16, bfloat16 or float64.")


def check_alike(tensors: dict[str, Tensor]) -> None:
    """Checks that all have the dtype and device of the first.

    Raises:
        TypeError, ValueError: naming the argument and the remedy.
    """
    (first, reference), *others = tensors.items()
    for name, x in others:
        if x.dtype != reference.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} and {first} {reference.dtype}; cast them to one dtype."
            )
        if x.device != reference.device:
            raise ValueError(
                f"{name} is on {x.device} and {first} on {reference.device}; move both to one device."
            )
