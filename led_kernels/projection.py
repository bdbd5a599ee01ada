"""These functions compute the self-attention of an encoder layer from hidden states, global projections included.

The projections are those of Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.1.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from led_kernels.absorbed import absorbed_global_attention
from led_kernels.api import banded_attention, global_attention
from led_kernels.distributed.collectives import merge_over_ranks
from led_kernels.distributed.context import ContextParallelMask
from led_kernels.distributed.split_attention import (
    add_own_global_rows,
    banded_attention_of_part,
    common_seeds,
    global_rows_of_all_ranks,
)
from led_kernels.global_rows import add_global_rows, gather_global_rows
from led_kernels.mask import LongformerMask
from led_kernels.modules import is_plain_linear
from led_kernels.processes import processes_share_gradients


def encoder_self_attention(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_global: nn.Module,
    key_global: nn.Module,
    value_global: nn.Module,
    mask: LongformerMask | ContextParallelMask,
    num_heads: int,
    window_size: int | tuple[int, int],
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Computes the self-attention of one encoder layer, up to its output projection.

    Only the rows of global tokens go through ``query_global``. Every token goes through ``key_global`` and
    ``value_global``, unless both are plain ``nn.Linear`` and ``max_globals * num_heads < d_model``: then
    global tokens attend over the hidden states themselves
    (:func:`led_kernels.absorbed_global_attention`), with the same result and gradients. With
    ``mask.max_globals == 0`` none of the three is called, and they get no gradient; where torch.distributed runs with
    several processes they are called with no rows and get zeros, for which the others may be waiting.

    Args:
        hidden: ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` with a packed mask; finite in
            padding rows if weights need a gradient.
        q, k, v: the layer's own projections of ``hidden``, ``[batch, seqlen, num_heads, head_dim]`` (packed
            ``[total_rows, num_heads, head_dim]``), any strides with a contiguous last dimension.
        query_global, key_global, value_global: modules from ``[..., d_model]`` to
            ``[..., num_heads * head_dim]``.
        mask, window_size, dropout_p: as in :func:`led_kernels.banded_attention`; or the mask of sequences that are
            split over ranks, which all call this together, each with its own rows.
        backend: of banded attention, and of global attention unless it attends over the hidden states, which is
            done by torch whatever backend is named.

    Returns:
        ``[batch, seqlen, num_heads * head_dim]`` (packed ``[total_rows, num_heads * head_dim]``), zeros on
        padding rows.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    if isinstance(mask, ContextParallelMask):
        shard = mask.shard(window_size)
        keys, banded_seed, global_seed = shard.keys, *common_seeds(dropout_p, q.device, mask.group)
        *keys_values, rows = global_rows_of_all_ranks([k, v, hidden], shard, mask.group)
        out = banded_attention_of_part(
            q, k, v, *keys_values, shard, mask.group, dropout_p=dropout_p, seed=banded_seed, backend=backend
        )
    else:
        keys, global_seed = mask, None
        out = banded_attention(q, k, v, mask, window_size=window_size, dropout_p=dropout_p, backend=backend)
    if mask.max_globals == 0:
        out = out.flatten(-2)
        if not processes_share_gradients():
            return out
        # Other processes may have global tokens: those projections that learn get zeros for a gradient.
        for module in (query_global, key_global, value_global):
            if any(parameter.requires_grad for parameter in module.parameters()):
                out = out + module(hidden.flatten(0, -2)[:0]).sum()
        return out
    if isinstance(mask, LongformerMask):
        rows = _global_rows(hidden, mask)
    q_global = query_global(rows).unflatten(-1, (num_heads, -1))
    saves_work = mask.max_globals * num_heads < hidden.shape[-1]
    settings: dict[str, Any] = dict(dropout_p=dropout_p, seed=global_seed, return_lse=True)
    if saves_work and _can_absorb(key_global, hidden) and _can_absorb(value_global, hidden):
        out_global, lse = absorbed_global_attention(
            hidden,
            q_global,
            key_global.weight,
            value_global.weight,
            value_global.bias,
            keys,
            **settings,
        )
        if key_global.bias is not None:
            # A constant per query cancels in the softmax: the bias has a gradient, and it is zero.
            out_global = out_global + key_global.bias[:0].sum()
    else:
        k_global, v_global = (
            module(hidden).unflatten(-1, (num_heads, -1)) for module in (key_global, value_global)
        )
        out_global, lse = global_attention(q_global, k_global, v_global, keys, backend=backend, **settings)
    if isinstance(mask, ContextParallelMask):
        out_global = merge_over_ranks(out_global, lse, mask.group)
        return add_own_global_rows(out, out_global, shard).flatten(-2)
    return add_global_rows(out, out_global, mask).flatten(-2)


def project_global_queries(
    hidden: Tensor, query_global: nn.Module, mask: LongformerMask, num_heads: int
) -> Tensor:
    """Projects the rows of the global tokens to their queries, ``[batch, max_globals, num_heads, head_dim]``.

    Args:
        hidden: ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` with a packed mask.
        query_global: a module from ``[..., d_model]`` to ``[..., num_heads * head_dim]``.
        mask: the mask of the batch.
    """
    return query_global(_global_rows(hidden, mask)).unflatten(-1, (num_heads, -1))


def _global_rows(hidden: Tensor, mask: LongformerMask) -> Tensor:
    """Returns the rows of the global tokens, ``[batch, max_globals, d_model]``, and zeros in unused slots."""
    rows = gather_global_rows(hidden, mask)
    # An unused slot repeats some row, which may be padding: NaN there must not reach a weight's gradient.
    return rows.masked_fill((mask.global_index < 0)[:, :, None], 0)


def _can_absorb(projection: nn.Module, hidden: Tensor) -> TypeGuard[nn.Linear]:
    """Tells whether global tokens may attend over the hidden states themselves, and not over their projection."""
    return is_plain_linear(projection) and projection.weight.device == hidden.device
