"""What every backend's tests share: cases, input factories, the list of backends, and the one error bound.

The oracle is the ``reference`` backend in fp64; plain PyTorch in the same dtype is the ``reference`` backend in that
dtype. A kernel passes when its largest error is at most twice plain PyTorch's, plus a floor of a few units in the
last place of the largest value (as in flash-attention's tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from led_kernels.dispatch import BACKENDS, can_run
from led_kernels.mask import LongformerMask


@dataclass(frozen=True)
class AttentionCase:
    """One problem: shapes, window and which tokens are padding or global.

    ``globals_per_row``: for each batch row the positions of its global tokens. ``padding``: ``none``, ``right``,
    ``left``, ``holes`` or ``all`` (the last row of the batch is only padding).
    """

    batch: int = 2
    seqlen: int = 67
    heads: int = 2
    head_dim: int = 16
    window_size: int | tuple[int, int] = 8
    globals_per_row: tuple[tuple[int, ...], ...] = ()
    padding: str = "none"
    packed: bool = False
    softmax_scale: float | None = None
    dropout_p: float = 0.0

    def mask(self, device: torch.device | str = "cpu") -> LongformerMask:
        if self.packed:
            lengths = torch.tensor([max(1, self.seqlen - 13 * b) for b in range(self.batch)])
            width = max([len(row) for row in self.globals_per_row], default=0)
            index = torch.full((self.batch, width), -1)
            for b, row in enumerate(self.globals_per_row):
                kept = [i for i in row if i < lengths[b]]
                index[b, : len(kept)] = torch.tensor(kept)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            return LongformerMask.packed(cu_seqlens, index).to(device)
        attention_mask = torch.ones(self.batch, self.seqlen, dtype=torch.int64)
        for b in range(self.batch):
            cut = (b + 1) * self.seqlen // (self.batch + 2)
            if self.padding == "right":
                attention_mask[b, self.seqlen - cut :] = 0
            elif self.padding == "left":
                attention_mask[b, :cut] = 0
            elif self.padding == "holes":
                generator = torch.Generator().manual_seed(b)
                attention_mask[b] = (torch.rand(self.seqlen, generator=generator) > 0.3).long()
        if self.padding == "all":
            attention_mask[-1] = 0
        global_attention_mask = torch.zeros_like(attention_mask)
        for b, row in enumerate(self.globals_per_row):
            global_attention_mask[b, list(row)] = 1
        return LongformerMask.from_padding(attention_mask, global_attention_mask).to(device)

    def inputs(
        self,
        mask: LongformerMask,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        poison_padding: bool = True,
        fused: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v on the mask's device: views of one QKV tensor (``fused``), NaN in padding rows (``poison_padding``)."""
        generator = torch.Generator().manual_seed(seed)
        rows = mask.token_kind.shape
        qkv = torch.randn(*rows, 3, self.heads, self.head_dim, generator=generator, dtype=torch.float64).to(
            dtype
        )
        qkv = qkv.to(mask.device)
        if poison_padding:
            qkv[mask.token_kind == 0] = float("nan")
        q, k, v = qkv.unbind(len(rows))
        return (q, k, v) if fused else (q.contiguous(), k.contiguous(), v.contiguous())


def runnable_backends(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> list[str]:
    """Backends under test on this device: all that run there, without the oracle."""
    return [name for name in BACKENDS if name != "reference" and can_run(name, torch.device(device), dtype)]


def assert_within_error_bound(
    actual: Tensor, oracle: Tensor, plain: Tensor, what: str, floor_ulps: float = 4
) -> None:
    """``max|actual - oracle| <= 2 max|plain - oracle| + floor``.

    Args:
        actual: the kernel's result in its dtype.
        oracle: the fp64 reference's.
        plain: plain PyTorch's in ``actual``'s dtype.
        what: named in the message.
        floor_ulps: floor in units of ``eps(dtype) * max|oracle|``, for cases where plain PyTorch is exact by luck.
    """
    assert actual.shape == oracle.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    )
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    eps = torch.finfo(plain.dtype).eps
    actual, oracle, plain = actual.double(), oracle.double(), plain.double()
    infinite = oracle.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{what}: rows without a result differ"
    actual, oracle, plain = (x.masked_fill(infinite, 0) for x in (actual, oracle, plain))
    if not actual.numel():
        return
    assert not actual.isnan().any(), f"{what}: holds NaN"
    floor = floor_ulps * eps * max(1.0, oracle.abs().max().item())
    error, allowed = (actual - oracle).abs().max().item(), 2 * (plain - oracle).abs().max().item() + floor
    assert error <= allowed, (
        f"{what}: error {error:.3g} exceeds {allowed:.3g} (2 x plain PyTorch's, floor {floor:.3g})"
    )


def run_with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    grad_seed: int = 1,
    dropout_seed: int = 0,
    grad_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """``out, lse`` of a function and the gradients of ``<out, d_out> + <lse, d_lse>`` for its inputs, by name.

    d_out and d_lse are random, the same for every backend; rows whose lse is infinite get none. ``grad_dtype`` is what
    they are rounded to first: give the oracle the dtype under test, so that it sees the very same d_out.
    """
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    torch.manual_seed(dropout_seed)
    out, lse = function(*inputs)
    generator = torch.Generator().manual_seed(grad_seed)
    d_out, d_lse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(grad_dtype or x.dtype).to(x)
        for x in (out, lse)
    )
    grads = torch.autograd.grad((out, lse), inputs, (d_out, d_lse.masked_fill(lse.isinf(), 0)))
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        **{f"d{i}": g for i, g in zip("qkv", grads, strict=True)},
    }


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh torch buffers are filled with NaN, so that an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
