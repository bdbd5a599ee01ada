"""The loss over a vocabulary, computed in pieces, is that of torch's cross-entropy, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels import loss as module
from led_kernels.loss import vocabulary_loss

D_MODEL, VOCABULARY = 12, 37


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 3 * VOCABULARY)  # three rows at a time


def case(dtype=torch.float64) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Returns hidden states ``[2, 4, d_model]``, a head, a bias and labels of which two are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, D_MODEL, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = nn.Linear(D_MODEL, VOCABULARY, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, D_MODEL, generator=generator))
    bias = torch.randn(1, VOCABULARY, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (2, 4), generator=generator)
    labels[0, 1] = labels[1, 3] = -100
    return hidden, head, bias, labels


def plain(hidden: Tensor, head: nn.Linear, bias: Tensor, labels: Tensor, items=None) -> tuple[Tensor, Tensor]:
    logits = head(hidden) + bias
    rows = logits.flatten(0, 1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    items = (labels != -100).sum() if items is None else items
    items = float(items)  # autograd divides fp64 by an integer tensor in fp32
    return F.cross_entropy(rows, labels.flatten(), reduction="sum") / items, logits


@pytest.mark.parametrize("items", [None, 11, torch.tensor(13)], ids=str)
@pytest.mark.parametrize("with_logits", [False, True], ids=["loss", "loss and logits"])
def test_gradients_are_those_of_autograd(items, with_logits):
    hidden, head, bias, labels = case()
    found = []
    for compute in (vocabulary_loss, plain):
        loss, logits = compute(hidden, head, bias, labels, items)
        total = loss * 3 + (logits.sin().sum() if with_logits else 0)
        found.append((loss, logits, *torch.autograd.grad(total, (hidden, head.weight))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_logits_alone_have_gradients():
    hidden, head, bias, labels = case()
    found = [
        torch.autograd.grad(compute(hidden, head, bias, labels)[1].sin().sum(), (hidden, head.weight))
        for compute in (vocabulary_loss, plain)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "is_autocast"),
    [
        (torch.float32, False),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.float16, True),
        (torch.bfloat16, True),
    ],
    ids=str,
)
def test_sums_are_exact(dtype, is_autocast):
    hidden, head, bias, labels = case()
    truth = plain(hidden, head, bias, labels)[0]
    outer = torch.float32 if is_autocast else dtype
    rounded = hidden.detach().to(outer).requires_grad_()
    head.to(outer)
    exact = plain(rounded.double(), head.double(), bias.to(outer).double(), labels)
    head.to(outer)
    with torch.autocast("cpu", dtype, enabled=is_autocast):
        loss, logits = vocabulary_loss(rounded, head, bias.to(outer), labels)
        theirs, _ = plain(rounded, head, bias.to(outer), labels)
    assert loss.dtype == torch.float32
    assert logits.dtype == dtype
    assert (loss - exact[0]).abs() <= 2 * (theirs - exact[0]).abs() + 1e-2 * torch.finfo(
        dtype
    ).eps ** 0.5 * truth
    gradient, expected = (torch.autograd.grad(x, rounded, retain_graph=True)[0] for x in (loss, theirs))
    assert gradient.dtype == outer
    torch.testing.assert_close(gradient, expected, rtol=0.05, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_what_is_not_trained_gets_no_gradient(frozen):
    hidden, head, bias, labels = case()
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    found = []
    for compute in (vocabulary_loss, plain):
        loss, logits = compute(hidden, head, bias, labels)
        wanted = [x for x in (hidden, head.weight) if x.requires_grad]
        found.append((loss, logits, *(torch.autograd.grad(loss, wanted) if wanted else ())))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_without_any_target_the_loss_is_nan_and_no_gradient_is_sent():
    hidden, head, bias, labels = case()
    loss, _ = vocabulary_loss(hidden, head, bias, torch.full_like(labels, -100))
    assert loss.isnan()
    assert not torch.autograd.grad(loss, hidden)[0].any()  # scaling by NaN would spread it
    loss, _ = vocabulary_loss(hidden, head, bias, torch.full_like(labels, -100), 5)
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_a_backward_may_be_repeated():
    hidden, head, bias, labels = case()
    loss, _ = vocabulary_loss(hidden, head, bias, labels)
    first, second = (
        torch.autograd.grad(loss * 2, (hidden, head.weight), retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["hook", "bias", "other module"])
def test_heads_that_are_more_than_a_weight_are_called(kind):
    hidden, head, bias, labels = case()
    called = []
    head = {
        "bias": lambda: nn.Linear(D_MODEL, VOCABULARY, dtype=torch.float64),
        "other module": lambda: nn.Sequential(head),
    }.get(kind, lambda: head)()
    head.register_forward_hook(lambda *_: called.append(1))
    found = []
    for compute in (vocabulary_loss, plain):
        loss, logits = compute(hidden, head, bias, labels)
        found.append((loss, logits, *torch.autograd.grad(loss, (hidden, *head.parameters()))))
    assert len(called) == 2
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    hidden, head, bias, labels = case()
    loss, _ = vocabulary_loss(hidden, head, bias, labels)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        (first.sum() + hidden.square().sum()).backward()


def test_scaled_loss_keeps_small_gradients_in_fp16_and_large_scales_finite():
    """A gradient scaler's scale leaves the range of fp16, and gradients without it are too small for it."""
    hidden, head, bias, labels = case(torch.float16)
    scale, items = 2.0**17, 2**21
    loss, _ = vocabulary_loss(hidden, head, bias, labels, items)
    found = torch.autograd.grad(loss * scale, (hidden, head.weight))
    exact = [x.double().detach().requires_grad_() for x in (hidden, head.weight)]
    logits = exact[0] @ exact[1].t() + bias.double()
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * (scale / items)
    for ours, expected in zip(found, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=5e-3 * expected.abs().max().item())


def test_what_is_ignored_is_left_out():
    hidden, head, bias, labels = case()
    bias[0, 0] = -torch.inf  # a token that is never written
    with torch.no_grad():
        hidden[0, 1] = torch.nan  # a row without a target
    found = []
    for compute in (vocabulary_loss, plain):
        loss, _ = compute(hidden, head, bias, labels)
        found.append((loss, torch.autograd.grad(loss, hidden)[0]))
    (loss, gradient), (expected, of_autograd) = found
    torch.testing.assert_close(loss, expected)
    assert loss.isfinite()
    rows = labels != -100
    torch.testing.assert_close(gradient[rows], of_autograd[rows])


@pytest.mark.parametrize("items", [torch.tensor([11]), torch.tensor([[11]])], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Sequential])
def test_a_number_of_items_in_a_tensor_of_any_shape(items, kind):
    hidden, head, bias, labels = case()
    head = head if kind is nn.Linear else nn.Sequential(head)
    loss, _ = vocabulary_loss(hidden, head, bias, labels, items)
    assert loss.shape == ()
    torch.testing.assert_close(loss, plain(hidden, head, bias, labels, 11)[0])


@pytest.mark.parametrize("kind", [nn.Linear, nn.Sequential])
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(2, 5).long(), torch.zeros(9).long(), torch.zeros(2, 4)],
    ids=["[2, 5]", "[9]", "float"],
)
def test_labels_that_do_not_fit_are_refused(kind, labels):
    hidden, head, bias, _ = case()
    head = head if kind is nn.Linear else nn.Sequential(head)
    with pytest.raises(
        ValueError, match=r"labels has shape .* for decoder tokens of shape \(2, 4\); give an integer"
    ):
        vocabulary_loss(hidden, head, bias, labels)


def test_many_targets_and_a_large_scale_in_fp16(monkeypatch):
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 512, D_MODEL, generator=generator).half().requires_grad_()
    head = nn.Linear(D_MODEL, 3000, bias=False).half()
    labels = torch.randint(0, 3000, (1, 512), generator=generator)
    scale, found = 65536.0, []
    wide = hidden.detach().double().requires_grad_()
    for states, compute in ((hidden, vocabulary_loss), (hidden, plain), (wide, plain)):
        layer = head if states is hidden else nn.Linear(D_MODEL, 3000, bias=False).double()
        layer.load_state_dict(head.state_dict())
        loss, _ = compute(states, layer, torch.zeros(1, 3000).to(states.dtype), labels, 8192)
        found.append(torch.autograd.grad(loss * scale, states)[0].double())
    ours, theirs, exact = found
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
