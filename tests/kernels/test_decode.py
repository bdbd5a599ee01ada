"""Products and attention of a few rows against fp64, where the compiled kernels serve, and where torch does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from led_kernels import decode
from led_kernels.decode import CapturedCalls, decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from led_kernels.dispatch import backend_module
from led_kernels.testing import assert_within_error_bound, unaligned
from tests.backends import needs_extension

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def calls(monkeypatch):
    """Names of the compiled functions that run."""
    made = []
    cpu = backend_module("cpu")

    def spy(name, function, *args):
        made.append(name)
        return function(*args)

    for name in ("write_rows", "few_rows_linear", "few_rows_add_norm", "decode_attention"):
        monkeypatch.setattr(cpu, name, partial(spy, name, getattr(cpu, name)))
    return made


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
def test_linear(calls, dtype, rows, in_features, out_features, bias):
    module = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    x = draw(2, rows, in_features, dtype=dtype)[1].view(1, rows, in_features)
    y = few_rows_linear(module, x)
    assert calls == ["few_rows_linear"]
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
def test_add_norm(calls, dtype, rows, features):
    residual, block = draw(1, rows, features, dtype=dtype), draw(1, rows, features, dtype=dtype, seed=1) + 3
    norm = nn.LayerNorm(features, dtype=dtype)
    norm.weight.copy_(draw(features, dtype=dtype, seed=2))
    norm.bias.copy_(draw(features, dtype=dtype, seed=3))
    y = few_rows_add_norm(residual, block, norm)
    assert calls == ["few_rows_add_norm"]
    expected = F.layer_norm(
        residual.double() + block.double(), (features,), norm.weight.double(), norm.bias.double(), norm.eps
    )
    assert_within_error_bound(y, expected, norm(residual + block), "y")


@needs_extension
@torch.no_grad()
def test_linear_of_tensors_that_lie_anywhere():
    """Rows a stride apart with NaN between them, and a weight that was transposed."""
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
def test_attention(calls, dtype, queries, keys, head_dim, visible):
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
    assert calls == ["decode_attention"]
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
def test_rows_into_a_cache(calls, dtype):
    cache = draw(2, 3, 9, 5, dtype=dtype)
    rows = draw(2, 2, 3, 5, dtype=dtype, seed=1).transpose(1, 2)
    expected, position = cache.clone(), torch.tensor([7, 0])
    write_rows(cache, position, rows)
    assert calls == ["write_rows"]
    assert torch.equal(cache, expected.index_copy_(2, position, rows))
    for outside in (9, -1):
        with pytest.raises(IndexError, match="give a longer cache"):
            write_rows(cache, torch.tensor([0, outside]), rows)
    assert torch.equal(cache, expected)


@needs_extension
@torch.no_grad()
def test_captured_calls_read_and_write_where_they_did(calls):
    module, norm = nn.Linear(16, 16), nn.LayerNorm(16)
    x, cache, position = torch.randn(1, 2, 3, 16), torch.zeros(1, 2, 8, 16), torch.tensor([0, 1, 2])
    visible = torch.ones(1, 1, 1, 8, dtype=torch.bool)

    def step() -> torch.Tensor:
        y = few_rows_linear(module, x, gelu=True)
        write_rows(cache, position, y)
        attended = decode_attention(y, cache, cache, visible)
        return few_rows_add_norm(x.view(6, 16), attended.transpose(1, 2).reshape(6, 16), norm)

    captured = CapturedCalls.of(step)
    assert torch.equal(captured.result, step())
    made = len(calls)
    for start in (3, 5):
        x.copy_(torch.randn(x.shape))
        position.copy_(torch.arange(start, start + 3))
        visible[..., start:] = False
        cache.zero_()
        captured.replay()
        assert len(calls) == made  # nothing of Python ran again
        result, written = captured.result.clone(), cache.clone()
        cache.zero_()
        assert torch.equal(result, step())
        assert torch.equal(written, cache)
        made = len(calls)


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: few_rows_linear(nn.Linear(8, 8), x.repeat(9, 1)),  # more rows than the kernel takes
        lambda x: x.zero_(),
        lambda x: torch.zeros(2),
    ],
)
def test_what_no_replay_would_do_is_not_captured(function):
    assert CapturedCalls.of(lambda: function(torch.randn(2, 8))) is None
    x = torch.randn(2, 8)
    assert CapturedCalls.of(lambda: function(x)) is None


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("when", ["__enter__", "__exit__"])
def test_ctrl_c_does_not_leave_a_capture_behind(calls, monkeypatch, when):
    """It may come when a mode has just been entered, or is about to be left."""

    class Interrupted(decode._KernelsAlone):
        def __enter__(self):
            super().__enter__()
            if when == "__enter__":
                raise KeyboardInterrupt
            return self

        def __exit__(self, *error):
            if when == "__exit__":
                raise KeyboardInterrupt
            super().__exit__(*error)

    module, x = nn.Linear(8, 8), torch.randn(2, 8)
    monkeypatch.setattr(decode, "_KernelsAlone", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        CapturedCalls.of(lambda: few_rows_linear(module, x))
    monkeypatch.undo()
    assert torch.equal(x + x, 2 * x)
    assert _get_current_dispatch_mode() is None
    assert CapturedCalls.of(lambda: few_rows_linear(module, x)) is not None


@needs_extension
@torch.no_grad()
def test_a_mode_without_its_recording_steps_aside():
    recording = backend_module("cpu").Recording()
    x = torch.ones(2)
    with decode._KernelsAlone(recording):
        assert torch.equal(x + x, 2 * x)
        with recording, pytest.raises(decode._OtherOperation):
            x + x
        assert torch.equal(x + x, 2 * x)


def test_torch_serves_the_rest(calls, monkeypatch):
    """Gradients, many rows, compilation, autocast, another backend by name, modules that are not plain."""
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
        decode._cpu_is_chosen.cache_clear()
        few_rows_linear(module, x)
        monkeypatch.delenv("LED_KERNELS_BACKEND")
        decode._cpu_is_chosen.cache_clear()
        hook = module.register_forward_hook(lambda *_: torch.zeros(1))
        assert few_rows_linear(module, x).shape == (1,)
        hook.remove()
        norm = nn.LayerNorm(8)
        norm.register_forward_hook(lambda *_: torch.zeros(1))
        assert few_rows_add_norm(x, x.clone(), norm).shape == (1,)
        decode_attention(torch.randn(1, 1, 3, 257), torch.randn(1, 1, 9, 257), torch.randn(1, 1, 9, 257))
    assert calls == []
