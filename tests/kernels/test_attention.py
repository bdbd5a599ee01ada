"""Every backend against the fp64 reference, and both against loops that follow the definition."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from led_kernels import (
    LongformerMask,
    absorbed_global_attention,
    banded_attention,
    global_attention,
    longformer_attention,
)
from led_kernels.backends import blockwise
from led_kernels.call import AttentionCall
from led_kernels.global_rows import gather_global_rows
from led_kernels.testing import (
    AttentionCase,
    assert_matches_reference,
    assert_within_error_bound,
    attention_function,
    poisoned_memory,
    run_with_gradients,
)
from tests.backends import needs_extension
from tests.conftest import Target

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OPS = ("banded", "global", "longformer")
SEQLENS = (1, 2, 3, 5, 17, 64, 65, 127, 200, 333)
HEAD_DIMS = (1, 3, 8, 16, 24, 33, 64, 65, 80, 128, 256)
WINDOWS = (0, 1, 7, 64, (3, 0), (0, 5), (100, 2), -1, (-1, 4), 1000)
PADDINGS = ("none", "right", "left", "holes", "all")
EVERY = tuple(range(67))
GLOBALS = {
    "none": (),
    "first": ((0,), (0,)),
    "last": ((66,), (66,)),
    "middle": ((33,), (34,)),
    "neighbors": ((31, 32, 33), (0, 1)),
    "unused-after-last": ((0, 1, 2), (66,)),
    "counts-differ": ((0, 20, 40, 66), (5,)),
    "one-row-only": ((), (7, 50)),
    "all": (EVERY, EVERY),
    "all-of-one-row": (EVERY, (3,)),
}
MIXED = ((0, 20, 21, 60), (5,))
BASE = AttentionCase(globals_per_row=MIXED)


def at_seqlen(seqlen: int, **changes) -> AttentionCase:
    """Puts global tokens at the first, a middle and the last position, so far as they differ."""
    return replace(
        BASE, seqlen=seqlen, globals_per_row=((0, seqlen // 2, seqlen - 1), (seqlen // 3,)), **changes
    )


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


@pytest.mark.parametrize(
    ("op", "dtype"),
    [*itertools.product(OPS[:2], DTYPES), ("longformer", torch.float32), ("longformer", torch.bfloat16)],
    ids=name_of,
)
class TestAgainstReference:
    """out, lse and all gradients: error at most twice plain PyTorch's in the same dtype, plus the floor."""

    def check(self, op: str, case: AttentionCase, target: Target, dtype: torch.dtype, **options) -> None:
        target.require(dtype)
        assert_matches_reference(op, case, target.backend, target.device, dtype, **options)

    @pytest.mark.parametrize("seqlen", SEQLENS)
    def test_seqlen(self, op, seqlen, target, dtype):
        self.check(op, at_seqlen(seqlen, padding="right" if seqlen > 3 else "none"), target, dtype)

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dim(self, op, head_dim, target, dtype):
        self.check(op, replace(BASE, head_dim=head_dim, window_size=20), target, dtype)

    @pytest.mark.parametrize("window_size", WINDOWS, ids=name_of)
    def test_window(self, op, window_size, target, dtype):
        self.check(op, at_seqlen(150, window_size=window_size, padding="holes"), target, dtype)

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("globals_per_row", GLOBALS.values(), ids=GLOBALS.keys())
    def test_padding_and_globals(self, op, padding, globals_per_row, target, dtype):
        self.check(op, AttentionCase(padding=padding, globals_per_row=globals_per_row), target, dtype)

    @pytest.mark.parametrize("globals_per_row", GLOBALS.values(), ids=GLOBALS.keys())
    @pytest.mark.parametrize("window_size", [5, (2, 9), -1], ids=name_of)
    def test_packed(self, op, window_size, globals_per_row, target, dtype):
        case = AttentionCase(window_size=window_size, globals_per_row=globals_per_row, packed=True)
        self.check(op, case, target, dtype)

    @pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("packed", [False, True])
    def test_dropout(self, op, packed, dropout_p, target, dtype):
        self.check(op, replace(BASE, dropout_p=dropout_p, packed=packed), target, dtype)

    @pytest.mark.parametrize("softmax_scale", [0.0, 0.01, -0.3, 1.5])
    def test_softmax_scale(self, op, softmax_scale, target, dtype):
        # probabilities carry the rounding of their score, and 1.5 makes scores of 25
        floor = {"floor_ulps": 25} if dtype == torch.float32 else {}
        self.check(op, replace(BASE, softmax_scale=softmax_scale), target, dtype, **floor)

    @pytest.mark.parametrize("fused", [True, False])
    def test_more_heads_and_rows(self, op, fused, target, dtype):
        globals_per_row = ((1,), (4, 70), ())
        case = AttentionCase(3, 90, 5, globals_per_row=globals_per_row, padding="left")
        self.check(op, case, target, dtype, fused=fused)


@pytest.mark.parametrize("op", OPS[:2])
def test_scores_of_ten_thousand(op, target):
    """No overflow; a probability carries the rounding of its score, which is 10,000 units in the last place of 1."""
    case = replace(BASE, softmax_scale=1.0)
    assert_matches_reference(op, case, target.backend, target.device, scale_k=1000.0, floor_ulps=10_000)


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(2, 1300, 1, window_size=100, globals_per_row=((0, 700), (1299,))),
        AttentionCase(2, 1300, 1, window_size=(700, 3), padding="holes", globals_per_row=((5,), ())),
        AttentionCase(1, 1300, 1, window_size=-1, globals_per_row=(tuple(range(0, 1300, 7)),)),
        AttentionCase(2, 1300, 1, window_size=30, packed=True, globals_per_row=((0,), (900,)), dropout_p=0.1),
    ],
    ids=["window", "holes", "unlimited", "packed"],
)
def test_sequences_that_threads_share(op, case, target):
    """Long sequences of few heads: their chunks see keys of each other, whose gradients are summed."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert_matches_reference(op, case, target.backend, target.device)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window_size", [0, 31, 64, 130, (200, 1), (1, 200), -1], ids=name_of)
@pytest.mark.parametrize("head_dim", [7, 16, 32, 64, 72, 96])
@pytest.mark.parametrize("seqlen", [63, 129, 256, 511, 700])
def test_larger_grid(op, dtype, window_size, head_dim, seqlen, target):
    target.require(dtype)
    padding = PADDINGS[(seqlen + head_dim) % len(PADDINGS)]
    case = at_seqlen(seqlen, head_dim=head_dim, window_size=window_size, padding=padding)
    assert_matches_reference(op, case, target.backend, target.device, dtype)


def brute_force(q, k, v, kind, rows, sees) -> tuple[Tensor, Tensor]:
    """Plain loops over ``rows`` [(batch, query row, query position)]: softmax over the keys that ``sees`` names."""
    out = torch.zeros(len(rows), *q.shape[-2:], dtype=torch.float64)
    lse = torch.zeros(len(rows), q.shape[-2], dtype=torch.float64)
    for n, (b, row, position) in enumerate(rows):
        keys = [j for j in range(k.shape[1]) if kind[b][j] != 0 and sees(b, position, j)]
        for head in range(q.shape[2]):
            scores = [float(q[b, row, head] @ k[b, j, head]) / math.sqrt(q.shape[3]) for j in keys]
            weights = [math.exp(score) for score in scores]
            lse[n, head] = math.log(sum(weights))
            out[n, head] = sum(w * v[b, j, head] for w, j in zip(weights, keys, strict=True)) / sum(weights)
    return out, lse


@pytest.mark.parametrize("reference", [False, True], ids=["backend", "reference"])
@pytest.mark.parametrize("window_size", [0, 1, (2, 0), (0, 3), 6, -1, (-1, 1)], ids=name_of)
def test_against_loops(window_size, reference, target):
    """Window edges, padding and global tokens by their definition; it shares no code with the reference."""
    backend = "reference" if reference else target.backend
    dtype = torch.float32
    kind = [[1, 2, 0, 1, 1, 1, 2, 1, 1, 0, 1, 1], [2, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]
    mask = LongformerMask.from_padding(torch.tensor(kind)).to(target.device)
    q, k, v = (
        torch.randn(2, 12, 2, 5, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)
    )
    q_, k_, v_ = (x.to(target.device) for x in (q, k, v))
    left, right = (window_size, window_size) if isinstance(window_size, int) else window_size
    left, right = (10**6 if side == -1 else side for side in (left, right))

    out, lse = banded_attention(q_, k_, v_, mask, window_size=window_size, return_lse=True, backend=backend)
    rows = [(b, i, i) for b in range(2) for i in range(12) if kind[b][i] == 1]
    at = tuple(torch.tensor(rows).T[:2])
    sees_band = lambda b, i, j: i - left <= j <= i + right or kind[b][j] == 2  # noqa: E731
    expected, expected_lse = brute_force(q.double(), k.double(), v.double(), kind, rows, sees_band)
    torch.testing.assert_close(out.cpu()[at].double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.cpu().transpose(1, 2)[at].double(), expected_lse, atol=2e-6, rtol=0)
    others = torch.tensor(kind) != 1
    assert (out.cpu()[others] == 0).all()
    assert (lse.cpu().transpose(1, 2)[others] == float("inf")).all()

    out, lse = global_attention(gather_global_rows(q_, mask), k_, v_, mask, return_lse=True, backend=backend)
    rows = [(0, 1, 1), (0, 6, 6), (1, 0, 0)]
    expected, expected_lse = brute_force(q.double(), k.double(), v.double(), kind, rows, lambda b, i, j: True)
    used = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    torch.testing.assert_close(out.cpu()[used].double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.cpu().transpose(1, 2)[used].double(), expected_lse, atol=2e-6, rtol=0)
    assert (out[1, 1] == 0).all()
    assert (lse[1, :, 1] == float("inf")).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_absorbed_matches_projected(dtype, packed, bias, dropout_p):
    """The same as projecting all tokens to keys and values first; NaN in padding stays there."""
    heads, head_dim, d_model = 2, 8, 20
    case = AttentionCase(globals_per_row=MIXED, padding="holes", packed=packed)
    mask = case.mask()
    rows, slots = tuple(mask.token_kind.shape), (2, mask.max_globals, heads, head_dim)
    shapes = {
        "hidden": (*rows, d_model),
        "q_global": slots,
        "key_weight": (heads * head_dim, d_model),
        "value_weight": (heads * head_dim, d_model),
        "value_bias": (heads * head_dim,),
    }
    generator = torch.Generator().manual_seed(0)
    inputs = {
        n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()
    }
    if not bias:
        del inputs["value_bias"]

    def absorbed(hidden, q_global, key_weight, value_weight, value_bias=None):
        projections = q_global, key_weight, value_weight, value_bias
        return absorbed_global_attention(hidden, *projections, mask, dropout_p=dropout_p, return_lse=True)

    def projected(hidden, q_global, key_weight, value_weight, value_bias=None):
        k = (hidden @ key_weight.T).view(*rows, heads, head_dim)
        v = torch.nn.functional.linear(hidden, value_weight, value_bias).view(*rows, heads, head_dim)
        settings = {"dropout_p": dropout_p, "backend": "reference", "return_lse": True}
        return global_attention(q_global, k, v, mask, **settings)

    def run(function, dtype_run, **replaced):
        values = [x.to(dtype_run) for x in (inputs | replaced).values()]
        return run_with_gradients(function, values, grad_dtype=dtype, names=list(inputs))

    poisoned = inputs["hidden"].masked_fill((mask.token_kind == 0)[..., None], float("nan"))
    actual = run(absorbed, dtype, hidden=poisoned)
    oracle, plain = run(projected, torch.float64), run(projected, dtype)
    for name in actual:
        assert_within_error_bound(actual[name], oracle[name], plain[name], name, floor_ulps=16)


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_drops_the_same_elements(op, packed, target):
    """With one-hot values, out holds the probabilities: its zeros are what was dropped."""
    case = AttentionCase(
        seqlen=80, heads=3, window_size=9, globals_per_row=MIXED, dropout_p=0.4, packed=packed
    )
    mask = case.mask(target.device)
    case = replace(case, head_dim=80)
    q, k, v = case.inputs(mask)
    position = torch.arange(v.shape[0 if packed else 1], device=v.device)
    one_hot = (position[:, None] % 80 == torch.arange(80, device=v.device)).float()
    v = one_hot[:, None].expand(v.shape).contiguous()
    patterns = []
    for backend in (target.backend, "reference"):
        torch.manual_seed(3)
        patterns.append(attention_function(op, case, mask, backend)(q, k, v)[0] != 0)
    assert torch.equal(*patterns)
    assert patterns[0].sum() > 0


def test_dropout_rate(target):
    """Uniform attention to ones gives kept / (n (1 - p)), 1 on average."""
    seqlen, heads, dropout_p = 256, 4, 0.3
    mask = LongformerMask.from_lengths([seqlen], seqlen).to(target.device)
    zeros = torch.zeros(1, seqlen, heads, 8, device=target.device)
    torch.manual_seed(0)
    settings = {"window_size": -1, "dropout_p": dropout_p, "backend": target.backend}
    out = banded_attention(zeros, zeros, torch.ones_like(zeros), mask, **settings)
    kept = out[..., 0] * (1 - dropout_p)  # [1, seqlen, heads], share of the keys that each row kept
    assert abs(kept.mean().item() - (1 - dropout_p)) < 4 * math.sqrt(0.21 / (seqlen * seqlen * heads))
    assert abs(kept.var().item() - 0.21 / seqlen) < 0.2 * 0.21 / seqlen
    again = banded_attention(zeros, zeros, torch.ones_like(zeros), mask, **settings)
    assert not torch.equal(out, again), "another call must draw another seed"
    torch.manual_seed(0)
    assert torch.equal(out, banded_attention(zeros, zeros, torch.ones_like(zeros), mask, **settings))


def test_dropout_zero_draws_nothing(target):
    q, k, v = BASE.inputs(BASE.mask(target.device))
    state = torch.get_rng_state()
    attention_function("banded", BASE, BASE.mask(target.device), target.backend)(q, k, v)
    assert torch.equal(state, torch.get_rng_state())


def gradients(out: Tensor, inputs: tuple[Tensor, ...], d_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, d_out, retain_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_d_out_of_any_strides(op, target):
    case, mask = BASE, BASE.mask(target.device)
    inputs = case.inputs(mask) + (case.inputs(mask, seed=1) if op == "longformer" else ())
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out, _ = attention_function(op, case, mask, target.backend)(*inputs)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    views = {
        "heads before rows": d_out.transpose(1, 2).contiguous().transpose(1, 2),
        "head_dim not last": d_out.transpose(1, 3).contiguous().transpose(1, 3),
        "every second": torch.stack([d_out, d_out], -1).flatten(-2)[..., ::2],
    }
    expected = gradients(out, inputs, d_out)
    for name, view in views.items():
        for actual, grad in zip(gradients(out, inputs, view), expected, strict=True):
            assert torch.equal(actual, grad), name
    ones = gradients(out, inputs, torch.ones_like(out))
    for actual, grad in zip(gradients(out, inputs, out.new_ones(()).expand(out.shape)), ones, strict=True):
        assert torch.equal(actual, grad), "expanded"


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("padding", ["right", "left", "holes", "all"])
def test_nan_in_padding_gradients_stays_there(op, padding, target):
    """d_out and d_lse of rows that are not computed are ignored, whatever they hold."""
    case = replace(BASE, padding=padding)
    mask = case.mask(target.device)
    inputs = tuple(x.detach().requires_grad_() for x in case.inputs(mask))
    out, lse = attention_function(op, case, mask, target.backend)(*inputs)
    no_row = lse.isinf()  # [batch, heads, rows]
    d_out, d_lse = torch.ones_like(out), torch.ones_like(lse)
    clean = torch.autograd.grad((out, lse), inputs, (d_out, d_lse.masked_fill(no_row, 0)), retain_graph=True)
    nan = float("nan")
    d_out = d_out.masked_fill(no_row.transpose(1, 2)[..., None], nan)
    poisoned = torch.autograd.grad((out, lse), inputs, (d_out, d_lse.masked_fill(no_row, nan)))
    for actual, expected in zip(poisoned, clean, strict=True):
        assert not expected.isnan().any()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize(("window", "at"), [(5, 70), (20, 100), (20, 170), (3, 14)])
def test_nan_of_one_padding_token_stays_there(window, at, head_dim, target):
    """Also where no row of a tile sees it, but the tiles of keys or queries that the rows need reach over it."""
    attention_mask = torch.ones(1, 300, dtype=torch.int64)
    attention_mask[0, at] = 0
    mask = LongformerMask.from_padding(attention_mask).to(target.device)
    case = AttentionCase(batch=1, seqlen=300, head_dim=head_dim)
    inputs = tuple(x.detach().requires_grad_() for x in case.inputs(mask))
    out = banded_attention(*inputs, mask, window_size=window, backend=target.backend)
    d_out = torch.ones_like(out)
    d_out[0, at] = float("nan")
    for x in (out, *torch.autograd.grad(out, inputs, d_out)):
        assert not x.isnan().any()


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("used", ["out", "lse"])
def test_gradient_of_one_output(op, used, target):
    """The other output's gradient is None in the op, and zeros in effect."""
    mask = BASE.mask(target.device)

    def run(backend):
        inputs = tuple(x.detach().requires_grad_() for x in BASE.inputs(mask, torch.float32))
        out, lse = attention_function(op, BASE, mask, backend)(*inputs)
        output = out if used == "out" else lse.masked_fill(lse.isinf(), 0)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return torch.autograd.grad(output, inputs, weights, allow_unused=True)

    for actual, expected in zip(run(target.backend), run("reference"), strict=True):
        actual = torch.zeros_like(expected) if actual is None else actual
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_of_real_tokens_propagate(where, value, target):
    """To every row that plain attention gives them; to no row that is far away, no other head, row or sequence."""
    seqlen, window, at, far = 1200, 8, 600, 300
    case = AttentionCase(seqlen=seqlen, window_size=window, head_dim=4, globals_per_row=((0,), (0,)))
    mask = case.mask(target.device)
    q, k, v = (x.clone() for x in case.inputs(mask))
    {"q": q, "k": k, "v": v}[where][0, at, 0] = value
    out = banded_attention(q, k, v, mask, window_size=window, backend=target.backend)
    bad = ~out.isfinite().all(-1)  # [batch, seqlen, heads]
    plain = banded_attention(q, k, v, mask, window_size=window, backend="reference")
    touched = torch.zeros_like(bad)
    touched[0, at if where == "q" else slice(at - window, at + window + 1), 0] = True
    must = touched & ~plain.isfinite().all(-1)
    assert must.any()
    assert bad[must].all()
    assert not bad[1].any()
    assert not bad[0, :, 1].any()
    assert not bad[0, : at - far].any()
    assert not bad[0, at + far :].any()


@pytest.mark.parametrize("op", OPS[:2])
def test_nan_of_a_real_key_reaches_gradients(op, target):
    """A gradient of 0 for a row whose result is NaN would hide it."""
    mask = BASE.mask(target.device)
    q, k, v = (x.clone() for x in BASE.inputs(mask))
    k[0, 21] = float("nan")
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    out, _ = attention_function(op, BASE, mask, target.backend)(*inputs)
    is_nan = out.isnan().any(-1)
    assert is_nan.any()
    (d_out,) = torch.autograd.grad(out.sum(), out, retain_graph=True)
    dq = torch.autograd.grad(out, inputs[0], d_out)[0]
    rows = gather_global_rows(dq, mask) if op == "global" else dq
    assert rows.isnan().any(-1)[is_nan].all()


def test_infinite_scores_as_in_plain_attention(target):
    """A score of -inf gives weight 0; a row of only such scores, or with a score of +inf, is NaN."""
    mask = LongformerMask.from_lengths([4], 4).to(target.device)
    q, v = (torch.ones(1, 4, 1, 1, device=target.device) for _ in range(2))
    k = torch.tensor([1.0, float("-inf"), 1.0, float("inf")], device=target.device).view(1, 4, 1, 1)
    settings = {"backend": target.backend}
    out = banded_attention(q, k, v, mask, window_size=0, **settings).flatten()
    assert out.isnan().tolist() == [False, True, False, True]
    out = banded_attention(q, k, v, mask, window_size=(1, 0), **settings).flatten()
    assert out.isnan().tolist() == [False, False, False, True]
    torch.testing.assert_close(out[:3], torch.ones(3, device=target.device))


def test_nan_does_not_cross_packed_sequences(target):
    mask = LongformerMask.packed([0, 40, 75, 100], [0]).to(target.device)
    q, k, v = (torch.randn(100, 2, 8, device=target.device) for _ in range(3))
    for x in (q, k, v):
        x[40:75] = float("nan")
    out = longformer_attention(q, k, v, q, k, v, mask, window_size=9, backend=target.backend)
    assert out[40:75].isnan().all()
    assert not out[:40].isnan().any()
    assert not out[75:].isnan().any()


def test_packed_equals_one_by_one(target):
    """Sequences of length 0 included."""
    lengths, globals_ = [5, 0, 33, 1, 20], [[0, 3], [-1, -1], [7, -1], [0, -1], [19, 2]]
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    mask = LongformerMask.packed(cu_seqlens, torch.tensor(globals_)).to(target.device)
    qkv = torch.randn(6, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0)).to(target.device)
    settings = {"window_size": 4, "backend": target.backend}
    packed = longformer_attention(*qkv, mask, **settings)
    for length, start, index in zip(lengths, cu_seqlens[:-1], globals_, strict=True):
        if length:
            alone = LongformerMask.from_lengths([length], length, torch.tensor([index])).to(target.device)
            rows = slice(start, start + length)
            expected = longformer_attention(*qkv[:, None, rows], alone, **settings)
            torch.testing.assert_close(packed[None, rows], expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batch_and_no_tokens(op, batch, target):
    """batch 0, and packed sequences of which none has a token."""
    if batch:
        mask, shape = LongformerMask.packed([0] * (batch + 1), max_globals=2, total_rows=0), (0, 2, 8)
    else:
        mask, shape = LongformerMask.from_padding(torch.ones(0, 7), max_globals=2), (0, 7, 2, 8)
    mask = mask.to(target.device)
    inputs = [torch.zeros(shape, device=target.device, requires_grad=True) for _ in range(6)]
    settings = {"window_size": 3, "backend": target.backend}
    if op == "banded":
        out = banded_attention(*inputs[:3], mask, **settings)
    elif op == "global":
        q_global = torch.zeros(batch, 2, 2, 8, device=target.device, requires_grad=True)
        out = global_attention(q_global, *inputs[1:3], mask, backend=target.backend)
        assert (out == 0).all()
    else:
        out = longformer_attention(*inputs, mask, **settings)
    out.sum().backward()
    assert all(x.grad is None or x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("op", OPS)
def test_capacity_larger_than_used(op, target):
    """Unused slots of global_index change nothing."""
    merged = torch.ones(2, 67, dtype=torch.int64)
    merged[0, [0, 20, 60]], merged[1, 5] = 2, 2
    tight, roomy = (LongformerMask.from_padding(merged, max_globals=n).to(target.device) for n in (None, 9))
    inputs = BASE.inputs(tight) + (BASE.inputs(tight, seed=1) if op == "longformer" else ())
    names = "abcdef"[: len(inputs)]
    expected, actual = (
        run_with_gradients(attention_function(op, BASE, mask, target.backend), inputs, names=names)
        for mask in (tight, roomy)
    )
    for name, x in actual.items():
        if op == "global" and name in ("out", "lse"):
            used, rest = (x[:, :3], x[:, 3:]) if name == "out" else (x[..., :3], x[..., 3:])
            assert (rest == (0 if name == "out" else float("inf"))).all()
            torch.testing.assert_close(used, expected[name])
        elif op != "global":  # d_out is another one there, as its shape is
            torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("packed", [False, True])
def test_deterministic(op, dropout_p, packed, target):
    """Bit-identical on repeat, every token global included."""
    every = tuple(range(150))
    case = AttentionCase(
        seqlen=150, globals_per_row=(every, (0, 9, 70)), window_size=40, dropout_p=dropout_p, packed=packed
    )
    mask = case.mask(target.device)
    inputs = case.inputs(mask) + (case.inputs(mask, seed=1) if op == "longformer" else ())
    function = attention_function(op, case, mask, target.backend)
    first, second = (run_with_gradients(function, inputs, names="abcdef"[: len(inputs)]) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_are_contiguous_and_own_memory(op, packed, target):
    case = replace(BASE, packed=packed)
    mask = case.mask(target.device)
    q, k, v = case.inputs(mask)
    with poisoned_memory():
        out, lse = attention_function(op, case, mask, target.backend)(q, k, v)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert out.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_torch_backend_keeps_to_the_device_of_its_inputs(dropout_p):
    """On meta tensors a tensor made elsewhere, or a value read by the host, is an error."""
    mask = BASE.mask().to("meta")
    q, k, v = (x.to("meta") for x in BASE.inputs(BASE.mask()))
    seed = torch.zeros(1, dtype=torch.int64, device="meta") if dropout_p else None
    q_global = torch.empty(2, mask.max_globals, *q.shape[2:], device="meta")
    for rows, window in ((q, (3, 4)), (q_global, None)):
        call = AttentionCall(rows, k, v, mask, window, 0.25, dropout_p, seed)
        out, lse = blockwise.forward(call)
        grads = blockwise.backward(call, out, lse, out, lse)
        assert [grad.shape for grad in grads] == [rows.shape, k.shape, v.shape]
        assert {x.device.type for x in (out, lse, *grads)} == {"meta"}


@needs_extension
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_positions_past_the_integers_of_fp32(backward):
    """The last rows of a sequence whose others are padding: as if these were not there."""
    used, results = 128, []
    for seqlen in (used, 2**24 + used):
        kind = torch.zeros(1, seqlen, dtype=torch.uint8)
        kind[:, -used:] = 1
        kind[:, -used // 2] = 2
        padding_before = torch.arange(seqlen, dtype=torch.int32).clamp(max=seqlen - used)[None]
        start, length, index, count = (
            torch.tensor(x, dtype=torch.int32) for x in ([0], [seqlen], [[seqlen - used // 2]], [1])
        )
        mask = LongformerMask(start, length, kind, padding_before, index, count, start, index, seqlen)
        x = torch.zeros(1, seqlen, 1, 1, dtype=torch.float16)
        x[:, -used:] = torch.randn(1, used, 1, 1, generator=torch.Generator().manual_seed(0))
        x.requires_grad_(backward)
        out = banded_attention(x, x, x, mask, window_size=2, backend="cpu")
        if backward:
            out.square().sum().backward()
            out = torch.stack([out, x.grad])
        results.append(out.detach()[..., -used:, :, :])
    assert torch.equal(*results)
