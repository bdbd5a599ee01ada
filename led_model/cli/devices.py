"""Chooses a device for each of several processes, for ``--devices``."""

from __future__ import annotations

import os
from argparse import Namespace

import torch


def check_devices(args: Namespace) -> None:
    """Checks that there are as many devices as are asked for, and work for several.

    Raises:
        ValueError: when there are not.
    """
    if args.devices == 1:
        return
    if args.join:
        raise ValueError("--join makes one document, which one device reads; leave --devices out.")
    devices_of(args)


def devices_of(args: Namespace) -> list[str]:
    """Returns the device of each process: one GPU each, or the processor.

    Raises:
        ValueError: when there are fewer, or ``--device`` names a single one.
    """
    wanted = args.devices
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {kind} is one device, or of a kind of which there is one, and --devices is {wanted}; leave one "
            "of the two out."
        )
    there = torch.cuda.device_count() if kind == "cuda" else os.cpu_count() or 1
    if wanted > there:
        what = "GPUs" if kind == "cuda" else "processors"
        raise ValueError(f"--devices is {wanted} and there are {there} {what}; give at most {there}.")
    return [f"cuda:{number}" if kind == "cuda" else "cpu" for number in range(wanted)]


def threads_of(args: Namespace) -> int:
    """Returns how many threads each of the processes gets."""
    return args.threads or max(1, (os.cpu_count() or 1) // args.devices)
