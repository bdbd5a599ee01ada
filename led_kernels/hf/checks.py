"""Whether what a decoder is given belongs to one batch: attention would make one row serve for many."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_shapes(
    shape: Sequence[int],
    attention_mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
    is_cached: bool,
) -> None:
    """Holds a decoder's arguments against its tokens, of ``shape`` ``[batch, tgt_len]``, as transformers' decoder does.

    Args:
        attention_mask: ``[batch, tgt_len]``, of these tokens; if ``is_cached``, which may be others too, of any length.
        encoder_hidden_states: ``[batch, src_len, d_model]``.
        encoder_attention_mask: ``[batch, src_len]``. Masks of four dimensions broadcast, and are not looked at.

    Raises:
        ValueError: for one of another batch or length, by the name that a model takes it under.
    """
    shape = tuple(shape)
    mask = attention_mask
    if (
        mask is not None
        and mask.dim() == 2
        and (mask.shape[0] != shape[0] or (mask.shape[1] != shape[1] and not is_cached))
    ):
        raise ValueError(
            f"decoder_attention_mask has shape {tuple(mask.shape)} and decoder_input_ids {shape}; give both "
            "[batch, tgt_len]."
        )
    if encoder_hidden_states is None:
        return
    encoded = tuple(encoder_hidden_states.shape[:2])
    if encoded[0] != shape[0]:
        raise ValueError(
            f"decoder_input_ids has {shape[0]} rows and the encoder's output {encoded[0]}; give one for each document."
        )
    mask = encoder_attention_mask
    if mask is not None and mask.dim() == 2 and tuple(mask.shape) not in (encoded, (1, encoded[1])):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and the encoder's output {encoded}; give both "
            "[batch, src_len]."
        )
