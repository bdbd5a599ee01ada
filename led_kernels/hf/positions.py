"""Lengthens the tables of positions of LED and Longformer models of transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.led.modeling_led import LEDDecoder, LEDEncoder
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from led_kernels.positions import check_num_positions, resize_table

# One number a position, [1, positions], in embeddings of RoBERTa.
_BUFFERS = ("position_ids", "token_type_ids")


class _Table(NamedTuple):
    """A table of positions, the module with its config, the setting there, and what else counts positions.

    ``num_reserved`` rows belong to no position. ``counts`` is an attribute of ``owner``, if there is one.
    """

    table: nn.Embedding
    owner: Any  # releases declare different attributes
    setting: str
    counts: str | None = None
    num_reserved: int = 0


def resize_position_embeddings(
    model: nn.Module, max_positions: int | None = None, *, max_decoder_positions: int | None = None
) -> None:
    """Lets texts have ``max_positions`` tokens, and what LED writes ``max_decoder_positions``.

    Old positions keep every bit; new ones are copies of them, repeated (Longformer, https://arxiv.org/abs/2004.05150),
    and want training on long texts. ``model.config`` says the new numbers: for Longformer, as for RoBERTa,
    ``max_position_embeddings`` also counts the ``pad_token_id + 1`` rows that belong to padding. The parameters are
    new ones: build the optimizer afterwards. Fewer positions cut the tables.

    Args:
        model: any module that holds an LED, a Longformer, or a RoBERTa with Longformer's attention; changed in place.

    Raises:
        TypeError: for a number that is no integer.
        ValueError: for one that is not positive, for none, for a model that has no such table, and for a table whose
            numbers are elsewhere (offloaded).
    """
    if max_positions is None and max_decoder_positions is None:
        raise ValueError("max_positions and max_decoder_positions are both missing; give one of them.")
    planned: list[tuple[_Table, int]] = []
    for name, number, find in (
        ("max_positions", max_positions, _encoder_tables),
        ("max_decoder_positions", max_decoder_positions, _decoder_tables),
    ):
        if number is None:
            continue
        check_num_positions(name, number)
        found = find(model)
        if not found:
            raise ValueError(f"{name} is given and model holds no table of such positions; leave it out.")
        planned += [(table, number) for table in found]
    if any(table.table.weight.is_meta for table, _ in planned):
        raise ValueError(
            "model has a table of positions on the meta device; load it whole, without offloading."
        )
    for table, number in planned:
        resize_table(table.table, number, table.num_reserved)
        rows = number + table.num_reserved
        if table.counts is not None:
            setattr(table.owner, table.counts, rows)
        _set_in_configs(model, table.owner, table.setting, rows)
        for name in _BUFFERS:
            _resize_buffer(getattr(table.owner, "embeddings", None), name, rows)


def _encoder_tables(model: nn.Module) -> list[_Table]:
    """Returns the tables of positions of what an LED or a Longformer reads."""
    found = [
        _Table(module.embed_positions, module, "max_encoder_position_embeddings", "max_source_positions")
        for module in model.modules()
        if isinstance(module, LEDEncoder)
    ]
    for owner in model.modules():
        embeddings = owner._modules.get("embeddings")  # wrappers have it as an attribute, too
        table = getattr(embeddings, "position_embeddings", None)
        is_long = any(isinstance(part, LongformerSelfAttention) for part in owner.modules())
        if isinstance(table, nn.Embedding) and is_long:
            # Rows of padding come first in RoBERTa and Longformer, and BERT has none.
            padding = getattr(embeddings, "padding_idx", None)
            num_reserved = padding + 1 if isinstance(padding, int) else 0
            found.append(_Table(table, owner, "max_position_embeddings", num_reserved=num_reserved))
    return found


def _decoder_tables(model: nn.Module) -> list[_Table]:
    """Returns the tables of positions of what an LED writes."""
    return [
        _Table(module.embed_positions, module, "max_decoder_position_embeddings", "max_target_positions")
        for module in model.modules()
        if isinstance(module, LEDDecoder)
    ]


def _resize_buffer(embeddings: nn.Module | None, name: str, rows: int) -> None:
    """Gives a buffer ``[1, positions]`` of counted or of equal numbers ``rows`` positions, if there is one."""
    buffer = getattr(embeddings, name, None)
    if isinstance(buffer, torch.Tensor):
        counted = torch.arange(rows, dtype=buffer.dtype, device=buffer.device)[None]
        setattr(embeddings, name, counted if name == "position_ids" else torch.zeros_like(counted))


def _set_in_configs(model: nn.Module, owner: nn.Module, setting: str, value: int) -> None:
    """Sets a value in the config of ``owner`` and in those of its kind around it, which are mostly one object."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(owner.config) and any(part is owner for part in module.modules()):
            setattr(config, setting, value)
