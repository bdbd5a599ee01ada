"""Embeds tokens and their positions: what the layers of the encoder and of the decoder begin with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from led_model.checks import check_inputs
from led_model.config import LEDConfig


def token_embedding(config: LEDConfig, tied_to: nn.Embedding | None = None) -> nn.Embedding:
    """Returns a new table of the vocabulary, which shares the weight of ``tied_to`` if that is given."""
    weight = None if tied_to is None else tied_to.weight
    table = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id, _weight=weight)
    if tied_to is not None:
        table.weight = tied_to.weight
    return table


class EmbeddedStack(nn.Module):
    """A base of encoder and decoder, which embeds tokens and positions and normalizes their sum.

    The positions are those of BART without its offset of 2.
    """

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding, max_positions: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(max_positions, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)

    def embed_inputs(
        self,
        ids_name: str,
        input_ids: Tensor | None,
        embeds_name: str,
        inputs_embeds: Tensor | None,
        one_position_each: bool = True,
    ) -> Tensor:
        """Returns the embedded tokens ``[batch, length, d_model]``, or ``inputs_embeds`` as they are.

        Raises:
            ValueError: as :func:`led_model.checks.check_inputs`, with the names of the arguments.
        """
        _, given = check_inputs(ids_name, input_ids, embeds_name, inputs_embeds, self, one_position_each)
        return given if input_ids is None else self.embed_tokens(given)

    def normed_embeddings(self, embedded: Tensor, position: Tensor | None = None) -> Tensor:
        """Returns the normed sum of the embedded tokens and their positions, before dropout.

        Args:
            embedded: the embedded tokens, ``[batch, length, d_model]``.
            position: int64 ``[length]``, or ``[1]`` for tokens at one position; default: 0, 1, …

        Returns:
            ``[batch, length, d_model]``.
        """
        if position is None:
            position = torch.arange(embedded.shape[1], device=embedded.device)
        hidden = embedded + self.embed_positions(position)
        del embedded
        return self.layernorm_embedding(hidden)
