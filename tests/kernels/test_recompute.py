"""The tail of an encoder layer, computed again in the backward, gives autograd's gradients and keeps a third of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.saved_tensors import saved_tensors
from led_kernels import recompute
from led_kernels.modules import calls_only
from led_kernels.recompute import LayerTail, limit_overflow

D_MODEL, FFN_DIM, ROWS = 24, 96, (2, 5)
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "module": nn.SiLU()}


def build(
    dtype=torch.float64, dropout=0.0, activation_dropout=0.0, activation=F.gelu, bias=True
) -> LayerTail:
    torch.manual_seed(0)
    modules = (
        nn.Linear(D_MODEL, D_MODEL, bias=bias),
        nn.LayerNorm(D_MODEL),
        nn.Linear(D_MODEL, FFN_DIM, bias=bias),
        nn.Linear(FFN_DIM, D_MODEL, bias=bias),
        nn.LayerNorm(D_MODEL, bias=bias),
    )
    for module in modules:
        module.to(dtype)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        modules[4].weight[3] = 0  # what is kept must not be divided by a norm's weight
    return LayerTail(*modules, activation, dropout, activation_dropout)


def by_autograd(tail: LayerTail, hidden: Tensor, attended: Tensor) -> Tensor:
    normed = tail.attention_norm(hidden + F.dropout(tail.output(attended), tail.dropout))
    inner = F.dropout(tail.activation(tail.fc1(normed)), tail.activation_dropout)
    return limit_overflow(tail.final_norm(normed + F.dropout(tail.fc2(inner), tail.dropout)))


def parameters(tail: LayerTail) -> list[nn.Parameter]:
    return [p for module in tail[:5] for p in module.parameters()]


def results(tail: LayerTail, compute, hidden: Tensor, attended: Tensor, d_out: Tensor) -> list[Tensor]:
    """Returns the output under one seed of dropout, and the gradients of both inputs and of what is trained."""
    torch.manual_seed(1)
    out = compute(tail, hidden, attended)
    wanted = [x for x in (hidden, attended, *parameters(tail)) if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, d_out)]


def recomputed(tail: LayerTail, hidden: Tensor, attended: Tensor) -> Tensor:
    assert tail.can_recompute(hidden)
    return tail.recomputed(hidden, hidden.to(attended.dtype), attended)


def inputs(dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, attended, d_out = torch.randn(3, *ROWS, D_MODEL, generator=generator, dtype=torch.float64).to(
        dtype
    )
    return hidden.clone().requires_grad_(), attended.clone().requires_grad_(), d_out


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.2, 0.4)], ids=str)
def test_gradients_are_those_of_autograd(activation, rates):
    tail = build(dropout=rates[0], activation_dropout=rates[1], activation=ACTIVATIONS[activation])
    given = inputs()
    expected = results(tail, by_autograd, *given)
    for ours, theirs in zip(results(tail, recomputed, *given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.2, 0.4)], ids=str)
def test_rows_in_pieces_give_the_same_gradients(rates, monkeypatch):
    monkeypatch.setattr(recompute, "PIECE_ROWS", 3)  # of 10
    tail = build(dropout=rates[0], activation_dropout=rates[1])
    given = inputs()
    expected = results(tail, by_autograd, *given)
    torch.testing.assert_close(results(tail, recomputed, *given), expected, rtol=1e-12, atol=1e-12)


def test_backward_leaves_the_generator_alone():
    tail = build(dropout=0.3)
    hidden, attended, d_out = inputs()
    out = recomputed(tail, hidden, attended)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    out.backward(d_out)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("frozen", ["attended", "hidden", "weights", "norms"])
def test_what_is_not_trained_gets_no_gradient(frozen, bias):
    tail = build(dropout=0.2, bias=bias)
    hidden, attended, d_out = inputs()
    hidden.requires_grad_(frozen != "hidden")
    attended.requires_grad_(frozen != "attended")
    for module in tail[:5]:
        module.requires_grad_(frozen != {nn.Linear: "weights", nn.LayerNorm: "norms"}[type(module)])
    expected = results(tail, by_autograd, hidden, attended, d_out)
    ours = results(tail, recomputed, hidden, attended, d_out)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["autocast", "pure"])
def test_half_precision_is_as_exact_as_autograd(kind, dtype):
    exact = build()
    hidden, attended, d_out = inputs()
    truth = results(exact, by_autograd, hidden, attended, d_out)
    # What is compared with the truth are gradients in fp64 of rounded numbers.
    outer = torch.float32 if kind == "autocast" else dtype
    tail = build(dtype=outer)
    given = (
        hidden.detach().to(outer).requires_grad_(),
        attended.detach().to(dtype).requires_grad_(),
        d_out.to(outer),
    )
    with torch.autocast("cpu", dtype, enabled=kind == "autocast"):
        theirs = results(tail, by_autograd, *given)
        ours = results(tail, recomputed, *given)
    for computed, plain, true in zip(ours, theirs, truth, strict=True):
        assert computed.dtype == plain.dtype
        error, bound = ((x.double() - true).norm() for x in (computed, plain))
        assert error <= 2 * bound + 1e-6 * true.norm()


def test_overflow_of_fp16_is_limited_and_sends_no_gradient():
    tail = build(dtype=torch.float16)
    with torch.no_grad():
        tail.final_norm.weight.fill_(60000.0)
    given = inputs(torch.float16)
    out, *gradients = results(tail, recomputed, *given)
    expected, *of_autograd = results(tail, by_autograd, *given)
    assert torch.equal(out, expected)
    assert out.isfinite().all()
    assert (out.abs() == out.abs().max()).sum() > 1
    for ours, theirs in zip(gradients, of_autograd, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_what_is_kept():
    tail = build(dtype=torch.float32, dropout=0.1)
    hidden, attended, _ = inputs(torch.float32)
    kept = saved_tensors(nn.ModuleList(tail[:5]), lambda: recomputed(tail, hidden, attended))
    # The layer's input, the attention's output, the feed-forward's first half and the input of the last norm.
    assert sum(saved.nbytes for saved in kept) == 7 * hidden.nbytes


def test_modules_that_are_more_than_their_weights_are_called():
    hidden, _, _ = inputs()
    assert build().can_recompute(hidden)
    with torch.no_grad():
        assert not build().can_recompute(hidden)
    for index in range(5):
        tail = build()
        handle = tail[index].register_forward_hook(lambda *_: None)
        assert not tail.can_recompute(hidden)
        handle.remove()
        assert tail.can_recompute(hidden)
    replaced = build()
    assert not replaced._replace(fc1=nn.Sequential(replaced.fc1)).can_recompute(hidden)
    hooked = nn.GELU()
    assert replaced._replace(activation=hooked).can_recompute(hidden)
    hooked.register_forward_hook(lambda *_: None)
    assert not replaced._replace(activation=hooked).can_recompute(hidden)


class DropsAtRandom(nn.Module):
    """An activation that is of no package whose activations are known."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.gelu(x), 0.5)


@pytest.mark.parametrize(
    "activation",
    [
        nn.PReLU(),
        nn.RReLU(),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.GELU(), nn.Dropout(0.5)),
        DropsAtRandom(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_activations_that_cannot_be_called_again_are_called_once(activation):
    hidden, _, _ = inputs()
    assert not build(activation=activation).can_recompute(hidden)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_checkpointing_around_it_draws_the_same(reentrant):
    tail = build(dropout=0.3, activation_dropout=0.2)
    given = inputs()

    def checkpointed(tail: LayerTail, hidden: Tensor, attended: Tensor) -> Tensor:
        return checkpoint(
            lambda *x: tail.recomputed(x[0], x[0], x[1]), hidden, attended, use_reentrant=reentrant
        )

    if reentrant:  # which takes no gradients by torch.autograd.grad
        outs = []
        for compute in (recomputed, checkpointed):
            hidden, attended, d_out = inputs()
            torch.manual_seed(1)
            compute(tail, hidden, attended).backward(d_out)
            outs.append((hidden.grad, attended.grad, *(p.grad.clone() for p in parameters(tail))))
            for parameter in parameters(tail):
                parameter.grad = None
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
        return
    expected = results(tail, recomputed, *given)
    torch.testing.assert_close(results(tail, checkpointed, *given), expected, rtol=1e-12, atol=1e-12)


def test_calls_only_tells_hooks_and_patches():
    module = nn.GELU()
    assert calls_only(module, nn.GELU.forward)
    assert not calls_only(module, nn.ReLU.forward)
    patched = copy.copy(module)
    patched.forward = lambda x: x
    assert not calls_only(patched, nn.GELU.forward)
    module.register_full_backward_hook(lambda *_: None)
    assert not calls_only(module, nn.GELU.forward)


def test_a_second_derivative_is_refused():
    tail = build()
    hidden, attended, d_out = inputs()
    (first,) = torch.autograd.grad(recomputed(tail, hidden, attended), hidden, d_out, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        (first.sum() + hidden.square().sum()).backward()
