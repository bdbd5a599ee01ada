"""Encoder self-attention reaches the global tokens in two ways from hidden states, each under its conditions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness.saved_tensors import saved_tensors
from led_kernels import longformer_attention, projection
from led_kernels.projection import encoder_self_attention
from led_kernels.testing import AttentionCase

CASES = {
    "one-global": AttentionCase(globals_per_row=((0,), (5,))),
    "counts-differ": AttentionCase(globals_per_row=((0, 3, 66), (1,))),
    "row-without": AttentionCase(globals_per_row=((), (2, 30))),
    "right-padding": AttentionCase(globals_per_row=((0, 9), (4,)), padding="right"),
    "left-padding": AttentionCase(globals_per_row=((40, 60), (66,)), padding="left"),
    "holes": AttentionCase(globals_per_row=((0, 7, 8), (20, 21)), padding="holes"),
    "row-of-padding": AttentionCase(globals_per_row=((0, 7), (3,)), padding="all"),
    "packed": AttentionCase(globals_per_row=((0, 7), (3,)), packed=True),
    "one-token": AttentionCase(batch=1, seqlen=1, globals_per_row=((0,),)),
    "dropout": AttentionCase(globals_per_row=((0, 7), (3,)), padding="right", dropout_p=0.3),
}
PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")


class Layer(nn.Module):
    """Holds the six projections of an encoder layer; ``behind`` makes the global ones something else than plain."""

    def __init__(self, case: AttentionCase, bias: bool = True, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        d_model = case.heads * case.head_dim
        for name in PROJECTIONS:
            setattr(self, name, nn.Linear(d_model, d_model, bias=bias, dtype=dtype))

    def forward(self, hidden: Tensor, mask, behind=lambda module: module, **settings) -> Tensor:
        case = self.case
        q, k, v = (
            module(hidden).unflatten(-1, (case.heads, case.head_dim))
            for module in (self.query, self.key, self.value)
        )
        return encoder_self_attention(
            hidden,
            q,
            k,
            v,
            query_global=self.query_global,
            key_global=behind(self.key_global),
            value_global=behind(self.value_global),
            mask=mask,
            num_heads=case.heads,
            window_size=case.window_size,
            dropout_p=case.dropout_p,
            backend="reference",
            **settings,
        )


def hidden_states(case: AttentionCase, mask, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (*mask.token_kind.shape, case.heads * case.head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(layer: Layer, hidden: Tensor, mask, **settings) -> dict[str, Tensor]:
    """Returns the output and every gradient of a fixed linear function of it."""
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    torch.manual_seed(7)  # dropout's seeds
    out = layer(hidden, mask, **settings)
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, **gradients}


@pytest.fixture
def absorbed_calls(monkeypatch) -> Iterator[list]:
    calls = []
    absorbed = projection.absorbed_global_attention

    def recording(*args, **kwargs):
        calls.append(args)
        return absorbed(*args, **kwargs)

    monkeypatch.setattr(projection, "absorbed_global_attention", recording)
    return calls


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_absorbed_equals_projected(case, bias, absorbed_calls):
    mask = case.mask()
    layer, hidden = Layer(case, bias), hidden_states(case, mask)
    absorbed = results(layer, hidden, mask)
    assert len(absorbed_calls) == 1
    projected = results(layer, hidden, mask, behind=nn.Sequential)
    assert len(absorbed_calls) == 1
    for name, expected in projected.items():
        torch.testing.assert_close(absorbed[name], expected, rtol=0, atol=1e-12, msg=name)
    if bias:
        assert torch.equal(absorbed["key_global.bias"], torch.zeros_like(layer.key_global.bias))


@pytest.mark.parametrize("behind", [lambda module: module, nn.Sequential], ids=["absorbed", "projected"])
def test_equals_attention_with_every_token_projected(behind):
    case = CASES["holes"]
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    six = (getattr(layer, name)(hidden).unflatten(-1, (case.heads, case.head_dim)) for name in PROJECTIONS)
    expected = longformer_attention(*six, mask, window_size=case.window_size, backend="reference")
    out = layer(hidden, mask, behind)
    torch.testing.assert_close(out, expected.flatten(2), rtol=0, atol=1e-12)
    with torch.inference_mode():  # merged in place
        assert torch.equal(layer(hidden, mask, behind), out)


@pytest.mark.parametrize("behind", [lambda module: module, nn.Sequential], ids=["absorbed", "projected"])
@pytest.mark.parametrize("name", ["right-padding", "left-padding", "holes", "row-of-padding"])
def test_padding_rows_reach_nothing(name, behind):
    case = CASES[name]
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    expected = layer(hidden, mask, behind)
    is_padding = mask.token_kind == 0
    hidden[is_padding] = float("nan")
    hidden.requires_grad_()
    out = layer(hidden, mask, behind)
    assert torch.equal(out, expected)
    assert not out[is_padding].any()
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    assert gradient[~is_padding].isfinite().all()


def test_weights_of_absorbed_projections_get_finite_gradients_under_nan_padding():
    case = CASES["left-padding"]  # the row that an unused slot repeats is padding here
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    expected = results(layer, hidden, mask)
    hidden[mask.token_kind == 0] = float("nan")
    poisoned = results(layer, hidden, mask)
    for name in ("query_global.weight", "key_global.weight", "value_global.weight"):
        assert torch.equal(poisoned[name], expected[name]), name


def test_no_globals_no_global_projection():
    case = AttentionCase(padding="right")
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    gradients = results(layer, hidden, mask)
    assert all(gradients[f"{name}.weight"] is None for name in PROJECTIONS[3:])
    assert all(gradients[f"{name}.weight"] is not None for name in PROJECTIONS[:3])


def with_hook(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: None)
    return linear


def with_own_forward(linear: nn.Linear) -> nn.Module:
    original = linear.forward
    linear.forward = lambda x: original(x)
    return linear


class Adapted(nn.Linear):
    """Any subclass may compute something else."""


def with_other_class(linear: nn.Linear) -> nn.Module:
    linear.__class__ = Adapted
    return linear


@pytest.mark.parametrize(
    "changed",
    [with_hook, with_own_forward, with_other_class, nn.utils.parametrizations.weight_norm, nn.Sequential],
)
def test_only_plain_linear_is_absorbed(changed, absorbed_calls):
    case = CASES["one-global"]
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    expected = layer(hidden, mask)
    assert len(absorbed_calls) == 1
    layer.value_global = changed(layer.value_global)
    torch.testing.assert_close(layer(hidden, mask), expected, rtol=0, atol=1e-12)
    assert len(absorbed_calls) == 1


def test_absorbed_only_while_it_pays(absorbed_calls):
    # With two heads of 4, d_model is 8, which four global tokens reach.
    for count, calls in ((3, 1), (4, 1)):
        case = AttentionCase(batch=1, seqlen=9, head_dim=4, globals_per_row=(tuple(range(count)),))
        mask = case.mask()
        Layer(case)(hidden_states(case, mask), mask)
        assert len(absorbed_calls) == calls


def test_autocast_runs_in_its_dtype():
    case = CASES["counts-differ"]
    mask = case.mask()
    layer, hidden = Layer(case, dtype=torch.float32), hidden_states(case, mask, torch.float32)
    expected = layer(hidden, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden, mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_compiles_without_a_graph_break():
    case = CASES["counts-differ"]
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, mask), layer(hidden, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("behind", [lambda module: module, nn.Sequential], ids=["absorbed", "projected"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_is_kept_for_the_backward(packed, behind):
    case = AttentionCase(globals_per_row=((0, 7), (3,)), padding=None if packed else "right", packed=packed)
    mask = case.mask()
    layer, hidden = Layer(case), hidden_states(case, mask)
    kept = [
        saved.nbytes / hidden.nbytes for saved in saved_tensors(layer, lambda: layer(hidden, mask, behind))
    ]
    # The input, q, k, v and the result, in which the global tokens' rows have been put; and their own keys and values.
    of_rows = 7 if behind is nn.Sequential else 5
    assert sum(size >= 1 for size in kept) == of_rows
    assert sum(kept) < of_rows + 1
