"""Defines what a forward pass returns, under transformers' names, and what it keeps on the way for that."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from led_kernels import LongformerMask
    from led_model.modeling.attention import CrossAttention, DecoderSelfAttention, EncoderSelfAttention


@dataclass
class EncoderRecord:
    """Keeps the inputs that the encoder's layers and their attentions saw, from which other outputs are made.

    ``hidden_states`` has the input ``[batch, seqlen, d_model]`` of every layer, and ``self_attention`` pairs each
    attention that ran with its input. ``mask``, the same for all layers, is set when the encoder runs.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    self_attention: list[tuple[EncoderSelfAttention, Tensor]] = field(default_factory=list)
    mask: LongformerMask = field(init=False)


@dataclass
class DecoderRecord:
    """Keeps the inputs that the decoder's layers and their attentions saw, as :class:`EncoderRecord` does."""

    hidden_states: list[Tensor] = field(default_factory=list)
    self_attention: list[tuple[DecoderSelfAttention, Tensor]] = field(default_factory=list)
    cross_attention: list[tuple[CrossAttention, Tensor]] = field(default_factory=list)


@dataclass(kw_only=True)
class Seq2SeqOutput:
    """Holds what every model returns. Fields that were not asked for are ``None``.

    Like transformers' outputs it can be indexed by name, or by position among the fields that are not ``None``.

    Fields:
        decoder_hidden_states: ``decoder_layers + 1`` of ``[batch, target, d_model]``, embeddings first.
        decoder_attentions: per layer ``[batch, heads, target, target]``, probabilities before dropout.
        cross_attentions: per layer ``[batch, heads, target, source]``.
        encoder_last_hidden_state: ``[batch, source, d_model]``.
        encoder_hidden_states: ``encoder_layers + 1`` of ``[batch, source, d_model]``.
        encoder_attentions: per layer ``[batch, heads, source, max_globals + attention_window + 1]``: of local
            tokens, the batch's global tokens first, then the window; rows of padding and globals are zero.
        encoder_global_attentions: per layer ``[batch, heads, source, max_globals]``, of global tokens over
            all; ``None`` when the batch has no global token.
    """

    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_global_attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values that are not ``None``, in transformers' order."""
        own = [f.name for f in fields(self) if f.name not in _SHARED_FIELDS]
        values = (getattr(self, name) for name in (*own, *_SHARED_FIELDS))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in {f.name for f in fields(self)}:
            raise KeyError(key)
        return getattr(self, key)


_SHARED_FIELDS = tuple(f.name for f in fields(Seq2SeqOutput))


@dataclass(kw_only=True)
class Seq2SeqModelOutput(Seq2SeqOutput):
    """Adds ``last_hidden_state``, the decoder's, ``[batch, target, d_model]``."""

    last_hidden_state: Tensor

    def shared(self) -> dict[str, Any]:
        """Returns the fields that a head's output repeats, by name."""
        return {name: getattr(self, name) for name in _SHARED_FIELDS}


@dataclass(kw_only=True)
class Seq2SeqLMOutput(Seq2SeqOutput):
    """Adds ``loss`` (scalar, ``None`` without labels) and ``logits`` ``[batch, target, vocab_size]``."""

    loss: Tensor | None = None
    logits: Tensor


@dataclass(kw_only=True)
class Seq2SeqQuestionAnsweringModelOutput(Seq2SeqOutput):
    """Adds ``loss`` (scalar, ``None`` without positions), ``start_logits`` and ``end_logits`` ``[batch, target]``."""

    loss: Tensor | None = None
    start_logits: Tensor
    end_logits: Tensor


@dataclass(kw_only=True)
class Seq2SeqSequenceClassifierOutput(Seq2SeqOutput):
    """Adds ``loss`` (scalar, ``None`` without labels) and ``logits`` ``[batch, num_labels]``."""

    loss: Tensor | None = None
    logits: Tensor
