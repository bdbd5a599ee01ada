"""Implements greedy search and sampling, whose rows do not depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor

from led_model.generation.step import Search


def sample(search: Search) -> Tensor:
    """Chooses the likeliest next token, or draws one, until all rows have ended or are full.

    Returns:
        int64 ``[batch * rows, length]``, prompt first; a row that has ended goes on with padding.
    """
    generation, eos, limit = search.generation, search.eos, search.limit
    batch, prompt = search.prompt.shape
    tokens = search.prompt.new_zeros(batch * search.rows, limit)
    tokens[:, :prompt] = search.prompt.repeat_interleave(search.rows, dim=0)
    ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    length_needed = torch.full_like(tokens[0, 0], prompt)
    for length in range(prompt, limit):
        scores = search.step(tokens[:, length - 1].view(batch, search.rows), length - 1)
        search.record_overflow(scores)
        if search.processors or generation.do_sample:
            scores = search.process(tokens[:, :length], scores.float())
            if (exhausted := search.exhausted_rows(scores, ~ended[:, None])) is not None:
                scores = scores.masked_fill(exhausted, 0.0)  # rows that have ended get padding anyway
        next_tokens = search.draw(scores, 1)[:, 0] if generation.do_sample else scores.argmax(-1)
        length_needed += ~ended.all()
        if len(eos):
            next_tokens = torch.where(ended, search.pad, next_tokens)
            ended = ended | torch.isin(next_tokens, eos)
        tokens[:, length] = next_tokens
        search.on_step(next_tokens)
        if len(eos) and search.should_stop(ended.all(), length):
            break
    return tokens[:, : int(length_needed)]
