"""Keeps the output of a run whose documents are cut into shards: a file a shard, which is there when it is complete."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two runs from one output
    fcntl = None

Record: TypeAlias = dict[str, Any]

_PLAN, _LOCK, _UNFINISHED = "run.json", ".lock", ".unfinished-"
_RESULTS, _ERRORS = "results-{:06d}.jsonl", "errors-{:06d}.jsonl"


class ShardFiles:
    """Writes and reads what has become of the documents of a shard: results, and the errors of those without one.

    A file gets its name when it is complete and on disk. So a shard that several processes write, as one of them was
    taken for dead, is there once all the same.
    """

    def __init__(self, directory: str | Path, number: int) -> None:
        self._directory = Path(directory)
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

    def write(self, results: Iterable[str], errors: Iterable[str]) -> None:
        """Writes lines, first those of errors, so that where results are these are, too.

        Raises:
            OSError: when they cannot be written.
        """
        if errors := list(errors):
            self._write(self.errors, errors)
        else:  # An attempt that was killed may have left some.
            self.errors.unlink(missing_ok=True)
        self._write(self.results, results)
        self._tries.unlink(missing_ok=True)

    def count(self) -> tuple[int, list[str]]:
        """Returns the number of results, and what is said of the other documents."""
        with self.results.open("rb") as file:
            done = sum(1 for _ in file)
        if not self.errors.exists():
            return done, []
        lines = self.errors.read_text("utf-8").splitlines()
        return done, [json.loads(line)["error"] for line in lines]

    def _write(self, path: Path, lines: Iterable[str]) -> None:
        unfinished = self._directory / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


class OutputDirectory:
    """Holds the shards of one run, and says what made them, so that the same command goes on where it was stopped.

    One process at a time can lock it.

    Args:
        path: made if it is not there.
        plan: what the shards depend on; the same after a round trip through JSON. Its values say, by name, what made
            the results, and which ``inputs`` in which state were cut into shards how.
        overwrite: what the directory holds of earlier runs goes at once.

    Raises:
        OSError: when the directory cannot be written, or is another process's output.
        ValueError: when it holds anything else, or shards of another plan.
    """

    def __init__(self, path: str, plan: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output {path} is a file; give --engine ray a directory.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_names()
            self._lock_file = (self.path / _LOCK).open("a")
        except OSError as error:
            raise OSError(
                f"--output {path} cannot be written ({error.strerror}); give a directory."
            ) from None
        try:
            self._lock()
            self._check(plan, overwrite)
        except BaseException:
            self._lock_file.close()
            raise

    def __enter__(self) -> OutputDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock_file.close()

    def shard(self, number: int) -> ShardFiles:
        return ShardFiles(self.path, number)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(
                f"--output {self.path} is being written by another process; wait for it, or give another directory."
            ) from None

    def _check_names(self) -> None:
        beginnings = (_PLAN, _LOCK, _UNFINISHED, "results-", "errors-")
        names = sorted(path.name for path in self.path.iterdir())
        if others := [name for name in names if not name.startswith(beginnings)]:
            raise ValueError(
                f"--output {self.path} holds {others[0]}, which is no result of this program; give another."
            )

    def _check(self, plan: dict[str, Any], overwrite: bool) -> None:
        """Checks that what is there is of the same plan, and removes what nobody needs."""
        plan_file = self.path / _PLAN
        for path in self.path.iterdir():
            if path.name.startswith(_UNFINISHED) or (overwrite and path.name != _LOCK):
                path.unlink()
        if plan_file.exists():
            self._compare(json.loads(plan_file.read_text("utf-8")), plan)
        else:
            unfinished = self.path / f"{_UNFINISHED}{uuid.uuid4().hex}"
            unfinished.write_text(json.dumps(plan), "utf-8")
            unfinished.replace(plan_file)

    def _compare(self, there: dict[str, Any], plan: dict[str, Any]) -> None:
        remedy = "give --overwrite to begin it anew, or another directory."
        for name in {**there, **plan}:
            if name in ("inputs", "model") or there.get(name) == plan.get(
                name
            ):  # its fingerprint tells the model
                continue
            raise ValueError(
                f"--output {self.path} was made with {name} {there.get(name)!r} and this run has "
                f"{plan.get(name)!r}; {remedy}"
            )
        changed = [file for file in there["inputs"] if file not in plan["inputs"]]
        changed += [file for file in plan["inputs"] if file not in there["inputs"]]
        if changed or there["inputs"] != plan["inputs"]:
            name = changed[0][0] if changed else "the order of the inputs"
            raise ValueError(f"{name} has changed since --output {self.path} was begun; {remedy}")
