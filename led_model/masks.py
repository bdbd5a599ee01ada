"""Builds the masks of a model: what the encoder's tokens are, and what the decoder's see of them and each other."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels import LongformerMask
from led_model.checks import check_mask, check_traceable
from led_model.packing import packed_lengths
from led_model.precision import autocast_dtype


def encoder_mask(
    name: str,
    given: Tensor,
    attention_mask: Tensor | None,
    global_attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_globals: int | None,
) -> LongformerMask:
    """Returns the mask of the encoder's input ``given``, which is called ``name``.

    Args:
        given: ids or embeddings, ``[batch, length]`` or, with ``cu_seqlens``, ``[total]``, and perhaps ``d_model``.
        attention_mask, global_attention_mask: as for ids.
        cu_seqlens: int ``[batch + 1]``, where packed sequences begin and end.
        max_globals: the most global tokens that a document may have.

    Raises:
        ValueError: for masks of another shape.
    """
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask and cu_seqlens are both given; packed sequences have no padding."
            )
        packed_lengths("cu_seqlens", cu_seqlens, given.shape[0], name)
        return LongformerMask.packed(
            cu_seqlens, max_globals=max_globals, global_attention_mask=global_attention_mask
        )
    check_mask("attention_mask", attention_mask, given, name)
    check_mask("global_attention_mask", global_attention_mask, given, name)
    if attention_mask is None:
        attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        if global_attention_mask is None:
            max_globals = max_globals or 0
    check_traceable("the number of global tokens is looked at", max_globals, "give max_globals")
    return LongformerMask.from_padding(attention_mask, global_attention_mask, max_globals)


def key_mask(attention_mask: Tensor) -> Tensor:
    """Returns which keys every query may see, bool ``[batch, 1, 1, keys]``.

    ``attention_mask`` is ``[batch, keys]``, nonzero for tokens.
    """
    return (attention_mask != 0)[:, None, None, :]


def causal_mask(position: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Returns which tokens each token sees, namely those up to itself that are no padding.

    Args:
        position: int64 ``[target]``, the places of the tokens.
        attention_mask: ``[batch, target]``, nonzero for tokens; default: all are tokens.

    Returns:
        bool ``[batch, 1, target, target]``, or ``[target, target]`` without an ``attention_mask``.
    """
    mask = position <= position[:, None]
    return mask if attention_mask is None else mask & key_mask(attention_mask)


def padding_scores(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to the scores of keys to hide padding, ``[batch, 1, 1, keys]``.

    ``attention_mask`` is ``[batch, keys]``, nonzero for tokens. The scores are finite, also in what autocast makes of
    ``dtype``, so that a document of only padding gives no NaN.
    """
    dtype = autocast_dtype(attention_mask.device) or dtype
    scores = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return scores.masked_fill(attention_mask == 0, torch.finfo(dtype).min)[:, None, None, :]


def cross_attention_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Returns what the cross-attention takes as its mask for decoding; ``None`` if all are tokens.

    ``attention_mask`` is ``[batch, source]``. Looking at its values costs one wait for a device, and a boolean mask or
    none is faster at every step.
    """
    mask = key_mask(attention_mask)
    all_present, none_empty = torch.stack([mask.all(), mask.any(-1).all()]).tolist()  # one sync
    if all_present:
        return None
    return mask if none_empty else padding_scores(attention_mask, dtype)
