"""These functions compute the self-attention of an encoder layer from hidden states, global projections included.

The projections are those of Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.1.
"""

from __future__ import annotations

from torch import Tensor, nn

from led_kernels.absorbed import absorbed_global_attention
from led_kernels.api import banded_attention, global_attention
from led_kernels.global_rows import add_global_rows, gather_global_rows
from led_kernels.mask import LongformerMask
from led_kernels.parallel_linear import products
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
    mask: LongformerMask,
    num_heads: int,
    window_size: int | tuple[int, int],
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Computes the self-attention of one encoder layer, up to its output projection.

    Only the rows of global tokens go through ``query_global``. Every token goes through ``key_global`` and
    ``value_global``, unless both are plain ``nn.Linear``, or sharded over heads, and ``max_globals < head_dim``: then
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
        out = out.flatten(-2)
        if not processes_share_gradients():
            return out
        # Other processes may have global tokens: those projections that learn get zeros for a gradient.
        for module in (query_global, key_global, value_global):
            if any(parameter.requires_grad for parameter in module.parameters()):
                out = out + module(hidden.flatten(0, -2)[:0]).sum()
        return out
    q_global = project_global_queries(hidden, query_global, mask, num_heads)
    # A token costs max_globals * num_heads * d_model in scores, and num_heads * head_dim * d_model to be projected.
    saves_work = mask.max_globals < q.shape[-1]
    if saves_work and (found := products((key_global, value_global), hidden)) is not None:
        states, (key, value) = found
        out_global = absorbed_global_attention(
            states, q_global, key.weight, value.weight, value.bias, mask, dropout_p=dropout_p
        )
        if key.bias is not None:
            # A constant per query cancels in the softmax: the bias has a gradient, and it is zero.
            out_global = out_global + key.bias[:0].sum()
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
    """Projects the rows of the global tokens to their queries, ``[batch, max_globals, num_heads, head_dim]``.

    Args:
        hidden: ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` with a packed mask.
        query_global: a module from ``[..., d_model]`` to ``[..., num_heads * head_dim]``.
        mask: the mask of the batch.
    """
    rows = gather_global_rows(hidden, mask)  # [batch, max_globals, d_model]
    # An unused slot repeats some row, which may be padding: NaN there must not reach a weight's gradient.
    rows = rows.masked_fill((mask.global_index < 0)[:, :, None], 0)
    return query_global(rows).unflatten(-1, (num_heads, -1))
