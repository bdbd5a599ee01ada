"""Token embeddings from ids or from the caller, checked before a kernel or a lookup would fail on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def embed(
    ids_name: str, ids: Tensor | None, embeds_name: str, embeds: Tensor | None, stack: nn.Module
) -> Tensor:
    """``[batch, length, d_model]``, from ids ``[batch, length]`` or as given, after :func:`check_inputs`."""
    check_inputs(ids_name, ids, embeds_name, embeds, stack)
    return embeds if ids is None else stack.embed_tokens(ids)


def check_inputs(
    ids_name: str, ids: Tensor | None, embeds_name: str, embeds: Tensor | None, stack: nn.Module
) -> None:
    """Holds ids or embeddings against the tables of ``stack``: ``embed_tokens`` and ``embed_positions``.

    Raises:
        ValueError: for both or neither given, another shape, ids outside the vocabulary, or more tokens than
            positions; with the argument's name.
    """
    if (ids is None) == (embeds is None):
        both = "missing" if ids is None else "given"
        raise ValueError(f"{ids_name} and {embeds_name} are both {both}; give one of them.")
    if ids is not None:
        _check_ids(ids_name, ids, stack.embed_tokens, stack.embed_positions)
        return
    positions, d_model = stack.embed_positions.weight.shape
    if embeds.dim() != 3 or embeds.shape[2] != d_model:
        raise ValueError(
            f"{embeds_name} has shape {tuple(embeds.shape)}; give [batch, length, d_model = {d_model}]."
        )
    _check_length(embeds_name, embeds.shape[1], positions)


def _check_ids(name: str, ids: Tensor, tokens: nn.Embedding, positions: nn.Embedding) -> None:
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; give integer ids as [batch, length]."
        )
    _check_length(name, ids.shape[1], positions.num_embeddings)
    # on a GPU the check would cost a sync, and there the lookup asserts by itself
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= tokens.num_embeddings:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} holds id {wrong}, outside the vocabulary of {tokens.num_embeddings}; "
                "use the tokenizer that belongs to the checkpoint."
            )


def _check_length(name: str, length: int, positions: int) -> None:
    if length > positions:
        raise ValueError(
            f"{name} has {length} tokens but the position table holds {positions}; cut or split the text."
        )
