"""Defines the tokenizer of LED checkpoints, BART's byte-level BPE, on the ``tokenizers`` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from led_model.checkpoint.hub import HUB_OPTIONS
from led_model.schema import check_names
from led_model.tokenization.base import TokenizerBase
from led_model.tokenization.batch_encoding import PADDING, BatchEncoding, pad_encoded, strategy_name
from led_model.tokenization.files import SPECIAL_TOKENS, read_tokenizer_files
from led_model.tokenization.text_checks import check_lengths, texts_of, token_ids_of
from led_model.tokenization.tokenizer_json import library_errors

if TYPE_CHECKING:
    from tokenizers import Encoding

_UNREADABLE = ("the tokenizer fails at a text or ids", "take the one that belongs to the checkpoint")
_TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")


class LEDTokenizer(TokenizerBase):
    """Turns texts into token ids, ``<s> text </s>`` or ``<s> text </s></s> pair </s>``, and back.

    Names, arguments and ids are those of transformers' ``LEDTokenizer``; padding is to the right, unless
    ``padding_side`` is set to "left". Each special token, ``bos_token`` to ``mask_token``, has its id in
    ``bos_token_id`` and so on. ``tokenizer`` is the underlying ``tokenizers.Tokenizer``, ``model_max_length``
    what the checkpoint says, or ``None``. Threads may share a tokenizer, and transformers' collators take it.

    >>> tokenizer = LEDTokenizer.from_pretrained(directory)
    >>> batch = tokenizer(["A text.", "A longer text."], padding=True, return_tensors="pt")
    >>> output = model(**batch)
    """

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, revision: str | None = None, **hub_options: Any
    ) -> LEDTokenizer:
        """Returns the tokenizer of a directory or hub id with tokenizer.json, or with vocab.json and merges.txt.

        Special and added tokens are those of tokenizer_config.json, special_tokens_map.json and
        added_tokens.json, where these files are there.

        Args:
            hub_options: ``cache_dir``, ``force_download``, ``local_files_only`` and ``token``, as
                ``huggingface_hub.hf_hub_download`` takes them.

        Raises:
            TypeError: for another argument.
            ImportError: without the ``tokenizers`` library (extra ``text``).
            FileNotFoundError: when neither form is there.
            ValueError: when a file cannot be read, or one contradicts another.
        """
        check_names(hub_options, HUB_OPTIONS, "from_pretrained")
        files = read_tokenizer_files(path_or_id, revision, hub_options)
        return cls(files.tokenizer, files.special_tokens, files.model_max_length)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        max_length: int | None = None,
        truncation: bool | str = False,
        padding: bool | str = False,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Encodes a text or a list of texts, each alone or with its pair.

        Args:
            text_target: texts that the model shall write, whose ids become ``labels``; without ``text`` they are
                encoded as texts are.
            max_length: longest sequence, special tokens included; default: ``model_max_length``.
            truncation: ``True`` or "longest_first" (of a pair, the longer part loses its end), "only_first" or
                "only_second".
            padding: ``True`` or "longest" of the batch, or "max_length"; always to the right.
            pad_to_multiple_of: padded length is rounded up to a multiple of this.
            split_special_tokens: read ``</s>`` in a text as any other text, not as the end.
            return_special_tokens_mask: whether ``special_tokens_mask`` is returned, 1 at special tokens and padding.
            return_offsets_mapping: whether ``offset_mapping`` is returned, each token's first character and the one
                after its last.
            return_tensors: "pt" for int64 tensors ``[batch, length]``, a single text as a batch of one.

        Returns:
            ``input_ids`` and ``attention_mask``, and what was asked for.

        Raises:
            ValueError: for settings that contradict each other, and lengths that do not fit.
        """
        check_lengths(max_length, pad_to_multiple_of)
        if text_target is not None:
            options = {
                "max_length": max_length,
                "truncation": truncation,
                "padding": padding,
                "pad_to_multiple_of": pad_to_multiple_of,
                "add_special_tokens": add_special_tokens,
                "split_special_tokens": split_special_tokens,
                "return_special_tokens_mask": return_special_tokens_mask,
                "return_offsets_mapping": return_offsets_mapping,
                "return_tensors": return_tensors,
            }
            targets = self(text_target, **options)
            if text is None:
                return targets
            return BatchEncoding({**self(text, text_pair, **options), "labels": targets["input_ids"]})
        if text is None:
            raise ValueError("text and text_target are both missing; give one of them.")
        single = isinstance(text, str)
        texts = texts_of("text", text)
        inputs: list[Any] = texts
        if text_pair is not None:
            pairs = texts_of("text_pair", text_pair)
            if len(pairs) != len(texts):
                raise ValueError(f"text_pair has {len(pairs)} texts for {len(texts)}; give as many.")
            inputs = list(zip(texts, pairs, strict=True))
        strategy = strategy_name("truncation", truncation, _TRUNCATION)
        how_to_pad = strategy_name("padding", padding, PADDING)
        if max_length is not None and strategy == "do_not_truncate" and how_to_pad != "max_length":
            raise ValueError("max_length has no effect; set truncation=True or padding='max_length'.")
        longest = None
        if strategy != "do_not_truncate":
            special = (
                self.tokenizer.num_special_tokens_to_add(text_pair is not None) if add_special_tokens else 0
            )
            longest = max_length = self._longest(max_length, special)
        errors = library_errors(
            f"max_length {max_length} cannot be met with truncation {strategy!r}",
            "raise it, or truncate 'longest_first'",
        )
        if strategy == "do_not_truncate":
            errors = library_errors(*_UNREADABLE)
        with errors, self._settings(longest, strategy, split_special_tokens):
            encodings = self.tokenizer.encode_batch(inputs, add_special_tokens=add_special_tokens)

        names = ["input_ids", "attention_mask"]
        names += ["special_tokens_mask"] if return_special_tokens_mask else []
        names += ["offset_mapping"] if return_offsets_mapping else []
        columns = {name: [_column(encoding, name) for encoding in encodings] for name in names}
        if single and return_tensors is None:
            columns = {name: rows[0] for name, rows in columns.items()}
        return self.pad(columns, how_to_pad, max_length, pad_to_multiple_of, return_tensors)

    def pad(
        self,
        encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        *,
        padding_side: str | None = None,
    ) -> BatchEncoding:
        """Pads sequences to one length: a batch, a list of single encodings, or a single one.

        ``input_ids`` gets the padding token, ``attention_mask`` (made if it is missing) 0,
        ``special_tokens_mask`` 1, ``offset_mapping`` (0, 0), and ``global_attention_mask`` -1, for 0 means
        local attention there, not "do not attend". Other entries stay as they are.

        Args: see :meth:`__call__`; ``padding_side`` is "right" or "left", by default the tokenizer's.

        Raises:
            ValueError: when an entry does not have as many elements as ``input_ids``, and for sequences of
                different lengths that shall become tensors.
        """
        side = padding_side or self.padding_side
        if side not in ("right", "left"):
            raise ValueError(f"padding_side is {side!r}; give 'right' or 'left'.")
        return pad_encoded(
            encoded, self.pad_token_id, padding, max_length, pad_to_multiple_of, return_tensors, side
        )

    def encode(self, text: str, text_pair: str | None = None) -> list[int]:
        """Returns the token ids of a text, or of a pair, with the special tokens around them."""
        for name, given in (("text", text), ("text_pair", "" if text_pair is None else text_pair)):
            if not isinstance(given, str):
                raise TypeError(f"{name} is a {type(given).__name__}; give a text.")
        with library_errors(*_UNREADABLE), self._settings():
            return self.tokenizer.encode(text, text_pair).ids

    def decode(self, token_ids: Iterable[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Returns the text of ``token_ids``, with or without the special tokens among them.

        Raises:
            ValueError: for numbers that cannot be ids, such as the -100 of labels.
        """
        ids = token_ids_of(token_ids)
        with library_errors(*_UNREADABLE):
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]] | Tensor, skip_special_tokens: bool = False
    ) -> list[str]:
        """Returns the text of each row of ``sequences``, as :meth:`decode` does."""
        if not isinstance(sequences, Iterable) or isinstance(sequences, str):
            raise TypeError(f"sequences is a {type(sequences).__name__}; give a list of rows of token ids.")
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt, without the added tokens, and returns their paths."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        return tuple(self.tokenizer.model.save(str(save_directory), filename_prefix))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes the vocabulary, tokenizer.json and tokenizer_config.json and returns their paths.

        :meth:`from_pretrained` and transformers read them back. The directory is made if need be; files of
        these names in it are replaced.
        """
        vocabulary = self.save_vocabulary(save_directory)
        backend, config = (
            Path(save_directory) / name for name in ("tokenizer.json", "tokenizer_config.json")
        )
        # The settings of another thread's call would be saved too.
        with self._settings():
            self.tokenizer.save(str(backend))
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        settings = {
            "tokenizer_class": "LEDTokenizer",
            "add_prefix_space": self.add_prefix_space,
            "added_tokens_decoder": {
                token_id: {flag: getattr(token, flag) for flag in flags}
                for token_id, token in self.tokenizer.get_added_tokens_decoder().items()
            },
            **{name: getattr(self, name) for name in SPECIAL_TOKENS},
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return (*vocabulary, str(backend), str(config))

    def _longest(self, max_length: int | None, special: int) -> int:
        """Returns the length to truncate to, which must leave room for the special tokens."""
        longest = self.model_max_length if max_length is None else max_length
        if longest is None:
            raise ValueError("truncation needs max_length, for the checkpoint's tokenizer does not say one.")
        if longest < special:
            raise ValueError(f"max_length is {longest}; give {special} or more, for the special tokens.")
        return longest


def _column(encoding: Encoding, name: str) -> list[Any]:
    """Returns an entry of one text by transformers' name for it."""
    attribute = {"input_ids": "ids", "offset_mapping": "offsets"}.get(name, name)
    return getattr(encoding, attribute)
