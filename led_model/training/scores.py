"""Computes ROUGE, by the package rouge-score, of what a model has written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

_TYPES = ("rouge1", "rouge2", "rougeLsum")
# A word, or one character of a script that writes words without spaces between them.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class _Words:
    """Cuts a text into words, as rouge-score does with English, but keeps the letters of all languages."""

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Returns the words, those of English without their endings."""
        words = _WORD.findall(text.lower())
        return [
            token for word in words for token in (self._english.tokenize(word) if word.isascii() else [word])
        ]


def rouge(targets: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """Returns the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-Lsum, in percent, by rouge-score's names.

    Lines of a text count as its sentences in the last.
    """
    scorer = RougeScorer(list(_TYPES), tokenizer=_Words())
    scores = [scorer.score(target, text) for target, text in zip(targets, written, strict=True)]
    return {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in _TYPES}
