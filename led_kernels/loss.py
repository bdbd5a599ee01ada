"""This module computes the loss over a vocabulary from hidden states, in pieces of rows.

Autograd would keep logits, their log-softmax and its gradient, each ``[targets, vocab_size]`` and the last two in fp32:
0.6 GB for 1,024 targets of LED. Here the gradients of hidden states and weight are made while a piece's logits are at
hand, as Liger-Kernel does (Hsu et al., 2024, https://arxiv.org/abs/2410.10989). torch 2.13's own
``linear_cross_entropy`` gives the same loss, but no logits, and takes 7 times as long on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.arguments import autocast
from led_kernels.eager import is_eager
from led_kernels.first_order import first_order_only
from led_kernels.modules import is_plain_linear
from led_kernels.sums import add_product

IGNORED = -100  # a label that stands for no target, as in torch and transformers
PIECE = 2**24  # numbers of a piece's logits, 64 MiB in fp32


def vocabulary_loss(
    hidden: Tensor,
    head: nn.Module,
    bias: Tensor | None,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy of ``head(hidden) + bias`` for ``labels``, and these logits.

    Args:
        hidden: ``[..., d_model]``.
        head: a module from ``[..., d_model]`` to ``[..., vocab_size]``; one that is not a plain ``nn.Linear`` without
            a bias is called on all rows at once.
        bias: ``[vocab_size]`` or ``[1, vocab_size]``, a constant.
        labels: int ``[...]``, -100 where no loss is wanted.
        num_items_in_batch: divides the sum of the losses; default: the number of labels that are not -100.

    Returns:
        the loss, a scalar accumulated in fp32 (fp64 for fp64), and the logits ``[..., vocab_size]``, in the dtype in
        which a linear layer computes. Both have gradients.
    """
    if labels.is_floating_point() or labels.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype} for decoder tokens of shape "
            f"{tuple(hidden.shape[:-1])}; give an integer for each of them."
        )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(labels.device).reshape(())
    is_plain = is_eager(hidden) and is_plain_linear(head) and head.bias is None
    if not is_plain or (bias is not None and bias.requires_grad):
        logits = head(hidden) if bias is None else head(hidden) + bias
        return mean_cross_entropy(logits, labels, num_items_in_batch), logits
    labels = labels.flatten().long()
    divisor = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    (computed,) = autocast(hidden)
    loss, logits = _VocabularyLoss.apply(computed.flatten(0, -2), head.weight, bias, labels, divisor)
    return loss, logits.unflatten(0, hidden.shape[:-1])


def mean_cross_entropy(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Returns the mean cross-entropy of all labels but -100, or their sum divided by ``num_items_in_batch``.

    Args:
        logits: ``[..., vocab_size]``.
        labels: int ``[...]``, -100 where no loss is wanted.
        num_items_in_batch: how many labels all batches have whose gradients are added, if there are others; a scalar.

    Returns:
        a scalar, fp32 (fp64 for fp64).
    """
    rows, labels = logits.flatten(0, -2), labels.flatten().long()
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # a sum leaves the range of fp16
    if num_items_in_batch is None:
        return F.cross_entropy(rows, labels, ignore_index=IGNORED)
    total = F.cross_entropy(rows, labels, ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, sums = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            computed = weight.to(dtype)
            logits = hidden.new_empty(len(hidden), len(weight))
            loss = hidden.new_zeros((), dtype=sums)
            d_hidden = torch.empty_like(hidden) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
            is_target = labels != IGNORED
            targets = labels.masked_fill(~is_target, 0)[:, None]
            step = max(1, PIECE // len(weight))
            for start in range(0, len(hidden), step):
                piece = slice(start, start + step)
                torch.mm(hidden[piece], computed.t(), out=logits[piece])
                scores = logits[piece]
                if bias is not None:
                    scores = scores + bias  # in the wider dtype of both
                    logits[piece] = scores
                log_p = F.log_softmax(scores, -1, dtype=sums)
                # What is ignored is left out, and not multiplied by 0, which keeps NaN.
                loss -= log_p.gather(1, targets[piece])[:, 0].where(is_target[piece], 0).sum()
                if not (needs_hidden or needs_weight):
                    continue
                d_logits = log_p.exp_()
                d_logits.scatter_add_(1, targets[piece], d_logits.new_full((len(d_logits), 1), -1.0))
                # They are divided in the backward, where a scaled loss keeps small ones in the range of fp16.
                d_logits = d_logits.masked_fill_(~is_target[piece, None], 0).to(dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, computed, out=d_hidden[piece])
                if d_weight is not None:
                    add_product(d_weight, d_logits.t(), hidden[piece])
            loss /= divisor
            # Without any target no gradient is sent, and the loss is NaN.
            share = torch.where(
                is_target.any(), 1 / torch.as_tensor(divisor, dtype=sums, device=loss.device), 0
            )
        ctx.save_for_backward(hidden, weight, d_hidden, d_weight, share)
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        d_loss, d_logits = grad_outputs
        hidden, weight, d_hidden, d_weight, share = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            if d_loss is None:
                d_hidden, d_weight = (
                    None if d is None else torch.zeros_like(d) for d in (d_hidden, d_weight)
                )
            else:
                factor = d_loss * share  # of the dtype of the sums: a scale may exceed what fp16 reaches
                d_hidden, d_weight = (
                    None if d is None else (d.to(factor.dtype) * factor).to(d.dtype)
                    for d in (d_hidden, d_weight)
                )
            if d_logits is not None and d_hidden is not None:
                d_hidden.addmm_(d_logits, weight.to(d_logits.dtype))
            if d_logits is not None and d_weight is not None:
                add_product(d_weight, d_logits.t(), hidden)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None
