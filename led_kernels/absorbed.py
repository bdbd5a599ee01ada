"""This module computes global attention from hidden states, in place of a backend's kernel where that costs less.

With few global tokens it saves both projections of every token to global keys and values, and two tensors of that size.
It is a handful of torch matrix products, the same on every device, and has no backend.
:func:`led_kernels.projection.encoder_self_attention` chooses it, whatever backend is named.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from led_kernels.argument_checks import check_number
from led_kernels.arguments import (
    autocast,
    check_alike,
    check_float,
    check_q_global,
    seed_of,
    softmax_scale_of,
)
from led_kernels.call import lse_dtype
from led_kernels.eager import is_eager
from led_kernels.global_rows import packed_rows
from led_kernels.mask import LongformerMask
from led_kernels.philox import GLOBAL_STREAM, keep_mask


@overload
def absorbed_global_attention(
    hidden: Tensor,
    q_global: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def absorbed_global_attention(
    hidden: Tensor,
    q_global: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def absorbed_global_attention(
    hidden: Tensor,
    q_global: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes :func:`global_attention` from hidden states, without projecting every token to keys and values.

    With keys ``W_k x + b_k`` the scores are ``(W_kᵀ q)·x + const``, and the constant cancels in the softmax; the output
    is ``W_v (Σ p x) + b_v Σ p``. Exact algebra; it pays while ``max_globals < head_dim``.

    Args:
        hidden: ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` with a packed mask.
        q_global: ``[batch, max_globals, heads, head_dim]`` in the order of ``mask.global_index``.
        key_weight, value_weight: ``[heads * head_dim, d_model]``, as in ``nn.Linear``.
        value_bias: ``[heads * head_dim]`` or None.
        mask, softmax_scale, dropout_p, seed, return_lse: as in :func:`banded_attention`.

    Returns:
        out and, with ``return_lse``, lse, as of :func:`global_attention`. There is no key bias ``b_k`` here, so lse is
        of the scores without ``q·b_k``: a constant of the query, which every piece of a sequence leaves out alike.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
    """
    check_q_global(q_global, mask)
    check_float(hidden, "hidden")
    if hidden.shape[:-1] != mask.token_kind.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; give [*{tuple(mask.token_kind.shape)}, d_model] for this mask."
        )
    heads, head_dim, d_model = *q_global.shape[2:], hidden.shape[-1]
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        check_float(weight, name)
        if weight.shape != (heads * head_dim, d_model):
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; give [heads * head_dim, d_model] = "
                f"[{heads * head_dim}, {d_model}]."
            )
    if value_bias is not None:
        check_float(value_bias, "value_bias")
        if value_bias.shape != (heads * head_dim,):
            raise ValueError(f"value_bias has shape {tuple(value_bias.shape)}; give [{heads * head_dim}].")
    hidden, q_global, key_weight, value_weight = autocast(hidden, q_global, key_weight, value_weight)
    alike = {"q_global": q_global, "hidden": hidden, "key_weight": key_weight, "value_weight": value_weight}
    check_alike(alike)
    dropout_p = check_number(dropout_p, "dropout_p")
    scale, seed = softmax_scale_of(softmax_scale, q_global), seed_of(seed, dropout_p, hidden.device)
    args = hidden, q_global, key_weight, value_weight, value_bias, mask, scale, dropout_p, seed
    if torch.is_grad_enabled() and is_eager(hidden, q_global):
        # The copy of hidden without its padding is made again in the backward, and not kept.
        out, lse = checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False)
    else:
        out, lse = _attend(*args)
    return (out, lse) if return_lse else out


def _attend(
    hidden: Tensor,
    q_global: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes :func:`absorbed_global_attention` of checked arguments -> out, lse."""
    batch, max_globals, heads, head_dim = q_global.shape
    d_model = hidden.shape[-1]
    hidden, exists = _sequences(hidden, mask)  # [batch, seqlen, d_model], bool [batch, seqlen]
    slot = torch.arange(max_globals, device=hidden.device)
    # [batch, max_globals], which have a result: none in a sequence that is all padding
    is_row = (slot < mask.num_globals[:, None]) & exists.any(1, keepdim=True)
    q_global = q_global.masked_fill(~is_row[:, :, None, None], 0)

    q_absorbed = torch.einsum(
        "bghd,hdm->bghm",
        q_global * softmax_scale,
        key_weight.view(heads, head_dim, d_model),
    )  # [batch, max_globals, heads, d_model]
    scores = (q_absorbed.flatten(1, 2) @ hidden.transpose(1, 2)).view(batch, max_globals, heads, -1)
    scores = scores.to(lse_dtype(scores.dtype)).masked_fill(
        ~exists[:, None, None, :], torch.finfo(scores.dtype).min
    )
    p = scores.softmax(-1)
    lse = scores.logsumexp(-1).transpose(1, 2).masked_fill(~is_row[:, None], float("inf"))
    if seed is not None:
        batch_head = torch.arange(batch * heads, device=hidden.device).view(batch, 1, heads, 1)
        query = mask.global_position[:, :, None, None]
        key = torch.arange(hidden.shape[1], device=hidden.device) + mask.position_offset[:, None]
        keep = keep_mask(seed, query, key[:, None, None], batch_head, GLOBAL_STREAM, dropout_p)
        p = torch.where(keep, p / (1 - dropout_p) if dropout_p < 1 else p, 0)
    mixed = p.to(hidden.dtype).flatten(1, 2) @ hidden  # [batch, max_globals * heads, d_model]
    mixed = mixed.view(batch, max_globals, heads, d_model)
    out = torch.einsum("bghm,hdm->bghd", mixed, value_weight.view(heads, head_dim, d_model))
    if value_bias is not None:
        kept = p.sum(-1, keepdim=True).to(out.dtype)  # 1, except under dropout
        out = out + kept * value_bias.to(out.dtype).view(heads, head_dim)
    return out.masked_fill(~is_row[:, :, None, None], 0), lse


def _sequences(hidden: Tensor, mask: LongformerMask) -> tuple[Tensor, Tensor]:
    """Returns hidden as [batch, max_seqlen, d_model], and which rows are real.

    Rows of padding are selected to be 0, as 0 · NaN is NaN.
    """
    if not mask.is_packed:
        exists = mask.token_kind != 0
        return hidden.masked_fill(~exists[:, :, None], 0), exists
    position = torch.arange(mask.max_seqlen, device=hidden.device)
    exists = position < mask.seq_len[:, None]
    rows = packed_rows(torch.where(exists, position, 0), mask, hidden.shape[0])
    return hidden[rows].masked_fill(~exists[:, :, None], 0), exists
