"""The public functions under torch.func, forward-mode differentiation and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from led_kernels import (
    LongformerMask,
    banded_attention,
    global_attention,
    longformer_attention,
)

OPS = ("banded", "global", "longformer")
MASK = LongformerMask.from_padding(torch.tensor([[2, 1, 1, 2, 1, 0]]))
K, V, Q_GLOBAL = torch.randn(3, 1, 6, 2, 4, generator=torch.Generator().manual_seed(0))


def attend(op: str, q: Tensor, mask: LongformerMask = MASK, k: Tensor = K, v: Tensor = V) -> Tensor:
    if op == "banded":
        return banded_attention(q, k, v, mask, window_size=1)
    if op == "global":
        return global_attention(q[:, : mask.max_globals], k, v, mask)
    return longformer_attention(q, k, v, q, k, v, mask, window_size=1)


def queries(*batch: int) -> Tensor:
    return torch.randn(*batch, 1, 6, 2, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
class TestFunctionTransforms:
    def test_gradients_are_those_of_backward(self, op):
        q = queries().requires_grad_()
        attend(op, q).square().sum().backward()
        assert q.grad.any()
        assert torch.equal(torch.func.grad(lambda x: attend(op, x).square().sum())(q.detach()), q.grad)
        out, pull_back = torch.func.vjp(lambda x: attend(op, x), q.detach())
        torch.testing.assert_close(pull_back(2 * out)[0], q.grad)
        jacobian = torch.func.jacrev(lambda x: attend(op, x))(q.detach())
        torch.testing.assert_close(torch.tensordot(2 * out, jacobian, dims=4), q.grad)

    def test_every_sample_on_its_own(self, op):
        def loss(x: Tensor) -> Tensor:
            return attend(op, x).square().sum()

        samples = queries(3)
        for transformed in (loss, torch.func.grad(loss)):
            expected = torch.stack([transformed(x) for x in samples])
            torch.testing.assert_close(torch.func.vmap(transformed)(samples), expected)

    def test_global_queries_alone_are_mapped(self, op):
        """Their rows are added to an output that is shared."""
        samples = torch.stack([Q_GLOBAL, 2 * Q_GLOBAL])

        def attend_globally(q_global: Tensor) -> Tensor:
            return longformer_attention(K, K, V, q_global, K, V, MASK, window_size=1)

        expected = torch.stack([attend_globally(x) for x in samples])
        torch.testing.assert_close(torch.func.vmap(attend_globally)(samples), expected)

    def test_derivatives_that_do_not_exist(self, op):
        def loss(x: Tensor) -> Tensor:
            return attend(op, x).square().sum()

        q = queries()
        with pytest.raises(NotImplementedError, match=r"forward-mode .* use reverse mode"):
            torch.func.jvp(loss, (q,), (q,))
        with pytest.raises(NotImplementedError, match=r"forward-mode .* use reverse mode"):
            torch.func.hessian(loss)(q)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            loss(forward_ad.make_dual(q, q))
        with pytest.raises(NotImplementedError, match=r"double backward .* is not supported"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_tangents_do_not_pass_through_a_compiled_program(self, op, backend):
        """In which an operator would be a constant."""

        def loss(x: Tensor) -> Tensor:
            return attend(op, x).square().sum()

        def tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

        compiled = partial(torch.compile, backend=backend)
        q = queries()
        for call in (
            compiled(lambda x: torch.func.jvp(loss, (x,), (x,))[1]),
            lambda x: torch.func.jvp(compiled(loss), (x,), (x,))[1],
            lambda x: tangent(compiled(loss), x),
            compiled(partial(tangent, loss)),
        ):
            torch.compiler.reset()
            with pytest.raises(NotImplementedError, match="forward-mode"):
                call(q)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_refuse_tangents(requires_grad):
    settings = (*MASK.tensors(), None, 6, 1, 1, 0.5, 0.0, "torch")
    with forward_ad.dual_level():
        q = forward_ad.make_dual(queries().requires_grad_(requires_grad), queries())
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.ops.led_kernels.banded_forward(q, K, V, *settings)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.ops.led_kernels.banded_backward(q, None, K, K, V, K, torch.zeros(1, 2, 6), *settings)


class Attention(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.scale = op, nn.Parameter(torch.ones(()))

    def forward(self, attention_mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = LongformerMask.from_padding(attention_mask, max_globals=2)
        return attend(self.op, self.scale * q, mask, k, v)


@pytest.mark.parametrize("op", ["banded", "longformer"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_length(op, strict):
    module, seqlen = Attention(op), torch.export.Dim("seqlen", min=3, max=4096)
    example = (torch.ones(2, 7, dtype=torch.int64), *torch.randn(3, 2, 7, 2, 4))
    program = torch.export.export(module, example, dynamic_shapes=({1: seqlen},) * 4, strict=strict)
    for length in (5, 33):
        attention_mask = torch.ones(2, length, dtype=torch.int64)
        attention_mask[0, [0, 3]], attention_mask[1, 4] = 2, 0
        qkv = torch.randn(3, 2, length, 2, 4)
        torch.testing.assert_close(program.module()(attention_mask, *qkv), module(attention_mask, *qkv))
