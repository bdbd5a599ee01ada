"""Builds the attention masks of the decoder: what its queries see of each other and of the encoder's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from led_model.precision import autocast_dtype


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
    scores = torch.where(attention_mask != 0, 0.0, torch.finfo(dtype).min)
    return scores.to(dtype)[:, None, None, :]


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
