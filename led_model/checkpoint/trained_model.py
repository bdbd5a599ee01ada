"""Defines what trainers ask of a model, by transformers' names: checkpointing, and how its loss is normalized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from led_model.checkpoint.stored_model import StoredModel
from led_model.schema import check_names

# What torch.utils.checkpoint.checkpoint takes beside a function and its arguments.
_CHECKPOINT_SETTINGS = (
    "use_reentrant",
    "preserve_rng_state",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
)


class TrainedModel(StoredModel):
    """A model that transformers' Trainer, accelerate and peft can train."""

    # Whether Trainer shall give the ``num_items_in_batch`` that the loss is divided by. Other losses are means, which
    # it divides by the number of accumulated batches.
    accepts_loss_kwargs: Any = False
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_save: list[str] | None = None  # Trainer looks at it when a checkpoint lacks a tensor

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Makes the backward compute the layers of encoder and decoder again, so that their inputs alone are kept.

        Args:
            activation_checkpointing_kwargs: settings of :func:`torch.utils.checkpoint.checkpoint`; default:
                ``{"use_reentrant": False}``.
            every_n_layers: leaves out the layers of each stack whose index this does not divide.
            offload: for transformers' callers; ``False``.

        Raises:
            ValueError: for a number below 1, and with ``offload``.
            TypeError: for other settings.
        """
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        check_names(settings, _CHECKPOINT_SETTINGS, "checkpointing")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; give 1 or more.")
        if offload:
            raise ValueError("offload is True; leave it out, as inputs of layers stay on their device.")
        for stack in (self.base_model.encoder, self.base_model.decoder):
            stack.gradient_checkpointing = True
            stack.checkpoint_every = every_n_layers
            stack.checkpoint_settings = settings

    def activation_checkpointing_disable(self) -> None:
        """Makes the forward keep activations for the backward again."""
        for stack in (self.base_model.encoder, self.base_model.decoder):
            stack.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Does what :meth:`activation_checkpointing_enable` does, under the name of transformers before 5.24."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Does what :meth:`activation_checkpointing_disable` does, under the name of transformers before 5.24."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Returns whether the backward computes layers again."""
        return (
            self.base_model.encoder.gradient_checkpointing or self.base_model.decoder.gradient_checkpointing
        )

    def enable_input_require_grads(self) -> None:
        """Makes embedded tokens require a gradient, also when the embeddings are frozen."""
        for stack in (self.base_model.encoder, self.base_model.decoder):
            stack.embed_tokens.register_forward_hook(_require_gradient)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Is there for peft, which keeps it while ``generate`` runs; this model's does not call it."""
        raise NotImplementedError("generate of led_model prepares its inputs itself; call generate.")

    _prepare_encoder_decoder_kwargs_for_generation = prepare_inputs_for_generation

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the table of tokens."""
        return self.base_model.shared


def _require_gradient(module: nn.Module, inputs: object, output: Tensor) -> None:
    output.requires_grad_(True)
