"""Plain misuse of the public functions ends in one sentence that names the argument."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from led_kernels import (
    LongformerMask,
    absorbed_global_attention,
    banded_attention,
    global_attention,
    longformer_attention,
)

MASK = LongformerMask.from_padding(torch.tensor([[2, 1, 1, 1, 1, 0]]))
X = torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(0))


def attend(**changes) -> None:
    """Calls both functions with some arguments changed."""
    q = changes.pop("q", X)
    banded_attention(q, X, X, MASK, window_size=2, **changes)


def absorb(**changes) -> None:
    weight = torch.randn(8, 8)
    given = {"hidden": X.flatten(-2), "q_global": X[:, :1], "key_weight": weight, "value_weight": weight}
    absorbed_global_attention(**(given | {"value_bias": None, "mask": MASK} | changes))


@pytest.mark.parametrize("call", [attend, absorb])
@pytest.mark.parametrize("name", ["softmax_scale", "dropout_p"])
@pytest.mark.parametrize(
    "value",
    [
        "a",
        "0.5",
        1j,
        torch.tensor([0.1, 0.2]),
        torch.tensor(0.5, requires_grad=True),
        [0.5],
        torch.tensor(1j),
    ],
    ids=str,
)
def test_what_is_no_number(call, name, value):
    with pytest.raises(TypeError, match=rf"{name} is .*; (give a number|multiply q by it)"):
        call(**{name: value})


def test_numbers_of_any_type():
    expected = banded_attention(X, X, X, MASK, window_size=2, softmax_scale=0.5)
    for scale in (np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)):
        assert torch.equal(banded_attention(X, X, X, MASK, window_size=2, softmax_scale=scale), expected)
    assert banded_attention(X, X, X, MASK, window_size=2, softmax_scale=1).isfinite().all()
    absorb(dropout_p=torch.tensor(0.5))
    with pytest.raises(TypeError, match="dropout_p is None; give a number"):
        attend(dropout_p=None)


@pytest.mark.parametrize("backend", [["cpu"], {}, "", 0, [], 1.5, "gpu"], ids=repr)
def test_what_is_no_backend(backend):
    with pytest.raises(ValueError, match=r"backend is .*; give one of"):
        attend(backend=backend)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense():
    nested = torch.nested.nested_tensor([X[0], X[0]])
    for q, kind in (
        (X.to_sparse(), "sparse_coo"),
        (X[0, :, 0].to_sparse_csr(), "sparse_csr"),
        (nested, "nested"),
    ):
        with pytest.raises(TypeError, match=f"q is a {kind} tensor; give a dense one"):
            attend(q=q)


def test_weights_that_are_no_tensors():
    for name in ("key_weight", "value_weight"):
        for value in (None, [[1.0]]):
            with pytest.raises(TypeError, match=rf"{name} is a .*; give a torch\.Tensor"):
                absorb(**{name: value})
    with pytest.raises(TypeError, match=r"value_bias is a list; give a torch\.Tensor"):
        absorb(value_bias=[1.0])


@pytest.mark.parametrize("name", ["q_global", "k_global", "v_global"])
@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, :, :1], lambda x: x[..., :1], lambda x: x.double()],
    ids=["one head", "one column", "double"],
)
def test_global_tensors_are_not_broadcast(name, change):
    given = {"q_global": X, "k_global": X, "v_global": X}
    with pytest.raises((ValueError, TypeError), match=f"{name} has (shape|dtype)"):
        longformer_attention(X, X, X, **(given | {name: change(X)}), mask=MASK, window_size=2)
    with pytest.raises((ValueError, TypeError), match="_global has"):
        longformer_attention(X, X, X, *[change(X)] * 3, MASK, window_size=2)


@pytest.mark.parametrize("value", [0.5, -0.5, float("nan"), float("inf"), 2, -2, 2.0**70, 2**32 - 1])
@pytest.mark.parametrize("attention", [-1, 0, 1, 2, 2**32, 2**62])
def test_values_of_the_global_mask(value, attention):
    attention_mask, marks = torch.tensor([[attention, 1]]), torch.tensor([[value, 0]])
    with pytest.raises(ValueError, match="holds a value other than 0"):
        LongformerMask.from_padding(attention_mask, marks)


@pytest.mark.parametrize("attention_mask", [[[1, 1]], np.ones((1, 2)), None])
def test_masks_that_are_no_tensors(attention_mask):
    with pytest.raises(TypeError, match=r"attention_mask is a .*; give a torch\.Tensor"):
        LongformerMask.from_padding(attention_mask)
    if attention_mask is not None:
        with pytest.raises(TypeError, match=r"global_attention_mask is a .*; give a torch\.Tensor"):
            LongformerMask.from_padding(torch.ones(1, 2), attention_mask)


ONES = torch.ones(1, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LongformerMask.from_padding(ONES + 0j), "attention_mask has dtype torch.complex64"),
        (lambda: LongformerMask.from_padding(ONES, ONES * 1j), "global_attention_mask has dtype"),
        (lambda: LongformerMask.from_padding(ONES, max_globals=1.0), "max_globals is 1.0; give an int"),
        (lambda: LongformerMask.from_lengths([2], 4, max_globals="1"), "max_globals is '1'; give an int"),
        (lambda: LongformerMask.packed([0, 2], max_globals=True), "max_globals is True; give an int"),
        (lambda: LongformerMask.from_lengths([2], 4.0), "seqlen is 4.0; give an int"),
        (lambda: LongformerMask.from_lengths([2], None), "seqlen is None; give an int"),
        (lambda: LongformerMask.from_lengths([2], "4"), "seqlen is '4'; give an int"),
        (lambda: LongformerMask.from_lengths(None, 4), "lengths is a NoneType"),
        (lambda: LongformerMask.from_lengths("12", 4), "lengths is a str"),
        (lambda: LongformerMask.from_lengths([2.7], 4), "lengths has dtype torch.float32; give integers"),
        (lambda: LongformerMask.packed([0, 2.7]), "cu_seqlens has dtype torch.float32; give integers"),
        (lambda: LongformerMask.from_lengths([3], 4, [1.9]), "global_index has dtype torch.float32"),
        (lambda: LongformerMask.from_lengths([4], 4, ONES[0] > 0), "global_index has dtype torch.bool"),
        (lambda: LongformerMask.packed([0, 2], max_seqlen=3.5), "max_seqlen is 3.5; give an int"),
        (lambda: LongformerMask.packed([0, 2], total_rows="2"), "total_rows is '2'; give an int"),
        (lambda: replace(MASK, max_seqlen=6.0), "max_seqlen of a mask is 6.0; give an int"),
    ],
)  # fmt: skip
def test_masks_of_other_types(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LongformerMask.from_padding(ONES.to("meta")), "give max_globals"),
        (lambda: LongformerMask.packed([0, 2], max_seqlen=2**70), "max_seqlen is .* give at most 2147483647"),
        (lambda: LongformerMask.packed([0, 2], max_seqlen=2**40), "max_seqlen is .* give at most 2147483647"),
        (lambda: replace(MASK, seq_len=MASK.seq_len - 2), "seq_len of a mask holds"),
        (lambda: replace(MASK, global_index=MASK.global_index + 1), "global_index of a mask holds"),
        (lambda: replace(MASK, token_kind=MASK.token_kind.clamp(max=1)), "global_index of a mask holds"),
        (lambda: replace(MASK, token_kind=MASK.token_kind.clamp(min=2)), "(padding_before|seq_len) of a mask holds"),
        (lambda: replace(LongformerMask.packed([0, 2, 4], [1]), seq_start=torch.tensor([0, 1]).int()),
         "seq_start of a mask holds"),
        (lambda: replace(LongformerMask.packed([0, 2, 4], [1]), token_kind=torch.ones(4).byte() + 1),
         "num_globals of a mask holds"),
    ],
)  # fmt: skip
def test_masks_of_other_values(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_masks_under_another_default_device():
    with torch.device("meta"):
        assert replace(MASK).global_index.tolist() == MASK.global_index.tolist()
        packed = LongformerMask.packed(torch.tensor([0, 2, 4], device="cpu"), torch.tensor([1], device="cpu"))
        assert replace(packed).device.type == "cpu"
        banded_attention(X, X, X, MASK, window_size=2)
        global_attention(X[:, :1], X, X, MASK)
