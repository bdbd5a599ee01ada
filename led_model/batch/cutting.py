"""Chooses which pieces are read at once, by their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cut_batches(
    lengths: Sequence[int], batch_tokens: int, batch_size: int, batch_cost: int
) -> list[list[int]]:
    """Returns the indices of the pieces of each batch; pieces are in order, and batches in that of their first.

    Batches hold pieces of similar length, and are such that all of them together cost least: a batch costs its tokens,
    padding included, and ``batch_cost``.

    Args:
        lengths: tokens of each piece.
        batch_tokens: of a batch, padding included; a longer piece is alone.
        batch_size: pieces of a batch at most.
        batch_cost: tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    descending = np.array([lengths[index] for index in order], np.int64)
    # Of the first n pieces: what they cost at least, and where their last batch then begins.
    costs, begins = np.zeros(len(order) + 1), [0]
    for end in range(1, len(order) + 1):
        begin = np.arange(max(0, end - batch_size), end)
        rows = end - begin
        tokens = rows * descending[begin]
        cost = costs[begin] + tokens + batch_cost
        cost[(tokens > batch_tokens) & (rows > 1)] = np.inf
        best = int(cost.argmin())
        costs[end] = cost[best]
        begins.append(int(begin[best]))
    batches, end = [], len(order)
    while end:
        batches.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return sorted(batches)


def cut_in_turn(lengths: Sequence[int], batch_tokens: int, batch_size: int) -> list[list[int]]:
    """Returns the indices of the pieces of each batch, which are cut one after another, in the order that they have."""
    batches: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        rows = len(batches[-1]) + 1 if batches else 1
        if not batches or rows > batch_size or rows * longest > batch_tokens:
            batches.append([])
            longest = length
        batches[-1].append(index)
    return batches
