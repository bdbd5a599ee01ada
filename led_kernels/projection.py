"""Encoder self-attention from hidden states: the projections of global tokens, and the cheaper way to them.

Source of the projections: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from led_kernels.absorbed import absorbed_global_attention
from led_kernels.api import banded_attention, global_attention
from led_kernels.global_rows import add_global_rows, gather_global_rows
from led_kernels.mask import LongformerMask

# As torch has them: what a caller puts in their place later is seen.
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm)}
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl


def encoder_self_attention(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_global: nn.Module,
    key_global: nn.Module,
    value_global: nn.Module,
    mask: LongformerMask,
    num_heads: int,
    window_size: int | tuple[int, int],
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention of one encoder layer, up to its output projection.

    Only the rows of global tokens go through ``query_global``. Every token goes through ``key_global`` and
    ``value_global``, unless both are plain ``nn.Linear`` and ``max_globals * num_heads < d_model``: then
    global tokens attend over the hidden states themselves
    (:func:`led_kernels.absorbed_global_attention`), with the same result and gradients. With
    ``mask.max_globals == 0`` none of the three is called, and they get no gradient.

    Args:
        hidden: ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` with a packed mask; finite in
            padding rows if weights need a gradient.
        q, k, v: the layer's own projections of ``hidden``, ``[batch, seqlen, num_heads, head_dim]`` (packed
            ``[total_rows, num_heads, head_dim]``), any strides with a contiguous last dimension.
        query_global, key_global, value_global: modules from ``[..., d_model]`` to
            ``[..., num_heads * head_dim]``.
        mask, window_size, dropout_p: as in :func:`led_kernels.banded_attention`.
        backend: of banded attention, and of global attention unless it attends over the hidden states, which is
            done by torch whatever backend is named.

    Returns:
        ``[batch, seqlen, num_heads * head_dim]`` (packed ``[total_rows, num_heads * head_dim]``), zeros on
        padding rows.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    out = banded_attention(q, k, v, mask, window_size=window_size, dropout_p=dropout_p, backend=backend)
    if mask.max_globals == 0:
        return out.flatten(-2)
    q_global = project_global_queries(hidden, query_global, mask, num_heads)
    if _absorbs(key_global, value_global, hidden, mask.max_globals * num_heads):
        out_global = absorbed_global_attention(
            hidden,
            q_global,
            key_global.weight,
            value_global.weight,
            value_global.bias,
            mask,
            dropout_p=dropout_p,
        )
        if key_global.bias is not None:
            # a constant per query cancels in the softmax: the bias has a gradient, and it is zero
            out_global = out_global + key_global.bias[:0].sum()
    else:
        k_global, v_global = (
            module(hidden).unflatten(-1, (num_heads, -1)) for module in (key_global, value_global)
        )
        out_global = global_attention(
            q_global, k_global, v_global, mask, dropout_p=dropout_p, backend=backend
        )
    return add_global_rows(out, out_global, mask).flatten(-2)


def project_global_queries(
    hidden: Tensor, query_global: nn.Module, mask: LongformerMask, num_heads: int
) -> Tensor:
    """Queries of the global tokens: ``hidden`` as above -> ``[batch, max_globals, num_heads, head_dim]``."""
    rows = gather_global_rows(hidden, mask)  # [batch, max_globals, d_model]
    # an unused slot repeats some row, which may be padding: NaN there must not reach a weight's gradient
    rows = rows.masked_fill((mask.global_index < 0)[:, :, None], 0)
    return query_global(rows).unflatten(-1, (num_heads, -1))


def _absorbs(key_global: nn.Module, value_global: nn.Module, hidden: Tensor, global_queries: int) -> bool:
    return global_queries < hidden.shape[-1] and all(
        is_plain_linear(module) and module.weight.device == hidden.device
        for module in (key_global, value_global)
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is x Wᵀ + b with its own parameters and nothing else.

    The exact type excludes LoRA, bitsandbytes and parametrisations; the parameters' type excludes quantised
    and sharded tensors; the forward function excludes accelerate's hooks.
    """
    return type(module) is nn.Linear and runs_its_own_code(module)


def runs_its_own_code(module: nn.Module) -> bool:
    """Whether calling an ``nn.Linear`` or ``nn.LayerNorm`` runs torch's code alone, on a parameter that is a plain
    tensor; False for other modules."""
    kind = type(module)
    return (
        kind in _FORWARDS
        and getattr(module.forward, "__func__", None) is _FORWARDS[kind]
        and kind.__call__ is _CALL
        and kind._call_impl is _CALL_IMPL
        and type(module.weight) is nn.Parameter
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Whether hooks run at every call of every module."""
    every = torch.nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )
