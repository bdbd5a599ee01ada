"""The arguments of a decoder are checked to belong to one batch, as attention would broadcast one row to many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_decoder_arguments(
    shape: Sequence[int],
    attention_mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
    is_cached: bool,
) -> None:
    """Checks that masks and encoder states go with a decoder's tokens, as transformers' own decoder does.

    Args:
        shape: ``[batch, tgt_len]`` of the tokens.
        attention_mask: ``[batch, tgt_len]``; of any length if ``is_cached``, as it then covers cached tokens, too.
        encoder_hidden_states: ``[batch, src_len, d_model]``.
        encoder_attention_mask: ``[batch, src_len]``. The shapes of masks with four dimensions are not checked, as they
            broadcast.
        is_cached: whether the decoder is given a cache.

    Raises:
        ValueError: for a tensor of another batch or length, or a mask with four dimensions that is neither bool nor of
            floating point; the message has the name under which a model takes the tensor.
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
    if encoder_hidden_states is not None:
        _check_encoder_arguments(shape, encoder_hidden_states, encoder_attention_mask)
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"decoder_attention_mask has four dimensions and holds {mask.dtype}; give bool, true where a token is "
            "seen, or floating-point numbers to add to the scores."
        )


def check_can_split(encoder: Any, is_recorded: bool | None) -> None:
    """Checks that nothing is asked of an encoder that its ranks, which split documents, cannot give.

    Raises:
        ValueError: naming it.
    """
    if is_recorded:
        raise ValueError(
            "output_attentions and output_hidden_states are not served where documents are split over ranks; leave "
            "them out."
        )
    if encoder.training and getattr(encoder, "layerdrop", 0):
        raise ValueError(
            f"encoder_layerdrop is {encoder.layerdrop}, and ranks that split a document cannot leave out different "
            "layers; set it to 0."
        )


def check_can_generate(max_time: float | None, *configs: Any) -> None:
    """Checks that nothing is asked of ``generate`` for which ranks that split documents could stop at other tokens.

    Args:
        max_time: of the call.
        configs: each a ``GenerationConfig`` of the call or of the model, or None.

    Raises:
        ValueError: naming it.
    """
    times = (max_time, *(getattr(config, "max_time", None) for config in configs))
    if any(time is not None for time in times):
        raise ValueError(
            "max_time is not served where documents are split over ranks, whose clocks differ; give max_new_tokens."
        )


def check_can_split_keys(encoder_attention_mask: Tensor | None, output_attentions: bool | None) -> None:
    """Checks that nothing is asked of a decoder that it cannot give where the ranks have parts of the documents.

    Raises:
        ValueError: naming it.
    """
    if output_attentions:
        raise ValueError(
            "output_attentions is not served where documents are split over ranks; leave it out."
        )
    if encoder_attention_mask is not None and encoder_attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {encoder_attention_mask.dim()} dimensions; give [batch, source] where documents are "
            "split over ranks."
        )


def _check_encoder_arguments(
    shape: tuple[int, ...], encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None
) -> None:
    """Checks what a decoder is given of the encoder, as :func:`check_decoder_arguments` says."""
    batch, src_len = encoder_hidden_states.shape[:2]
    if batch != shape[0]:
        raise ValueError(
            f"decoder_input_ids has {shape[0]} rows and the encoder's output {batch}; give one for each document."
        )
    mask = encoder_attention_mask
    if mask is not None and mask.dim() == 2 and tuple(mask.shape) not in ((batch, src_len), (1, src_len)):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and the encoder's output {(batch, src_len)}; give both "
            "[batch, src_len]."
        )
