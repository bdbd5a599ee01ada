"""A batch is cut into pieces as ranks hold it, and what a backend makes of them is compared with the whole.

A piece of banded attention has the rows ``[global tokens outside | left halo | own rows | right halo]``; one of global
attention has its own rows, and the global tokens may lie in other pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from led_kernels.api import banded_attention, global_attention
from led_kernels.mask import GLOBAL, LOCAL, PADDING, LongformerMask
from led_kernels.mask_tensors import HALO, MaskTensors
from led_kernels.testing import AttentionCase, assert_within_error_bound, poisoned_memory

CUT_CASES = {
    "globals": AttentionCase(
        seqlen=150, window_size=(13, 9), globals_per_row=((0, 60, 61, 149), (70,)), dropout_p=0.3
    ),
    "holes": AttentionCase(
        seqlen=150, window_size=20, globals_per_row=((5, 50), (0, 1, 2)), padding="holes", dropout_p=0.3
    ),
    "padded": AttentionCase(seqlen=130, window_size=(0, 30), padding="right", dropout_p=0.3),
    "no-dropout": AttentionCase(
        seqlen=150, window_size=33, globals_per_row=((0, 149), (148,)), padding="left"
    ),
}


@dataclass(frozen=True)
class Piece:
    """Holds the mask of a piece, and for each of its rows the position in the whole sequence, -1 for none."""

    mask: LongformerMask
    position: Tensor  # [batch, rows]

    def gather(self, x: Tensor, others: float) -> Tensor:
        """Returns the rows of x ``[batch, seqlen, ...]`` that the piece has, and ``others`` in its other rows."""
        rows = x[torch.arange(len(x), device=x.device)[:, None], self.position.clamp(min=0)]
        return rows.masked_fill((self.position < 0).view(*self.position.shape, *[1] * (x.dim() - 2)), others)

    def scatter(self, x: Tensor, seqlen: int) -> Tensor:
        """Returns the rows of x ``[batch, rows, ...]`` at their positions of ``[batch, seqlen, ...]``, in fp64."""
        whole = x.new_zeros(len(x), seqlen + 1, *x.shape[2:], dtype=torch.float64)
        position = torch.where(self.position < 0, seqlen, self.position)
        index = position.view(*position.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return whole.scatter_add(1, index, x.double())[:, :-1]


def assert_pieces_match_whole(
    op: str,
    case: AttentionCase,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    num_pieces: int = 3,
) -> None:
    """Asserts the error bound on out, lse and the summed gradients of the pieces, against the unsplit reference."""
    whole = case.mask(device)
    q, k, v = case.inputs(whole, dtype)
    if op == "global":
        slots = torch.Generator().manual_seed(2)
        q = torch.randn(case.batch, whole.max_globals, *q.shape[2:], generator=slots).to(q)
    compute = {"banded": _banded_in_pieces, "global": _global_in_pieces}[op]
    length = -(-case.seqlen // num_pieces)
    cuts = [(start, min(start + length, case.seqlen)) for start in range(0, case.seqlen, length)]
    with poisoned_memory():
        actual = compute(case, whole, (q, k, v), cuts, backend)
    oracle, plain = (_whole(op, case, whole, (q, k, v), run) for run in (torch.float64, dtype))
    for name in oracle:
        assert_within_error_bound(actual[name].to(plain[name].dtype), oracle[name], plain[name], name)


def banded_piece(whole: LongformerMask, own: tuple[int, int], window: tuple[int, int]) -> Piece:
    """Returns the piece whose own rows are ``own[0] … own[1] - 1`` of each sequence."""
    kind = whole.token_kind.cpu()
    batch, seqlen = kind.shape
    first, end = own[0] - window[0], own[1] + window[1]  # of own rows and halo
    tokens = [
        index[:n].tolist() for index, n in zip(whole.global_index, whole.num_globals.tolist(), strict=True)
    ]
    outside = [[i for i in row if not first <= i < end] for row in tokens]
    front = max(map(len, outside), default=0)
    front += (first - front) % 4  # so that the rows' offset is a multiple of 4
    offset, rows = first - front, front + end - first
    position = torch.arange(offset, end).expand(batch, rows).clone()
    position[:, :front] = -1
    position[(position < 0) | (position >= seqlen)] = -1
    index, places = (torch.full((batch, whole.max_globals), -1, dtype=torch.int32) for _ in range(2))
    for b, row in enumerate(outside):
        position[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
        inside = [i for i in tokens[b] if first <= i < end]
        index[b, : len(row) + len(inside)] = torch.tensor(
            [*range(len(row)), *(i - offset for i in inside)]
        ).int()
        places[b, : len(row) + len(inside)] = torch.tensor([*row, *inside]).int()
    kinds = kind.gather(1, position.clamp(min=0)).masked_fill(position < 0, PADDING)
    is_own = (position >= own[0]) & (position < own[1])
    kinds[(kinds == LOCAL) & ~is_own] = HALO
    mask = _mask(kinds, offset, index, whole.num_globals.cpu(), places)
    mask = LongformerMask(*mask, rows).to(whole.device)  # checks the values
    return Piece(mask, position.to(whole.device))


def global_piece(whole: LongformerMask, own: tuple[int, int]) -> Piece:
    """Returns the piece whose keys are the rows ``own[0] … own[1] - 1`` of each sequence; its queries have no row."""
    kind = whole.token_kind.cpu()
    offset = own[0] - own[0] % 4
    position = torch.arange(offset, own[1]).expand(len(kind), -1)
    position = torch.where(position < own[0], -1, position)
    kinds = kind.gather(1, position.clamp(min=0)).masked_fill(position < 0, PADDING)
    kinds = torch.where(kinds == GLOBAL, LOCAL, kinds)
    places = whole.global_position.cpu()
    mask = _mask(kinds, offset, torch.full_like(places, -1), whole.num_globals.cpu(), places)
    mask = LongformerMask.from_tensors(mask, kinds.shape[1]).to(whole.device)
    return Piece(mask, position.to(whole.device))


def _mask(kinds: Tensor, offset: int, index: Tensor, counts: Tensor, places: Tensor) -> MaskTensors:
    is_padding = (kinds == PADDING).int()
    batch, rows = kinds.shape
    return MaskTensors(
        seq_start=torch.zeros(batch, dtype=torch.int32),
        seq_len=((1 - is_padding) * torch.arange(1, rows + 1)).amax(1).int(),
        token_kind=kinds.to(torch.uint8),
        padding_before=(is_padding.cumsum(1) - is_padding).int(),
        global_index=index,
        num_globals=counts,
        position_offset=torch.full((batch,), offset, dtype=torch.int32),
        global_position=places,
    )


def _settings(case: AttentionCase, backend: str) -> dict:
    return {
        "softmax_scale": case.softmax_scale,
        "dropout_p": case.dropout_p,
        "backend": backend,
        "return_lse": True,
    }


def _window(case: AttentionCase) -> tuple[int, int]:
    return case.window_size if isinstance(case.window_size, tuple) else (case.window_size, case.window_size)


def _leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def _d_outputs(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draws the gradients of out ``[batch, rows, heads, head_dim]`` and of lse ``[batch, heads, rows]``."""
    generator = torch.Generator().manual_seed(1)
    d_out, d_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    return d_out.to(dtype).to(out), d_lse.float().to(lse).masked_fill(lse.isinf(), 0)


def _whole(
    op: str, case: AttentionCase, mask: LongformerMask, inputs: tuple[Tensor, ...], run: torch.dtype
) -> dict[str, Tensor]:
    leaves = _leaves(tuple(x.to(run) for x in inputs))
    torch.manual_seed(0)
    settings = _settings(case, "reference")
    if op == "banded":
        out, lse = banded_attention(*leaves, mask, window_size=case.window_size, **settings)
    else:
        out, lse = global_attention(*leaves, mask, **settings)
    grads = torch.autograd.grad((out, lse), leaves, _d_outputs(out, lse, inputs[0].dtype))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def _banded_in_pieces(
    case: AttentionCase, whole: LongformerMask, inputs: tuple[Tensor, ...], cuts: list, backend: str
) -> dict[str, Tensor]:
    batch, seqlen, heads, _ = inputs[0].shape
    d_out, d_lse = _d_outputs(inputs[0], inputs[0].new_zeros(batch, heads, seqlen).float(), inputs[0].dtype)
    sums: dict[str, Tensor] = {}
    for own in cuts:
        piece = banded_piece(whole, own, _window(case))
        is_query = piece.mask.token_kind == LOCAL
        # Rows that are no query hold NaN in q and in all gradients.
        q, k, v = _leaves(tuple(piece.gather(x, float("nan")) for x in inputs))
        others = (piece.mask.token_kind == HALO) | (piece.mask.token_kind == PADDING)
        q.data[others] = float("nan")
        torch.manual_seed(0)
        settings = _settings(case, backend)
        out, lse = banded_attention(q, k, v, piece.mask, window_size=case.window_size, **settings)
        assert torch.equal(lse.isinf(), ~is_query[:, None].expand_as(lse)), (
            "rows of no local token have an lse"
        )
        d_piece = piece.gather(d_out, 0.0).masked_fill(~is_query[..., None, None], float("nan"))
        d_lse_piece = piece.gather(d_lse.transpose(1, 2), 0.0).masked_fill(~is_query[..., None], float("nan"))
        dq, dk, dv = torch.autograd.grad(
            (out, lse), (q, k, v), (d_piece, d_lse_piece.transpose(1, 2).to(lse))
        )
        for x in (out, dq):
            assert not x[~is_query].any(), "rows of no local token have a result or a gradient"
        lse_rows = lse.transpose(1, 2).masked_fill(~is_query[..., None], 0)
        for name, x in {"out": out, "lse": lse_rows, "dq": dq, "dk": dk, "dv": dv}.items():
            sums[name] = sums.get(name, 0) + piece.scatter(x.detach(), seqlen)
    is_row = (whole.token_kind == LOCAL)[:, None]
    sums["lse"] = sums["lse"].transpose(1, 2).masked_fill(~is_row, float("inf"))
    return sums


def _global_in_pieces(
    case: AttentionCase, whole: LongformerMask, inputs: tuple[Tensor, ...], cuts: list, backend: str
) -> dict[str, Tensor]:
    q, k, v = _leaves(inputs)
    outs, lses = [], []
    for own in cuts:
        piece = global_piece(whole, own)
        torch.manual_seed(0)
        settings = _settings(case, backend)
        out, lse = global_attention(
            q, piece.gather(k, float("nan")), piece.gather(v, float("nan")), piece.mask, **settings
        )
        outs.append(out.double())
        lses.append(lse.double())
    out, lse = merge(torch.stack(outs), torch.stack(lses))
    grads = torch.autograd.grad((out, lse), (q, k, v), _d_outputs(out, lse, q.dtype))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merges pieces' out ``[pieces, batch, rows, heads, head_dim]`` by their lse; one of +inf has no part."""
    logarithms = lses.masked_fill(lses.isinf(), float("-inf"))
    has_result = ~lses.isinf().all(0)
    total = logarithms.masked_fill(~has_result, 0).logsumexp(0)
    weights = (logarithms - total).exp()  # [pieces, batch, heads, rows]
    out = (weights.transpose(2, 3)[..., None] * outs).sum(0)
    return out, total.masked_fill(~has_result, float("inf"))


def assert_far_halo_is_not_read(
    backend: str, device: torch.device | str, dtype: torch.dtype, halo: int, poisoned: int
) -> None:
    """Asserts that NaN in the first ``poisoned`` rows of a halo, keys too, is in no result of another row.

    No local token sees these rows, and tiles with local tokens end before them: they are not computed at all.
    """
    case = AttentionCase(1, halo + 40, 1, window_size=20, globals_per_row=((halo + 3,),), halo=(halo, 0))
    mask = case.mask(device)
    results = []
    for value in (0.0, float("nan")):
        q, k, v = _leaves(case.inputs(mask, dtype, fused=False))
        for x in (q, k, v):
            x.data[:, :poisoned] = value
        out, lse = banded_attention(q, k, v, mask, window_size=20, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
        results.append([out, lse.transpose(1, 2), *grads])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, poisoned:], other[:, poisoned:])
        assert not other[:, halo:].isnan().any()
