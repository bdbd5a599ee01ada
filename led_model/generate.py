"""Greedy generation with transformers' meaning of every length, start and stop setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from led_model.cache import StaticKVCache

if TYPE_CHECKING:
    from led_model.model import LEDForConditionalGeneration


@torch.no_grad()
def greedy_generate(
    model: LEDForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    global_attention_mask: Tensor | None = None,
    encoded: Tensor | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    **settings: Any,
) -> Tensor:
    """The most likely next token, again and again, over a static cache.

    Args:
        input_ids: int ``[batch, source]``.
        attention_mask: ``[batch, source]``, nonzero for tokens; default: all but the padding id.
        global_attention_mask: ``[batch, source]``, 1 for tokens that all others see. Usually the first.
        encoded: ``[batch, source, d_model]``, the encoder's output for ``input_ids`` if it is at hand.
        on_token: called after each step with its tokens, int64 ``[batch]``.
        settings: fields of :class:`GenerationConfig` that replace the checkpoint's, ``max_new_tokens=256``.

    Returns:
        int64 ``[batch, length]``, start token first; a sequence that has ended goes on with padding.

    Raises:
        ValueError: when the length asked for is 0 or exceeds the decoder's position table.
        TypeError: for a setting that is no field of :class:`GenerationConfig`.
    """
    config = model.config
    generation = replace(model.generation_config, **settings)
    if "max_length" in settings and "max_new_tokens" not in settings:
        generation.max_new_tokens = None  # the caller's limit wins over the checkpoint's
    limit = generation.length_limit()
    positions = config.max_decoder_position_embeddings
    if limit > positions + 1:
        raise ValueError(
            f"max_new_tokens or max_length asks for {limit - 1} new tokens but the decoder has {positions} "
            f"positions; give max_new_tokens of at most {positions}."
        )
    if limit < 2:
        raise ValueError(
            f"max_new_tokens or max_length allows {limit - 1} new tokens; give max_new_tokens of 1 or more."
        )
    eos = torch.tensor(generation.eos_token_ids, dtype=torch.int64, device=input_ids.device)
    pad = generation.pad_token_id
    if pad is None and len(eos):
        pad = int(eos[0])  # as transformers does
    if attention_mask is None:
        attention_mask = _mask_from_padding(input_ids, generation.pad_token_id, generation.eos_token_ids)

    batch = input_ids.shape[0]
    if encoded is None:
        encoded = model.led.encode(input_ids, attention_mask, global_attention_mask)
    cross_keys_values = model.led.decoder.cross_keys_values(encoded)
    cache = StaticKVCache(config, batch, limit - 1, dtype=encoded.dtype, device=encoded.device)
    del encoded  # the cross keys and values are all that the decoder needs of it

    tokens = input_ids.new_full((batch, limit), generation.decoder_start_token_id, dtype=torch.int64)
    ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for length in range(1, limit):
        hidden = model.led.decoder(
            tokens[:, length - 1 : length],
            cross_keys_values,
            cross_mask=attention_mask,
            cache=cache,
            position=cache.slots[length - 1 : length],
        )
        next_tokens = model.logits(hidden[:, -1]).argmax(-1)
        if length == 1 and generation.forced_bos_token_id is not None:
            next_tokens.fill_(generation.forced_bos_token_id)
        if length == limit - 1 and generation.forced_eos_token_ids:
            next_tokens.fill_(min(generation.forced_eos_token_ids))  # argmax of equal scores: the lowest id
        if len(eos):
            next_tokens = torch.where(ended, pad, next_tokens)
            ended = ended | torch.isin(next_tokens, eos)
        tokens[:, length] = next_tokens
        if on_token is not None:
            on_token(next_tokens)
        if ended.all():
            return tokens[:, : length + 1]
    return tokens


def _mask_from_padding(input_ids: Tensor, pad: int | None, eos: list[int]) -> Tensor:
    """Everything but padding, unless padding cannot be told from the end of a sequence."""
    if pad is None or pad in eos:
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)
