"""Public attention functions: documentation, validation, dropout's seed, and the call."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from led_kernels import ops
from led_kernels.argument_checks import check_number
from led_kernels.call_checks import lse_dtype
from led_kernels.dispatch import choose_backend
from led_kernels.eager import is_transformed
from led_kernels.mask import LongformerMask
from led_kernels.philox import GLOBAL_STREAM, keep_mask


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    *,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sliding-window attention of the local tokens, which also see every global token.

    Equivalent to dense softmax attention with ``allowed[i, j] = valid(j) and (i - left <= j <= i + right or
    is_global(j))``, where padding rows and global rows give zeros (a global token's own row comes from
    :func:`global_attention`) and send no gradient to their ``q``.

    Args:
        q, k, v: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads, head_dim]`` with a packed mask; fp32,
            fp16, bf16, or fp64 on the backends reference, torch and cpu; head_dim 1 … 256; any strides with a
            contiguous last dimension.
        mask: :class:`LongformerMask` of the batch.
        window_size: ``w`` or ``(left, right)``, inclusive: query i sees keys i - left … i + right; -1 is unlimited.
            Hugging Face's ``attention_window`` is ``2 * w``.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        dropout_p: probability of dropping an attention probability; drawn from torch's generator.
        return_lse: also return the log-sum-exp of the scaled scores.
        backend: ``reference | torch | cpu | triton | cuda``; default by device and ``LED_KERNELS_BACKEND``.

    Returns:
        out, like q and contiguous; with ``return_lse`` also lse, fp32 (fp64 for fp64), natural logarithm,
        ``[batch, heads, seqlen]`` (packed ``[heads, total_rows]``), +inf on rows without a result. Both have gradients.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.
    """
    _check_qkv({"q": q, "k": k, "v": v}, mask)
    q, k, v = _autocast(q, k, v)
    left, right = _window(window_size, mask.max_seqlen)
    dropout_p = check_number(dropout_p, "dropout_p")
    out, lse = ops.banded(
        q, k, v, *mask.tensors(), _seed(dropout_p, q.device), mask.max_seqlen, left, right,
        _scale(softmax_scale, q), dropout_p, choose_backend(q.device, q.dtype, backend),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def global_attention(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the global tokens over every token of their sequence that is not padding.

    Args:
        q_global: ``[batch, max_globals, heads, head_dim]`` in the order of ``mask.global_index``; unused slots are
            ignored.
        k_global, v_global: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads, head_dim]`` with a packed
            mask.
        mask, softmax_scale, dropout_p, return_lse, backend: as in :func:`banded_attention`.

    Returns:
        out ``[batch, max_globals, heads, head_dim]``, zeros in unused slots; with ``return_lse`` also lse
        ``[batch, heads, max_globals]``, +inf there.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    _check_qkv({"k_global": k_global, "v_global": v_global}, mask)
    _check_q_global(q_global, mask, k_global.shape[-2])
    _check_alike({"q_global": q_global, "k_global": k_global})
    if q_global.shape[3] != k_global.shape[-1]:
        raise ValueError(
            f"q_global has head_dim {q_global.shape[3]} and k_global {k_global.shape[-1]}; make them equal."
        )
    q_global, k_global, v_global = _autocast(q_global, k_global, v_global)
    dropout_p = check_number(dropout_p, "dropout_p")
    out, lse = ops.global_(
        q_global, k_global, v_global, *mask.tensors(), _seed(dropout_p, q_global.device), mask.max_seqlen,
        _scale(softmax_scale, q_global), dropout_p, choose_backend(q_global.device, q_global.dtype, backend),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    *,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Longformer self-attention: banded attention for local tokens, global attention for global ones, merged.

    Args:
        q, k, v, q_global, k_global, v_global: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads,
            head_dim]`` with a packed mask; here ``q_global`` has a row for every token, of which the global ones count.
        others: as in :func:`banded_attention`.

    Returns:
        out, like q; zeros on padding rows.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    settings = dict(softmax_scale=softmax_scale, dropout_p=dropout_p, backend=backend)
    if isinstance(mask, LongformerMask) and mask.max_globals > 0:
        _check_qkv({"q": q, "q_global": q_global, "k_global": k_global, "v_global": v_global}, mask)
    out = banded_attention(q, k, v, mask, window_size=window_size, **settings)
    if mask.max_globals == 0 or out.numel() == 0:
        return out
    out_global = global_attention(gather_global_rows(q_global, mask), k_global, v_global, mask, **settings)
    return add_global_rows(out, out_global, mask)


def absorbed_global_attention(
    hidden: Tensor,
    q_global: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """:func:`global_attention` from hidden states, without projecting every token to keys and values.

    With keys ``W_k x + b_k`` the scores are ``(W_kᵀ q)·x + const``, and the constant cancels in the softmax; the output
    is ``W_v (Σ p x) + b_v Σ p``. Exact algebra; it pays while ``max_globals * heads < d_model``.

    Args:
        hidden: ``[batch, seqlen, d_model]``, or ``[total_rows, d_model]`` with a packed mask.
        q_global: ``[batch, max_globals, heads, head_dim]`` in the order of ``mask.global_index``.
        key_weight, value_weight: ``[heads * head_dim, d_model]``, as in ``nn.Linear``.
        value_bias: ``[heads * head_dim]`` or None.
        mask, softmax_scale, dropout_p: as in :func:`banded_attention`.

    Returns:
        ``[batch, max_globals, heads, head_dim]``, zeros in unused slots.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
    """
    _check_q_global(q_global, mask)
    _check_float(hidden, "hidden")
    if hidden.shape[:-1] != mask.token_kind.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; give [*{tuple(mask.token_kind.shape)}, d_model] for this mask."
        )
    batch, max_globals, heads, head_dim = q_global.shape
    d_model = hidden.shape[-1]
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        _check_float(weight, name)
        if weight.shape != (heads * head_dim, d_model):
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; give [heads * head_dim, d_model] = "
                f"[{heads * head_dim}, {d_model}]."
            )
    if value_bias is not None:
        _check_float(value_bias, "value_bias")
        if value_bias.shape != (heads * head_dim,):
            raise ValueError(f"value_bias has shape {tuple(value_bias.shape)}; give [{heads * head_dim}].")
    hidden, q_global, key_weight, value_weight = _autocast(hidden, q_global, key_weight, value_weight)
    alike = {"q_global": q_global, "hidden": hidden, "key_weight": key_weight, "value_weight": value_weight}
    _check_alike(alike)
    hidden, exists = _sequences(hidden, mask)  # [batch, seqlen, d_model], bool [batch, seqlen]
    is_slot = (
        torch.arange(max_globals, device=hidden.device) < mask.num_globals[:, None]
    )  # [batch, max_globals]
    q_global = q_global.masked_fill(~is_slot[:, :, None, None], 0)

    q_absorbed = torch.einsum(
        "bghd,hdm->bghm",
        q_global * _scale(softmax_scale, q_global),
        key_weight.view(heads, head_dim, d_model),
    )  # [batch, max_globals, heads, d_model]
    scores = (q_absorbed.flatten(1, 2) @ hidden.transpose(1, 2)).view(batch, max_globals, heads, -1)
    scores = scores.to(lse_dtype(scores.dtype)).masked_fill(
        ~exists[:, None, None, :], torch.finfo(scores.dtype).min
    )
    p = scores.softmax(-1)
    dropout_p = check_number(dropout_p, "dropout_p")
    seed = _seed(dropout_p, hidden.device)
    if seed is not None:
        batch_head = torch.arange(batch * heads, device=hidden.device).view(batch, 1, heads, 1)
        query = mask.global_index.clamp(min=0)[:, :, None, None]
        key = torch.arange(hidden.shape[1], device=hidden.device)
        keep = keep_mask(seed, query, key, batch_head, GLOBAL_STREAM, dropout_p)
        p = torch.where(keep, p / (1 - dropout_p) if dropout_p < 1 else p, 0)
    mixed = p.to(hidden.dtype).flatten(1, 2) @ hidden  # [batch, max_globals * heads, d_model]
    mixed = mixed.view(batch, max_globals, heads, d_model)
    out = torch.einsum("bghm,hdm->bghd", mixed, value_weight.view(heads, head_dim, d_model))
    if value_bias is not None:
        kept = p.sum(-1, keepdim=True).to(out.dtype)  # 1, except under dropout
        out = out + kept * value_bias.to(out.dtype).view(heads, head_dim)
    return out.masked_fill(~is_slot[:, :, None, None], 0)


def gather_global_rows(x: Tensor, mask: LongformerMask) -> Tensor:
    """Rows of the global tokens: ``[batch, seqlen, ...]`` or ``[total_rows, ...]`` -> ``[batch, max_globals, ...]``.

    Unused slots repeat a row of the same batch entry.
    """
    position = mask.global_index.clamp(min=0).long()
    if mask.is_packed:
        return x[_packed_rows(position, mask, x.shape[0])]
    return x[torch.arange(mask.batch, device=x.device)[:, None], position]


def add_global_rows(out: Tensor, out_global: Tensor, mask: LongformerMask) -> Tensor:
    """Merge ``[batch, max_globals, ...]`` into ``[batch, seqlen, ...]`` or ``[total_rows, ...]`` by addition.

    Exact, since each of the two holds zeros where the other holds a result. In place when no gradient is recorded.
    """
    position = mask.global_index.clamp(min=0).long()
    source = out_global.to(out.dtype)
    if mask.is_packed:
        at = (_packed_rows(position, mask, out.shape[0]),)
    else:
        at = torch.arange(mask.batch, device=out.device)[:, None], position
    is_recorded = out.requires_grad or source.requires_grad or is_transformed()
    put = out.index_put if is_recorded else out.index_put_
    return put(at, source, accumulate=True)


def _packed_rows(position: Tensor, mask: LongformerMask, total_rows: int) -> Tensor:
    return (mask.seq_start[:, None] + position).clamp(max=max(total_rows - 1, 0))


def _sequences(hidden: Tensor, mask: LongformerMask) -> tuple[Tensor, Tensor]:
    """[batch, max_seqlen, d_model] with zeros in padding rows (a select: 0 · NaN is NaN), and which rows are real"""
    if not mask.is_packed:
        exists = mask.token_kind != 0
        return hidden.masked_fill(~exists[:, :, None], 0), exists
    position = torch.arange(mask.max_seqlen, device=hidden.device)
    exists = position < mask.seq_len[:, None]
    rows = _packed_rows(torch.where(exists, position, 0), mask, hidden.shape[0])
    return hidden[rows].masked_fill(~exists[:, :, None], 0), exists


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; give a probability from 0 to 1.")
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _scale(softmax_scale: float | None, q: Tensor) -> float:
    return (
        1 / math.sqrt(q.shape[-1]) if softmax_scale is None else check_number(softmax_scale, "softmax_scale")
    )


def _window(window_size: int | tuple[int, int], max_seqlen: int) -> tuple[int, int]:
    """Both sides as lengths: -1 (unlimited) and anything wider than a sequence become max_seqlen."""
    sides = window_size if isinstance(window_size, (tuple, list)) else (window_size, window_size)
    if len(sides) != 2 or not all(
        isinstance(side, Integral) and not isinstance(side, bool) for side in sides
    ):
        raise TypeError(f"window_size is {window_size!r}; give an int or a pair (left, right) of ints.")
    sides = [int(side) for side in sides]
    if any(side < -1 for side in sides):
        raise ValueError(f"window_size is {window_size!r}; give 0 or more on each side, or -1 for unlimited.")
    left, right = (max_seqlen if side == -1 else min(side, max_seqlen) for side in sides)
    return left, right


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, attention runs in its dtype, as scaled_dot_product_attention does; fp64 stays."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_qkv(tensors: dict[str, Tensor], mask: LongformerMask) -> None:
    if not isinstance(mask, LongformerMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}; build a LongformerMask, for instance by LongformerMask.from_padding."
        )
    expected = "[total_rows, heads, head_dim]" if mask.is_packed else "[batch, seqlen, heads, head_dim]"
    first = None
    for name, x in tensors.items():
        _check_tensor(x, name)
        if x.dim() != (3 if mask.is_packed else 4):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give it as {expected} for this mask.")
        if x.shape[:-2] != mask.token_kind.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but the mask is for {tuple(mask.token_kind.shape)} "
                f"rows; give {expected} with these."
            )
        if x.device != mask.device:
            raise ValueError(
                f"{name} is on {x.device} and mask on {mask.device}; use mask.to({str(x.device)!r})."
            )
        if not 1 <= x.shape[-1] <= 256:
            raise ValueError(f"{name} has head_dim {x.shape[-1]}; 1 to 256 are supported.")
        first = first or name
        if x.shape != tensors[first].shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and {first} {tuple(tensors[first].shape)}; make them equal."
            )
    _check_alike(tensors)


def _check_q_global(q_global: Tensor, mask: LongformerMask, heads: int | None = None) -> None:
    _check_tensor(q_global, "q_global")
    if not isinstance(mask, LongformerMask):
        raise TypeError(f"mask is a {type(mask).__name__}; build a LongformerMask.")
    heads = heads or (q_global.shape[2] if q_global.dim() == 4 else 1)
    if q_global.dim() != 4 or q_global.shape[:3] != (mask.batch, mask.max_globals, heads):
        raise ValueError(
            f"q_global has shape {tuple(q_global.shape)}; give [batch, max_globals, heads, head_dim] = "
            f"[{mask.batch}, {mask.max_globals}, {heads}, …] in the order of mask.global_index."
        )


def _check_tensor(x: Tensor, name: str) -> None:
    _check_float(x, name)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has a non-contiguous last dimension (stride {x.stride(-1)}); call .contiguous() on it."
        )


def _check_float(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; give a torch.Tensor.")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {kind} tensor; give a dense one.")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; give float32, float16, bfloat16 or float64.")


def _check_alike(tensors: dict[str, Tensor]) -> None:
    (first, reference), *others = tensors.items()
    for name, x in others:
        if x.dtype != reference.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} and {first} {reference.dtype}; cast them to one dtype."
            )
        if x.device != reference.device:
            raise ValueError(
                f"{name} is on {x.device} and {first} on {reference.device}; move both to one device."
            )
