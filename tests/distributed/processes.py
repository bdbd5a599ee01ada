"""Functions run on several processes at once, which a group of torch.distributed (gloo, on the CPU) connects."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = timedelta(seconds=120)  # of one collective operation; a process that waits for another ends by it


def run_on_ranks(world: int, function_name: str, tmp_path: Path) -> list[Any]:
    """Calls ``function_name`` (``"module.function"``, without arguments) in ``world`` processes -> what each returned.

    The processes meet by a file in ``tmp_path``, which must hold none of an earlier group. One that raises fails the
    call with its traceback.
    """
    torch.multiprocessing.spawn(_run, (world, function_name, str(tmp_path)), nprocs=world)
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, world: int, function_name: str, directory: str) -> None:
    torch.set_num_threads(1)
    module, _, name = function_name.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    meeting = f"file://{directory}/group"
    dist.init_process_group("gloo", meeting, TIMEOUT, rank=rank, world_size=world)
    found = function()
    torch.save(found, Path(directory) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_checks(checks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Runs checks on every rank, one after another -> by name what each returned, or the text of its error."""
    found: dict[str, Any] = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # the other checks have their results
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return found


def result(found: Mapping[str, Any], check: str) -> Any:
    """Returns what a check of :func:`run_checks` returned; fails with the text of its error."""
    value = found[check]
    assert not isinstance(value, str), f"{check}: {value}"
    return value
