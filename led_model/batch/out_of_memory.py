"""Tells that memory ran out from other errors."""

from __future__ import annotations

import torch

# So torch's CPU allocator, C++, the CUDA driver and cuBLAS say it, in errors that have no class of their own.
_MESSAGES = (
    "can't allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether ``error`` says that a GPU's or the processor's memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def shortage(error: BaseException) -> str:
    """Returns a sentence on memory that ran out: what the error says of it, in one line, and what helps."""
    reason = str(error).strip().split("\n")[0]
    return (
        f"memory ran out{f' ({reason})' if reason else ''}; shorten the text or change --batch-tokens, --batch-size, "
        "--dtype or --device."
    )
