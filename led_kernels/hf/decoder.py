"""LED's decoder: SDPA for its attentions, and causal masks that hold with every cache.

The decoder of transformers builds its causal mask only for two tokens and more. A step of one token then attends to
the empty slots of a static cache, and to padding of the prompt.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, LEDConfig, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.led.modeling_led import (
    LEDDecoder,
    LEDDecoderAttention,
    LEDDecoderLayer,
    LEDLearnedPositionalEmbedding,
)

from led_kernels.attention_weights import attention_weights
from led_kernels.hf.encoder import Options, refuse_head_mask

# up to 5.0 a cache wants the positions, of which it needs the number
_MASK_SIZES_TAKE_LENGTH = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters


class FusedLEDDecoderAttention(LEDDecoderAttention):
    """Self- and cross-attention by SDPA; the projections are the model's own modules."""

    led_kernels_options = Options()

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
        layer_head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        """
        Args:
            hidden_states: ``[batch, tgt_len, d_model]``.
            key_value_states: ``[batch, src_len, d_model]``, the encoder's states; makes this a cross-attention,
                whose keys and values are projected once per cache.
            attention_mask: broadcasts to ``[batch, heads, tgt_len, keys]``; bool, true where a query sees a key,
                or a number to add to each score. A query that sees no key gets zeros.
            output_attentions: also return the probabilities, before dropout.
            cache_position: int64 ``[tgt_len]``, where a static cache before 5.23 stores the tokens.

        Returns:
            ``[batch, tgt_len, d_model]``; the probabilities ``[batch, heads, tgt_len, keys]`` or None;
            ``past_key_values``.
        """
        refuse_head_mask(layer_head_mask)
        q = self._split_heads(self.q_proj(hidden_states))
        k, v = self._keys_values(hidden_states, key_value_states, past_key_values, cache_position)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, dropout_p=self.dropout if self.training else 0.0
        )
        weights = _probabilities(q, k, attention_mask) if output_attentions else None
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights, past_key_values

    def _keys_values(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        past_key_values: Cache | None,
        cache_position: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, cached ones included, ``[batch, heads, keys, head_dim]``."""
        is_cross, cache = key_value_states is not None, past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = (
                past_key_values.cross_attention_cache if is_cross else past_key_values.self_attention_cache
            )
            if is_cross and past_key_values.is_updated.get(self.layer_idx):
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        states = key_value_states if is_cross else hidden_states
        k, v = self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))
        if cache is not None:
            position = None if is_cross else cache_position
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": position})
            if is_cross and isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
        return k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """``[batch, rows, d_model]`` to ``[batch, heads, rows, head_dim]``"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class FusedLEDLearnedPositionalEmbedding(LEDLearnedPositionalEmbedding):
    """The stock embedding, but a number of past tokens that is a tensor stays on its device."""

    led_kernels_options = Options()

    def forward(self, input_ids_shape: torch.Size, past_key_values_length: int | Tensor = 0) -> Tensor:
        positions = torch.arange(input_ids_shape[1], device=self.weight.device) + past_key_values_length
        return nn.Embedding.forward(self, positions)


class FusedLEDDecoder(LEDDecoder):
    """Builds the masks once per forward, for any number of tokens and any cache."""

    led_kernels_options = Options()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs,
    ):
        """Arguments and outputs as in transformers' LEDDecoder; ``global_attention_mask`` is ignored there too."""
        refuse_head_mask(head_mask)
        refuse_head_mask(cross_attn_head_mask)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "decoder_input_ids and decoder_inputs_embeds are both given or both missing; give one of them."
            )
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        shape = inputs_embeds.shape[:2]
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        if cache_position is None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(shape[1], device=inputs_embeds.device) + past_length

        mask = _causal_mask(cache_position, attention_mask, past_key_values)
        cross_mask = encoder_attention_mask
        if cross_mask is not None and cross_mask.dim() == 2:
            cross_mask = cross_mask.bool()[:, None, None, :]
        hidden_states = self.layernorm_embedding(
            inputs_embeds + self.embed_positions(shape, cache_position[:1])
        )
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

        states, attentions, cross_attentions = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden_states)
            if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                continue
            # both states go by position: reentrant checkpointing sees no gradient in keywords
            hidden_states, *weights = layer(
                hidden_states,
                mask,
                encoder_hidden_states,
                encoder_attention_mask=cross_mask,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
                use_cache=False,
                cache_position=cache_position,
            )
            attentions += weights[:1]
            cross_attentions += weights[1:]
        values = {
            "last_hidden_state": hidden_states,
            "past_key_values": past_key_values,
            "hidden_states": (*states, hidden_states) if output_hidden_states else None,
            "attentions": tuple(attentions) if output_attentions else None,
            "cross_attentions": tuple(cross_attentions) if output_attentions else None,
        }
        if config.return_dict if return_dict is None else return_dict:
            return BaseModelOutputWithPastAndCrossAttentions(**values)
        return tuple(value for value in values.values() if value is not None)


def _causal_mask(positions: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """True where a token sees a key: bool ``[batch or 1, 1, tgt_len, keys]``, with a key per slot of the cache.

    ``positions``: int64 ``[tgt_len]``. ``attention_mask``: ``[batch, keys]``, of which the last may be missing; one
    of four dimensions is taken as it is.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    keys = tgt_len = positions.shape[0]
    if past_key_values is not None:
        keys, _ = past_key_values.get_mask_sizes(tgt_len if _MASK_SIZES_TAKE_LENGTH else positions, 0)
    elif attention_mask is not None:
        keys = attention_mask.shape[1]
    mask = (torch.arange(keys, device=positions.device) <= positions[:, None])[None, None]
    if attention_mask is None:
        return mask
    exists = attention_mask[:, :keys].bool()
    exists = nn.functional.pad(exists, (0, keys - exists.shape[1]))
    return mask & exists[:, None, None, :]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Of the attention that :class:`FusedLEDDecoderAttention` computes: ``[batch, heads, tgt_len, keys]``."""
    if mask is not None and mask.dtype != torch.bool:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask).softmax(-1)
    return attention_weights(
        q, k, torch.ones((), dtype=torch.bool, device=q.device) if mask is None else mask
    )


@functools.cache
def stock_decoder_fails() -> bool:
    """Whether this transformers' LED decoder reads the empty slots of a static cache.

    Tried on a decoder of one layer, so that a release with a right decoder keeps its own. Before 4.56 layers took
    their cache under another name or had no static one: False too.
    """
    if "past_key_values" not in inspect.signature(LEDDecoderLayer.forward).parameters:
        return False
    config = LEDConfig(
        vocab_size=4,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        decoder_ffn_dim=4,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        max_decoder_position_embeddings=2,
        dropout=0.0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        decoder = LEDDecoder(config).float().eval()
        torch.manual_seed(0)
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=0.3)  # so that empty slots weigh as much as tokens
        last = []
        for cache in (DynamicCache(), StaticCache(config=config, max_cache_len=64)):
            caches = EncoderDecoderCache(cache, DynamicCache())
            for position in range(2):
                out = decoder(
                    input_ids=torch.tensor([[2]]),
                    past_key_values=caches,
                    use_cache=True,
                    cache_position=torch.tensor([position]),
                )
            last.append(out.last_hidden_state)
    return not torch.allclose(*last, atol=1e-3)
