"""The tests of all backends share these cases, input factories and the one error bound.

The oracle is the ``reference`` backend in fp64; plain PyTorch in the same dtype is the ``reference`` backend in that
dtype. A kernel passes when its largest error is at most twice plain PyTorch's, plus a floor of a few units in the
last place of the largest value (as in flash-attention's tests).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from led_kernels.api import banded_attention, global_attention, longformer_attention
from led_kernels.global_rows import gather_global_rows
from led_kernels.mask import LOCAL, LongformerMask
from led_kernels.mask_tensors import HALO


@dataclass(frozen=True)
class AttentionCase:
    """A case says of one problem its shapes, its window and which tokens are padding or global.

    ``globals_per_row`` has for each batch row the positions of its global tokens. ``padding`` is ``none``, ``right``,
    ``left``, ``holes`` or ``all`` (the last row of the batch is only padding). With ``halo`` so many first and last
    rows of each sequence are keys alone. With a ``position_offset`` rows stand at other positions of the whole
    sequence, and global tokens that no local one has in its window at some that are not their rows'.
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
    halo: tuple[int, int] = (0, 0)
    position_offset: int | None = None

    def mask(self, device: torch.device | str = "cpu") -> LongformerMask:
        """Builds the mask of the case."""
        mask = self._whole_mask()
        if self.halo == (0, 0) and self.position_offset is None:
            return mask.to(device)
        kind, places, offset = mask.token_kind.clone(), mask.global_index.clone(), self.position_offset or 0
        window = self.window_size if isinstance(self.window_size, tuple) else (self.window_size,) * 2
        left, right = (self.seqlen if side < 0 else side for side in window)
        for b, (start, length) in enumerate(zip(mask.seq_start.tolist(), mask.seq_len.tolist(), strict=True)):
            row = kind[start : start + length] if mask.is_packed else kind[b, :length]
            position = torch.arange(length)
            in_halo = (position < self.halo[0]) | (position >= length - self.halo[1])
            row[(row == LOCAL) & in_halo] = HALO
            for slot, i in enumerate(mask.global_index[b, : mask.num_globals[b]].tolist()):
                is_seen = (row[max(i - right, 0) : i + left + 1] == LOCAL).any()
                places[b, slot] = i + offset if is_seen else 7 * i + 2
        offsets = torch.full_like(mask.position_offset, offset)
        return replace(mask, token_kind=kind, position_offset=offsets, global_position=places).to(device)

    def _whole_mask(self) -> LongformerMask:
        if self.packed:
            lengths = torch.tensor([max(1, self.seqlen - 13 * b) for b in range(self.batch)])
            width = max([len(row) for row in self.globals_per_row], default=0)
            index = torch.full((self.batch, width), -1)
            for b, row in enumerate(self.globals_per_row):
                kept = [i for i in row if i < lengths[b]]
                index[b, : len(kept)] = torch.tensor(kept)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            return LongformerMask.packed(cu_seqlens, index)
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
        return LongformerMask.from_padding(attention_mask, global_attention_mask)

    def inputs(
        self,
        mask: LongformerMask,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        poison_padding: bool = True,
        fused: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws q, k and v on the mask's device.

        They are views of one tensor if ``fused``. If ``poison_padding``, padding rows hold NaN, and q of a halo too.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = mask.token_kind.shape
        qkv = torch.randn(*rows, 3, self.heads, self.head_dim, generator=generator, dtype=torch.float64).to(
            dtype
        )
        qkv = qkv.to(mask.device)
        if poison_padding:
            qkv[mask.token_kind == 0] = float("nan")
        q, k, v = qkv.unbind(len(rows))
        if poison_padding:
            q[mask.token_kind == HALO] = float("nan")
        return (q, k, v) if fused else (q.contiguous(), k.contiguous(), v.contiguous())


def unaligned(x: Tensor) -> Tensor:
    """Returns x at an address and with strides that are multiples of one element only; NaN lies between rows."""
    padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    return padded[..., 1 : 1 + x.shape[-1]].copy_(x)


def assert_within_error_bound(
    actual: Tensor, oracle: Tensor, plain: Tensor, what: str, floor_ulps: float | None = None
) -> None:
    """Asserts ``max|actual - oracle| <= 2 max|plain - oracle| + floor``.

    Args:
        actual: the kernel's result in its dtype.
        oracle: the result of the reference in fp64.
        plain: the result of plain PyTorch in ``actual``'s dtype.
        what: the name of the result, for the message.
        floor_ulps: the floor in units of ``eps(dtype) * max|oracle|``, for cases where plain PyTorch is exact by luck;
            default 2 for fp16 and bf16 (a backward from lse takes ``delta`` from the rounded out), 8 for fp32 (other
            orders of summation), 64 for fp64, whose plain PyTorch is the oracle itself.
    """
    assert actual.shape == oracle.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    )
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    eps = torch.finfo(plain.dtype).eps
    if floor_ulps is None:
        floor_ulps = {torch.float64: 64, torch.float32: 8}.get(plain.dtype, 2)
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
    function: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: Sequence[Tensor],
    grad_seed: int = 1,
    dropout_seed: int = 0,
    grad_dtype: torch.dtype | None = None,
    names: Sequence[str] = "qkv",
) -> dict[str, Tensor]:
    """Returns, by name, ``out, lse`` of a function and the gradients of ``<out, d_out> + <lse, d_lse>`` for its inputs.

    d_out and d_lse are random, the same for every backend; they are zeros in rows whose lse is infinite, and lse may be
    None. ``grad_dtype`` is what they are rounded to first: give the oracle the dtype under test, so that it sees the
    very same d_out.
    """
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    torch.manual_seed(dropout_seed)
    outputs = dict(zip(("out", "lse"), function(*inputs), strict=True))
    outputs = {name: x for name, x in outputs.items() if x is not None}
    generator = torch.Generator().manual_seed(grad_seed)
    d_outputs = []
    for x in outputs.values():
        d_x = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(grad_dtype or x.dtype)
        d_outputs.append(d_x.to(x).masked_fill(x.isinf(), 0))
    # Without global tokens the global projections are not used at all.
    grads = torch.autograd.grad(
        tuple(outputs.values()), inputs, d_outputs, allow_unused=True, materialize_grads=True
    )
    results = {name: x.detach() for name, x in outputs.items()}
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


_INPUT_NAMES = {
    "banded": ("q", "k", "v"),
    "global": ("q_global", "k_global", "v_global"),
    "longformer": ("q", "k", "v", "q_global", "k_global", "v_global"),
}


def attention_function(op: str, case: AttentionCase, mask: LongformerMask, backend: str) -> Callable:
    """Returns a function that runs ``banded``, ``global`` or ``longformer`` on the case, as ``inputs -> (out, lse)``.

    ``global`` takes q of every row, as the others do; ``longformer`` has no lse (None) and takes six inputs.
    """
    settings = {"softmax_scale": case.softmax_scale, "dropout_p": case.dropout_p, "backend": backend}

    def banded(q, k, v):
        return banded_attention(q, k, v, mask, window_size=case.window_size, return_lse=True, **settings)

    def global_(q, k, v):
        return global_attention(gather_global_rows(q, mask), k, v, mask, return_lse=True, **settings)

    def longformer(q, k, v, q_global, k_global, v_global):
        projected = (q, k, v, q_global, k_global, v_global)
        return longformer_attention(*projected, mask, window_size=case.window_size, **settings), None

    return {"banded": banded, "global": global_, "longformer": longformer}[op]


def assert_matches_reference(
    op: str,
    case: AttentionCase,
    backend: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    scale_k: float = 1.0,
    floor_ulps: float | None = None,
    fused: bool = True,
) -> None:
    """Asserts the error bound on out, lse and every gradient, with NaN in padding and in fresh memory.

    Args:
        op: ``banded``, ``global`` or ``longformer``.
        scale_k: factor of the keys, for large scores.
        fused: whether q, k and v are views of one tensor.
    """
    with poisoned_memory():
        actual = _run(op, case, backend, device, dtype, dtype, scale_k, fused)
    oracle, plain = _reference_results(op, case, device, dtype, scale_k)
    for name in actual:
        assert_within_error_bound(actual[name], oracle[name], plain[name], name, floor_ulps)


@functools.lru_cache(maxsize=2)  # The backends under test take turns on a case.
def _reference_results(op, case, device, dtype, scale_k) -> list[dict[str, Tensor]]:
    """Returns the results of the reference in fp64, and those of plain PyTorch in ``dtype``."""
    return [_run(op, case, "reference", device, dtype, run, scale_k) for run in (torch.float64, dtype)]


def _run(
    op: str,
    case: AttentionCase,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    run_dtype: torch.dtype,
    scale_k: float,
    fused: bool = True,
) -> dict[str, Tensor]:
    """Runs the op in ``run_dtype`` on inputs and d_out rounded to ``dtype``."""
    mask, names = case.mask(device), _INPUT_NAMES[op]
    triples = [case.inputs(mask, dtype, seed, fused=fused) for seed in range(len(names) // 3)]
    inputs = [x for q, k, v in triples for x in (q, k if scale_k == 1 else k * scale_k, v)]
    function = attention_function(op, case, mask, backend)
    return run_with_gradients(function, [x.to(run_dtype) for x in inputs], grad_dtype=dtype, names=names)


@contextmanager
def poisoned_memory() -> Generator[None]:
    """Fills fresh torch buffers with NaN, so that an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
