"""Keeps a run on disk so that it can be killed at any moment: what has its name there is complete.

Files and checkpoints are written under a name that begins with ``.led-``, and renamed. The result's config.json,
without which nothing loads the result, comes last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two runs from one output
    fcntl = None

SETTINGS, LOG, PLOT = "finetune.json", "training_log.jsonl", "loss.png"
# These are the files of a model, the last of which makes it one.
_MODEL = (
    "model.safetensors", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json",
    "tokenizer_config.json", "config.json",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".led-"


class RunDirectory:
    """Is the output of ``led finetune``, of which one process at a time is the owner.

    Args:
        path: made if it is not there.

    Raises:
        FileNotFoundError: when the directory around it is not there.
        OSError: when it is no directory, or another process is its owner.
        ValueError: when it holds anything but a run.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.path = Path(os.path.realpath(path))
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"the directory of --output {path} is not there; make it first.")
        if self.path.exists() and not self.path.is_dir():
            raise OSError(f"--output {path} is a file; give a directory.")
        self._is_new = not self.path.exists()
        self.path.mkdir(exist_ok=True)
        self._lock = None if fcntl is None else os.open(self.path, os.O_RDONLY)
        try:
            self._take_lock()
            self.settings = self._read_settings()
            self._remove(name for name in os.listdir(self.path) if name.startswith(_UNFINISHED))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def is_finished(self) -> bool:
        """Returns whether the result is there."""
        return (self.path / "config.json").exists()

    @property
    def latest_step(self) -> int | None:
        """Returns the number of updates before the newest checkpoint; ``None`` if there is no checkpoint."""
        return max(self._steps(), default=None)

    def checkpoint(self, step: int) -> Path:
        """Returns the path of the checkpoint after ``step`` updates."""
        return self.path / f"checkpoint-{step}"

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Checks that the run that is there, if one is, has ``settings``; names that it does not know do not count.

        Raises:
            ValueError: naming the first difference.
        """
        for name, value in settings.items():
            stored = (self.settings or {}).get(name, value)
            if stored != value:
                raise ValueError(
                    f"--output {self.name} was begun with {name} {stored!r} and this run has {value!r}; give "
                    "--overwrite to begin it anew, or another directory."
                )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Notes the settings of a new run, in place of an earlier one."""
        known = {*_MODEL, LOG, PLOT, *(f"checkpoint-{step}" for step in self._steps())}
        # Without config.json there is no result, and without its settings no run.
        self._remove(["config.json"])
        self._remove([*known, SETTINGS])
        self.settings = dict(settings)
        self.write_text(SETTINGS, json.dumps({"led": "finetune", **settings}, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file, whole or not at all."""
        with self.new_file(name) as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def new_file(self, name: str) -> Generator[Path, None, None]:
        """Yields a path to write into, which gets ``name`` when it is written."""
        path = self.path / f"{_UNFINISHED}{name}"
        with self.writing():
            yield path
            _rename(path, self.path / name)

    @contextmanager
    def new_checkpoint(self, step: int) -> Generator[Path, None, None]:
        """Yields a directory in which to write ``checkpoint-STEP``, which is moved out of it when it is written."""
        name = self.checkpoint(step).name
        around = self.path / f"{_UNFINISHED}{name}"
        with self.writing():
            around.mkdir()
            try:
                yield around
                for path in (around / name).iterdir():
                    _sync(path)
                self._remove([name])
                _rename(around / name, self.checkpoint(step))
            finally:
                shutil.rmtree(around)

    @contextmanager
    def writing(self) -> Generator[None, None, None]:
        """Makes one sentence of what hinders the block in writing, such as a full disk.

        Raises:
            OSError: with it.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            # The writer behind torch.save has errors of many kinds.
            is_of_torch = "inline_container" in str(error)
            if isinstance(error, RuntimeError) and not is_of_torch:
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
            reason = "not all of a file" if is_of_torch else reason
            raise OSError(
                f"--output {self.name} cannot be written ({reason}); make room and give the same command again, which "
                "goes on from the newest checkpoint."
            ) from None

    def keep_checkpoints(self, steps: Iterable[int]) -> None:
        """Removes all checkpoints but those after ``steps`` updates."""
        kept = set(steps)
        self._remove(self.checkpoint(step).name for step in self._steps() if step not in kept)

    def finish(self, step: int) -> None:
        """Makes the model of the checkpoint after ``step`` updates the result."""
        there = {path.name for path in self.checkpoint(step).iterdir()}
        for name in (name for name in _MODEL if name in there):
            with self.new_file(name) as path:
                shutil.copyfile(self.checkpoint(step) / name, path)

    def _steps(self) -> list[int]:
        found = (_CHECKPOINT.fullmatch(name) for name in os.listdir(self.path))
        return [int(match[1]) for match in found if match]

    def _remove(self, names: Iterable[str]) -> None:
        """Removes files and directories; of a directory nothing is left under its own name, even for a moment."""
        for name in list(names):
            path = self.path / name
            if path.is_dir():
                if not name.startswith(_UNFINISHED):
                    path = path.rename(self.path / f"{_UNFINISHED}removed-{name}")
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _read_settings(self) -> dict[str, Any] | None:
        path = self.path / SETTINGS
        others = [name for name in os.listdir(self.path) if not name.startswith(_UNFINISHED)]
        if SETTINGS not in others:
            if others:
                raise ValueError(
                    f"--output {self.name} holds {min(others)} and is no output of led finetune; give a new or an "
                    "empty directory."
                )
            return None
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            settings = None
        if (
            not isinstance(settings, dict)
            or settings.pop("led", None) != "finetune"
            or not isinstance(settings.get("chosen"), dict)
        ):
            raise ValueError(
                f"{SETTINGS} in --output {self.name} is not of led finetune; give another directory."
            )
        return settings

    def _take_lock(self) -> None:
        if fcntl is None or self._lock is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # some network file systems know no locks
            self._is_new = False
            raise OSError(
                f"--output {self.name} is being written by another process; wait for it, or give another directory."
            ) from None

    def _close(self) -> None:
        """Lets go of the directory, and removes it if this run made it and wrote nothing."""
        if self._is_new:
            with suppress(OSError):
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)


def _rename(source: Path, target: Path) -> None:
    """Renames what is written, on disk before its name is."""
    _sync(source)
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name == "nt":  # where directories cannot be opened, and files only for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
