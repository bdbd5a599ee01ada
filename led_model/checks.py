"""Whether a call's tensors go with each other: told before a kernel or a lookup would fail on them, or not fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from led_kernels.eager import is_eager

if TYPE_CHECKING:
    from led_model.cache import StaticKVCache


def embed(
    ids_name: str,
    ids: Tensor | None,
    embeds_name: str,
    embeds: Tensor | None,
    stack: nn.Module,
    one_position_each: bool = True,
) -> Tensor:
    """``[batch, length, d_model]``, from ids ``[batch, length]`` or as given, after :func:`check_inputs`."""
    check_inputs(ids_name, ids, embeds_name, embeds, stack, one_position_each)
    return embeds if ids is None else stack.embed_tokens(ids)


def check_inputs(
    ids_name: str,
    ids: Tensor | None,
    embeds_name: str,
    embeds: Tensor | None,
    stack: nn.Module,
    one_position_each: bool = True,
) -> None:
    """Holds ids or embeddings against the tables of ``stack``: ``embed_tokens`` and, where each token has a
    position of its own, ``embed_positions``.

    Raises:
        ValueError: for both or neither given, another shape, ids outside the vocabulary, or more tokens than
            positions; with the argument's name.
    """
    if (ids is None) == (embeds is None):
        both = "missing" if ids is None else "given"
        raise ValueError(f"{ids_name} and {embeds_name} are both {both}; give one of them.")
    positions, d_model = (
        stack.embed_positions.weight.shape
    )  # what the table has now, not what it was built with
    if ids is not None:
        check_ids(ids_name, ids, stack.embed_tokens)
    elif not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[2] != d_model:
        raise ValueError(f"{embeds_name} {_is(embeds)}; give [batch, length, d_model = {d_model}].")
    name, given = (embeds_name, embeds) if ids is None else (ids_name, ids)
    if one_position_each and given.shape[1] > positions:
        raise ValueError(
            f"{name} has {given.shape[1]} tokens but the position table holds {positions}; cut or split the text."
        )


def check_ids(name: str, ids: Any, tokens: nn.Embedding) -> None:
    """Integer ``[batch, length]`` inside the vocabulary of the table ``tokens``.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} {_is(ids)}; give integer ids as a tensor [batch, length].")
    size = tokens.weight.shape[0]
    wrong = _outside(ids, size)
    if wrong is not None:
        raise ValueError(
            f"{name} holds id {wrong}, outside the vocabulary of {size}; "
            "use the tokenizer that belongs to the checkpoint."
        )


def check_mask(name: str, mask: Any, shape: Sequence[int], of: str) -> None:
    """``mask`` is ``None`` or has the shape ``[batch, length]`` of the argument ``of``.

    Raises:
        ValueError: naming both.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != torch.Size(shape)):
        raise ValueError(f"{name} {_is(mask)}; give a tensor {tuple(shape)}, as {of} has.")


def check_encoded(encoded: Any, input_ids: Tensor, table: nn.Embedding) -> None:
    """The encoder's output for ``input_ids``, for a model whose embeddings are ``table``.

    Raises:
        ValueError: for another shape or dtype, or a document too many.
    """
    shape = (*input_ids.shape, table.weight.shape[1])
    if not isinstance(encoded, Tensor) or encoded.shape != shape:
        raise ValueError(
            f"encoded {_is(encoded)}; give [batch, source, d_model] = {shape}, the encoder's output for input_ids."
        )
    mixed = torch.is_autocast_enabled(encoded.device.type)
    if not encoded.is_floating_point() or (encoded.dtype != table.weight.dtype and not mixed):
        raise ValueError(
            f"encoded is {encoded.dtype} and the model {table.weight.dtype}; convert one of them."
        )


def check_decoder_call(
    hidden: Tensor,
    cross_keys_values: Any,
    cross_mask: Any,
    attention_mask: Any,
    cache: StaticKVCache | None,
    position: Any,
    stack: nn.Module,
) -> None:
    """Holds the decoder's arguments against its embedded tokens ``hidden`` ``[batch, target, d_model]``.

    Raises:
        ValueError: naming the one that is of another batch, length or width.
    """
    batch, target, d_model = hidden.shape
    if not isinstance(cross_keys_values, Sequence) or len(cross_keys_values) != len(stack.layers):
        raise ValueError(
            f"cross_keys_values {_is(cross_keys_values)}; give what cross_keys_values(encoded) returns, "
            f"one pair for each of {len(stack.layers)} layers."
        )
    heads = stack.layers[0].encoder_attn.num_heads if len(stack.layers) else 0
    source = None
    for pair in cross_keys_values:
        for tensor in pair:
            if source is None and isinstance(tensor, Tensor) and tensor.dim() == 4:
                source = tensor.shape[2]
            expected = (batch, heads, source, d_model // heads)
            if not isinstance(tensor, Tensor) or tensor.shape != expected:
                raise ValueError(
                    f"cross_keys_values holds what {_is(tensor)}; give [batch, heads, source, head_dim] = "
                    f"{expected}, made from the encoder's output for the same documents."
                )
    if cross_mask is not None and (
        not isinstance(cross_mask, Tensor) or cross_mask.shape != (batch, 1, 1, source)
    ):
        raise ValueError(
            f"cross_mask {_is(cross_mask)}; give [batch, 1, 1, source] = {(batch, 1, 1, source)}."
        )
    places = stack.embed_positions.weight.shape[0]
    if cache is None:
        check_mask("attention_mask", attention_mask, (batch, target), "the decoder's input")
        count = target
    else:
        cache.check(batch, attention_mask, stack)
        places, count = min(places, cache.max_length), cache.positions_of(target)
    if position is None:
        if cache is not None:
            raise ValueError(
                "position is missing; give int64 [target], where in the cache the tokens belong."
            )
        return
    if not isinstance(position, Tensor) or position.dtype != torch.int64 or position.shape != (count,):
        raise ValueError(f"position {_is(position)}; give int64 [{count}], the places of the tokens.")
    wrong = _outside(position, places)
    if wrong is not None:
        raise ValueError(f"position holds {wrong}; give 0 to {places - 1}, the places that there are.")


def _outside(values: Tensor, size: int) -> int | None:
    """A value that is not in ``[0, size)``. On a GPU that would cost a sync, and there the lookup asserts by itself."""
    if values.device.type != "cpu" or not values.numel() or not is_eager(values):
        return None
    low, high = (int(x) for x in values.aminmax())
    return low if low < 0 else high if high >= size else None


def _is(value: Any) -> str:
    """What an argument is, to be said of it: its dtype and shape, or the type of what is no tensor."""
    if isinstance(value, Tensor):
        return f"is {value.dtype} of shape {tuple(value.shape)}"
    return f"is a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
