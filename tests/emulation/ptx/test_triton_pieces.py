"""Triton compiles the pieces of attention kernels here, alone: products in every dtype, Philox, gathers, reductions."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from led_kernels.philox import philox4x32
from tests.emulation.ptx.faults import MemoryFault
from tests.emulation.ptx.launch import executed_launches


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, BLOCK: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, k, BLOCK, num_stages=NUM_STAGES):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m[:, None] < m) & (offs_k[None, :] < k)
        b_mask = (offs_k[:, None] < k) & (offs_n[None, :] < n)
        a = tl.load(a_ptr + offs_m[:, None] * k + offs_k[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + offs_k[:, None] * n + offs_n[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    c_mask = (offs_m[:, None] < m) & (offs_n[None, :] < n)
    tl.store(c_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(c_ptr.dtype.element_ty), mask=c_mask)


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float16, "ieee", 2e-3),
        (torch.bfloat16, "ieee", 2e-2),
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32", 2e-3),
        (torch.float32, "tf32x3", 1e-6),
    ],
    ids=["fp16", "bf16", "fp32", "tf32", "tf32x3"],
)
@pytest.mark.parametrize(
    ("sizes", "num_stages"), [((70, 96, 80), 3), ((33, 45, 51), 1)], ids=["pipelined", "odd"]
)
def test_matmul(dtype, precision, tolerance, sizes, num_stages):
    m, n, k = sizes
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))
    c = torch.full((m, n), float("nan"), dtype=dtype)
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
    with executed_launches() as launches:
        _matmul_kernel[grid](a, b, c, m, n, k, BLOCK=32, PRECISION=precision, NUM_STAGES=num_stages)
    expected = a.double() @ b.double()
    assert (c.double() - expected).abs().max() <= tolerance * expected.abs().max()
    # that the tensor cores' instructions are what was executed
    ptx = launches[0].kernel.asm["ptx"]
    instruction = {torch.float16: "f16.f16", torch.bfloat16: "bf16.bf16", torch.float32: "tf32.tf32"}[dtype]
    assert ("mma.sync" in ptx and instruction in ptx) == (precision != "ieee" or dtype != torch.float32)


@triton.jit(do_not_specialize=["seed"])
def _philox_kernel(out_ptr, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    draws = tl.philox(seed, i // 4, i * 7, i * 0 + 5, i * 0 + 1)
    lane = i % 4
    word = tl.where(
        lane == 0, draws[0], tl.where(lane == 1, draws[1], tl.where(lane == 2, draws[2], draws[3]))
    )
    tl.store(out_ptr + i, word.to(tl.int64), mask=i < n)


def _draws(seed: int, n: int) -> torch.Tensor:
    i = torch.arange(n)
    key = tuple(torch.tensor(x) for x in (seed & 0xFFFFFFFF, seed >> 32))
    words = philox4x32((i // 4, i * 7, torch.full_like(i, 5), torch.ones_like(i)), key)
    return torch.stack(words, 1)[i, i % 4]


def test_philox():
    n, seed = 1000, 0x123456789ABCDEF
    out = torch.zeros(n, dtype=torch.int64)
    with executed_launches():
        _philox_kernel[(triton.cdiv(n, 256),)](out, seed, n, BLOCK=256)
    assert torch.equal(out, _draws(seed, n))


@triton.jit
def _gather_kernel(x_ptr, index_ptr, sums_ptr, maxima_ptr, n, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index_ptr + slot, mask=slot < n, other=-1)
    offs_d = tl.arange(0, COLUMNS)
    x = tl.load(
        x_ptr + row.to(tl.int64)[:, None] * COLUMNS + offs_d[None, :], mask=row[:, None] >= 0, other=0.0
    ).to(tl.float32)
    tl.store(sums_ptr + slot, tl.sum(x, 1), mask=slot < n)
    tl.store(maxima_ptr + tl.program_id(0) * COLUMNS + offs_d, tl.max(x, 0))


@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_gather_and_reductions(num_warps):
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.tensor([3, -1, 99, 0, 7, 50, -1] * 6, dtype=torch.int32)
    sums, maxima = torch.full((42,), float("nan")), torch.full((2, 64), float("nan"))
    with executed_launches():
        _gather_kernel[(2,)](x, index, sums, maxima, 42, COLUMNS=64, BLOCK=32, num_warps=num_warps)
    rows = torch.where(index[:, None] >= 0, x.float()[index.long()], 0)
    torch.testing.assert_close(sums, rows.sum(1))
    padded = torch.cat([rows, torch.zeros(22, 64)]).view(2, 32, 64)
    torch.testing.assert_close(maxima, padded.amax(1), rtol=0, atol=0)
    index[5] = 100
    with pytest.raises(MemoryFault, match="of x_ptr"), executed_launches():
        _gather_kernel[(2,)](x, index, sums, maxima, 42, COLUMNS=64, BLOCK=32, num_warps=num_warps)


def test_arguments_that_triton_compiles_in():
    """An int that is 1 and constexprs are no parameters of the compiled function."""
    out = torch.zeros(1, dtype=torch.int64)
    with executed_launches() as launches:
        _philox_kernel[(1,)](out, 3, 1, BLOCK=32)
    assert list(launches[0].parameters) == ["out_ptr", "seed"]
    assert torch.equal(out, _draws(3, 1))
