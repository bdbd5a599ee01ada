"""Defines what encoder and decoder share: embedded tokens and positions, and layers that may be computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from led_model.checks import check_inputs
from led_model.config import LEDConfig
from led_model.packing import packed_inputs


def token_embedding(config: LEDConfig, tied_to: nn.Embedding | None = None) -> nn.Embedding:
    """Returns a new table of the vocabulary, which shares the weight of ``tied_to`` if that is given."""
    weight = None if tied_to is None else tied_to.weight
    table = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id, _weight=weight)
    if tied_to is not None:
        table.weight = tied_to.weight
    return table


class EmbeddedStack(nn.Module):
    """A base of encoder and decoder, which embeds tokens and positions and normalizes their sum.

    The positions are those of BART without its offset of 2. With ``gradient_checkpointing`` every
    ``checkpoint_every``-th layer is computed again in the backward, by :func:`torch.utils.checkpoint.checkpoint` with
    the ``checkpoint_settings``.
    """

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding, max_positions: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.gradient_checkpointing = False
        self.checkpoint_every = 1
        self.checkpoint_settings: dict[str, Any] = {"use_reentrant": False}
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

    def embed_packed(
        self,
        ids_name: str,
        input_ids: Tensor | None,
        embeds_name: str,
        inputs_embeds: Tensor | None,
        longest: int,
    ) -> Tensor:
        """Returns the embedded tokens of packed sequences, ids ``[total]``, as ``[1, total, d_model]``.

        Raises:
            ValueError: as :meth:`embed_inputs`, and where the ``longest`` has more tokens than there are positions.
        """
        name, _ = packed_inputs(ids_name, input_ids, embeds_name, inputs_embeds)
        positions = self.embed_positions.weight.shape[0]
        if longest > positions:
            raise ValueError(
                f"{name} has a sequence of {longest} tokens but the position table holds {positions}; cut or split "
                "the text."
            )
        ids, embeds = (None if x is None else x[None] for x in (input_ids, inputs_embeds))
        return self.embed_inputs(ids_name, ids, embeds_name, embeds, one_position_each=False)

    def run_layer(self, index: int, layer: nn.Module, *inputs: Any) -> Tensor:
        """Calls the layer with this index; ``gradient_checkpointing`` keeps its inputs alone for the backward."""
        if not self.training or not self.gradient_checkpointing or index % self.checkpoint_every:
            return layer(*inputs)
        hidden, *others = inputs
        if self.checkpoint_settings["use_reentrant"] and torch.is_grad_enabled() and not hidden.requires_grad:
            # A reentrant checkpoint has gradients only if an input has, which those of frozen embeddings have not.
            hidden = hidden.detach().requires_grad_()
        return checkpoint(layer, hidden, *others, **self.checkpoint_settings)

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
