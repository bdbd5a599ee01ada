"""Finds the documents that a command was given by files, directories and globs, each once, but not its output."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from led_model.batch.documents import Source

SUFFIXES = (".txt", ".md", ".jsonl")
_ANY_DEPTH = "**"

# This is the (device, inode) of a file, whatever its name, and its path where there is no file.
Identity = tuple[int, int] | str


def find_sources(
    inputs: Iterable[str],
    *,
    jsonl: bool = False,
    text_field: str = "text",
    leave_out: str | None = None,
    suffixes: tuple[str, ...] = SUFFIXES,
) -> tuple[list[Source], list[str]]:
    """Returns what files, directories (with all below them that is not hidden), globs and ``-`` name, each file once.

    Links are followed, and no directory is entered twice.

    Args:
        jsonl: whether stdin and files of any name are JSONL; otherwise files that end in .jsonl are.
        leave_out: the command's own output, which directories and globs leave out.
        suffixes: of the files that are documents in a directory.

    Raises:
        ValueError: when an input is that file.

    Returns:
        The sources in the order given, those of a directory or glob sorted, and one sentence about each input
        that names none, and about each directory or link that cannot be followed.
    """
    sources: dict[Identity, Source] = {}
    problems: list[str] = []
    own = None if leave_out is None else identity(leave_out)
    for item in inputs:
        if item != "-" and identity(item) == own:
            raise ValueError(
                f"{item} is the --output, too, which would be read and written; give another file."
            )
        known = len(problems)
        paths = _expand(item, problems, suffixes)
        others = [path for path in paths if path == "-" or identity(path) != own]
        if paths and not others:
            problems.append(f"{item} names nothing but the --output itself; give another.")
        elif not paths and len(problems) == known:
            problems.append(_names_nothing(item, suffixes))
        for path in others:
            is_jsonl = jsonl or path.lower().endswith(".jsonl")
            sources.setdefault(path if path == "-" else identity(path), Source(path, is_jsonl, text_field))
    return list(sources.values()), problems


def identity(path: str | int) -> Identity:
    """Returns what identifies a path, or an open file by its number."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a NUL in the path raises the latter
        return os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path)
    return status.st_dev, status.st_ino


def _expand(item: str, problems: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """Returns the paths that an input names; what cannot be followed is added to ``problems``."""
    if item == "-":
        return [item]
    if os.path.isdir(item):
        found = (
            os.path.join(directory, name)
            for directory, names in _directories(item, problems)
            for name in names
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        )
        return sorted(os.path.normpath(path) for path in found if _is_document(path, problems))
    if os.path.lexists(item):
        return [os.path.normpath(item)]
    if not glob.has_magic(item):
        return []
    return sorted(os.path.normpath(path) for path in _glob(item, problems) if os.path.isfile(path))


def _names_nothing(item: str, suffixes: tuple[str, ...]) -> str:
    """Returns a sentence on why an input names no file."""
    if os.path.isdir(item):
        return f"{item} holds no {', '.join(suffixes)} file; give files, or a glob."
    if glob.has_magic(item):
        return f"{item} matches no file; quote the pattern, and use ** for any depth."
    try:
        os.lstat(item)
    except PermissionError:
        return f"{item} is in a directory that may not be read; check its permissions."
    except (OSError, ValueError):
        pass
    return f"{item or 'an empty name'} is not there; give a text file, a directory, or - for stdin."


def _glob(pattern: str, problems: list[str]) -> Iterator[str]:
    """Yields what ``glob.glob(recursive=True)`` does, which however follows every way around a circle of links."""
    parts = pattern.split(os.sep)
    if _ANY_DEPTH not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index(_ANY_DEPTH)
    below = os.sep.join(parts[at + 1 :]) or "*"
    for base in glob.glob(os.sep.join([*parts[:at], ""])) if at else [""]:
        for directory, _ in _directories(base or ".", problems):
            name = "" if directory == "." and not base else glob.escape(directory)
            yield from _glob(os.path.join(name, below), problems)


def _directories(top: str, problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields ``top`` and all directories below it that are not hidden, each once, with the names in it."""
    waiting, seen = [top], {identity(top)}
    while waiting:
        directory = waiting.pop()
        names = _names_in(directory, problems)
        yield directory, names
        for name in names:
            path = os.path.join(directory, name)
            if not name.startswith(".") and os.path.isdir(path) and identity(path) not in seen:
                seen.add(identity(path))
                waiting.append(path)


def _names_in(directory: str, problems: list[str]) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        problems.append(f"{directory} cannot be looked into ({error.strerror}); check its permissions.")
        return []


def _is_document(path: str, problems: list[str]) -> bool:
    """Returns whether ``path`` is a file; if it cannot be reached, that is added to ``problems``."""
    try:
        return Path(os.path.realpath(path, strict=True)).is_file()
    except (OSError, RuntimeError):
        problems.append(
            f"{path} leads to no file that can be reached; mend the link, or check its permissions."
        )
        return False
