"""Chooses what runs a command over documents: this process and its own, or Ray."""

from __future__ import annotations

from argparse import Namespace

from led_model.cli.commands import run_on_documents
from led_model.cli.dry_run import count_documents
from led_model.cli.ray_engine import run_on_ray


def run_by_engine(args: Namespace) -> int:
    """Runs ``args.command`` over documents, or counts these, and returns the exit status.

    Raises:
        ValueError: for a flag of another engine.
    """
    if args.engine != "ray":
        for name in ("ray_address", "shard_rows"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for --engine ray; give that too, or leave it out."
                )
    if args.dry_run:
        return count_documents(args)
    return (run_on_ray if args.engine == "ray" else run_on_documents)(args)
