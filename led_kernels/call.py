"""Every backend takes a call of attention in the form that is defined here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from led_kernels.mask import LongformerMask
from led_kernels.philox import BANDED_STREAM, GLOBAL_STREAM


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of lse for inputs of ``dtype``: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Holds the inputs and settings of banded or of global attention.

    A backend computes ``(out, lse)`` from it: ``out`` is like ``q`` and contiguous; ``lse`` is fp32 (fp64 for fp64),
    natural logarithm, of :attr:`lse_shape`, +inf on rows without a result, which are zeros in ``out``.

    Attributes:
        q: banded ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads, head_dim]`` with a packed mask; global
            ``[batch, max_globals, heads, head_dim]`` in the order of ``mask.global_index``.
        k, v: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads, head_dim]`` with a packed mask. All three
            have any strides with a contiguous last dimension.
        mask: of the batch.
        window: banded ``(left, right)``, inclusive, each 0 … ``mask.max_seqlen``: query i sees keys i - left …
            i + right. None for global attention.
        softmax_scale: what the scores are multiplied by.
        dropout_p: probability of dropping an attention probability, 0 … 1.
        seed: int64 ``[1]`` on the device of ``q``, of the dropout (:mod:`led_kernels.philox`); None without dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: LongformerMask
    window: tuple[int, int] | None
    softmax_scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def is_global(self) -> bool:
        """Tells whether the queries are the global tokens, which see every key, and not the local ones."""
        return self.window is None

    @property
    def banded_window(self) -> tuple[int, int]:
        """Returns the window of a call of banded attention, which has one."""
        assert self.window is not None
        return self.window

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Returns ``[batch, heads, rows of q]``; for banded attention under a packed mask ``[heads, total_rows]``."""
        *batch, rows, heads, _ = self.q.shape
        return (*batch, heads, rows)

    @property
    def philox_stream(self) -> int:
        """Tells which of the random streams of :mod:`led_kernels.philox` the dropout draws from."""
        return GLOBAL_STREAM if self.is_global else BANDED_STREAM

    @property
    def names(self) -> tuple[str, str, str]:
        """Returns what public functions call ``q``, ``k`` and ``v``, for messages."""
        return ("q_global", "k_global", "v_global") if self.is_global else ("q", "k", "v")
