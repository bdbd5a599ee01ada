"""Kernels run in place of torch's operations only where nobody sees the difference: modes, patches, odd tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from led_kernels import capture
from led_kernels.capture import CapturedCalls
from led_kernels.dispatch import backend_module
from led_kernels.eager import is_plain_surroundings
from led_kernels.gemv import decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from led_kernels.modules import is_plain_linear, runs_its_own_code
from tests.backends import needs_extension

pytestmark = needs_extension


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **kwargs or {})


@torch.no_grad()
def test_a_mode_below_the_capture_sees_every_operation():
    linear, x = nn.Linear(8, 8), torch.randn(2, 8)
    with Seen() as seen:
        assert CapturedCalls.capture(lambda: few_rows_linear(linear, x)) is None
        recording = backend_module("cpu").Recording()
        with capture.CaptureMode(recording):
            few_rows_linear(linear, x)
    assert "addmm" in seen.names


@torch.no_grad()
def test_function_modes_see_every_operation():
    linear, norm, x = nn.Linear(8, 8), nn.LayerNorm(8), torch.randn(2, 8)
    q = torch.randn(1, 2, 3, 8)
    with SeenFunctions() as seen:
        few_rows_add_norm(x, few_rows_linear(linear, x), norm)
        decode_attention(q, q, q)
        write_rows(q.clone(), torch.tensor([1]), q[:, :, :1])
    assert {"linear", "layer_norm", "scaled_dot_product_attention", "index_copy_"} <= set(seen.names)
    with torch.device("cpu"):  # a function mode too, which makes tensors alone
        assert is_plain_surroundings()
        assert CapturedCalls.capture(lambda: few_rows_linear(linear, x)) is not None


def test_surroundings_that_are_not_plain():
    assert is_plain_surroundings()
    for mode in (Seen(), SeenFunctions()):
        with mode:
            assert not is_plain_surroundings()
    torch.func.grad(lambda x: check_not_plain(x.sum()))(torch.ones(2))
    assert is_plain_surroundings()


def check_not_plain(x: Tensor) -> Tensor:
    assert not is_plain_surroundings()
    return x


@torch.no_grad()
@pytest.mark.parametrize("name", ["forward", "__call__", "_call_impl"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_patches_of_a_class_run(monkeypatch, name, kind):
    module, x = kind(*(8, 8) if kind is nn.Linear else (8,)), torch.randn(2, 8)
    monkeypatch.setattr(kind, name, lambda self, x: torch.full_like(x, 7.0), raising=False)
    assert not runs_its_own_code(module)
    result = few_rows_linear(module, x) if kind is nn.Linear else few_rows_add_norm(x, x, module)
    assert (result == 7).all()


@torch.no_grad()
@pytest.mark.parametrize("module", [nn.Identity(), nn.Sequential(nn.Linear(8, 8)), nn.RMSNorm(8)], ids=str)
def test_modules_without_a_weight_of_their_own_are_called(module):
    x = torch.randn(2, 8)
    assert not runs_its_own_code(module)
    assert not is_plain_linear(module)
    assert torch.equal(few_rows_linear(module, x), module(x))
    assert torch.equal(few_rows_add_norm(x, x, module), module(x + x))


def test_autograd_knows_what_was_written():
    cache, weight = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8, requires_grad=True)
    position, rows = torch.tensor([1]), torch.randn(1, 2, 1, 8)
    product = cache * weight
    with torch.no_grad():
        write_rows(cache, position, rows)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.no_grad():
        captured = CapturedCalls.capture(lambda: (write_rows(cache, position, rows), cache[:])[1])
    product = cache * weight
    captured.replay()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@torch.no_grad()
def test_caches_that_torch_does_not_write():
    position, rows = torch.tensor([1]), torch.randn(1, 2, 1, 8)
    with torch.inference_mode():
        cache = torch.zeros(1, 2, 4, 8)
        write_rows(cache, position, rows)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        write_rows(cache, position, rows)
    for wrong in (torch.zeros(1, 1, 4, 8).expand(1, 2, 4, 8), torch.zeros(1, 2, 1, 8).expand(1, 2, 4, 8)):
        with pytest.raises(RuntimeError, match="single memory location"):
            write_rows(wrong, position, rows)
    cache = torch.randn(1, 2, 4, 8)
    expected = cache.clone().index_copy_(2, position, cache[:, :, 2:3].clone())
    write_rows(cache, position, cache[:, :, 2:3])
    assert torch.equal(cache, expected)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "negated when read": torch._neg_view,
    "imaginary part of a conjugate": lambda x: torch.complex(x, x).conj().imag,
}


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_tensors_whose_memory_holds_something_else(odd):
    linear, norm, x = nn.Linear(8, 8), nn.LayerNorm(8), torch.randn(2, 8)
    torch.testing.assert_close(few_rows_linear(linear, odd(x)), linear(odd(x)))
    torch.testing.assert_close(few_rows_add_norm(x, odd(x), norm), norm(x + odd(x)))
    q, k, v = torch.randn(3, 1, 2, 3, 8).unbind()
    for given in ((odd(q), k, v), (q, odd(k), v), (q, k, odd(v))):
        torch.testing.assert_close(decode_attention(*given), F.scaled_dot_product_attention(*given))
    cache, position = torch.zeros(1, 2, 4, 8), torch.tensor([1])
    write_rows(cache, position, odd(q[:, :, :1]))
    assert torch.equal(cache[:, :, 1:2], odd(q[:, :, :1]))


@torch.no_grad()
def test_zeros_without_memory():
    linear, norm, x = nn.Linear(8, 8), nn.LayerNorm(8), torch.randn(2, 8)
    zeros = torch._efficientzerotensor(x.shape)
    torch.testing.assert_close(few_rows_linear(linear, zeros), linear(torch.zeros_like(x)))
    torch.testing.assert_close(few_rows_add_norm(x, zeros, norm), norm(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_weights_that_are_not_strided():
    x, dense = torch.randn(2, 8), torch.randn(8, 8)
    linear = nn.Linear(8, 8, bias=False)
    for weight in (dense.to_sparse_csr(), dense.to_sparse(), dense.to_mkldnn()):
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            expected = linear(x)
        except RuntimeError as refusal:
            with pytest.raises(RuntimeError, match=str(refusal)[:20]):
                few_rows_linear(linear, x)
        else:
            torch.testing.assert_close(few_rows_linear(linear, x), expected)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1,), (), (2, 8), (1, 8)], ids=str)
def test_biases_that_torch_broadcasts(shape):
    linear, norm, x = nn.Linear(8, 8), nn.LayerNorm(8), torch.randn(2, 8)
    linear.bias = nn.Parameter(torch.randn(shape))
    torch.testing.assert_close(few_rows_linear(linear, x), linear(x))
    norm.bias = nn.Parameter(torch.randn(shape))
    with pytest.raises(RuntimeError, match="bias"):
        few_rows_add_norm(x, x, norm)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_torchs():
    linear, rows = nn.Linear(8, 8), [torch.randn(2, 8), torch.randn(3, 8)]
    for result, x in zip(
        few_rows_linear(linear, torch.nested.nested_tensor(rows)).unbind(), rows, strict=True
    ):
        torch.testing.assert_close(result, linear(x))
    linear.weight = nn.Parameter(torch.nested.nested_tensor(rows), requires_grad=False)
    with pytest.raises(RuntimeError):
        few_rows_linear(linear, rows[0])
