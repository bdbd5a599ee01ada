"""Builds the rules that change the scores of the next token before one is chosen, in transformers' order.

Scores are float32 ``[rows, vocab_size]``: logits, or log-probabilities in beam search. Nothing here waits for
the device: which rules apply depends on the length alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from led_model.generation.generation_config import GenerationConfig

_ANY, _NONE = -1, -2  # they stand for a token: _ANY matches all tokens and _NONE matches none

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Takes the tokens so far, int64 ``[rows, length]``, and the scores; returns the new scores."""


def build_processors(
    generation: GenerationConfig, input_ids: Tensor, eos: Tensor, rows_per_document: int, prompt: int
) -> list[LogitsProcessor]:
    """Returns the rules that ``generation`` asks for, in the order in which they apply.

    Args:
        input_ids: the encoder's, int ``[batch, source]``.
        eos: int64 ``[any]``, the ids that end a sequence.
        rows_per_document: row ``r`` of the scores belongs to document ``r // rows_per_document``.
        prompt: number of tokens that the sequences begin with.
    """
    processors: list[LogitsProcessor] = []
    if generation.repetition_penalty != 1.0:
        processors.append(partial(_penalize_repetition, penalty=generation.repetition_penalty))
    if generation.no_repeat_ngram_size > 0:
        processors.append(partial(_ban_repeated_ngrams, size=generation.no_repeat_ngram_size))
    if 0 < generation.encoder_no_repeat_ngram_size <= input_ids.shape[1]:
        size = generation.encoder_no_repeat_ngram_size
        ngrams = input_ids.to(torch.int64).repeat_interleave(rows_per_document, dim=0).unfold(1, size, 1)
        processors.append(partial(_ban_ngrams, ngrams=ngrams))
    if generation.bad_words_ids:
        ends = {(token,) for token in generation.eos_token_ids}
        longest = generation.max_sequence_length(prompt)
        distinct = dict.fromkeys(map(tuple, generation.bad_words_ids))
        words = [list(word) for word in distinct if word not in ends and len(word) <= longest]
        processors.append(partial(_ban_words, groups=_by_length(words, input_ids.device)))
    if (least := generation.min_sequence_length(prompt)) > 0 and len(eos):
        processors.append(partial(_delay_end, min_length=least, eos=eos))
    if generation.forced_bos_token_id is not None:
        processors.append(partial(_force, length=1, token_ids=[generation.forced_bos_token_id]))
    if generation.forced_eos_token_ids:
        last = generation.max_sequence_length(prompt) - 1
        processors.append(partial(_force, length=last, token_ids=generation.forced_eos_token_ids))
    if generation.do_sample:
        # A beam needs one token that goes on, however many ends are likely.
        least = max(2, 1 + len(eos)) if generation.num_beams > 1 else 1
        if generation.temperature != 1.0:
            processors.append(partial(_divide, temperature=generation.temperature))
        if generation.top_k > 0:
            processors.append(partial(_keep_top_k, top_k=max(generation.top_k, least)))
        if generation.top_p < 1.0:
            processors.append(partial(_keep_top_p, top_p=generation.top_p, least=least))
    return processors


def _penalize_repetition(tokens: Tensor, scores: Tensor, *, penalty: float) -> Tensor:
    """Divides the scores of tokens that are there (CTRL, https://arxiv.org/abs/1909.05858, section 4.1).

    Negative scores are multiplied instead.
    """
    repeated = scores.gather(1, tokens)
    return scores.scatter(1, tokens, torch.where(repeated < 0, repeated * penalty, repeated / penalty))


def _ban_repeated_ngrams(tokens: Tensor, scores: Tensor, *, size: int) -> Tensor:
    if tokens.shape[1] < size:
        return scores
    return _ban_ngrams(tokens, scores, ngrams=tokens.unfold(1, size, 1))


def _ban_ngrams(tokens: Tensor, scores: Tensor, *, ngrams: Tensor) -> Tensor:
    """Bans the last token of each n-gram that is about to be completed; ``ngrams`` is int64 ``[rows, count, size]``."""
    length, size = tokens.shape[1], ngrams.shape[2]
    if length < size - 1:
        return scores
    ending = tokens[:, None, length - size + 1 :]  # [rows, 1, size - 1]
    completed = (ngrams[..., :-1] == ending).all(-1)
    hits = torch.zeros_like(scores).scatter_add_(1, ngrams[..., -1], completed.to(scores.dtype))
    return scores.masked_fill(hits > 0, -math.inf)


def _by_length(words: Sequence[list[int]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Groups words of similar length: all but their last token ``[words, longest - 1]``, and the last ``[words]``.

    Shorter ones are filled on the left with ``_ANY``; lengths up to each power of two are one group, so that words of
    a thousand lengths are few operations at a step.
    """
    groups = defaultdict(list)
    for word in words:
        groups[(len(word) - 1).bit_length()].append(word)
    stacked = []
    for group in groups.values():
        longest = max(map(len, group))
        rows = [[_ANY] * (longest - len(word)) + word for word in group]
        stacked.append(torch.tensor(rows, dtype=torch.int64, device=device))
    return [(group[:, :-1], group[:, -1]) for group in stacked]


def _ban_words(tokens: Tensor, scores: Tensor, *, groups: list[tuple[Tensor, Tensor]]) -> Tensor:
    length = tokens.shape[1]
    for prefixes, last in groups:
        width = prefixes.shape[1]
        # A word longer than the sequence is compared with what is no token.
        ending = F.pad(tokens[:, max(0, length - width) :], (max(0, width - length), 0), value=_NONE)
        begun = ((ending[:, None] == prefixes) | (prefixes == _ANY)).all(-1)  # [rows, words]
        hits = torch.zeros_like(scores).index_add_(1, last, begun.to(scores.dtype))
        scores = scores.masked_fill(hits > 0, -math.inf)
    return scores


def _delay_end(tokens: Tensor, scores: Tensor, *, min_length: int, eos: Tensor) -> Tensor:
    return scores.index_fill(1, eos, -math.inf) if tokens.shape[1] < min_length else scores


def _force(tokens: Tensor, scores: Tensor, *, length: int, token_ids: list[int]) -> Tensor:
    if tokens.shape[1] != length:
        return scores
    scores = torch.full_like(scores, -math.inf)
    scores[:, token_ids] = 0
    return scores


def _divide(tokens: Tensor, scores: Tensor, *, temperature: float) -> Tensor:
    return scores / temperature


def _keep_top_k(tokens: Tensor, scores: Tensor, *, top_k: int) -> Tensor:
    lowest = scores.topk(min(top_k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < lowest, -math.inf)


def _keep_top_p(tokens: Tensor, scores: Tensor, *, top_p: float, least: int) -> Tensor:
    """Keeps the nucleus of the distribution (https://arxiv.org/abs/1904.09751, section 3.1)."""
    ascending, order = scores.sort()
    unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    unlikely[:, -least:] = False
    return scores.masked_fill(unlikely.scatter(1, order, unlikely), -math.inf)
