"""Defines the base of the tokenizer: its special tokens, its vocabulary, and the library's tokenizer behind it."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

from led_model.tokenization.files import SPECIAL_TOKENS
from led_model.tokenization.fork_safe import new_lock

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenizerBase:
    """Holds special tokens and their ids, and a ``tokenizers.Tokenizer`` that threads and processes may share."""

    bos_token: str
    eos_token: str
    sep_token: str
    cls_token: str
    unk_token: str
    pad_token: str
    mask_token: str
    bos_token_id: int
    eos_token_id: int
    sep_token_id: int
    cls_token_id: int
    unk_token_id: int
    pad_token_id: int
    mask_token_id: int

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        model_max_length: int | None = None,
    ) -> None:
        """Takes over ``tokenizer``, and replaces its truncation, its padding and its special tokens around a text.

        Args:
            special_tokens: ``{"pad_token": "<pad>", …}`` where they are not BART's; all in the vocabulary.
        """
        from tokenizers import processors

        self.tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.padding_side = "right"
        self._lock = new_lock()
        for name, token in (SPECIAL_TOKENS | dict(special_tokens or {})).items():
            setattr(self, name, token)
            setattr(self, f"{name}_id", tokenizer.token_to_id(token))
        # A tokenizer.json may ask for truncation and padding, which a whole document must not get.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = processors.RobertaProcessing(
            (self.sep_token, self.sep_token_id),
            (self.cls_token, self.cls_token_id),
            add_prefix_space=self.add_prefix_space,
        )

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_lock"}
        # The settings of another thread's call would be copied too.
        with self._settings():
            return state | {"tokenizer": copy.deepcopy(self.tokenizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=new_lock())

    def __len__(self) -> int:
        """Returns how many tokens have an id, added ones included: the rows that an embedding needs."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens of the BPE alone."""
        return self.tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def add_prefix_space(self) -> bool:
        """Returns whether a text is read as if a space preceded it."""
        return getattr(self.tokenizer.pre_tokenizer, "add_prefix_space", False)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token of the vocabulary or of the added ones, ``None`` when there is no such token."""
        if not isinstance(token, str):
            raise TypeError(f"token is a {type(token).__name__}; give a text.")
        return self.tokenizer.token_to_id(token)

    @property
    def doc_sep_token_id(self) -> int | None:
        """Returns the id of ``<doc-sep>``, which PRIMERA puts between documents; ``None`` in other vocabularies."""
        return self.token_id("<doc-sep>")

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Returns the ids of tokens, and that of the unknown token for tokens that are not there."""
        if isinstance(tokens, str):
            token_id = self.token_id(tokens)
            return self.unk_token_id if token_id is None else token_id
        if not isinstance(tokens, Iterable):
            raise TypeError(f"tokens is a {type(tokens).__name__}; give a token or a list of tokens.")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def get_special_tokens_mask(
        self, token_ids: Sequence[int], already_has_special_tokens: bool = True
    ) -> list[int]:
        """Returns 1 for special tokens in ``token_ids``, which include them already, and 0 for others.

        Raises:
            ValueError: for ids to which special tokens would still have to be added.
        """
        if not already_has_special_tokens:
            raise ValueError(
                "already_has_special_tokens is False; ask for return_special_tokens_mask instead."
            )
        added = self.tokenizer.get_added_tokens_decoder().items()
        special = {token_id for token_id, token in added if token.special}
        special |= {getattr(self, f"{name}_id") for name in SPECIAL_TOKENS}
        return [int(token_id in special) for token_id in token_ids]

    @contextmanager
    def _settings(
        self,
        longest: int | None = None,
        truncation: str = "longest_first",
        split_special_tokens: bool = False,
    ) -> Generator[None, None, None]:
        """Gives the library's tokenizer these settings for one call, which truncates only if ``longest`` is given.

        They belong to it and not to a call, so that one thread at a time may have its own.
        """
        with self._lock:
            self.tokenizer.no_truncation()
            if longest is not None:
                self.tokenizer.enable_truncation(longest, strategy=truncation)
            self.tokenizer.encode_special_tokens = split_special_tokens
            try:
                yield
            finally:
                self.tokenizer.no_truncation()
                self.tokenizer.encode_special_tokens = False
