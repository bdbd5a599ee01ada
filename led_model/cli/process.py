"""How a command ends: with a status, and where that is not 0 with one sentence on stderr."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

import torch

from led_kernels import BackendUnavailable
from led_model.cli.terminal import complain


def open_missing_streams() -> None:
    """Who starts a program with a stream closed would have a file opened under its number, and printed into."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def status_of(args: Namespace, can_print: bool) -> int:
    """Runs ``args.run``; what can be expected to fail is said in a sentence, and any other error is raised.

    Args:
        can_print: whether there was a stdout to begin with.
    """
    speaker = f"led {args.command}"
    try:
        if not can_print and getattr(args, "output", None) is None:
            raise ValueError("there is no stdout to print into; give it one, or --output.")
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.errno is not None and error.filename is None:
            return _without_stdout(error, speaker)
        complain(_sentence(error), speaker)
    except (ValueError, ImportError, BackendUnavailable) as error:
        complain(str(error), speaker)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]
        complain(
            f"memory ran out{f' ({reason})' if reason else ''}; shorten the text or change --batch-size, --dtype or "
            "--device.",
            speaker,
        )
    except KeyboardInterrupt:
        complain("interrupted.", speaker)
        return 130
    return 1


def _without_stdout(error: OSError, speaker: str) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it once more at its end
    if not isinstance(error, BrokenPipeError):  # there the reader has gone, and knows
        complain(f"stdout cannot be written ({error.strerror}); print elsewhere, or give --output.", speaker)
    return 1


def _sentence(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    return f"{error.filename} cannot be used ({error.strerror}); check its name and permissions."


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
