"""Names what reading, writing and quantizing a checkpoint use of a model, whatever its head."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from led_model.checks import LayerStack
from led_model.config import LEDConfig
from led_model.generation.generation_config import GenerationConfig


class CheckpointedStack(LayerStack, Protocol):
    """A stack whose backward can compute its layers again."""

    gradient_checkpointing: bool
    checkpoint_every: int
    checkpoint_settings: dict[str, Any]


class BaseModel(Protocol):
    """An encoder and a decoder over one table of tokens."""

    shared: nn.Embedding

    @property
    def encoder(self) -> CheckpointedStack:
        """Returns the stack that reads."""

    @property
    def decoder(self) -> CheckpointedStack:
        """Returns the stack that writes."""


class StoredModel(nn.Module):
    """A model that a checkpoint can hold. Its ``generation_config`` is there only if it generates."""

    base_prefix = "led."  # the encoder's and decoder's tensors have it in this class's checkpoints
    is_quantized = False
    config: LEDConfig
    generation_config: GenerationConfig

    def __init__(self, config: LEDConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def base_model(self) -> BaseModel:
        """Returns the model without a head that this one is or has."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Makes encoder, decoder and head read the shared embedding again, after it was replaced."""
        raise NotImplementedError

    def resize_position_embeddings(
        self, max_positions: int | None = None, *, max_decoder_positions: int | None = None
    ) -> None:
        """Lengthens or cuts the tables of positions."""
        raise NotImplementedError

    def init_weights(self, module: nn.Module) -> None:
        """Fills the weights of a module that no checkpoint has."""
        raise NotImplementedError
