"""Defines what a forward pass returns, under transformers' names, and what it keeps on the way for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

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


class Seq2SeqOutput(dict[str, Any]):
    """Holds what every model returns. Fields that were not asked for are ``None``.

    Like transformers' outputs it can be indexed by name, or by position among the fields that are not ``None``, and is
    a dict of these, as transformers' Trainer and accelerate expect. DistributedDataParallel and FSDP find its tensors.

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

    own_fields: tuple[str, ...] = ()  # the names that a subclass puts before those that all share
    decoder_hidden_states: tuple[Tensor, ...] | None
    decoder_attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[Tensor, ...] | None
    encoder_last_hidden_state: Tensor | None
    encoder_hidden_states: tuple[Tensor, ...] | None
    encoder_attentions: tuple[Tensor, ...] | None
    encoder_global_attentions: tuple[Tensor, ...] | None

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any) -> None:
        given = dict(values, **named)
        names = (*self.own_fields, *SHARED_FIELDS)
        if unknown := given.keys() - set(names):
            raise TypeError(
                f"{type(self).__name__} has no field {min(unknown)!r}; it has {', '.join(names)}."
            )
        super().__init__({name: given[name] for name in names if given.get(name) is not None})

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            pytree._dict_flatten,
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            flatten_with_keys_fn=pytree._dict_flatten_with_keys,
        )

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values that are not ``None``, in transformers' order."""
        return tuple(self.values())

    def shared(self) -> dict[str, Any]:
        """Returns the fields that a head's output repeats, by name."""
        return {name: value for name, value in self.items() if name in SHARED_FIELDS}

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.own_fields and key not in SHARED_FIELDS:
            raise KeyError(key)
        return self.get(key)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.own_fields and name not in SHARED_FIELDS:  # wrappers would find a field too many
            raise KeyError(name)
        super().__setitem__(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} holds what a model returned; give {name} another name.")

    def __getattr__(self, name: str) -> Any:
        if name in type(self).own_fields or name in SHARED_FIELDS:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")


SHARED_FIELDS = tuple(name for name in Seq2SeqOutput.__annotations__ if name != "own_fields")


class Seq2SeqModelOutput(Seq2SeqOutput):
    """Adds ``last_hidden_state``, the decoder's, ``[batch, target, d_model]``."""

    own_fields = ("last_hidden_state",)
    last_hidden_state: Tensor


class Seq2SeqLMOutput(Seq2SeqOutput):
    """Adds ``loss`` (scalar, ``None`` without labels) and ``logits`` ``[batch, target, vocab_size]``."""

    own_fields = ("loss", "logits")
    loss: Tensor | None
    logits: Tensor


class Seq2SeqQuestionAnsweringModelOutput(Seq2SeqOutput):
    """Adds ``loss`` (scalar, ``None`` without positions), ``start_logits`` and ``end_logits`` ``[batch, target]``."""

    own_fields = ("loss", "start_logits", "end_logits")
    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor


class Seq2SeqSequenceClassifierOutput(Seq2SeqOutput):
    """Adds ``loss`` (scalar, ``None`` without labels) and ``logits`` ``[batch, num_labels]``."""

    own_fields = ("loss", "logits")
    loss: Tensor | None
    logits: Tensor
