"""Defines the rules by which tokens of a document become global: functions of its ids, which can be pickled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from led_model.schema import check_values, integer, list_of

GlobalRule = Callable[[Tensor], Tensor]
"""A function of a document's ids, int64 ``[seqlen]``, that returns which are global, bool ``[seqlen]``."""

_NAMES = ("first", "question", "separators", "none")


@dataclass(frozen=True)
class FirstTokens:
    """Marks the first ``count`` tokens: 1 is the rule for summaries, 0 leaves all tokens local."""

    count: int = 1

    def __post_init__(self) -> None:
        check_values(vars(self), {"count": integer(0)})

    def __call__(self, input_ids: Tensor) -> Tensor:
        return torch.arange(input_ids.shape[0]) < self.count


@dataclass(frozen=True)
class EveryKthToken:
    """Marks the first token and every ``k``-th after it."""

    k: int

    def __post_init__(self) -> None:
        check_values(vars(self), {"k": integer(1)})

    def __call__(self, input_ids: Tensor) -> Tensor:
        return torch.arange(input_ids.shape[0]) % self.k == 0


@dataclass(frozen=True)
class TokensWithId:
    """Marks the tokens that have one of ``token_ids``, as separators of sentences or documents do."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        check_values(vars(self), {"token_ids": list_of(integer(0), "token ids", least=1)})

    def __call__(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids, torch.tensor(self.token_ids))


@dataclass(frozen=True)
class QuestionTokens:
    """Marks the tokens before the first ``separator_id``: the question of ``<s> question </s></s> document </s>``.

    A tokenizer makes such ids of ``tokenizer(question, document)``. The separators themselves stay local, as in
    transformers' question answering and in ``led answer``.

    Raises:
        ValueError: for ids in which nothing follows the first separator: a document alone would all be a question.
    """

    separator_id: int

    def __post_init__(self) -> None:
        check_values(vars(self), {"separator_id": integer(0)})

    def __call__(self, input_ids: Tensor) -> Tensor:
        is_separator = input_ids == self.separator_id
        past_first = is_separator.cumsum(0) > 0
        if not bool((past_first & ~is_separator).any()):
            raise ValueError(
                f"nothing follows a separator of id {self.separator_id}; encode question and document as a pair, "
                "tokenizer(question, document)."
            )
        return ~past_first


@dataclass(frozen=True)
class AnyOf:
    """Marks the tokens that at least one of ``rules`` marks."""

    rules: tuple[GlobalRule, ...]

    def __call__(self, input_ids: Tensor) -> Tensor:
        return torch.stack([rule(input_ids) for rule in self.rules]).any(0)


def rule_of(global_tokens: Any, tokenizer: Any) -> GlobalRule:
    """Returns the rule that ``global_tokens`` names, with the separators of ``tokenizer``.

    Args:
        global_tokens: "first", "question", "separators" (``<doc-sep>`` where the tokenizer has it, else its
            ``sep_token``) or "none"; how many of the first tokens; a function of the ids; or a list of these, whose
            tokens are then all global.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name, an empty list, and a tokenizer without the separator.
    """
    if isinstance(global_tokens, str):
        return _rule_by_name(global_tokens, tokenizer)
    if isinstance(global_tokens, int) and not isinstance(global_tokens, bool):
        return FirstTokens(global_tokens)
    if callable(global_tokens):
        return global_tokens
    if not isinstance(global_tokens, Sequence):
        raise TypeError(
            f"global_tokens is a {type(global_tokens).__name__}; give one of {', '.join(_NAMES)}, a number of first "
            "tokens, a function of the ids, or a list of these."
        )
    if not global_tokens:
        raise ValueError("global_tokens is an empty list; give 'none' for local tokens only.")
    return AnyOf(tuple(rule_of(rule, tokenizer) for rule in global_tokens))


def _rule_by_name(name: str, tokenizer: Any) -> GlobalRule:
    if name not in _NAMES:
        raise ValueError(f"global_tokens is {name!r}; give one of {', '.join(_NAMES)}.")
    if name in ("first", "none"):
        return FirstTokens(int(name == "first"))
    separator = document_separator(tokenizer) if name == "separators" else None
    if separator is None:
        separator = tokenizer.sep_token_id
    if separator is None:
        raise ValueError(f"global_tokens is {name!r} and the tokenizer has no sep_token; set one.")
    return QuestionTokens(separator) if name == "question" else TokensWithId((separator,))


def document_separator(tokenizer: Any) -> int | None:
    """Returns the id of PRIMERA's ``<doc-sep>`` in this library's tokenizer or one of transformers, or ``None``."""
    token_id = tokenizer.convert_tokens_to_ids("<doc-sep>")
    return None if token_id == tokenizer.unk_token_id else token_id
