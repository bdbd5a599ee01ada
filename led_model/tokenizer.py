"""BART's byte-level BPE, which LED checkpoints use, on the ``tokenizers`` library."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from led_model.checkpoint import checkpoint_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class LEDTokenizer:
    """Text to token ids and back: ``<s>`` text ``</s>``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # what a tokenizer.json may ask for, and a whole document must not get
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], *, revision: str | None = None
    ) -> LEDTokenizer:
        """From a directory or hub id with tokenizer.json, or with vocab.json and merges.txt.

        Raises:
            ImportError: without the ``tokenizers`` library (extra ``text``).
            FileNotFoundError: when neither form is there.
            ValueError: when a file cannot be read.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError("text needs the tokenizers library: pip install 'led-kernels[text]'.") from None
        fetch = checkpoint_files(path_or_id, revision)
        if (path := fetch("tokenizer.json")) is not None:
            try:
                return cls(Tokenizer.from_file(str(path)))
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{path} is no readable tokenizer ({error}); fetch it again.") from None
        vocab, merges = fetch("vocab.json"), fetch("merges.txt")
        if vocab is None or merges is None:
            raise FileNotFoundError(
                f"{path_or_id} holds no tokenizer.json, nor vocab.json with merges.txt; "
                "copy the tokenizer's files there."
            )
        return cls(_byte_level_bpe(vocab, merges))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` between ``<s>`` and ``</s>``."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` without the special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    try:
        bpe = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{vocab} and {merges} are no readable BPE ({error}); fetch them again.") from None
    tokenizer = Tokenizer(bpe)
    missing = [token for token in _SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(f"{vocab} lacks {', '.join(missing)}; LED needs BART's vocabulary.")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS]
    )
    return tokenizer
