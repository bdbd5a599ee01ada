"""Long sequences, large tensors and many sequences."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.shapes import Shape
from benchmarks.suites import attention_providers as providers
from benchmarks.suites.attention_truth import LEAVES, make_inputs, truth_of
from led_kernels import LongformerMask, banded_attention, longformer_attention
from led_kernels.testing import assert_within_error_bound

pytestmark = pytest.mark.gpu

FUNCTIONS = {"banded": banded_attention, "core": longformer_attention}


def require_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


def check_shape(what: str, shape: Shape, backend: str) -> None:
    """Checks out and all gradients; the truth is computed row by row, plain PyTorch is the dense reference."""

    def results(backend: str) -> dict[str, torch.Tensor]:
        provider = providers.led_kernels_provider(FUNCTIONS[what], backend, shape.device, shape.torch_dtype)
        return providers.forward_backward(provider, make_inputs(shape), LEAVES[what])()

    actual, plain, truth = results(backend), results("reference"), truth_of(what, shape)
    for name, x in actual.items():
        assert_within_error_bound(
            x, truth[name].nan_to_num(), plain[name], name
        )  # NaN: rows that are not ours


@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("seqlen", "window", "global_index"),
    [
        (2048, 512, (0,)),
        (4097, 300, (0, 1, 4000)),
        (8191, 4096, (17,)),
        (16384, 512, tuple(range(0, 16384, 500))),
    ],
)
def test_long_sequence(what, dtype, seqlen, window, global_index, backend):
    require_memory(16)
    name = str(dtype).removeprefix("torch.")
    check_shape(what, Shape(seqlen, 1, 64, window, global_index, dtype=name, device="cuda"), backend)


def test_offsets_beyond_32_bits(backend):
    """q, k, v as views of one tensor of more than 2³¹ elements: its last sequence equals the same computed alone."""
    require_memory(24)
    batch, seqlen, heads, head_dim = 24, 16384, 16, 128
    qkv = torch.empty(batch, seqlen, 3, heads, head_dim, dtype=torch.float16, device="cuda")
    assert qkv.numel() > 2**31
    qkv.normal_(generator=torch.Generator("cuda").manual_seed(0))
    results = {}
    for rows in (slice(None), slice(batch - 1, None)):
        leaves = [x.detach().requires_grad_() for x in qkv[rows].unbind(2)]
        size = len(leaves[0])
        mask = LongformerMask.from_lengths([seqlen] * size, seqlen, [0], max_globals=1).to("cuda")
        out = banded_attention(*leaves, mask, window_size=100, backend=backend)
        grads = torch.autograd.grad(out, leaves, out.detach())
        results[size] = [x[-1].clone() for x in (out.detach(), *grads)]
    for of_many, alone in zip(results[batch], results[1], strict=True):
        assert torch.equal(of_many, alone)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 1000])
def test_batch_sizes(batch, backend):
    """Each sequence as if it were alone."""
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, 34, (batch,), generator=generator)
    qkv = torch.randn(6, batch, 33, 2, 16, generator=generator).to("cuda")
    mask = LongformerMask.from_lengths(lengths, 33, [0]).to("cuda")
    settings = {"window_size": 5, "backend": backend}
    out = longformer_attention(*qkv, mask, **settings)
    for b in {0, batch // 2, batch - 1}:
        alone = LongformerMask.from_lengths(lengths[b : b + 1], 33, [0]).to("cuda")
        torch.testing.assert_close(
            out[b : b + 1], longformer_attention(*qkv[:, b : b + 1], alone, **settings)
        )
