"""Prints a summary or an answer on a terminal, word by word while it is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from torch import Tensor

from led_model.tokenization.tokenizer import LEDTokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the first bytes of a character alone are decoded to it


class TextStreamer:
    """Prints what ``generate`` writes, as its ``streamer``, for one sequence at a time.

    Each sequence is a line. White space is printed with the word behind it, and bytes with the rest of their character,
    so that what is printed is always the beginning of the stripped text.
    """

    def __init__(self, tokenizer: LEDTokenizer, file: TextIO) -> None:
        self.tokenizer = tokenizer
        self.file = file
        self.printed = ""
        self._begin()

    def put(self, tokens: Tensor) -> None:
        """Takes the next token, int64 of one element; the first call has the prompt, which is not printed."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids.append(int(tokens))
        self._extend_line(self._text().rstrip(_UNFINISHED).rstrip())

    def end(self) -> None:
        """Prints the rest of the sequence, which is complete or was cut off."""
        self._extend_line(self._text())
        self._print("\n")
        self._begin()

    def lines(self, texts: Iterable[str]) -> None:
        """Prints sequences that were written without this streamer."""
        self._print("".join(f"{text}\n" for text in texts))

    def finish(self, text: str) -> None:
        """Prints what is missing of the whole ``text``; all of it if something else was printed."""
        text += "\n"
        self._print(text.removeprefix(self.printed) if text.startswith(self.printed) else text)
        self.printed = ""

    def _begin(self) -> None:
        self._is_prompt, self._ids, self._line = True, [], ""

    def _text(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True).strip()

    def _extend_line(self, text: str) -> None:
        """Prints what the line lacks of ``text``, or nothing if the text begins otherwise."""
        if text.startswith(self._line):
            self._print(text[len(self._line) :])
            self._line = text

    def _print(self, text: str) -> None:
        self.printed += text
        self.file.write(text)
        self.file.flush()
