"""Lengthens tables of learned positions by copies of their own rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_positions(table: Tensor, num_positions: int, num_reserved: int = 0) -> Tensor:
    """Returns a new table of ``num_positions`` positions, whose old rows keep every bit.

    Positions beyond the table's are its own, repeated from the first on, so that neighbors stay neighbors but at the
    seams (Longformer, https://arxiv.org/abs/2004.05150, section 5).

    Args:
        table: ``[num_reserved + old positions, dim]``.
        num_positions: 1 or more; fewer than the table's cut it.
        num_reserved: leading rows that belong to no position, as those of padding. They stay.

    Returns:
        ``[num_reserved + num_positions, dim]``, with storage of its own.
    """
    old = table.shape[0] - num_reserved
    position = torch.arange(num_positions, device=table.device) % old
    return torch.cat([table[:num_reserved], table[num_reserved:][position]])


def resize_table(table: nn.Embedding, num_positions: int, num_reserved: int = 0) -> None:
    """Gives an embedding of positions a new parameter, by :func:`with_positions`."""
    with torch.no_grad():
        rows = with_positions(table.weight, num_positions, num_reserved)
    table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    table.num_embeddings = rows.shape[0]


def check_num_positions(name: str, num_positions: int) -> None:
    """Checks how many positions a caller asks for.

    Raises:
        TypeError: when it is no integer.
        ValueError: when it is not positive, with its ``name``.
    """
    if isinstance(num_positions, bool) or not isinstance(num_positions, int):
        raise TypeError(f"{name} is {num_positions!r}; give a whole number of tokens.")
    if num_positions < 1:
        raise ValueError(f"{name} is {num_positions}; give how many tokens a text may have, 1 or more.")
