"""BART's byte-level BPE, which LED checkpoints use, on the ``tokenizers`` library."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from led_model.checkpoint.hub import HUB_OPTIONS
from led_model.schema import check_names
from led_model.tokenization.batch_encoding import PADDING, BatchEncoding, pad_encoded, strategy_name
from led_model.tokenization.files import SPECIAL_TOKENS, read_tokenizer_files
from led_model.tokenization.fork_safe import new_lock
from led_model.tokenization.text_checks import check_lengths, texts_of, token_ids_of
from led_model.tokenization.tokenizer_json import library_errors

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_UNREADABLE = ("the tokenizer fails at a text or ids", "take the one that belongs to the checkpoint")
_TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")


class LEDTokenizer:
    """Text to token ids, ``<s> text </s>`` or ``<s> text </s></s> pair </s>``, and back.

    Names, arguments and ids are those of transformers' ``LEDTokenizer``; padding is to the right, unless
    ``padding_side`` is set to "left". Each special token, ``bos_token`` to ``mask_token``, has its id in
    ``bos_token_id`` and so on. ``tokenizer`` is the underlying ``tokenizers.Tokenizer``, ``model_max_length``
    what the checkpoint says, or ``None``. Threads may share one, and transformers' collators take it.

    >>> tokenizer = LEDTokenizer.from_pretrained(directory)
    >>> batch = tokenizer(["A text.", "A longer text."], padding=True, return_tensors="pt")
    >>> output = model(**batch)
    """

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
    model_input_names = ("input_ids", "attention_mask")
    is_fast = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        model_max_length: int | None = None,
    ) -> None:
        """
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
        # what a tokenizer.json may ask for, and a whole document must not get
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = processors.RobertaProcessing(
            (self.sep_token, self.sep_token_id),
            (self.cls_token, self.cls_token_id),
            add_prefix_space=self.add_prefix_space,
        )

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, revision: str | None = None, **hub_options: Any
    ) -> LEDTokenizer:
        """From a directory or hub id with tokenizer.json, or with vocab.json and merges.txt.

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

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_lock"}
        with self._reading(None, "do_not_truncate", False):  # not with the settings of another thread's call
            return state | {"tokenizer": copy.deepcopy(self.tokenizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=new_lock())

    def __len__(self) -> int:
        """Tokens with an id, added ones included: the rows that an embedding needs."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Tokens of the BPE alone."""
        return self.tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def add_prefix_space(self) -> bool:
        """Whether a text is read as if a space preceded it."""
        return getattr(self.tokenizer.pre_tokenizer, "add_prefix_space", False)

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
            return_special_tokens_mask: also ``special_tokens_mask``, 1 at special tokens and padding.
            return_offsets_mapping: also ``offset_mapping``, each token's first character and the one after
                its last.
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
        if strategy != "do_not_truncate":
            special = (
                self.tokenizer.num_special_tokens_to_add(text_pair is not None) if add_special_tokens else 0
            )
            max_length = self._longest(max_length, special)
        errors = library_errors(
            f"max_length {max_length} cannot be met with truncation {strategy!r}",
            "raise it, or truncate 'longest_first'",
        )
        if strategy == "do_not_truncate":
            errors = library_errors(*_UNREADABLE)
        with errors, self._reading(max_length, strategy, split_special_tokens):
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
        """Brings sequences to one length: a batch, a list of single encodings, or a single one.

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

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary or of the added ones, ``None`` when there is no such token."""
        if not isinstance(token, str):
            raise TypeError(f"token is a {type(token).__name__}; give a text.")
        return self.tokenizer.token_to_id(token)

    @property
    def doc_sep_token_id(self) -> int | None:
        """The id of ``<doc-sep>``, which PRIMERA puts between documents; ``None`` in other vocabularies."""
        return self.token_id("<doc-sep>")

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of tokens, that of the unknown token for those that there are not."""
        if isinstance(tokens, str):
            token_id = self.token_id(tokens)
            return self.unk_token_id if token_id is None else token_id
        if not isinstance(tokens, Iterable):
            raise TypeError(f"tokens is a {type(tokens).__name__}; give a token or a list of tokens.")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def get_special_tokens_mask(
        self, token_ids: Sequence[int], already_has_special_tokens: bool = True
    ) -> list[int]:
        """1 for special tokens in ``token_ids``, which have theirs already, and 0 for others.

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

    def encode(self, text: str, text_pair: str | None = None) -> list[int]:
        """Token ids of a text, or of a pair, with the special tokens around them."""
        for name, given in (("text", text), ("text_pair", "" if text_pair is None else text_pair)):
            if not isinstance(given, str):
                raise TypeError(f"{name} is a {type(given).__name__}; give a text.")
        with library_errors(*_UNREADABLE), self._reading(None, "do_not_truncate", False):
            return self.tokenizer.encode(text, text_pair).ids

    def decode(self, token_ids: Iterable[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Text of ``token_ids``, with or without the special tokens among them.

        Raises:
            ValueError: for what no id can be, such as the -100 of labels.
        """
        ids = token_ids_of(token_ids)
        with library_errors(*_UNREADABLE):
            return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]] | Tensor, skip_special_tokens: bool = False
    ) -> list[str]:
        """:meth:`decode` for each row of ``sequences``."""
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
        with self._reading(None, "do_not_truncate", False):  # whose settings would be saved, too
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

    @contextmanager
    def _reading(self, max_length: int | None, truncation: str, split_special_tokens: bool) -> Iterator[None]:
        """These settings belong to the library's tokenizer, not to a call: one thread at a time may have its own."""
        with self._lock:
            self.tokenizer.no_truncation()
            if truncation != "do_not_truncate":
                self.tokenizer.enable_truncation(max_length, strategy=truncation)
            self.tokenizer.encode_special_tokens = split_special_tokens
            try:
                yield
            finally:
                self.tokenizer.no_truncation()
                self.tokenizer.encode_special_tokens = False

    def _longest(self, max_length: int | None, special: int) -> int:
        """The length to truncate to, once it is known to leave room for the special tokens."""
        longest = self.model_max_length if max_length is None else max_length
        if longest is None:
            raise ValueError("truncation needs max_length, for the checkpoint's tokenizer does not say one.")
        if longest < special:
            raise ValueError(f"max_length is {longest}; give {special} or more, for the special tokens.")
        return longest


def _column(encoding: Encoding, name: str) -> list[Any]:
    attribute = {"input_ids": "ids", "offset_mapping": "offsets"}.get(name, name)
    return getattr(encoding, attribute)
