"""Ends a command with a status and, where that is not 0, with one sentence on stderr."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from led_kernels import BackendUnavailable
from led_model.batch.out_of_memory import is_out_of_memory, shortage
from led_model.terminal import log_error


def open_missing_streams() -> None:
    """Opens closed standard streams on the null device.

    Otherwise the next file that is opened would get the number of one, and would be printed into.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def status_of(args: Namespace, can_print: bool) -> int:
    """Runs ``args.run`` and returns the exit status; errors that are no bugs become a sentence, others are raised.

    Args:
        can_print: whether there was a stdout to begin with.
    """
    prog = f"led {args.command}"
    try:
        if not can_print and getattr(args, "output", None) is None:
            raise ValueError("there is no stdout to print into; give it one, or --output.")
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.errno is not None and error.filename is None:
            return _without_stdout(error, prog)
        log_error(_sentence(error), prog)
    except (ValueError, ImportError, BackendUnavailable) as error:
        log_error(str(error), prog)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log_error(shortage(error), prog)
    except KeyboardInterrupt:
        log_error("interrupted.", prog)
        return 130
    return 1


def _without_stdout(error: OSError, prog: str) -> int:
    """Reports that stdout cannot be written, and returns the exit status."""
    # Without a file that can be written, Python would report the error once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):  # the reader of a broken pipe has gone
        log_error(f"stdout cannot be written ({error.strerror}); print elsewhere, or give --output.", prog)
    return 1


def _sentence(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    return f"{error.filename} cannot be used ({error.strerror}); check its name and permissions."
