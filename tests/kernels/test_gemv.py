"""The compiled kernels for a few rows agree with fp64, and torch serves wherever they do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from led_kernels import gemv
from led_kernels.gemv import decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from led_kernels.testing import assert_within_error_bound, unaligned
from tests.backends import needs_extension

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(768, 130), (1, 1), (5, 3), (31, 67), (64, 64)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(compiled_calls, dtype, rows, in_features, out_features, bias):
    module = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    x = draw(2, rows, in_features, dtype=dtype)[1].view(1, rows, in_features)
    y = few_rows_linear(module, x)
    assert compiled_calls == ["few_rows_linear"]
    parameters = [None if p is None else p.double() for p in (module.weight, module.bias)]
    assert_within_error_bound(y, F.linear(x.double(), *parameters), module(x), "y")


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_features", [3, 130])
def test_linear_with_gelu(dtype, out_features):
    module, x = nn.Linear(40, out_features, dtype=dtype), draw(5, 40, dtype=dtype) * 3
    parameters = [p.double() for p in (module.weight, module.bias)]
    expected = F.gelu(F.linear(x.double(), *parameters))
    assert_within_error_bound(few_rows_linear(module, x, gelu=True), expected, F.gelu(module(x)), "y")


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("features", [1, 37, 768])
def test_add_norm(compiled_calls, dtype, rows, features):
    residual, block = draw(1, rows, features, dtype=dtype), draw(1, rows, features, dtype=dtype, seed=1) + 3
    norm = nn.LayerNorm(features, dtype=dtype)
    norm.weight.copy_(draw(features, dtype=dtype, seed=2))
    norm.bias.copy_(draw(features, dtype=dtype, seed=3))
    y = few_rows_add_norm(residual, block, norm)
    assert compiled_calls == ["few_rows_add_norm"]
    expected = F.layer_norm(
        residual.double() + block.double(), (features,), norm.weight.double(), norm.bias.double(), norm.eps
    )
    assert_within_error_bound(y, expected, norm(residual + block), "y")


@needs_extension
@torch.no_grad()
def test_linear_of_tensors_that_lie_anywhere():
    """Rows lie a stride apart with NaN between them, and a weight was transposed."""
    x, weight = (
        unaligned(draw(3, 37, dtype=torch.float32)),
        unaligned(draw(21, 37, dtype=torch.float32, seed=1)),
    )
    for w in (weight, draw(37, 21, dtype=torch.float32, seed=2).t()):
        module = nn.Linear(37, 21)
        module.weight = nn.Parameter(w)
        expected = F.linear(x.double(), w.double(), module.bias.double())
        assert_within_error_bound(few_rows_linear(module, x), expected, module(x), "y")


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 4, 7, 16])
@pytest.mark.parametrize(
    ("keys", "head_dim"), [(1, 64), (77, 64), (1000, 64), (33, 5), (130, 100), (64, 256)], ids=str
)
@pytest.mark.parametrize("visible", ["all", "per document", "per query", "shared"])
def test_attention(compiled_calls, dtype, queries, keys, head_dim, visible):
    q, k, v = (
        draw(2, 3, n, head_dim, dtype=dtype, seed=seed) for seed, n in enumerate((queries, keys, keys))
    )
    shape = {"all": None, "per document": (2, 1, 1), "per query": (2, 1, queries), "shared": (1, 1, queries)}[
        visible
    ]
    mask = None
    if shape is not None:
        mask = torch.rand(*shape, keys, generator=torch.Generator().manual_seed(3)) < 0.3
        mask[..., keys // 2] = True
        mask[..., keys // 3 : keys // 3 + 70] = False  # whole blocks of keys that nobody sees
        mask[..., 0] = True
    out = decode_attention(q, k, v, mask)
    assert compiled_calls == ["decode_attention"]
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    assert_within_error_bound(out, expected, F.scaled_dot_product_attention(q, k, v, mask), "out")


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_with_any_number_of_threads(threads):
    """Keys are split over threads, and some splits see nothing."""
    before = torch.get_num_threads()
    q, k, v = (draw(1, 2, n, 16, dtype=torch.float32, seed=seed) for seed, n in enumerate((3, 900, 900)))
    mask = (torch.arange(900) < 100)[None, None, None]
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    try:
        torch.set_num_threads(threads)
        out = decode_attention(q, k, v, mask)
    finally:
        torch.set_num_threads(before)
    assert_within_error_bound(out, expected, F.scaled_dot_product_attention(q, k, v, mask), "out")


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_keys_that_nobody_sees_may_hold_anything(dtype):
    q, k, v = (draw(2, 2, n, 32, dtype=dtype, seed=seed) for seed, n in enumerate((2, 150, 150)))
    mask = torch.rand(2, 1, 2, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = decode_attention(q, k, v, mask)
    unseen = ~mask.any(2)[..., None]
    for poison in (float("nan"), float("inf")):
        poisoned = decode_attention(q, k.masked_fill(unseen, poison), v.masked_fill(unseen, poison), mask)
        assert torch.equal(poisoned, expected)


@needs_extension
@torch.no_grad()
def test_large_scores_and_tensors_that_lie_anywhere():
    q, k, v = (
        unaligned(draw(1, 3, n, 24, dtype=torch.float32, seed=seed)) for seed, n in enumerate((4, 90, 90))
    )
    q = q * 40
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out = decode_attention(q, k, v)
    assert_within_error_bound(out, expected, F.scaled_dot_product_attention(q, k, v), "out")


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_into_a_cache(compiled_calls, dtype):
    cache = draw(2, 3, 9, 5, dtype=dtype)
    rows = draw(2, 2, 3, 5, dtype=dtype, seed=1).transpose(1, 2)
    expected, position = cache.clone(), torch.tensor([7, 0])
    write_rows(cache, position, rows)
    assert compiled_calls == ["write_rows"]
    assert torch.equal(cache, expected.index_copy_(2, position, rows))
    for outside in (9, -1):
        with pytest.raises(IndexError, match="give a longer cache"):
            write_rows(cache, torch.tensor([0, outside]), rows)
    assert torch.equal(cache, expected)


def test_torch_serves_the_rest(compiled_calls, monkeypatch):
    """Torch serves gradients, many rows, compilation, autocast, other backends by name, modules that are not plain."""
    module, x = nn.Linear(8, 4), torch.randn(2, 8)
    q = torch.randn(1, 2, 3, 8)
    few_rows_linear(module, x).sum().backward()
    assert module.weight.grad is not None
    with torch.no_grad():
        few_rows_linear(module, torch.randn(17, 8))
        few_rows_linear(module.double(), x.double().repeat(9, 1), gelu=True)
        few_rows_add_norm(torch.randn(17, 8), torch.randn(17, 8), nn.LayerNorm(8))
        module.float()
        decode_attention(torch.randn(1, 2, 17, 8), q, q)
        decode_attention(q, q, q, torch.zeros(1, 1, 3, 3))
        torch.compile(few_rows_linear, backend="eager", fullgraph=True)(module, x)
        torch.compile(decode_attention, backend="eager", fullgraph=True)(q, q, q)
        with torch.autocast("cpu", torch.bfloat16):
            assert few_rows_linear(module, x).dtype == torch.bfloat16
        monkeypatch.setenv("LED_KERNELS_BACKEND", "torch")
        gemv._cpu_backend_serves.cache_clear()
        few_rows_linear(module, x)
        monkeypatch.delenv("LED_KERNELS_BACKEND")
        gemv._cpu_backend_serves.cache_clear()
        hook = module.register_forward_hook(lambda *_: torch.zeros(1))
        assert few_rows_linear(module, x).shape == (1,)
        hook.remove()
        norm = nn.LayerNorm(8)
        norm.register_forward_hook(lambda *_: torch.zeros(1))
        assert few_rows_add_norm(x, x.clone(), norm).shape == (1,)
        decode_attention(torch.randn(1, 1, 3, 257), torch.randn(1, 1, 9, 257), torch.randn(1, 1, 9, 257))
    assert compiled_calls == []
