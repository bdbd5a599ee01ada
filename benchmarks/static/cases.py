"""These calls of the Triton backend are compiled, and these functions find the launches that they make.

Every case is one call of the backend at the reference shape: 16,384 tokens, window 512, two heads, one global token or
so many that other configurations serve them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from benchmarks.harness.shapes import Shape
from benchmarks.static.fake_driver import Launch, captured_launches
from benchmarks.static.gpus import TARGETS
from led_kernels.call import AttentionCall
from led_kernels.mask import LongformerMask

OPS = ("banded_forward", "banded_backward", "global_forward", "global_backward")
DTYPES = ("bfloat16", "float16", "float32", "tf32")
TMA_TARGETS = ("sm_90", "sm_100", "sm_120")
HEAD_DIMS = (16, 32, 64, 128, 256)
SEQLEN, HEADS, WINDOW = 16384, 2, 512
MANY_GLOBALS = 200


@dataclass(frozen=True)
class Case:
    """Describes a call of the backend, compiled for one target.

    Attributes:
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``tf32``, which is float32 with tf32 products allowed.
        tma: tiles are loaded by tensor descriptors, which users ask for by ``LED_KERNELS_TRITON_TMA=1``.
        num_globals: global tokens, the first ones of the sequence.
    """

    op: str
    target: str
    dtype: str = "bfloat16"
    head_dim: int = 64
    dropout: bool = False
    tma: bool = False
    num_globals: int = 1

    def __str__(self) -> str:
        variant = ", dropout" * self.dropout + ", tma" * self.tma
        if self.num_globals > 1:
            variant += f", {self.num_globals} globals"
        return f"{self.op} {self.target} {self.dtype} head_dim {self.head_dim}{variant}"

    @property
    def shape(self) -> Shape:
        index = tuple(range(self.num_globals))
        return Shape(seqlen=SEQLEN, heads=HEADS, head_dim=self.head_dim, window=WINDOW, global_index=index)


def short_list() -> list[Case]:
    """Returns what every run of the tests compiles."""
    cases = [
        Case(op, target, head_dim=head_dim)
        for target in ("sm_80", "sm_90")
        for head_dim in (64, 128)
        for op in OPS
    ]
    return [
        *cases,
        Case("banded_forward", "sm_80", "float16"),
        Case("banded_forward", "sm_80", "float32"),
        Case("banded_forward", "sm_80", dropout=True),
        Case("banded_forward", "sm_90", tma=True),
        Case("global_backward", "sm_80", num_globals=MANY_GLOBALS),
    ]


def everything() -> list[Case]:
    """Returns every configuration that is shipped, on every target, and fp16, whose configurations are bf16's, once."""
    variants = [
        (dtype, head_dim, dropout)
        for dtype in ("bfloat16", "float32", "tf32")
        for head_dim in HEAD_DIMS
        for dropout in (False, True)
    ]
    others = [("float16", 64, False), ("bfloat16", 80, False)]
    cases = [Case(op, target, *variant) for target in TARGETS for variant in variants + others for op in OPS]
    many = [dataclasses.replace(case, num_globals=MANY_GLOBALS) for case in cases if case.dtype != "tf32"]
    tma = [
        Case("banded_forward", target, dtype, head_dim, tma=True)
        for target in TMA_TARGETS
        for dtype in ("bfloat16", "float32")
        for head_dim in HEAD_DIMS
    ]
    return cases + many + tma


def launches(case: Case) -> list[Launch]:
    """Returns what the call launches, each compilation once.

    Raises:
        triton.runtime.errors.OutOfResources: a launch needs more shared memory than the target has.
    """
    from led_kernels.backends import triton as backend

    index = torch.arange(case.num_globals)
    mask = LongformerMask.from_lengths(torch.tensor([SEQLEN]), SEQLEN, global_index=index)
    dropout = (0.1 if case.dropout else 0.0, torch.zeros((), dtype=torch.int64) if case.dropout else None)
    scale = case.head_dim**-0.5
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    q, k, v = torch.zeros(1, SEQLEN, 3, HEADS, case.head_dim, dtype=dtype).unbind(2)
    window = (WINDOW, WINDOW) if case.op.startswith("banded") else None
    if window is None:
        q = q[:, : mask.max_globals].contiguous()
    call = AttentionCall(q, k, v, mask, window, scale, *dropout)
    with _settings(case), captured_launches(case.target) as found:
        if case.op.endswith("forward"):
            backend.forward(call)
        else:
            out, lse = torch.zeros(q.shape, dtype=dtype), torch.zeros(call.lse_shape)
            backend.backward(call, out, lse, out, None)
    return list({launch.kernel.hash: launch for launch in found}.values())


@contextlib.contextmanager
def _settings(case: Case) -> Iterator[None]:
    """Sets what a user sets for tf32 products and for tensor descriptors."""
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    try:
        with mock.patch.dict(os.environ, {"LED_KERNELS_TRITON_TMA": str(int(case.tma))}):
            yield
    finally:
        matmul.fp32_precision = precision
