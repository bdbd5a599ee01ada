"""These functions compute the self-attention of an encoder layer from hidden states, global projections included.

The projections are those of Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from led_kernels.eager import never_compiled
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
    mask: LongformerMask | ContextParallelMask,
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
    projections = _GlobalProjections(query_global, key_global, value_global, num_heads)
    settings: dict[str, Any] = {"dropout_p": dropout_p, "backend": backend}
    if isinstance(mask, ContextParallelMask):
        return _attend_in_part(hidden, q, k, v, projections, mask, window_size, settings).flatten(-2)
    out = banded_attention(q, k, v, mask, window_size=window_size, **settings)
    if mask.max_globals == 0:
        return projections.with_no_rows(out.flatten(-2), hidden)
    out_global, _ = projections.attend(hidden, _global_rows(hidden, mask), mask, **settings)
    return add_global_rows(out, out_global, mask).flatten(-2)


@never_compiled
def _attend_in_part(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projections: _GlobalProjections,
    mask: ContextParallelMask,
    window_size: int | tuple[int, int],
    settings: dict[str, Any],
) -> Tensor:
    """Computes the self-attention of the own rows of sequences that are split over ranks."""
    shard, group = mask.shard(window_size), mask.group
    banded_seed, global_seed = common_seeds(settings["dropout_p"], q.device, group)
    k_rows, v_rows, rows = global_rows_of_all_ranks([k, v, hidden], shard, group)
    out = banded_attention_of_part(q, k, v, k_rows, v_rows, shard, group, seed=banded_seed, **settings)
    if mask.max_globals == 0:
        return projections.with_no_rows(out, hidden)
    out_global, lse = projections.attend(
        hidden, rows, shard.keys, seed=global_seed, return_lse=True, **settings
    )
    assert lse is not None  # as it was asked for
    return add_own_global_rows(out, merge_over_ranks(out_global, lse, group), shard)


class _GlobalProjections(NamedTuple):
    """Holds the modules that project the global tokens' queries, and every token's keys and values for these."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    num_heads: int

    def attend(
        self,
        hidden: Tensor,
        rows: Tensor,
        mask: LongformerMask,
        *,
        dropout_p: float,
        backend: str | None,
        seed: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes global attention, and its lse if that is asked for.

        Args:
            hidden: the tokens of ``mask``, ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` packed.
            rows: the global tokens, ``[batch, max_globals, d_model]``.
        """
        q_global = self.query(rows).unflatten(-1, (self.num_heads, -1))
        settings: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "return_lse": return_lse}
        # A token costs max_globals * num_heads * d_model in scores, and num_heads * head_dim * d_model to be projected.
        saves_work = mask.max_globals < q_global.shape[-1]
        if saves_work and (multiplied := products((self.key, self.value), hidden)) is not None:
            states, (key, value) = multiplied
            found = absorbed_global_attention(
                states, q_global, key.weight, value.weight, value.bias, mask, **settings
            )
            out, lse = found if return_lse else (found, None)
            if key.bias is not None:
                # A constant per query cancels in the softmax: the bias has a gradient, and it is zero.
                out = out + key.bias[:0].sum()
            return out, lse
        k_global, v_global = (
            module(hidden).unflatten(-1, (self.num_heads, -1)) for module in (self.key, self.value)
        )
        found = global_attention(q_global, k_global, v_global, mask, backend=backend, **settings)
        return found if return_lse else (found, None)

    def with_no_rows(self, out: Tensor, hidden: Tensor) -> Tensor:
        """Returns ``out`` of a batch without global tokens, for which the modules are not needed.

        Other processes may have some: then those modules that learn get zeros for a gradient.
        """
        if processes_share_gradients():
            for module in (self.query, self.key, self.value):
                if any(parameter.requires_grad for parameter in module.parameters()):
                    out = out + module(hidden.flatten(0, -2)[:0]).sum()
        return out


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
