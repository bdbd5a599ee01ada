"""Implements beam search with transformers' rules for candidates, ends and early stopping."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from led_model.generation.cache import BeamKVCache
from led_model.generation.step import Search

# This is added to the score of what may not be chosen. It is lower than what a low temperature or a power of a length
# makes of any other score, but unlike -inf it can be calculated with.
_BANNED = -1.0e30


@dataclass
class _Finished:
    """Holds the best sequences that have ended, per document, best first; places not yet taken score ``_BANNED``.

    ``sequences`` int64 ``[batch, beams, limit]``; ``scores`` float32, ``lengths`` int64 (new tokens) and
    ``taken`` bool, all ``[batch, beams]``.
    """

    sequences: Tensor
    scores: Tensor
    lengths: Tensor
    taken: Tensor

    def merged(self, others: _Finished) -> _Finished:
        """Returns the best of both, as many as there are beams."""
        beams = self.scores.shape[1]
        scores = torch.cat([self.scores, others.scores], dim=1)
        best = scores.topk(beams).indices
        columns = {
            f.name: torch.cat([getattr(self, f.name), getattr(others, f.name)], dim=1) for f in fields(self)
        }
        return _Finished(**{name: _gather_beams(column, best) for name, column in columns.items()})

    def unless(self, condition: Tensor, old: _Finished) -> _Finished:
        """Returns ``old`` where the 0-dim ``condition`` holds, else this."""
        return _Finished(
            **{
                f.name: torch.where(condition, getattr(old, f.name), getattr(self, f.name))
                for f in fields(self)
            }
        )


def beam_search(search: Search) -> tuple[Tensor, Tensor]:
    """Keeps the ``rows`` likeliest beginnings of each document and, of those that end, the best by score.

    The score is the sum of log-probabilities over ``new tokens ** length_penalty``. With ``do_sample``
    continuations are drawn instead of taken from the top.

    Returns:
        int64 ``[batch * num_return_sequences, length]``, prompt first and padded, best first for each
        document, and their scores, float32 ``[batch * num_return_sequences]``.
    """
    generation, eos, limit = search.generation, search.eos, search.limit
    (batch, prompt), beams, device = search.prompt.shape, search.rows, eos.device
    cache = search.step.cache
    # DecoderStep makes a StaticKVCache for one row only, which is never beam search.
    assert isinstance(cache, BeamKVCache)
    # These are enough that `beams` of them go on even if all likely tokens are ends.
    candidates = max(2, 1 + len(eos)) * beams
    # A padding id of 0 gives way to the first eos id, as in transformers.
    fill = (search.pad or generation.eos_token_ids[0]) if len(eos) else -1
    running = torch.full((batch, beams, limit), fill, dtype=torch.int64, device=device)
    running[:, :, :prompt] = search.prompt[:, None]
    running_scores = torch.zeros(batch, beams, device=device)
    running_scores[:, 1:] = _BANNED  # all beams are the same at first, so that only one may have children
    finished = _Finished(
        sequences=running,
        scores=torch.full((batch, beams), _BANNED, device=device),
        lengths=torch.zeros(batch, beams, dtype=torch.int64, device=device),
        taken=torch.zeros(batch, beams, dtype=torch.bool, device=device),
    )
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
    stopped = torch.zeros((), dtype=torch.bool, device=device)

    for length in range(prompt, limit):  # the length of the sequences so far
        new_tokens = length + 1 - prompt  # the number after this step
        logits = search.step(running[:, :, length - 1], length - 1)
        search.record_overflow(logits)
        log_probs = search.process(
            running[:, :, :length].flatten(0, 1), F.log_softmax(logits.float(), dim=-1)
        )
        vocab_size = log_probs.shape[1]
        candidates = min(candidates, beams * vocab_size)
        totals = (log_probs.view(batch, beams, vocab_size) + running_scores[..., None]).flatten(1)
        if generation.do_sample:
            if (exhausted := search.exhausted_rows(totals, improvable, above=_BANNED / 2)) is not None:
                totals = totals.masked_fill(exhausted, _BANNED)  # these documents are done
            chosen = search.draw(totals, candidates)
            # They are sorted, as only the first `beams` of them may end.
            scores, order = totals.gather(1, chosen).sort(dim=1, descending=True)
            chosen = chosen.gather(1, order)
        else:
            scores, chosen = totals.topk(candidates)
            search.exhausted_rows(scores, improvable, above=_BANNED / 2)
        parents = chosen // vocab_size
        sequences = _gather_beams(running, parents)
        sequences[:, :, length] = chosen % vocab_size
        ends = torch.isin(sequences[:, :, length], eos) | (length + 1 == limit)

        running_scores, going_on = (scores + ends * _BANNED).topk(beams)
        running = _gather_beams(sequences, going_on)
        cache.reorder(_gather_beams(parents, going_on), cache.positions[length - 1 : length])
        search.on_step(running[:, :, length].flatten())

        newly = ends & (torch.arange(candidates, device=device) < beams)  # the others only stand in for ends
        final = scores / new_tokens**generation.length_penalty
        if generation.early_stopping is True:
            final = final + finished.taken.all(1, keepdim=True) * _BANNED
        final = final + ~improvable * _BANNED + ~newly * _BANNED
        ended = _Finished(sequences, final, torch.full_like(chosen, new_tokens), newly)
        finished = finished.merged(ended).unless(stopped, finished)

        improvable = improvable & _can_improve(search, running_scores, finished, new_tokens)
        stopped = stopped | ~improvable.any()
        if generation.early_stopping is True:
            stopped = stopped | finished.taken.all()
        if search.should_stop(stopped, length):
            break

    best = slice(generation.num_return_sequences)
    longest = prompt + int(finished.lengths[:, best].max())
    return finished.sequences[:, best, :longest].flatten(0, 1), finished.scores[:, best].flatten()


def _can_improve(search: Search, running_scores: Tensor, finished: _Finished, new_tokens: int) -> Tensor:
    """Returns whether a document's best beam may still beat its worst finished sequence, bool ``[batch, 1]``.

    For a length penalty above 0 this is a guess, unless ``early_stopping`` is "never": then the longest sequence is
    assumed, which favors the beam most.
    """
    generation = search.generation
    if generation.early_stopping == "never" and generation.length_penalty > 0:
        new_tokens = search.limit - search.prompt.shape[1]
    best = running_scores[:, :1] / new_tokens**generation.length_penalty
    worst = torch.where(finished.taken, finished.scores.amin(1, keepdim=True), _BANNED)
    return (best > worst).any(1, keepdim=True)


def _gather_beams(rows: Tensor, indices: Tensor) -> Tensor:
    """Returns ``rows[b, indices[b]]`` for each document ``b``."""
    return rows.take_along_dim(indices.view(*indices.shape, *[1] * (rows.dim() - 2)), dim=1)
