"""Checks that the arguments of a decoder's call fit its tokens; :mod:`led_model.checks` is for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from led_kernels.distributed.split_keys import SplitKeys
from led_model.checks import (
    TokenTables,
    check_binary,
    check_mask,
    describe,
    is_dense,
    is_inspectable,
    out_of_range,
)
from led_model.generation.cache import StaticKVCache
from led_model.modeling.layers import DecoderLayer
from led_model.modeling.module_list import ModuleList
from led_model.precision import autocast_dtype


class DecoderStack(TokenTables, Protocol):
    """Describes the decoder as these checks see it, since importing ``LEDDecoder`` would close a circle."""

    @property
    def layers(self) -> ModuleList[DecoderLayer]:
        """Returns the layers, from the first to the last."""


def check_decoder_call(
    hidden: Tensor,
    cross_keys_values: Any,
    encoder_hidden_states: Tensor | None,
    cross_mask: Any,
    attention_mask: Any,
    cache: Any,
    position: Any,
    stack: DecoderStack,
) -> None:
    """Checks the decoder's arguments against its embedded tokens ``hidden`` ``[batch, target, d_model]``.

    Raises:
        ValueError: naming the one that is of another batch, length, width, dtype or device.
        TypeError: for a cache of another kind.
    """
    batch, target, _ = hidden.shape
    if encoder_hidden_states is None:
        source = _check_cross_keys_values(cross_keys_values, hidden, stack)
    elif cross_keys_values is not None:
        raise ValueError("cross_keys_values and encoder_hidden_states are both given; give one of them.")
    else:
        source = encoder_hidden_states.shape[1]
        if encoder_hidden_states.shape[0] != batch:
            raise ValueError(
                f"decoder_input_ids has {batch} rows and the encoder's output {encoder_hidden_states.shape[0]}; "
                "give one for each document."
            )
    if isinstance(cross_mask, SplitKeys):
        if cross_mask.is_key.shape != (batch, source):
            raise ValueError(
                f"cross_mask is of {tuple(cross_mask.is_key.shape)} rows and the keys are {(batch, source)}; give that "
                "of the same rows."
            )
    elif cross_mask is not None and (
        not is_dense(cross_mask)
        or cross_mask.shape != (batch, 1, 1, source)
        or not (cross_mask.dtype == torch.bool or cross_mask.is_floating_point())
        or cross_mask.device != hidden.device
    ):
        raise ValueError(
            f"cross_mask {describe(cross_mask)}; give [batch, 1, 1, source] = {(batch, 1, 1, source)} on "
            f"{hidden.device}, bool or numbers to add to the scores."
        )
    max_positions = stack.embed_positions.weight.shape[0]
    if cache is None:
        check_mask("attention_mask", attention_mask, hidden, "the decoder's input")
        check_binary("attention_mask", attention_mask)
        count = target
    else:
        if not isinstance(cache, StaticKVCache):
            raise TypeError(f"cache is a {type(cache).__name__}; give a StaticKVCache or a BeamKVCache.")
        cache.check(hidden, attention_mask, stack)
        max_positions, count = min(max_positions, cache.max_length), cache.num_positions(target)
    if position is None:
        if cache is not None:
            raise ValueError(
                "position is missing; give int64 [target], where in the cache the tokens belong."
            )
        return
    if not is_dense(position) or position.dtype != torch.int64 or position.shape != (count,):
        raise ValueError(f"position {describe(position)}; give int64 [{count}], the places of the tokens.")
    if position.device != hidden.device:
        raise ValueError(
            f"position is on {position.device} and the decoder's input on {hidden.device}; move both to one device."
        )
    wrong = out_of_range(position, 0, max_positions - 1)
    if wrong is not None:
        raise ValueError(f"position holds {wrong}; give 0 to {max_positions - 1}, the places that there are.")
    if cache is not None and attention_mask is None and is_inspectable(position) and count:
        first = int(position.min())
        if first > 0 and cache.is_empty_at(first - 1):
            raise ValueError(
                f"position begins with {first} but the cache holds nothing at {first - 1}; write the places before it "
                "first, or hide them by attention_mask."
            )


def _check_cross_keys_values(pairs: Any, hidden: Tensor, stack: DecoderStack) -> int | None:
    """Checks each layer's keys and values and returns for how many tokens of the encoder they are.

    It is ``None`` where there are no layers.

    Raises:
        ValueError: naming ``cross_keys_values``.
    """
    batch = hidden.shape[0]
    if (
        not isinstance(pairs, Sequence)
        or len(pairs) != len(stack.layers)
        or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
    ):
        raise ValueError(
            f"cross_keys_values {describe(pairs)}; give what cross_keys_values(encoder_hidden_states) returns, "
            f"one pair for each of {len(stack.layers)} layers."
        )
    attention = stack.layers[0].encoder_attn if len(stack.layers) else None
    # Under autocast they are narrower than what they are made of.
    mixed = autocast_dtype(hidden.device) is not None
    dtype, source = stack.embed_positions.weight.dtype, None
    for pair in pairs:
        for tensor in pair:
            if source is None and is_dense(tensor) and tensor.dim() == 4:
                source = tensor.shape[2]
            assert attention is not None  # as there is a pair for each layer
            expected = (batch, attention.num_heads, source, attention.head_dim)
            if not is_dense(tensor) or tensor.shape != expected:
                raise ValueError(
                    f"cross_keys_values holds what {describe(tensor)}; give [batch, heads, source, head_dim] = "
                    f"{expected}, made from the encoder's output for the same documents."
                )
            if tensor.device != hidden.device or (tensor.dtype != dtype and not mixed):
                raise ValueError(
                    f"cross_keys_values holds what {describe(tensor)}; the model computes in {dtype} on "
                    f"{hidden.device}, make them by the model as it is now."
                )
    return source
