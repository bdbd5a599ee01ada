"""This module computes what follows the attention in an encoder layer, and keeps little of it for the backward.

Autograd would keep every intermediate result of output projection, dropout, residuals, norms and feed-forward: 15 units
of ``seqlen * d_model`` numbers with an ffn_dim of ``4 * d_model``. Kept here are the layer's input, the attention's
output, that of the feed-forward's first half before its activation, and the input of the last norm: 7 units, of which
the attention keeps 2 anyway. The rest is computed again: the output projection, which is a twelfth of a layer's linear
operations, elementwise functions, and dropout masks, drawn once more from the state that the generator had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.eager import is_eager
from led_kernels.first_order import first_order_only
from led_kernels.modules import is_hooked, is_plain_linear, runs_its_own_code
from led_kernels.sums import add_product

PIECE_ROWS = 2048  # of the feed-forward, whose gradient is computed at a time


class LayerTail(NamedTuple):
    """Holds the modules after the attention of a post-norm layer, and the rates of its dropouts (0 in inference).

    An ``activation`` that is no module is a function of each number alone, without parameters and without chance.
    The layer is ``y = attention_norm(hidden + dropout(output(attended)))`` and then
    ``final_norm(y + dropout(fc2(activation_dropout(activation(fc1(y))))))``.
    """

    output: nn.Linear
    attention_norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    final_norm: nn.LayerNorm
    activation: Callable[[Tensor], Tensor]
    dropout: float
    activation_dropout: float

    @classmethod
    def of(cls, layer: Any, output: nn.Linear, activation: Callable[[Tensor], Tensor]) -> LayerTail:
        """Returns the tail of a ``layer`` that has its modules and rates under the names of transformers' LED."""
        return cls(
            output=output,
            attention_norm=layer.self_attn_layer_norm,
            fc1=layer.fc1,
            fc2=layer.fc2,
            final_norm=layer.final_layer_norm,
            activation=activation,
            dropout=layer.dropout if layer.training else 0.0,
            activation_dropout=layer.activation_dropout if layer.training else 0.0,
        )

    def can_recompute(self, hidden: Tensor) -> bool:
        """Tells whether :meth:`recomputed` may stand in for the modules.

        A gradient must be recorded, nothing compiled, traced or captured, and no hook, adapter or quantized weight
        must want to see a module's call. The activation must be one that gives the same when it is called again.
        """
        linears, norms = (self.output, self.fc1, self.fc2), (self.attention_norm, self.final_norm)
        return (
            torch.is_grad_enabled()
            and is_eager(hidden)
            and all(map(is_plain_linear, linears))
            and all(type(norm) is nn.LayerNorm and runs_its_own_code(norm) for norm in norms)
            and _is_repeatable(self.activation)
            and not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def recomputed(self, hidden: Tensor, kept_hidden: Tensor, attended: Tensor) -> Tensor:
        """Returns what the layer makes of ``hidden`` and ``attended``, both ``[..., d_model]``.

        Args:
            hidden: the layer's input.
            kept_hidden: the same numbers in the dtype of ``attended``, kept for the backward.
            attended: what the attention made of the layer's input, before its output projection.
        """
        weights = []
        for module in (self.output, self.attention_norm, self.fc1, self.fc2, self.final_norm):
            weights += [module.weight, module.bias]
        return _Recomputed.apply(self, hidden, kept_hidden.detach(), attended, *weights)


def limit_overflow(hidden: Tensor) -> Tensor:
    """Returns fp16 states with what overflowed made finite, and NaN kept; those of other dtypes as they are."""
    if hidden.dtype != torch.float16:
        return hidden
    limit = torch.finfo(torch.float16).max - 1000
    return hidden.clamp(-limit, limit)


def _is_repeatable(activation: Callable[[Tensor], Tensor]) -> bool:
    """Tells whether an activation has no parameters, gives the same at each call, and no hook wants to see these."""
    if not isinstance(activation, nn.Module):
        return True
    kind = type(activation)
    return (
        kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
        and kind is not nn.RReLU
        and next(activation.children(), None) is None
        and next(activation.parameters(), None) is None
        and not getattr(activation, "inplace", False)
        and "forward" not in vars(activation)
        and not is_hooked(activation)
    )


class _RedrawnDropout:
    """A dropout that keeps the generator's state, and not its mask, to be drawn once more.

    A draw depends on dtype and shape; those of a gradient are its tensor's. While it is drawn again the generator has
    the earlier state, as under torch's checkpointing: another thread should not draw from it then.
    """

    def __init__(self, p: float, x: Tensor) -> None:
        self.p = p
        self.device = x.device
        self.state: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Returns ``x`` with elements dropped, from the second call on the same elements."""
        if self.p == 0:
            return x
        generator: Any = torch if self.device.type == "cpu" else torch.get_device_module(self.device)
        place = () if self.device.type == "cpu" else (self.device,)
        if self.state is None:
            self.state = generator.get_rng_state(*place)
            return F.dropout(x, self.p)
        now = generator.get_rng_state(*place)
        generator.set_rng_state(self.state, *place)
        try:
            return F.dropout(x, self.p)
        finally:
            generator.set_rng_state(now, *place)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tail: LayerTail, hidden: Tensor, kept_hidden: Tensor, attended: Tensor, *weights: Tensor
    ) -> Tensor:
        w_output, b_output, *norm, w1, b1, w2, b2, w_final, b_final = weights
        dtype = attended.dtype
        ctx.tail = tail
        ctx.draws = [
            _RedrawnDropout(p, hidden) for p in (tail.dropout, tail.activation_dropout, tail.dropout)
        ]
        after_output, after_activation, after_fc2 = ctx.draws
        with torch.autocast(hidden.device.type, enabled=False):
            normed = _attention_block(tail, after_output, hidden, attended, w_output, b_output, *norm)
            expanded = _linear(normed.to(dtype), w1, b1)  # [..., ffn_dim]
            activated = after_activation(tail.activation(expanded))
            summed = normed + after_fc2(_linear(activated, w2, b2))
            del normed, activated
            ctx.save_for_backward(kept_hidden, attended, expanded, summed.to(dtype), *weights)
            return _final_norm(tail, summed, w_final, b_final)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grad_outputs
        tail: LayerTail = ctx.tail
        after_output, after_activation, after_fc2 = ctx.draws
        hidden, attended, expanded, summed, *weights = ctx.saved_tensors
        _, needs_hidden, _, needs_attended, *needs = ctx.needs_input_grad
        w_output, b_output, w_norm, b_norm, *_, w_final, b_final = weights
        dtype = attended.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            summed, *final = _leaves((summed.to(d_out.dtype), w_final, b_final), (True, *needs[8:]))
            with torch.enable_grad():
                out = _final_norm(tail, summed, *final)
            d_summed, *d_final = _gradients(out, (summed, *final), d_out)
            del out, summed

            d_block = after_fc2(d_summed.to(dtype).contiguous())
            leaves = _leaves(
                (hidden.to(d_out.dtype), attended, w_output, b_output, w_norm, b_norm),
                (needs_hidden, needs_attended, *needs[:4]),
            )
            with torch.enable_grad():
                normed = _attention_block(tail, after_output, *leaves)
            # The residual's share. It may be d_block's own memory, of which each piece is read before it is added to.
            d_normed = d_summed.contiguous()
            d_second = _feed_forward_backward(
                tail, after_activation, normed.detach(), expanded, d_block, d_normed, weights[4:8], needs[4:8]
            )
            del d_summed, d_block, expanded
            d_hidden, d_attended, *d_first = _gradients(normed, leaves, d_normed)
        return None, d_hidden, None, d_attended, *d_first, *d_second, *d_final


def _attention_block(
    tail: LayerTail,
    dropped: _RedrawnDropout,
    hidden: Tensor,
    attended: Tensor,
    w_output: Tensor,
    b_output: Tensor | None,
    w_norm: Tensor,
    b_norm: Tensor | None,
) -> Tensor:
    """Returns what the first norm makes of the residual and the projected attention, in the dtype of ``hidden``."""
    summed = hidden + dropped(_linear(attended, w_output, b_output))
    return _layer_norm(summed, tail.attention_norm, w_norm, b_norm)


def _final_norm(tail: LayerTail, summed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return limit_overflow(_layer_norm(summed, tail.final_norm, weight, bias))


def _layer_norm(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, list(norm.normalized_shape), weight, bias, norm.eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``x Wᵀ + b`` in the dtype of ``x``; autocast's copies of the weights are not kept."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _feed_forward_backward(
    tail: LayerTail,
    dropped: _RedrawnDropout,
    normed: Tensor,
    expanded: Tensor,
    d_out: Tensor,
    d_normed: Tensor,
    parameters: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of both linear layers' weights and biases, ``None`` where one is not needed.

    That of ``normed`` is added to ``d_normed``. Rows are taken in pieces: tensors of the width ffn_dim stay small.
    """
    dtype, sums = d_out.dtype, torch.promote_types(d_out.dtype, torch.float32)
    num_rows = d_out.numel() // d_out.shape[-1]
    # A mask of dropout is drawn for all rows at once.
    step = PIECE_ROWS if dropped.p == 0 else max(1, num_rows)
    w1, _, w2, _ = parameters  # and the biases
    totals = [
        torch.zeros_like(x, dtype=sums) if x is not None and need else None
        for x, need in zip(parameters, needs, strict=True)
    ]
    first, second = w1.to(dtype), w2.to(dtype)
    pieces = (x.flatten(0, -2).split(step) for x in (normed, expanded, d_out, d_normed))
    for rows, inner, d_rows_out, d_rows in zip(*pieces, strict=True):
        (inner,) = _leaves((inner,), (True,))
        with torch.enable_grad():
            activated = dropped(tail.activation(inner))
        if totals[2] is not None:
            add_product(totals[2], d_rows_out.t(), activated.detach())
        if totals[3] is not None:
            totals[3] += d_rows_out.sum(0)
        (d_inner,) = torch.autograd.grad(activated, inner, d_rows_out @ second)
        if totals[0] is not None:
            add_product(totals[0], d_inner.t(), rows.to(dtype))
        if totals[1] is not None:
            totals[1] += d_inner.sum(0)
        d_rows += d_inner @ first
    return tuple(
        None if total is None or x is None else total.to(x.dtype)
        for total, x in zip(totals, parameters, strict=True)
    )


def _leaves(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Any]:
    """Returns the tensors as the beginning of a graph of their own, which records what ``needs`` says."""
    return [
        None if x is None else x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)
    ]


def _gradients(out: Tensor, leaves: Sequence[Tensor | None], d_out: Tensor) -> list[Any]:
    """Returns the gradient of each of the ``leaves``, ``None`` where none is recorded."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, d_out) if wanted else ())
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]
