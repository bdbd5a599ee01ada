"""Calls that would make a kernel read or write outside of its tensors are refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from led_kernels import LongformerMask, banded_attention, longformer_attention, ops
from led_kernels.dispatch import backend_module
from led_kernels.gemv import decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from tests.backends import backends_on, needs_extension


@pytest.fixture(params=["reference", *backends_on("cpu")])
def backend(request) -> str:
    return request.param


def call(backend: str, op: str = "banded", **changes):
    """Calls one of the four operators as a traced graph calls it, with some arguments changed."""
    mask = LongformerMask.from_padding(torch.tensor([[2, 1, 1, 1, 0], [1, 2, 2, 1, 1]]))
    tokens, slots = (2, 5, 2, 4), (2, 2, 2, 4)
    rows, lse = (tokens, (2, 2, 5)) if op.startswith("banded") else (slots, (2, 2, 2))
    arguments = {"q": torch.zeros(rows), "k": torch.zeros(tokens), "v": torch.zeros(tokens)}
    if op.endswith("backward"):
        saved = {"d_out": torch.zeros(rows), "d_lse": None}
        arguments = saved | arguments | {"out": torch.zeros(rows), "lse": torch.zeros(lse)}
    arguments |= mask.tensors()._asdict() | {"seed": None, "max_seqlen": 5}
    if op.startswith("banded"):
        arguments |= {"left": 2, "right": 2}
    arguments |= {"scale": 0.5, "dropout_p": 0.0, "backend": backend}
    direction = op if "_" in op else f"{op}_forward"
    return getattr(ops, direction)(*(arguments | changes).values())


@pytest.mark.parametrize("op", ["banded_forward", "banded_backward", "global_forward", "global_backward"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 4, 2, 4), "v": torch.zeros(2, 4, 2, 4)}, "the mask was built for rows"),
        ({"v": torch.zeros(2, 4, 2, 4)}, "v.* has shape"),
        ({"v": torch.zeros(2, 5, 2, 3)}, "v.* has shape"),
        ({"v": torch.zeros(2, 5, 2, 4).double()}, "v.* has dtype"),
        ({"v": torch.zeros(2, 5, 4, 2).mT}, "v.* has a non-contiguous last dimension"),
        ({"q": torch.zeros(1, 5, 2, 4)}, "has shape"),
        ({"token_kind": torch.ones(2, 4).byte(), "padding_before": torch.zeros(2, 4).int()}, "token_kind"),
        ({"max_seqlen": 50}, "token_kind of a mask has shape"),
        ({"global_index": torch.zeros(1, 2).int()}, "global_index of a mask has shape"),
        ({"num_globals": torch.zeros(2)}, "num_globals of a mask has dtype"),
        ({"seed": torch.zeros(1)}, "seed is"),
        ({"dropout_p": 0.5}, "seed is None"),
        ({"dropout_p": 1.5, "seed": torch.zeros(1).long()}, "dropout_p is 1.5"),
    ],
    ids=str,
)
def test_operators_refuse_tensors_of_another_call(op, changes, message, backend):
    call(backend, op)
    with pytest.raises((ValueError, TypeError), match=message):
        call(backend, op, **changes)


@pytest.mark.parametrize("window", [{"left": -1}, {"right": 6}, {"left": 2**62}], ids=str)
def test_operators_refuse_windows_that_are_no_lengths(window, backend):
    with pytest.raises(ValueError, match="window is"):
        call(backend, **window)


@pytest.mark.parametrize("name", ["d_out", "out", "lse", "d_lse"])
def test_backward_refuses_what_the_forward_did_not_give(name, backend):
    for op in ("banded_backward", "global_backward"):
        with pytest.raises(ValueError, match=f"{name} "):
            call(backend, op, **{name: torch.zeros(2, 2, 1)})


@needs_extension
@pytest.mark.parametrize(
    "values",
    [
        {"seq_len": torch.tensor([6, 5]).int()},
        {"seq_len": torch.tensor([-1, 5]).int()},
        {"seq_start": torch.tensor([0, 1]).int()},
        {"num_globals": torch.tensor([3, 2]).int()},
    ],
    ids=str,
)
def test_the_extension_compares_the_values_of_a_mask(values):
    """Which an operator takes unseen."""
    for op in ("banded", "global"):
        with pytest.raises(ValueError, match="of the mask"):
            call("cpu", op, **values)


@needs_extension
@pytest.mark.parametrize("index", [[[9, -1], [1, 2]], [[0, -1], [2, 1]], [[-1, -1], [-1, -1]]], ids=str)
def test_the_extension_looks_at_global_index_where_it_reads_the_rows(index):
    values = {"global_index": torch.tensor(index).int()}
    for op in ("banded_forward", "banded_backward"):
        with pytest.raises(ValueError, match="global_index of the mask does not ascend"):
            call("cpu", op, **values)
    for op in ("global_forward", "global_backward"):
        for result, expected in zip(call("cpu", op, **values), call("cpu", op), strict=True):
            assert torch.equal(result, expected)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 0}, "head_dim is not 1 to 256"),
        ({"head_dim": 257}, "head_dim is not 1 to 256"),
        ({"batch": -1}, "negative"),
        ({"window_left": -1}, "window is negative"),
        ({"num_threads": 0}, "num_threads is below 1"),
        ({}, "the mask's rows are not max_seqlen"),
        ({"max_seqlen": 0, "num_threads": 10**5}, "num_threads is over"),
        ({"dropout_p": float("nan")}, "dropout_p is not 0 to 1"),
        ({"window_right": 2**40}, "window is over"),
    ],
    ids=str,
)
def test_the_extension_compares_sizes(change, message):
    cpu = backend_module("cpu")
    params = cpu._C.AttentionParams()
    for name, value in ({"batch": 1, "heads": 1, "head_dim": 4, "max_seqlen": 2} | change).items():
        setattr(params, name, value)
    for kernel in ("banded_forward", "banded_backward", "global_forward", "global_backward"):
        with pytest.raises(ValueError, match=message):
            getattr(cpu._C, f"cpu_{kernel}")(params, cpu.instruction_set())


def test_windows_of_any_integer_type():
    q = torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    mask = LongformerMask.from_lengths([9], 9)
    expected = banded_attention(q, q, q, mask, window_size=(2, 3))
    for window in ((np.int64(2), np.int32(3)), [2, np.uint8(3)]):
        assert torch.equal(banded_attention(q, q, q, mask, window_size=window), expected)
    for window in (2.0, True, np.bool_(True), "2", torch.tensor(2.0), (1, 2, 3)):
        with pytest.raises(TypeError, match="window_size is"):
            banded_attention(q, q, q, mask, window_size=window)


@torch.no_grad()
def test_few_rows_of_other_shapes_are_torchs():
    """Which broadcasts, or says what is wrong."""
    linear, norm, x = nn.Linear(8, 3), nn.LayerNorm(8), torch.randn(2, 8)
    for wrong in (torch.randn(2, 9), torch.randn(2, 7), torch.randn(())):
        with pytest.raises(RuntimeError):
            few_rows_linear(linear, wrong)
    with pytest.raises(RuntimeError):
        few_rows_linear(linear, x.double())
    assert few_rows_linear(linear.to("meta"), x.to("meta")).is_meta
    with pytest.raises(RuntimeError):
        few_rows_linear(linear, x)
    with pytest.raises(RuntimeError):
        few_rows_add_norm(x, torch.randn(2, 7), norm)
    torch.testing.assert_close(few_rows_add_norm(x, x[:1].clone(), norm), norm(x + x[:1]))
    with pytest.raises(RuntimeError):
        few_rows_add_norm(torch.randn(2, 9), torch.randn(2, 9), norm)


@torch.no_grad()
def test_decode_attention_of_other_shapes_is_torchs():
    q, k = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(
        decode_attention(q, k[:1], k[:1]),
        F.scaled_dot_product_attention(q, *[k[:1].expand(2, -1, -1, -1)] * 2),
    )
    for wrong in (k[:, :2], k[..., :7], torch.randn(3, 3, 5, 8), k.double()):
        with pytest.raises(RuntimeError):
            decode_attention(q, wrong, wrong)
    assert decode_attention(q, k[:, :, :0], k[:, :, :0]).shape == q.shape
    with pytest.raises(RuntimeError):
        decode_attention(q, k, k, torch.ones(2, 1, 1, 4).bool())


@torch.no_grad()
def test_write_rows_of_other_shapes_is_torchs():
    cache, rows, position = torch.zeros(2, 3, 4, 8), torch.ones(2, 3, 1, 8), torch.tensor([2])
    write_rows(cache, position[:0], rows[:, :, :0])
    assert not cache.any()
    for given in (
        (cache[:1], position, rows),
        (cache, position.expand(2), rows),
        (cache, position, rows[..., :7]),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            write_rows(*given)
    with pytest.raises(IndexError):
        write_rows(cache, position + 2, rows)
    assert not cache.any()


@needs_extension
@pytest.mark.parametrize(
    "wrong",
    [
        lambda cpu, x: cpu.few_rows_linear(x, torch.zeros(3, 9), None, False),
        lambda cpu, x: cpu.few_rows_linear(x, torch.zeros(3, 8), torch.zeros(2), False),
        lambda cpu, x: cpu.few_rows_linear(x, torch.zeros(3, 8, device="meta"), None, False),
        lambda cpu, x: cpu.few_rows_linear(x, torch.zeros(3, 8).half(), None, False),
        lambda cpu, x: cpu.few_rows_add_norm(x, x[:1], torch.ones(8), torch.ones(8), 1e-5),
        lambda cpu, x: cpu.few_rows_add_norm(x, x, torch.ones(7), torch.ones(8), 1e-5),
        lambda cpu, x: cpu.decode_attention(x[None, None], x[None, None], x[None, None, :, :7], None),
        lambda cpu, x: cpu.decode_attention(x[None, None], x[None, None, :0], x[None, None, :0], None),
        lambda cpu, x: cpu.decode_attention(
            x[None, None], x[None, None], x[None, None], torch.ones(1, 1, 1, 3).bool()
        ),
        lambda cpu, x: cpu.write_rows(x[None, None], torch.tensor([0]), x[None, None]),
        lambda cpu, x: cpu.write_rows(x[None, None], torch.tensor([0, 1]).int(), x[None, None]),
        lambda cpu, x: cpu.write_rows(x[None, None, :, :7], torch.tensor([0, 1]), x[None, None]),
    ],
)
def test_wrappers_refuse_what_the_kernels_would_run_past(wrong):
    with pytest.raises(ValueError, match=r"give|no keys"):
        wrong(backend_module("cpu"), torch.randn(2, 8))


@torch.no_grad()
def test_few_rows_under_tracing_are_torchs():
    """A kernel that runs while a program is recorded would not be in it, and its result uninitialized when replayed."""
    linear, norm = nn.Linear(8, 8).requires_grad_(False), nn.LayerNorm(8).requires_grad_(False)
    x, other = torch.randn(2, 2, 8)

    def step(x):
        hidden = few_rows_add_norm(x, few_rows_linear(linear, x, gelu=True), norm)
        k = hidden.view(1, 1, 2, 8)
        cache = torch.zeros(1, 1, 4, 8)
        write_rows(cache, torch.tensor([1, 3]), k)
        return decode_attention(k, cache, cache)

    for program in (
        torch.jit.trace(step, x),
        make_fx(step)(x),
        make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    ):
        torch.testing.assert_close(program(other), step(other))
    add = lambda x: few_rows_add_norm(x, few_rows_linear(linear, x), norm)  # noqa: E731
    torch.testing.assert_close(torch.vmap(add)(torch.stack([x, other]))[1], add(other))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert few_rows_linear(linear, x).shape == (2, 8)


def test_attention_under_tracing():
    """A mask that is built in the traced function is not looked at, and the graph serves other tensors."""
    generator = torch.Generator().manual_seed(0)

    def attend(attention_mask, *qkv):
        mask = LongformerMask.from_padding(attention_mask, max_globals=2)
        return longformer_attention(*qkv, mask, window_size=2)

    qkv = torch.randn(2, 6, 2, 9, 2, 4, generator=generator)
    masks = torch.tensor([[[2, 1, 1, 1, 1, 1, 1, 0, 0]] * 2, [[1, 1, 1, 2, 2, 1, 1, 1, 1]] * 2])
    traced = make_fx(attend)(masks[0], *qkv[0])
    torch.testing.assert_close(traced(masks[1], *qkv[1]), attend(masks[1], *qkv[1]))
    with pytest.raises((ValueError, RuntimeError)):
        traced(masks[1][:, :7], *qkv[1])


@torch.no_grad()
def test_tangents_pass_through_few_rows():
    """Which a kernel would drop without a word."""
    linear, norm, x = (
        nn.Linear(8, 8).requires_grad_(False),
        nn.LayerNorm(8).requires_grad_(False),
        torch.randn(2, 8),
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for ours, torchs in (
            (few_rows_linear(linear, dual), linear(dual)),
            (few_rows_add_norm(dual, dual, norm), norm(dual + dual)),
        ):
            torch.testing.assert_close(
                forward_ad.unpack_dual(ours).tangent, forward_ad.unpack_dual(torchs).tangent
            )
