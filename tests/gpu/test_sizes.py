"""Long sequences, large tensors and many sequences."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention, verify
from benchmarks.shapes import Shape
from led_kernels import LongformerMask, banded_attention, longformer_attention
from led_kernels.testing import assert_within_error_bound

pytestmark = pytest.mark.gpu

FUNCTIONS = {"banded": banded_attention, "core": longformer_attention}


def require_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


def check_shape(what: str, shape: Shape, backend: str = "triton") -> None:
    """out and all gradients; the truth is computed row by row, plain PyTorch is the dense reference in the dtype."""

    def results(backend: str) -> dict[str, torch.Tensor]:
        provider = attention.led_kernels_provider(FUNCTIONS[what], backend, shape.device, shape.torch_dtype)
        return attention.forward_backward(provider, attention.make_inputs(shape), attention.LEAVES[what])()

    actual, plain, truth = results(backend), results("reference"), verify.truth_of(what, shape)
    for name, x in actual.items():
        assert_within_error_bound(
            x, truth[name].nan_to_num(), plain[name], name
        )  # NaN: rows that are not ours


@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("seqlen", "window", "global_index"),
    [
        (2048, 512, (0,)),
        (4097, 300, (0, 1, 4000)),
        (8191, 4096, (17,)),
        (16384, 512, tuple(range(0, 16384, 500))),
    ],
)
def test_long_sequence(what, dtype, seqlen, window, global_index):
    require_memory(16)
    check_shape(what, Shape(seqlen, 1, 64, window, global_index, dtype=dtype, device="cuda"))


def test_offsets_beyond_32_bits():
    """q, k, v as views of one tensor of more than 2³¹ elements: its last sequence equals the same computed alone."""
    require_memory(24)
    batch, seqlen, heads, head_dim = 24, 16384, 16, 128
    qkv = torch.empty(batch, seqlen, 3, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    assert qkv.numel() > 2**31
    qkv.normal_(generator=torch.Generator("cuda").manual_seed(0))
    out = {}
    for rows in (slice(None), slice(batch - 1, None)):
        q, k, v = qkv[rows].unbind(2)
        mask = LongformerMask.from_lengths([seqlen] * len(q), seqlen, [0], max_globals=1).to("cuda")
        out[len(q)] = banded_attention(q, k, v, mask, window_size=100, backend="triton")[-1]
    assert torch.equal(out[batch], out[1])


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 1000])
def test_batch_sizes(batch):
    """Each sequence as if it were alone."""
    check_batch(batch, "triton", "cuda")


def check_batch(batch: int, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, 34, (batch,), generator=generator)
    qkv = torch.randn(6, batch, 33, 2, 16, generator=generator).to(device)
    mask = LongformerMask.from_lengths(lengths, 33, [0]).to(device)
    settings = {"window_size": 5, "backend": backend}
    out = longformer_attention(*qkv, mask, **settings)
    for b in {0, batch // 2, batch - 1}:
        alone = LongformerMask.from_lengths(lengths[b : b + 1], 33, [0]).to(device)
        torch.testing.assert_close(
            out[b : b + 1], longformer_attention(*qkv[:, b : b + 1], alone, **settings)
        )
