"""Keeps the output of a run whose documents are cut into shards: a file a shard, which is there when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from led_model.cli.locking import lock

Record: TypeAlias = dict[str, Any]

_PLAN, _LOCK, _UNFINISHED = "run.json", ".lock", ".unfinished-"
_RESULTS, _ERRORS = "results-{:06d}.jsonl", "errors-{:06d}.jsonl"
_OF_SHARDS = re.compile(r"(results|errors)-\d{6,}\.jsonl")
_OWN = re.compile(rf"{_OF_SHARDS.pattern}|run\.json|\.lock|\.unfinished-[\w-]+")
_NOT_COMPARED = ("inputs", "model", "run")  # of a plan: a fingerprint tells the model


class ShardFiles:
    """Writes and reads what has become of the documents of a shard: results, and the errors of those without one.

    A file gets its name when it is complete and on disk. So a shard that several processes write, as one of them was
    taken for dead, is there once all the same.

    Args:
        directory: that of the output.
        number: of the shard.
        run: of :attr:`OutputDirectory.run`, for those that write.
    """

    def __init__(self, directory: str | Path, number: int, run: str | None = None) -> None:
        self._directory = Path(directory)
        self._run = run
        self.results = self._directory / _RESULTS.format(number)
        self.errors = self._directory / _ERRORS.format(number)
        self._tries = self._directory / f"{_UNFINISHED}tries-{number:06d}"

    @property
    def are_there(self) -> bool:
        return self.results.exists()

    def begin(self) -> int:
        """Notes that the shard is begun, and returns how often it has been without being ended."""
        with self._tries.open("ab") as file:
            file.write(b".")
            return file.tell()

    def forget_tries(self) -> None:
        """Lets the shard count as not begun."""
        self._tries.unlink(missing_ok=True)

    def write(self, results: Iterable[str], errors: Iterable[str]) -> None:
        """Writes lines, first those of errors, so that where results are these are, too.

        Raises:
            OSError: when they cannot be written, or the output has been begun anew by another run.
        """
        if _read_plan(self._directory).get("run") != self._run:
            raise OSError(f"--output {self._directory} was begun anew by another run; this one ends.")
        if errors := list(errors):
            _write_whole(self.errors, errors)
        else:  # An attempt that was killed may have left some.
            self.errors.unlink(missing_ok=True)
        _write_whole(self.results, results)
        self.forget_tries()

    def count(self) -> tuple[int, list[str]]:
        """Returns the number of results, and what is said of the other documents."""
        with self.results.open("rb") as file:
            done = sum(1 for _ in file)
        if not self.errors.exists():
            return done, []
        lines = self.errors.read_text("utf-8").splitlines()
        return done, [json.loads(line)["error"] for line in lines]


class OutputDirectory:
    """Holds the shards of one run, and says what made them, so that the same command goes on where it was stopped.

    One process at a time can lock it.

    Args:
        path: made if it is not there.
        plan: what the shards depend on; the same after a round trip through JSON. Its values say, by name, what made
            the results, and which ``inputs`` in which state were cut into shards how.
        overwrite: whether :meth:`begin` removes what the directory holds of earlier runs.

    Raises:
        OSError: when the directory cannot be written, or is another process's output.
        ValueError: when it holds anything else, or shards of another plan.
    """

    def __init__(self, path: str, plan: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output {path} is a file; give --engine ray a directory.")
        self._plan, self._overwrite = plan, overwrite
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_names()
            self._lock_file = (self.path / _LOCK).open("a")
        except OSError as error:
            raise OSError(
                f"--output {path} cannot be written ({error.strerror}); give a directory."
            ) from None
        try:
            lock(self._lock_file, str(self.path), "directory")
            self._there = _read_plan(self.path)
            if self._there and not overwrite:
                self._compare(self._there, plan)
        except BaseException:
            self._lock_file.close()
            raise

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock_file.close()

    def begin(self) -> str:
        """Makes the directory ready to be written into, and returns the run that writes.

        What a killed run has left of unfinished files goes, and with ``overwrite`` all that is there.
        """
        begins = self._overwrite or not self._there
        for path in self.path.iterdir():
            if path.name.startswith(_UNFINISHED) or (self._overwrite and path.name != _LOCK):
                path.unlink()
        if begins:
            self._there = self._plan | {"run": uuid.uuid4().hex}
            _write_whole(self.path / _PLAN, [json.dumps(self._there)])
            self._overwrite = False
        return self._there["run"]

    def holds(self, number: int) -> bool:
        """Tells whether a shard is there that counts."""
        return not self._overwrite and self.shard(number).are_there

    def shard(self, number: int) -> ShardFiles:
        return ShardFiles(self.path, number, self._there.get("run"))

    def _check_names(self) -> None:
        names = sorted(path.name for path in self.path.iterdir())
        if others := [name for name in names if not _OWN.fullmatch(name)]:
            raise ValueError(
                f"--output {self.path} holds {others[0]}, which is no result of this program; give another."
            )
        shards = [name for name in names if _OF_SHARDS.fullmatch(name)]
        if shards and _PLAN not in names:
            raise ValueError(
                f"--output {self.path} holds {shards[0]} and no {_PLAN} that says what made it; give another."
            )

    def _compare(self, there: dict[str, Any], plan: dict[str, Any]) -> None:
        remedy = "give --overwrite to begin it anew, or another directory."
        for name in {**there, **plan}:
            if name not in _NOT_COMPARED and there.get(name) != plan.get(name):
                raise ValueError(
                    f"--output {self.path} was made with {name} {there.get(name)!r} and this run has "
                    f"{plan.get(name)!r}; {remedy}"
                )
        changed = [file for file in there["inputs"] if file not in plan["inputs"]]
        changed += [file for file in plan["inputs"] if file not in there["inputs"]]
        if changed or there["inputs"] != plan["inputs"]:
            name = changed[0][0] if changed else "the order of the inputs"
            raise ValueError(f"{name} has changed since --output {self.path} was begun; {remedy}")


def _read_plan(directory: Path) -> dict[str, Any]:
    """Returns what run.json says, and nothing if it is not there.

    Raises:
        ValueError: when it is damaged.
    """
    path = directory / _PLAN
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text("utf-8"))
    except ValueError:
        plan = None
    if not isinstance(plan, dict) or not {"inputs", "run"} <= plan.keys():
        raise ValueError(
            f"{path} is damaged; remove it with the results beside it, or give another --output."
        )
    return plan


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    """Writes a file that is there, under its name and on disk, whole or not at all."""
    unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # The name, too; some systems open no directories.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
