"""Checks whether the tensors of a call go with each other and with its mask, as the backends rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.argument_checks import check_storage
from led_kernels.call import AttentionCall, lse_dtype

_MAX_HEAD_DIM = 256


def check_call(call: AttentionCall) -> None:
    """Checks shapes, dtypes and devices of all tensors, and the window.

    Raises:
        ValueError: naming the argument.
    """
    q_name, k_name, v_name = call.names
    if call.is_global:
        _check_rows(call, {k_name: call.k, v_name: call.v})
        _check_slots(call, {q_name: call.q})
    else:
        _check_rows(call, {q_name: call.q, k_name: call.k, v_name: call.v})
        _check_window(call)
    _check_seed(call)


def check_gradients(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> None:
    """Checks what the backward of a checked call takes besides it.

    Raises:
        ValueError: naming the tensor.
    """
    like_q = {"d_out": d_out, "out": out}
    if call.is_global:
        _check_slots(call, like_q)
    else:
        _check_rows(call, like_q)
    dtype, device = lse_dtype(call.q.dtype), call.q.device
    for name, x in {"lse": lse, "d_lse": d_lse}.items():
        if x is not None and (x.shape != call.lse_shape or x.dtype != dtype or x.device != device):
            raise ValueError(
                f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}; give {call.lse_shape} of {dtype} on {device}."
            )


def _check_rows(call: AttentionCall, tensors: dict[str, Tensor]) -> None:
    """All must be of one shape ``[*mask rows, heads, head_dim]``, dtype and device."""
    mask, first = call.mask, call.k if call.is_global else call.q
    if first.dim() != mask.token_kind.dim() + 2 or not 1 <= first.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(
            f"q, k or v has shape {tuple(first.shape)}; give [*rows, heads, head_dim ≤ {_MAX_HEAD_DIM}]."
        )
    shape = (*mask.token_kind.shape, *first.shape[-2:])
    for name, x in tensors.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and the mask was built for rows {tuple(mask.token_kind.shape)}; "
                f"give {shape}, or another mask."
            )
        _check_kind(name, x, first.dtype, mask.device)


def _check_slots(call: AttentionCall, tensors: dict[str, Tensor]) -> None:
    """All must be ``[batch, max_globals, heads, head_dim]`` with the heads of k."""
    mask, k = call.mask, call.k
    shape = (mask.batch, mask.max_globals, *k.shape[-2:])
    for name, x in tensors.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; give [batch, max_globals, heads, head_dim] = {shape}."
            )
        _check_kind(name, x, k.dtype, mask.device)


def _check_window(call: AttentionCall) -> None:
    """Both sides go from 0 to the longest sequence, which is as good as unlimited."""
    most = call.mask.max_seqlen
    left, right = call.banded_window
    if not (0 <= left <= most and 0 <= right <= most):
        raise ValueError(f"window is ({left}, {right}); give 0 … max_seqlen = {most} on each side.")


def _check_seed(call: AttentionCall) -> None:
    """Dropout needs one int64 on the device of q."""
    seed, device = call.seed, call.q.device
    if not 0 <= call.dropout_p <= 1:
        raise ValueError(f"dropout_p is {call.dropout_p}; give a probability from 0 to 1.")
    if seed is None:
        if call.dropout_p > 0:
            raise ValueError(
                f"seed is None and dropout_p {call.dropout_p}; give an int64 tensor of one number."
            )
    elif seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed is {tuple(seed.shape)} of {seed.dtype} on {seed.device}; give one int64 on {device}."
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
