"""The ``torch`` backend takes blocks of queries with their slice of the keys and the global keys, on any device.

One routine serves both ops: global attention is banded attention of few queries whose band is the sequence.
Nothing of size ``seqlen * window`` is held: extra memory is a few tensors like q, and one block of scores.
Shapes come from Python integers, so that a padded batch costs no device-to-host sync; of a packed one the
lengths are read once per call, and its sequences are served one after another.

Source: Dao et al., "FlashAttention", 2022, for the backward from ``lse``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from led_kernels.backends._results import new_gradients, new_results
from led_kernels.call import AttentionCall, lse_dtype
from led_kernels.mask import LOCAL, PADDING, LongformerMask
from led_kernels.philox import keep_mask

_SCORES_PER_BLOCK = 2**21
_PHILOX_COST = 16  # bytes that drawing the dropout of one score holds, in those of the score
_BLOCK_SIZES = (256, 128, 64, 32, 16)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes attention by blocks of queries -> out, lse."""
    out, lse = new_results(call, has_gaps=True)
    for part in _parts(call.mask):
        part_out, part_lse = part.rows(out), part.lse(lse)
        problem = _Problem(part, call)
        for block in problem.blocks():
            scores = block.scores()
            peak = scores.amax(-1, keepdim=True)  # [batch, heads, rows, 1]
            p = scores.sub_(peak).exp_()
            total = p.sum(-1, keepdim=True)
            block_out = block.dropout(p) @ block.v / total
            # torch.where selects, as rows without a result may hold 0/0
            is_query = problem.is_query[:, None, block.rows, None]
            part_out[:, block.rows] = torch.where(is_query, block_out, 0).transpose(1, 2)
            part_lse[:, :, block.rows] = torch.where(is_query, peak + total.log(), float("inf"))[..., 0]
    return out, lse


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of :func:`forward` -> dq, dk, dv.

    From p = exp(s - lse): dv = pᵀ d_out, ds = p (d_out vᵀ - delta), dq = ds k, dk = dsᵀ q.
    """
    results = new_gradients(call, has_gaps=True)
    for part in _parts(call.mask):
        problem = _Problem(part, call)
        part_d_out, part_out = (_heads_first(part.rows(x), problem.is_query) for x in (d_out, out))
        part_lse = part.lse(lse)[..., None]
        delta = (part_d_out * part_out).sum(-1, keepdim=True)  # [batch, heads, queries, 1]
        if d_lse is not None:
            delta -= part.lse(d_lse)[..., None].masked_fill(~problem.is_query[:, None, :, None], 0)
        dq, dk, dv = (torch.zeros_like(x) for x in (problem.q, problem.k, problem.v))
        global_dk, global_dv = (problem.gather_global_keys(x) for x in (dk, dv))  # zeros
        for block in problem.blocks():
            # where a row has no result, lse is +inf and p is 0
            p = block.scores().sub_(part_lse[:, :, block.rows]).exp_()
            d_out_block = part_d_out[:, :, block.rows]
            dv_block = block.dropout(p).transpose(2, 3) @ d_out_block  # [batch, heads, keys, head_dim]
            dp = block.dropout(d_out_block @ block.v.transpose(2, 3))
            ds = dp.sub_(delta[:, :, block.rows]).mul_(p)
            dk_block = ds.transpose(2, 3) @ block.q
            dq[:, :, block.rows] = ds @ block.k
            in_band = block.band.stop - block.band.start
            for grad, global_grad, update in ((dk, global_dk, dk_block), (dv, global_dv, dv_block)):
                grad[:, :, block.band] += update[:, :, :in_band]
                global_grad += update[:, :, in_band:]
        dk, dv = problem.add_to_global_keys(dk, global_dk), problem.add_to_global_keys(dv, global_dv)
        dq = dq.mul_(call.softmax_scale).masked_fill_(
            ~problem.is_query[:, None, :, None], 0
        )  # 0 · NaN is NaN
        for result, grad in zip(results, (dq, dk, dv), strict=True):
            part.rows(result).copy_(grad.transpose(1, 2))
    return results


@dataclass(frozen=True)
class _Part:
    """Describes what is computed at once: a padded batch, or one sequence of a packed one as a batch of 1."""

    batch: slice  # its entries of [batch, ...]
    span: slice | None  # its rows of [total_rows, ...]; None when padded
    token_kind: Tensor  # [batch, seqlen]
    global_index: Tensor  # [batch, max_globals]
    num_globals: Tensor  # [batch]
    position_offset: Tensor  # [batch]
    global_position: Tensor  # [batch, max_globals]

    def rows(self, x: Tensor) -> Tensor:
        """Returns the part of x, as a view [batch, seqlen or max_globals, heads, head_dim]."""
        return x[self.span][None] if x.dim() == 3 else x[self.batch]

    def lse(self, x: Tensor) -> Tensor:
        """Returns the part of x, as a view [batch, heads, seqlen or max_globals]."""
        return x[:, self.span][None] if x.dim() == 2 else x[self.batch]


def _parts(mask: LongformerMask) -> Iterator[_Part]:
    if not mask.is_packed:
        yield _Part(slice(0, mask.batch), None, mask.token_kind, *_of_globals(mask, slice(None)))
        return
    for b, (start, length) in enumerate(torch.stack([mask.seq_start, mask.seq_len], 1).tolist()):
        one, span = slice(b, b + 1), slice(start, start + length)
        if length:
            yield _Part(one, span, mask.token_kind[None, span], *_of_globals(mask, one))


def _of_globals(mask: LongformerMask, batch: slice) -> tuple[Tensor, ...]:
    """Returns what the last four fields of a part hold for some batch entries."""
    of_all = mask.global_index, mask.num_globals, mask.position_offset, mask.global_position
    return tuple(x[batch] for x in of_all)


@dataclass(frozen=True)
class _Block:
    """Holds a block of queries with the keys of its band, and behind them the global keys."""

    rows: slice
    band: slice
    q: Tensor  # [batch, heads, rows, head_dim]
    k: Tensor  # [batch, heads, keys, head_dim]
    v: Tensor
    forbidden: Tensor  # bool [batch, 1, rows, keys]
    keep: Tensor | None  # bool [batch, heads, rows, keys]
    dropout_p: float

    def scores(self) -> Tensor:
        return (self.q @ self.k.transpose(2, 3)).masked_fill_(self.forbidden, float("-inf"))

    def dropout(self, x: Tensor) -> Tensor:
        if self.keep is None:
            return x
        return torch.where(self.keep, x / (1 - self.dropout_p) if self.dropout_p < 1 else x, 0)


class _Problem:
    """Holds a call whose query i sees the keys i - left … i + right and the global keys outside these.

    ``window`` is None for global attention: there the queries are the global tokens, and see every key.
    """

    def __init__(self, part: _Part, call: AttentionCall) -> None:
        self.is_key = part.token_kind != PADDING  # [batch, seqlen]
        seqlen, max_globals = self.is_key.shape[1], part.global_index.shape[1]
        device = call.q.device
        if call.window is None:
            slot = torch.arange(max_globals, device=device)
            # [batch, queries], the rows that have a result; a sequence that is all padding has none
            self.is_query = (slot < part.num_globals[:, None]) & self.is_key.any(1, keepdim=True)
            self.left = self.right = seqlen + max_globals
            self.global_keys = part.global_index[:, :0].long()  # [batch, 0]
            self.query_position = part.global_position
        else:
            self.is_query = part.token_kind == LOCAL
            self.left, self.right = call.window
            self.global_keys = part.global_index.long()  # positions, [batch, max_globals], -1 for none
            self.query_position = torch.arange(seqlen, device=device) + part.position_offset[:, None]
        # [batch, heads, rows, head_dim], in the accumulation dtype, zeros in padding
        self.q = _heads_first(part.rows(call.q), self.is_query).mul_(call.softmax_scale)
        self.k, self.v = (_heads_first(part.rows(x), self.is_key) for x in (call.k, call.v))
        self.position_offset = part.position_offset[:, None, None]  # [batch, 1, 1]
        self.global_position = part.global_position[:, None]  # [batch, 1, max_globals]
        self.call = call
        self.first_batch = part.batch.start

    def blocks(self) -> Iterator[_Block]:
        queries, device = self.q.shape[2], self.q.device
        global_k, global_v = (self.gather_global_keys(x) for x in (self.k, self.v))
        global_key = self.global_keys[:, None]  # [batch, 1, max_globals]
        size = self._block_size()
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            band = slice(max(start - self.left, 0), min(rows.stop + self.right, self.k.shape[2]))
            query = torch.arange(rows.start, rows.stop, device=device)[:, None]
            key = torch.arange(band.start, band.stop, device=device).expand(self.q.shape[0], 1, -1)
            k, v = self.k[:, :, band], self.v[:, :, band]
            allowed = self._in_band(query, key) & self.is_key[:, None, band]  # [batch, rows, band]
            if self.global_keys.shape[1]:
                # the band keeps the global keys that lie in it, so that each key counts once
                outside = (global_key >= 0) & ~self._in_band(query, global_key)
                allowed = torch.cat([allowed, outside], -1)  # [batch, rows, keys]
                k, v = torch.cat([k, global_k], 2), torch.cat([v, global_v], 2)
            keep = self._keep(rows, key)
            yield _Block(rows, band, self.q[:, :, rows], k, v, ~allowed[:, None], keep, self.call.dropout_p)

    def gather_global_keys(self, x: Tensor) -> Tensor:
        """Gathers the global keys -> [batch, heads, max_globals, head_dim]; an unused slot holds some row."""
        return x.gather(2, _rows_index(self.global_keys.clamp(min=0), x))

    def add_to_global_keys(self, x: Tensor, update: Tensor) -> Tensor:
        """Adds ``update`` to x in the rows of the global keys, which differ; unused slots get a row that is cut off."""
        if update.shape[2] == 0:
            return x
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
        index = _rows_index(torch.where(self.global_keys < 0, x.shape[2] - 1, self.global_keys), x)
        return x.scatter_(2, index, x.gather(2, index) + update)[:, :, :-1]

    def _in_band(self, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query - self.left) & (key <= query + self.right)

    def _keep(self, rows: slice, key: Tensor) -> Tensor | None:
        """Tells which scores dropout keeps, bool [batch, heads, rows, keys]; None without dropout.

        ``key``: [batch, 1, keys of the band], rows of the piece; the global keys follow.
        """
        call = self.call
        if call.seed is None:
            return None
        batch, heads, _, _ = self.q.shape
        first = self.first_batch * heads
        batch_head = torch.arange(first, first + batch * heads, device=key.device).view(batch, heads, 1, 1)
        query = self.query_position[:, None, rows, None]
        key = key + self.position_offset  # [batch, 1, keys of the band]
        if self.global_keys.shape[1]:
            key = torch.cat([key, self.global_position], -1)
        return keep_mask(call.seed, query, key[:, None], batch_head, call.philox_stream, call.dropout_p)

    def _block_size(self) -> int:
        batch, heads, _, _ = self.q.shape
        budget = _SCORES_PER_BLOCK // (1 if self.call.seed is None else _PHILOX_COST)
        for size in _BLOCK_SIZES:
            keys = min(self.k.shape[2], self.left + size + self.right) + self.global_keys.shape[1]
            if batch * heads * size * keys <= budget:
                return size
        return _BLOCK_SIZES[-1]


def _heads_first(x: Tensor, exists: Tensor) -> Tensor:
    """Copies [batch, rows, heads, head_dim] to [batch, heads, rows, head_dim], with zeros where no row exists."""
    x = x.transpose(1, 2).to(lse_dtype(x.dtype), memory_format=torch.contiguous_format, copy=True)
    return x.masked_fill_(~exists[:, None, :, None], 0)


def _rows_index(rows: Tensor, x: Tensor) -> Tensor:
    return rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
