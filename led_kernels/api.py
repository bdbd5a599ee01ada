"""The public attention functions. Each checks its arguments, draws the seed of dropout, and runs one call."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from led_kernels import ops
from led_kernels.argument_checks import check_number, window_of
from led_kernels.arguments import (
    autocast,
    check_alike,
    check_q_global,
    check_qkv,
    seed_of,
    softmax_scale_of,
)
from led_kernels.call import AttentionCall
from led_kernels.dispatch import choose_backend
from led_kernels.global_rows import add_global_rows, gather_global_rows
from led_kernels.mask import LongformerMask


@overload
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    *,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    *,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    *,
    window_size: int | tuple[int, int],
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes sliding-window attention of the local tokens, which also see every global token.

    Equivalent to dense softmax attention with ``allowed[i, j] = valid(j) and (i - left <= j <= i + right or
    is_global(j))``, where padding, global and halo rows give zeros (a global token's own row comes from
    :func:`global_attention`, a halo's from another piece of its sequence) and send no gradient to their ``q``.

    Args:
        q, k, v: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads, head_dim]`` with a packed mask; fp32,
            fp16, bf16, or fp64 on the backends reference, torch and cpu; head_dim 1 … 256; any strides with a
            contiguous last dimension.
        mask: :class:`LongformerMask` of the batch.
        window_size: ``w`` or ``(left, right)``, inclusive: query i sees keys i - left … i + right; -1 is unlimited.
            Hugging Face's ``attention_window`` is ``2 * w``.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        dropout_p: probability of dropping an attention probability.
        seed: int64 ``[1]`` on the device of q, which decides what is dropped; default: drawn from torch's generator.
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
    check_qkv({"q": q, "k": k, "v": v}, mask)
    q, k, v = autocast(q, k, v)
    window = window_of(window_size, mask.max_seqlen)
    dropout_p = check_number(dropout_p, "dropout_p")
    scale, seed = softmax_scale_of(softmax_scale, q), seed_of(seed, dropout_p, q.device)
    call = AttentionCall(q, k, v, mask, window, scale, dropout_p, seed)
    out, lse = ops.attend(call, choose_backend(q.device, q.dtype, backend))
    return (out, lse) if return_lse else out


@overload
def global_attention(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def global_attention(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def global_attention(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes attention of the global tokens over every token of their sequence that is not padding.

    It looks at ``mask.num_globals``, for dropout at ``mask.global_position``, and never at ``mask.global_index``: the
    queries are given, and their tokens may lie in another piece of the sequence than the keys.

    Args:
        q_global: ``[batch, max_globals, heads, head_dim]`` in the order of ``mask.global_index``; unused slots are
            ignored.
        k_global, v_global: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads, head_dim]`` with a packed
            mask.
        mask, softmax_scale, dropout_p, seed, return_lse, backend: as in :func:`banded_attention`.

    Returns:
        out ``[batch, max_globals, heads, head_dim]``, zeros in unused slots, and in all slots of a sequence that holds
        nothing but padding; with ``return_lse`` also lse ``[batch, heads, max_globals]``, +inf there. Who merges pieces
        of a sequence by their lse gives those at +inf the weight 0.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    check_qkv({"k_global": k_global, "v_global": v_global}, mask)
    check_q_global(q_global, mask, k_global.shape[-2])
    check_alike({"q_global": q_global, "k_global": k_global})
    if q_global.shape[3] != k_global.shape[-1]:
        raise ValueError(
            f"q_global has head_dim {q_global.shape[3]} and k_global {k_global.shape[-1]}; make them equal."
        )
    q_global, k_global, v_global = autocast(q_global, k_global, v_global)
    dropout_p = check_number(dropout_p, "dropout_p")
    scale, seed = softmax_scale_of(softmax_scale, q_global), seed_of(seed, dropout_p, q_global.device)
    call = AttentionCall(q_global, k_global, v_global, mask, None, scale, dropout_p, seed)
    out, lse = ops.attend(call, choose_backend(q_global.device, q_global.dtype, backend))
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
    """Computes Longformer self-attention: banded for local tokens, global for global ones, in one result.

    Args:
        q, k, v, q_global, k_global, v_global: ``[batch, seqlen, heads, head_dim]``, or ``[total_rows, heads,
            head_dim]`` with a packed mask; here ``q_global`` has a row for every token, of which the global ones count.
        mask, window_size, softmax_scale, dropout_p, backend: as in :func:`banded_attention`.

    Returns:
        out, like q; zeros on padding rows.

    Raises:
        ValueError, TypeError: naming the argument and the remedy.
        BackendUnavailable: when the named backend cannot run the call.
    """
    settings = dict(softmax_scale=softmax_scale, dropout_p=dropout_p, backend=backend)
    if isinstance(mask, LongformerMask) and mask.max_globals > 0:
        check_qkv({"q": q, "q_global": q_global, "k_global": k_global, "v_global": v_global}, mask)
    out = banded_attention(q, k, v, mask, window_size=window_size, **settings)
    if mask.max_globals == 0 or out.numel() == 0:
        return out
    out_global = global_attention(gather_global_rows(q_global, mask), k_global, v_global, mask, **settings)
    return add_global_rows(out, out_global, mask)
