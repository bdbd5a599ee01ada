"""Says what a model must offer to write: an encoder, a decoder whose steps can be run apart, and a head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from led_kernels.distributed.context import ContextParallel
from led_kernels.distributed.split_keys import SplitKeys
from led_model.checks import LayerStack, TokenTables
from led_model.config import LEDConfig
from led_model.generation.cache import StaticKVCache
from led_model.generation.captured import Part
from led_model.generation.generation_config import GenerationConfig


class Decoder(LayerStack, Part, Protocol):
    """Runs the causal layers over keys and values of the encoder's output that are made once per document."""

    @property
    def context(self) -> ContextParallel | None:
        """Returns the ranks over which documents are split, if they are."""

    def __call__(
        self,
        input_ids: Tensor,
        cross_keys_values: list[tuple[Tensor, Tensor]],
        *,
        cross_mask: Tensor | SplitKeys | None,
        attention_mask: Tensor | None,
        cache: StaticKVCache,
        position: Tensor,
    ) -> Tensor:
        """Returns the last hidden states, ``[batch, target, d_model]``."""

    def cross_keys_values(self, encoder_hidden_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's keys and values of the encoder's output."""

    def embed(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Returns what :meth:`run_layers` takes of a decoding step's tokens, ``[batch, target, d_model]``."""

    def run_layers(
        self,
        hidden: Tensor,
        mask: Tensor,
        cache_indices: Tensor,
        cross_keys_values: list[tuple[Tensor, Tensor]],
        cross_mask: Tensor | SplitKeys | None,
        cache: StaticKVCache,
    ) -> Tensor:
        """Runs the layers of one decoding step over embedded tokens and a cache, and returns their last output."""


class EncoderDecoder(Protocol):
    """Consists of the two stacks, and runs the first."""

    @property
    def encoder(self) -> TokenTables:
        """Returns the stack that reads a document."""

    @property
    def decoder(self) -> Decoder:
        """Returns the stack that writes."""

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        global_attention_mask: Tensor | None,
    ) -> Tensor:
        """Returns the encoder's output, ``[batch, source, d_model]``."""


class GenerativeModel(Protocol):
    """Computes the logits of the next token by a language-modeling head."""

    config: LEDConfig
    generation_config: GenerationConfig
    lm_head: nn.Linear
    final_logits_bias: Tensor

    @property
    def led(self) -> EncoderDecoder:
        """Returns the model under the head."""

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the embeddings."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns ``[..., vocab_size]`` for the decoder's ``[..., d_model]``."""

    def modules(self) -> Iterator[nn.Module]:
        """Yields the model and all modules in it."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields all weights by their names."""
