"""Finds the files of a checkpoint, in a directory or on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from led_kernels.extras import install_extra
from led_model.schema import printable

# A function of this type returns the path of a checkpoint's file by its name, None when there is no such file.
Fetch = Callable[[str], Path | None]

# These are arguments of hf_hub_download.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")

# This holds why the hub could not be reached by this process: without a network it is tried once, not per file.
_unreachable: list[str] = []
_asked: list[bool] = []  # it has an element once the hub has been tried


def checkpoint_files(
    path_or_id: str | os.PathLike[str],
    revision: str | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Fetch:
    """Returns a function from a file's name to its path: in a directory, or downloaded from the hub.

    Args:
        hub_options: arguments of ``huggingface_hub.hf_hub_download``, those of ``HUB_OPTIONS``.

    Raises:
        FileNotFoundError: when ``path_or_id`` is neither a directory nor of the form ``owner/name``, and the function
            when a name is there but leads to no file.
    """
    directory = Path(path_or_id)
    if directory.is_dir():
        return partial(_in_directory, directory)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path_or_id)) or directory.exists():
        raise FileNotFoundError(f"{path_or_id} is no directory; give one with a config.json, or a hub id.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"{path_or_id} is no directory, and fetching it from the hub needs huggingface_hub: "
            f"{install_extra('text')}."
        ) from None
    options = {name: value for name, value in (hub_options or {}).items() if value is not None}

    def fetch(name: str) -> Path | None:
        # Without the hub, what is in the cache still serves.
        arguments: dict[str, Any] = {"revision": revision} | options
        if not _hub_answers(options):
            arguments["local_files_only"] = True
        try:
            return Path(hf_hub_download(str(path_or_id), name, **arguments))
        except LocalEntryNotFoundError as error:  # there is no network, and the file is not in the cache
            reason = _unreachable[0] if _unreachable else first_line(error)
            raise FileNotFoundError(
                f"{path_or_id} is no directory, and {name} could not be fetched from the hub "
                f"({reason}); check the path or the network."
            ) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{path_or_id} is no directory, and the hub refused {name} ({first_line(error)}); "
                "check the name."
            ) from None

    return fetch


def _in_directory(directory: Path, name: str) -> Path | None:
    path = directory / name
    if path.is_file():
        return path
    if os.path.lexists(path):  # otherwise the settings in it would be missing without a word
        raise FileNotFoundError(
            f"{path} is there but is no file, or a link to none; fetch it again, or remove it."
        )
    return None


def what_else_is_in(path_or_id: str | os.PathLike[str], otherwise: str = "give a complete checkpoint") -> str:
    """Returns a clause on what a directory without a complete checkpoint is, and what to give instead."""
    directory = Path(path_or_id)
    if not directory.is_dir():
        return otherwise
    if (directory / "adapter_config.json").is_file():
        return (
            "it is an adapter: load it with peft, merge it into its model by merge_and_unload() and save that"
        )
    saved = [
        p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    if saved:
        newest = max(saved, key=lambda path: int(path.name.split("-")[1]))
        return f"it is a Trainer's output directory: give {newest}, its newest checkpoint"
    return otherwise


def first_line(error: BaseException) -> str:
    """Returns what a message quotes of a library's error."""
    return printable(str(error).strip().split("\n")[0].rstrip(".")) or type(error).__name__


def _hub_answers(options: Mapping[str, Any]) -> bool:
    """Returns whether the hub can be reached.

    It is asked once per process, as hf_hub_download itself tries for half a minute.
    """
    if options.get("local_files_only"):
        return True
    if not _asked:
        _asked.append(True)
        from huggingface_hub import constants, get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception as error:  # the installed release may use any HTTP library
            _unreachable.append(first_line(error))
    return not _unreachable
