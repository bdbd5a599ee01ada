"""Attention over sequences that are split over ranks: each computes its own rows, for which a halo of others travels.

Per layer a rank sends and gets the rows of k and v that windows reach, and a few rows for each global token, however
long the sequences are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from led_kernels.api import banded_attention, global_attention
from led_kernels.argument_checks import check_number
from led_kernels.arguments import check_qkv, draw_seed
from led_kernels.distributed.collectives import all_reduce_sum, merge_over_ranks
from led_kernels.distributed.context import ContextParallelMask, from_first_rank
from led_kernels.distributed.halo import Halo
from led_kernels.eager import never_compiled
from led_kernels.first_order import first_order_only
from led_kernels.global_rows import add_global_rows, gather_global_rows
from led_kernels.mask import LongformerMask
from led_kernels.mask_shard import MaskShard, Piece


@never_compiled
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: ContextParallelMask,
    *,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Computes :func:`led_kernels.longformer_attention` of sequences that are split over the ranks of a group.

    All ranks call it together, each with its own rows. They get the rows of the same result, and of the same gradients,
    as one process would with all rows; dropout drops the same elements, by the seed of the group's first rank.

    Args:
        q, k, v, q_global, k_global, v_global: the own rows, ``[batch, rows, heads, head_dim]``; ``mask.bounds`` says
            which these are.
        mask: of the whole sequences, on every rank.
        window_size, softmax_scale, dropout_p, backend: as in :func:`led_kernels.banded_attention`.

    Returns:
        out, like q; zeros on padding rows.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    shard, group = mask.shard(window_size), mask.group
    check_qkv(dict(q=q, k=k, v=v, q_global=q_global, k_global=k_global, v_global=v_global), shard.keys)
    seeds = common_seeds(dropout_p, q.device, group)
    settings: dict[str, Any] = dict(softmax_scale=softmax_scale, dropout_p=dropout_p, backend=backend)
    k_rows, v_rows, q_rows = global_rows_of_all_ranks([k, v, q_global], shard, group)
    out = banded_attention_of_part(q, k, v, k_rows, v_rows, shard, group, seed=seeds[0], **settings)
    if mask.max_globals == 0:
        return out
    partial = global_attention(
        q_rows, k_global, v_global, shard.keys, seed=seeds[1], return_lse=True, **settings
    )
    return add_own_global_rows(out, merge_over_ranks(*partial, group), shard)


def common_seeds(
    dropout_p: float, device: torch.device, group: dist.ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the seeds of banded and of global attention's dropout, which one process would have drawn."""
    dropout_p = check_number(dropout_p, "dropout_p")
    seeds = [draw_seed(dropout_p, device) for _ in range(2)]
    if seeds[0] is None or seeds[1] is None:
        return None, None
    both = from_first_rank(torch.cat([seeds[0], seeds[1]]), group)
    return both[:1], both[1:]


def global_rows_of_all_ranks(
    tensors: list[Tensor], shard: MaskShard[LongformerMask], group: dist.ProcessGroup
) -> list[Tensor]:
    """Gathers the rows of all global tokens of the sequences, by one collective.

    Args:
        tensors: the own rows of each, ``[batch, rows, ...]``.

    Returns:
        of each ``[batch, max_globals, ...]``; zeros in unused slots.
    """
    keys = shard.keys
    if keys.max_globals == 0:
        return [x[:, :0] for x in tensors]
    rows = [gather_global_rows(x, keys) for x in tensors]
    flat = torch.cat([x.flatten(2) for x in rows], -1)  # [batch, max_globals, any]
    # Each row comes from the one rank that has it, so that the sum is exact; 0 · NaN would not be.
    summed = all_reduce_sum(flat.masked_fill(keys.global_index[:, :, None] < 0, 0), group)
    parts = summed.split([x[0, 0].numel() for x in rows], -1)
    return [part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, rows, strict=True)]


def add_own_global_rows(out: Tensor, out_global: Tensor, shard: MaskShard[LongformerMask]) -> Tensor:
    """Puts the rows of this part's global tokens, of ``[batch, max_globals, ...]``, into ``out``, which is given up."""
    is_own = shard.keys.global_index >= 0
    return add_global_rows(out, out_global.masked_fill(~is_own[:, :, None, None], 0), shard.keys)


def banded_attention_of_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_of_globals: Tensor,
    v_of_globals: Tensor,
    shard: MaskShard[LongformerMask],
    group: dist.ProcessGroup,
    **settings: Any,
) -> Tensor:
    """Computes banded attention of the own rows, and exchanges the halo meanwhile.

    Args:
        q, k, v: the own rows, ``[batch, rows, heads, head_dim]``.
        k_of_globals, v_of_globals: ``[batch, max_globals, heads, head_dim]``.
        settings: of :func:`led_kernels.banded_attention`.

    Returns:
        ``[batch, rows, heads, head_dim]``; the memory behind it may hold more rows.
    """
    settings["window_size"] = shard.window
    of_globals = k_of_globals, v_of_globals
    no_halos = [(x[:, :0], x[:, :0]) for x in (k, v)]
    if shard.world == 1 or max(shard.window) == 0:
        return _attend(shard.main, (q, k, v), of_globals, no_halos, settings)[:, _own_rows(shard)]
    halo = Halo([k, v], shard, group)
    if shard.strips:
        out = _attend(shard.main, (q, k, v), of_globals, no_halos, settings)
        halos = halo.wait()
    else:
        halos = halo.wait()
        out = _attend(shard.main, (q, k, v), of_globals, halos, settings)
    strips = []
    for strip in shard.strips:
        own = tuple(x[:, _of_strip(strip, shard)] for x in (q, k, v))
        is_left = strip.keys[0] < shard.own[0]
        sides = [(left, right[:, :0]) if is_left else (left[:, :0], right) for left, right in halos]
        tensors = *own, *of_globals, *sides[0], *sides[1]
        if torch.is_grad_enabled():
            # A strip has three times as many rows as queries, and is computed again in the backward. What is kept for
            # that has to be a copy: a slice would keep the memory of all rows.
            copies = [x.clone() for x in own]
            out_strip = checkpoint(
                _attend_strip, strip, settings, *copies, *tensors[len(own) :],
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            out_strip = _attend_strip(strip, settings, *tensors)
        strips.append(out_strip)
    return _PutStrips.apply(shard, out, *strips, *(side for pair in halos for side in pair))


def _own_rows(shard: MaskShard[LongformerMask]) -> slice:
    """Returns where the own rows are among those of the main piece, all of them, also those that strips compute."""
    (first, last), main = shard.own, shard.main
    begin = main.front + first - main.keys[0]
    return slice(begin, begin + last - first)


def _of_strip(strip: Piece[LongformerMask], shard: MaskShard[LongformerMask]) -> slice:
    """Returns which of the own rows a strip spans."""
    (first, last), (begin, end) = shard.own, strip.keys
    return slice(max(begin - first, 0), min(end, last) - first)


def _attend_strip(piece: Piece[LongformerMask], settings: dict[str, Any], *tensors: Tensor) -> Tensor:
    """Computes the queries of a strip, of the tensors that :func:`_attend` takes, in a row."""
    q, k, v, k_of_globals, v_of_globals, k_left, k_right, v_left, v_right = tensors
    halos = (k_left, k_right), (v_left, v_right)
    return _attend(piece, (q, k, v), (k_of_globals, v_of_globals), halos, settings)[:, piece.own_rows]


def _attend(
    piece: Piece[LongformerMask],
    own: tuple[Tensor, ...],
    of_globals: tuple[Tensor, Tensor],
    halos: Sequence[tuple[Tensor, Tensor]],
    settings: dict[str, Any],
) -> Tensor:
    """Computes a piece, ``[batch, rows of the piece, heads, head_dim]``.

    Args:
        own: q, k and v of the own rows that the piece spans.
        of_globals: k and v of all global tokens.
        halos: k and v of the rows to the left and to the right of the own ones.
    """
    q, *keys = own
    k, v = (_rows(piece.front, rows, x, *halo) for rows, x, halo in zip(of_globals, keys, halos, strict=True))
    before, after = piece.front + halos[0][0].shape[1], halos[0][1].shape[1]
    if before or after:  # Whatever is there for rows that are no queries is not looked at.
        q = F.pad(q, (0, 0, 0, 0, before, after))
    return banded_attention(q, k, v, piece.mask, **settings)


def _rows(front: int, of_globals: Tensor, own: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns the rows of a piece: those of the global tokens and the gap, of the halo and of the part."""
    rows = [left, own, right]
    if front:
        rows.insert(0, F.pad(of_globals, (0, 0, 0, 0, 0, front - of_globals.shape[1])))
    rows = [x for x in rows if x.shape[1]]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


class _PutStrips(torch.autograd.Function):
    """Writes the strips' rows into the memory of the main piece's result behind autograd's back.

    Banded attention has kept that for its backward, where these rows are no queries. The halos are arguments so that
    their gradients are sent by every rank, also by one whose windows reach none.
    """

    @staticmethod
    def forward(ctx: Any, shard: MaskShard[LongformerMask], out: Tensor, *others: Tensor) -> Tensor:
        ctx.shard, ctx.rows, ctx.num_others = shard, out.shape[1], len(others)
        own, first = out.data[:, _own_rows(shard)], shard.own[0]
        for strip, rows in zip(shard.strips, others, strict=False):
            own[:, strip.queries[0] - first : strip.queries[1] - first] = rows
        return own

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_own,) = grad_outputs
        shard, own = ctx.shard, _own_rows(ctx.shard)
        d_out = (
            F.pad(d_own, (0, 0, 0, 0, own.start, ctx.rows - own.stop)) if ctx.rows > d_own.shape[1] else d_own
        )
        first = shard.own[0]
        d_strips = [d_own[:, strip.queries[0] - first : strip.queries[1] - first] for strip in shard.strips]
        return None, d_out, *d_strips, *(None,) * (ctx.num_others - len(d_strips))
