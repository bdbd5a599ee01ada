"""Prints for people: tables, a progress bar over layers, messages and numbers."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from torch import nn
from tqdm import tqdm

from led_model.schema import escape_unprintable

_MAX_MESSAGE = 2000  # characters
_is_quiet = ContextVar("is_quiet", default=False)


@contextmanager
def quiet(wanted: bool = True) -> Generator[None, None, None]:
    """Keeps bars and messages other than errors off stderr within the block, if ``wanted``."""
    token = _is_quiet.set(wanted or _is_quiet.get())
    try:
        yield
    finally:
        _is_quiet.reset(token)


def is_quiet() -> bool:
    """Returns whether only errors shall be told."""
    return _is_quiet.get()


def no_bars() -> bool | None:
    """Returns what tqdm takes as ``disable``; ``None`` draws a bar on a terminal only."""
    return True if _is_quiet.get() else None


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Returns rows in aligned columns, the first to the left, the others to the right."""
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
def layer_progress(layers: nn.ModuleList, description: str) -> Generator[None, None, None]:
    """Draws a bar that grows with each layer that has run, on a terminal only."""
    with tqdm(total=len(layers), desc=description, unit="layer", leave=False, disable=no_bars()) as bar:

        def count(*_: object) -> None:  # a value that a hook returns would replace the layer's output
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


def log(message: str, prog: str = "led") -> None:
    """Prints a line on stderr, above the bars if there are any, unless it is :func:`quiet`."""
    if not _is_quiet.get():
        log_error(message, prog)


def log_error(message: str, prog: str = "led") -> None:
    """Prints a line on stderr about what failed, also where it is :func:`quiet`."""
    relay(f"{prog}: {one_line(message)}")


def relay(line: str) -> None:
    """Prints on stderr what another process has made a line of."""
    with suppress(OSError):  # a closed stderr is no reason to stop the work
        tqdm.write(line, file=sys.stderr)


def one_line(text: str) -> str:
    """Returns a text as one line of bounded length without control characters, which file names may hold."""
    if len(text) > _MAX_MESSAGE:
        text = f"{text[: _MAX_MESSAGE - 300]} … {text[-300:]}"
    return escape_unprintable(text)
