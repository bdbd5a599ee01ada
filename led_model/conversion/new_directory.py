"""Writes a directory whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

from led_model.schema import printable


def check_output(output: Path, overwrite: bool, own_files: Collection[str]) -> None:
    """Checks that a directory can be made at ``output``, or may be replaced there.

    Args:
        overwrite: whether one that holds nothing but ``own_files`` may be replaced; an empty one always may.

    Raises:
        FileNotFoundError: when the directory around it is not there.
        ValueError: when something is there that is not replaced.
    """
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no directory {output.parent}; make it first.")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a directory that is to be made.")
    found = sorted(path.name for path in output.iterdir())
    if foreign := [name for name in found if name not in own_files]:
        raise ValueError(
            f"--output {output} holds {printable(foreign[0])}, which no conversion wrote, and is left as it is; name "
            "another directory."
        )
    if found and not overwrite:
        raise ValueError(f"--output {output} holds a checkpoint already; give --overwrite to replace it.")


@contextmanager
def new_directory(output: Path) -> Generator[Path, None, None]:
    """Yields an empty directory beside ``output`` that takes its place when the block ends, and goes if it fails.

    What is at ``output`` stays there, whole, until then.

    Raises:
        OSError: when it cannot be made, or cannot take the place.
    """
    output = output.resolve()  # the target of a link, not the link
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise OSError(
            f"--output {output} cannot be made ({error.strerror}); name another directory."
        ) from None
    made, old = staging / "new", staging / "old"
    try:
        made.mkdir()
        yield made
        try:
            if output.exists():
                output.rename(old)
            made.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
