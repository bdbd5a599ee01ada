"""What the commands share: a table, a progress bar over layers, messages, numbers for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from torch import nn
from tqdm import tqdm

_LONGEST = 2000  # characters of a message
_is_quiet = ContextVar("is_quiet", default=False)


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """No bars and no messages but complaints within, if ``wanted``."""
    token = _is_quiet.set(wanted or _is_quiet.get())
    try:
        yield
    finally:
        _is_quiet.reset(token)


def no_bars() -> bool | None:
    """tqdm's ``disable``: ``None`` draws a bar on a terminal only."""
    return True if _is_quiet.get() else None


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    if header:
        text.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(text)


@contextmanager
def layer_progress(layers: nn.ModuleList, description: str) -> Iterator[None]:
    """A bar that grows with each layer that has run; only on a terminal."""
    with tqdm(total=len(layers), desc=description, unit="layer", leave=False, disable=no_bars()) as bar:

        def count(*_: object) -> None:  # what a hook returns would replace the layer's output
            bar.update()

        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def say(message: str, speaker: str = "led") -> None:
    """A line on stderr, above the bars if there are any; none where it is :func:`quiet`."""
    if not _is_quiet.get():
        complain(message, speaker)


def complain(message: str, speaker: str = "led") -> None:
    """A line on stderr about what failed, also where it is :func:`quiet`."""
    with suppress(OSError):  # that nobody can read it is no reason to stop the work
        tqdm.write(f"{speaker}: {one_line(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Names of files, and what checkpoints say, may hold anything: here it moves no cursor and fills no screen."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 300]} … {text[-300:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
