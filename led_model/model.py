"""A Longformer-Encoder-Decoder: BART with banded and global attention in the encoder, and an LM head.

Post-norm, learned positions without BART's offset, one embedding table for encoder, decoder and head.
Longformer, https://arxiv.org/abs/2004.05150; BART, https://arxiv.org/abs/1910.13461.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from led_kernels import LongformerMask
from led_model.cache import StaticKVCache
from led_model.checkpoint import load_pretrained
from led_model.config import GenerationConfig, LEDConfig
from led_model.generate import generate
from led_model.layers import DecoderLayer, EncoderLayer


@dataclass
class Seq2SeqLMOutput:
    """``loss`` (scalar, or ``None`` without labels), ``logits`` ``[batch, target, vocab_size]`` and
    ``encoder_last_hidden_state`` ``[batch, source, d_model]``."""

    logits: Tensor
    encoder_last_hidden_state: Tensor
    loss: Tensor | None = None


class LEDEncoder(nn.Module):
    """Embeddings and the banded layers; ``gradient_checkpointing = True`` recomputes each in the backward."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.gradient_checkpointing = False
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_encoder_position_embeddings, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList([EncoderLayer(config, i) for i in range(config.encoder_layers)])

    def forward(self, input_ids: Tensor, mask: LongformerMask) -> Tensor:
        """``[batch, seqlen]`` token ids to ``[batch, seqlen, d_model]``; nothing is padded to the window.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, or more tokens than positions.
        """
        _check_ids("input_ids", input_ids, self.embed_tokens, self.embed_positions)
        hidden = self.embed_tokens(input_ids)
        hidden += self.embed_positions.weight[: input_ids.shape[1]]
        hidden = F.dropout(self.layernorm_embedding(hidden), self.dropout, self.training)
        for layer in self.layers:
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            if self.training and self.gradient_checkpointing:
                hidden = checkpoint(layer, hidden, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, mask)
        return hidden


class LEDDecoder(nn.Module):
    """Embeddings and the causal layers, each of which also attends to the encoder's output."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layerdrop = config.decoder_layerdrop
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_decoder_position_embeddings, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.decoder_layers)])

    def cross_keys_values(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer, the keys and values of ``encoded`` ``[batch, source, d_model]``: once per document."""
        return [layer.encoder_attn.keys_values(encoded) for layer in self.layers]

    def forward(
        self,
        input_ids: Tensor,
        cross_keys_values: list[tuple[Tensor, Tensor]],
        *,
        cross_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StaticKVCache | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """``[batch, target]`` token ids to ``[batch, target, d_model]``.

        Args:
            cross_keys_values: from :meth:`cross_keys_values`.
            cross_mask: ``[batch, source]``, nonzero for the encoder's tokens; default: all are tokens.
            attention_mask: ``[batch, target]``, nonzero for tokens; with a cache ``[batch, slots]``.
            cache: written at ``position``, attended to as far as it is filled.
            position: int64 ``[target]`` of ``input_ids``; default: 0, 1, …

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, or more tokens than positions.
        """
        _check_ids("decoder_input_ids", input_ids, self.embed_tokens, self.embed_positions)
        if position is None:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = None
        if cache is not None:
            mask = cache.attention_mask(position, attention_mask)
        elif attention_mask is not None:
            mask = (position <= position[:, None]) & (attention_mask != 0)[:, None, None, :]
        hidden = self.embed_tokens(input_ids)
        if cross_mask is not None:
            # added to the scores; finite, so that a document of only padding gives no NaN
            lowest = torch.finfo(hidden.dtype).min
            cross_mask = torch.where(cross_mask != 0, 0.0, lowest).to(hidden.dtype)[:, None, None, :]
        hidden += self.embed_positions(position)
        hidden = F.dropout(self.layernorm_embedding(hidden), self.dropout, self.training)
        for layer, keys_values in zip(self.layers, cross_keys_values, strict=True):
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            hidden = layer(hidden, mask, position, keys_values, cross_mask, cache)
        return hidden


class LEDModel(nn.Module):
    """Encoder and decoder over one embedding table (three, when the config does not tie them)."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = _embedding(config)
        tied = config.tie_word_embeddings
        self.encoder = LEDEncoder(config, self.shared if tied else _embedding(config))
        self.decoder = LEDDecoder(config, self.shared if tied else _embedding(config))

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Runs the encoder under one mask for all layers, built by :meth:`LongformerMask.from_padding`."""
        _check_ids("input_ids", input_ids, self.encoder.embed_tokens, self.encoder.embed_positions)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.encoder(input_ids, LongformerMask.from_padding(attention_mask, global_attention_mask))


class LEDForConditionalGeneration(nn.Module):
    """LED with a language-modelling head: summaries, answers, translations.

    >>> model = LEDForConditionalGeneration.from_pretrained("allenai/led-base-16384")
    >>> summary_ids = model.generate(input_ids, global_attention_mask=global_mask, max_new_tokens=256)
    """

    def __init__(self, config: LEDConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig.from_dict(vars(config))
        self.led = LEDModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.apply(partial(_init_weights, std=config.init_std))
        self.tie_weights()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> LEDForConditionalGeneration:
        """A model, in eval mode, from a directory that transformers wrote or from the Hugging Face hub.

        Args:
            path_or_id: directory with config.json and the weights (``model.safetensors``,
                ``pytorch_model.bin``, or either in shards with its index), or a hub id (extra ``text``).
            dtype: default: the checkpoint's own.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: when a file is not there.
            ValueError: when a file cannot be read, or tensors are missing, unexpected or of another shape.
        """
        return load_pretrained(cls, path_or_id, dtype=dtype, device=device, revision=revision)

    def tie_weights(self) -> None:
        """Makes the head read the shared embedding again, after its parameters were replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.led.shared.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Seq2SeqLMOutput:
        """One teacher-forced pass.

        Args:
            input_ids: int ``[batch, source]``.
            attention_mask, global_attention_mask: ``[batch, source]``, as :meth:`LongformerMask.from_padding`
                takes them.
            decoder_input_ids: int ``[batch, target]``; default: ``labels``, else ``input_ids``, shifted.
            decoder_attention_mask: ``[batch, target]``, nonzero for tokens.
            labels: int ``[batch, target]``, -100 where no loss is wanted; the loss is the mean cross-entropy.
        """
        if decoder_input_ids is None:
            decoder_input_ids = self.shift_right(input_ids if labels is None else labels)
        encoded = self.led.encode(input_ids, attention_mask, global_attention_mask)
        hidden = self.led.decoder(
            decoder_input_ids,
            self.led.decoder.cross_keys_values(encoded),
            cross_mask=attention_mask,
            attention_mask=decoder_attention_mask,
        )
        logits = self.logits(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(logits, encoded, loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., d_model]`` of the decoder to ``[..., vocab_size]``."""
        return self.lm_head(hidden) + self.final_logits_bias

    def shift_right(self, ids: Tensor) -> Tensor:
        """Decoder input for teacher forcing: start token, then all but the last id; -100 becomes padding."""
        start = torch.full_like(ids[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat([start, ids[:, :-1]], dim=1)
        if self.config.pad_token_id is None:
            return shifted
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    generate = generate


def _embedding(config: LEDConfig) -> nn.Embedding:
    return nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)


def _init_weights(module: nn.Module, std: float) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if getattr(module, "padding_idx", None) is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def _check_ids(name: str, ids: Tensor, tokens: nn.Embedding, positions: nn.Embedding) -> None:
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; give integer ids as [batch, length]."
        )
    if ids.shape[1] > positions.num_embeddings:
        raise ValueError(
            f"{name} has {ids.shape[1]} tokens but the position table holds {positions.num_embeddings}; "
            "cut or split the text."
        )
    # on a GPU the check would cost a sync, and there the lookup asserts by itself
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= tokens.num_embeddings:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{name} holds id {wrong}, outside the vocabulary of {tokens.num_embeddings}; "
                "use the tokenizer that belongs to the checkpoint."
            )
