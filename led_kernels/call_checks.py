"""Whether the tensors of a call go with each other and with its mask, as the backends rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.argument_checks import check_storage
from led_kernels.mask import LongformerMask

_MAX_HEAD_DIM = 256


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_rows(mask: LongformerMask, tensors: dict[str, Tensor]) -> None:
    """All of one shape ``[*mask rows, heads, head_dim]``, dtype and device.

    Raises:
        ValueError: naming the tensor.
    """
    first = next(iter(tensors.values()))
    if first.dim() != mask.token_kind.dim() + 2 or not 1 <= first.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(
            f"q, k or v has shape {tuple(first.shape)}; give [*rows, heads, head_dim ≤ {_MAX_HEAD_DIM}]."
        )
    shape = (*mask.token_kind.shape, *first.shape[-2:])
    dtype, device = first.dtype, mask.device
    for name, x in tensors.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and the mask was built for rows {tuple(mask.token_kind.shape)}; "
                f"give {shape}, or another mask."
            )
        _check_kind(name, x, dtype, device)


def check_slots(mask: LongformerMask, k_global: Tensor, tensors: dict[str, Tensor]) -> None:
    """All ``[batch, max_globals, heads, head_dim]`` with the heads of ``k_global``.

    Raises:
        ValueError: naming the tensor.
    """
    shape = (mask.batch, mask.max_globals, *k_global.shape[-2:])
    dtype, device = k_global.dtype, mask.device
    for name, x in tensors.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; give [batch, max_globals, heads, head_dim] = {shape}."
            )
        _check_kind(name, x, dtype, device)


def check_lse(q: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """All ``[(batch,) heads, rows]`` in the dtype of lse.

    Raises:
        ValueError: naming the tensor.
    """
    *lead, rows, heads, _ = q.shape
    for name, x in tensors.items():
        if x is None:
            continue
        if x.shape != (*lead, heads, rows) or x.dtype != lse_dtype(q.dtype) or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}; give {(*lead, heads, rows)} of "
                f"{lse_dtype(q.dtype)} on {q.device}."
            )


def check_window(mask: LongformerMask, left: int, right: int) -> None:
    """Both sides from 0 to the longest sequence, which is as good as unlimited.

    Raises:
        ValueError: otherwise.
    """
    if not (0 <= left <= mask.max_seqlen and 0 <= right <= mask.max_seqlen):
        raise ValueError(
            f"window is ({left}, {right}); give 0 … max_seqlen = {mask.max_seqlen} on each side."
        )


def check_seed(seed: Tensor | None, dropout_p: float, q: Tensor) -> None:
    """One int64 on the device of q; dropout needs it.

    Raises:
        ValueError: for another one, or none.
    """
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; give a probability from 0 to 1.")
    if seed is None:
        if dropout_p > 0:
            raise ValueError(f"seed is None and dropout_p {dropout_p}; give an int64 tensor of one number.")
    elif seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device:
        raise ValueError(
            f"seed is {tuple(seed.shape)} of {seed.dtype} on {seed.device}; give one int64 on {q.device}."
        )
    else:
        check_storage("seed", seed)


def _check_kind(name: str, x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} has dtype {x.dtype} on {x.device}; give {dtype} on {device}, as the others have."
        )
    # gradients may come with any strides; what a kernel reads in place may not
    if name != "d_out" and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise ValueError(f"{name} has a non-contiguous last dimension; call .contiguous() on it.")
