"""Whether what a decoder is given belongs to one batch: attention would make one row serve for many."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_shapes(
    shape: Sequence[int],
    attention_mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
) -> None:
    """Holds a decoder's arguments against its tokens, of ``shape`` ``[batch, tgt_len]``, as transformers' decoder does.

    Args:
        attention_mask: of these tokens alone; with a cache, which may hold any number of others, leave it out.
        encoder_hidden_states: ``[batch, src_len, d_model]``.
        encoder_attention_mask: ``[batch, src_len]``. Masks of four dimensions broadcast, and are not looked at.

    Raises:
        ValueError: for one of another batch or length, by the name that a model takes it under.
    """
    shape = tuple(shape)
    if attention_mask is not None and attention_mask.dim() == 2 and tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"decoder_attention_mask has shape {tuple(attention_mask.shape)} and decoder_input_ids {shape}; give both "
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
    if mask is not None and mask.dim() == 2 and tuple(mask.shape) != encoded:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and the encoder's output {encoded}; give both "
            "[batch, src_len]."
        )
