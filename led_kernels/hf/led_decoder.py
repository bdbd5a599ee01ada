"""LED's decoder runs by SDPA in these classes, under causal masks that hold with every cache.

The decoder of transformers builds its causal mask only for two tokens and more. A step of one token then attends to
the unwritten positions of a static cache, and to padding of the prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import Cache
from transformers.models.led.modeling_led import (
    LEDDecoder,
    LEDDecoderAttention,
    LEDDecoderLayer,
    LEDLearnedPositionalEmbedding,
)

from led_kernels.arguments import autocast
from led_kernels.attention_weights import attention_weights
from led_kernels.distributed.context import ContextParallel, fork_rng
from led_kernels.distributed.split_keys import SplitKeys
from led_kernels.hf.checks import check_can_split_keys, check_decoder_arguments
from led_kernels.hf.compat import (
    accepts,
    as_cache,
    cache_argument,
    decoder_output,
    is_static,
    layer_keys_values,
    new_cache,
    num_keys,
    takes_arguments_of,
    takes_names_of,
)
from led_kernels.hf.shared import FusedLayer, Options

# This release calls a layer and its attentions, which may be subclasses with a forward of their own, by these names.
_LAYER_CACHE = cache_argument(LEDDecoderLayer.forward)
_ATTENTION_CACHE = cache_argument(LEDDecoderAttention.forward)
_PASSES_POSITIONS = accepts(LEDDecoderLayer.forward, "cache_position")


class FusedLEDDecoderAttention(LEDDecoderAttention):
    """Computes self- or cross-attention by SDPA; the projections are the model's own modules."""

    led_kernels_options = Options()
    must_not_be_overridden = True

    @takes_arguments_of(LEDDecoderAttention.forward)
    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | SplitKeys | None = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        """Computes the attention and its output projection.

        Args:
            hidden_states: ``[batch, tgt_len, d_model]``.
            key_value_states: ``[batch, src_len, d_model]``, the encoder's states; makes this a cross-attention,
                whose keys and values are projected once per cache.
            attention_mask: broadcasts to ``[batch, heads, tgt_len, keys]``; bool, true where a query sees a key,
                or a number to add to each score. A query that sees no key gets zeros. In a cross-attention over
                documents that are split over ranks, it says which of the own rows are keys.
            output_attentions: also return the probabilities, before dropout.
            cache_position: int64 ``[tgt_len]``, where a static cache before 5.23 stores the tokens.
            is_causal: a token sees those up to itself, in place of ``attention_mask``, which SDPA would keep.

        Returns:
            ``[batch, tgt_len, d_model]``; the probabilities ``[batch, heads, tgt_len, keys]`` or None; the cache.
        """
        q = self._split_heads(self.q_proj(hidden_states))
        k, v = self._keys_values(hidden_states, key_value_states, cache, cache_position)
        dropout_p = (self.dropout or 0.0) if self.training else 0.0
        if isinstance(attention_mask, SplitKeys):
            out = attention_mask.attend(q, k, v, dropout_p)
            return self.out_proj(out.transpose(1, 2).flatten(2)), None, cache
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(q.dtype)
        if is_causal and output_attentions:
            attention_mask = _causal_mask(torch.arange(q.shape[2], device=q.device), None, None)
            is_causal = False
        weights = _probabilities(q, k, attention_mask) if output_attentions else None
        if weights is not None and torch.is_grad_enabled():  # SDPA would give them no gradient
            out = nn.functional.dropout(weights, dropout_p) @ v
        else:
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask, dropout_p=dropout_p, is_causal=is_causal
            )
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights, cache

    def _keys_values(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns all keys and values, cached ones included, ``[batch, heads, keys, head_dim]``."""
        is_cross, layer_cache = key_value_states is not None, cache
        layer: Any = self.layer_idx  # the number of a layer, which transformers declares as bool | None
        if isinstance(cache, EncoderDecoderCache):
            layer_cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
            if is_cross and cache.is_updated.get(layer):
                return layer_keys_values(layer_cache, layer)
        states = key_value_states if is_cross else hidden_states
        k, v = self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))
        if layer_cache is not None:
            position = None if is_cross else cache_position
            k, v = layer_cache.update(k, v, layer, {"cache_position": position})
            if is_cross and isinstance(cache, EncoderDecoderCache):
                cache.is_updated[layer] = True
        return k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshapes ``[batch, rows, d_model]`` to ``[batch, heads, rows, head_dim]``."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class FusedLEDDecoderLayer(FusedLayer, LEDDecoderLayer):
    """Differs from the stock layer only in how it calls its attentions, which releases do in different ways."""

    led_kernels_options = Options()

    @takes_arguments_of(LEDDecoderLayer.forward)
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | SplitKeys | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        use_cache: bool = True,
        cache_position: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple:
        """Takes the arguments of :class:`FusedLEDDecoderAttention`, and returns what transformers' layer does."""
        common = {_ATTENTION_CACHE: cache, "output_attentions": output_attentions}
        attended, weights, _ = self.self_attn(
            hidden_states,
            attention_mask=attention_mask,
            **common,
            **_positions(cache_position),
            **_causality(is_causal),
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + self._dropout(attended, self.dropout))
        cross_weights = None
        if encoder_hidden_states is not None:
            attended, cross_weights, _ = self.encoder_attn(
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **common,
            )
            attended = self._dropout(attended, self.dropout)
            hidden_states = self.encoder_attn_layer_norm(hidden_states + attended)
        attentions = (weights, cross_weights) if output_attentions else ()
        return self._feed_forward(hidden_states), *attentions, *((cache,) if use_cache else ())


class FusedLEDLearnedPositionalEmbedding(LEDLearnedPositionalEmbedding):
    """Differs from the stock embedding in that a number of past tokens that is a tensor stays on its device."""

    led_kernels_options = Options()

    @takes_names_of(LEDLearnedPositionalEmbedding.forward)  # 5.24 renamed the number of past tokens
    def forward(self, input_ids_shape: torch.Size, past_length: int | Tensor = 0) -> Tensor:
        positions = torch.arange(input_ids_shape[1], device=self.weight.device) + past_length
        return nn.Embedding.forward(self, positions)


class CautiousLEDDecoder(LEDDecoder):
    """Refuses static caches, and padding once it is cached: the stock decoder gives wrong tokens for both."""

    led_kernels_options = Options()

    def forward(self, *args, **kwargs):
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if any(map(is_static, caches)):
            raise ValueError(
                f'cache_implementation="static" gives wrong tokens with the LED decoder of transformers '
                f"{transformers.__version__}; leave it out, for a dynamic cache."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and any(cache.get_seq_length() > 0 for cache in caches) and not bool(mask.all()):
            raise ValueError(
                f"decoder_attention_mask is forgotten by the LED decoder of transformers {transformers.__version__} "
                "once its prompt is cached; give use_cache=False, or prompts of one length."
            )
        return super().forward(*args, **kwargs)


class FusedLEDDecoder(LEDDecoder):
    """Builds the masks once per forward, for any number of tokens and any cache."""

    led_kernels_options = Options()
    context: ContextParallel | None = None  # the ranks over which documents are split
    where_overridden = CautiousLEDDecoder
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "*_attn": "heads",
        "*_attn.[qkv]_proj": "columns",
        "*_attn.out_proj": "rows",
        "*.fc1": "columns",
        "*.fc2": "rows",
    }

    @takes_arguments_of(LEDDecoder.forward, ignores=("global_attention_mask",))
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | tuple | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
    ):
        """Runs the decoder with the arguments and outputs of transformers' LEDDecoder.

        ``global_attention_mask`` is ignored there, too. Where documents are split over ranks, the encoder's states are
        those of this rank's rows, and its mask is of the whole documents.
        """
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
            assert input_ids is not None  # as one of the two is given
            inputs_embeds = self.embed_tokens(input_ids.view(-1, input_ids.shape[-1]))
        shape = inputs_embeds.shape[:2]
        cache = as_cache(cache)
        if use_cache and cache is None and not (self.gradient_checkpointing and self.training):
            cache = new_cache(config)
        cross_mask: Tensor | SplitKeys | None = encoder_attention_mask
        if self.context is not None and encoder_hidden_states is not None:
            check_can_split_keys(encoder_attention_mask, output_attentions)
            cross_mask = SplitKeys.of_part(encoder_attention_mask, encoder_hidden_states, self.context.group)
            encoder_attention_mask = None
        check_decoder_arguments(
            shape, attention_mask, encoder_hidden_states, encoder_attention_mask, is_cached=cache is not None
        )
        # A tuned prefix has made a dynamic cache longer than the caller's positions say.
        if cache_position is None or not is_static(cache):
            past_length = 0 if cache is None else cache.get_seq_length()
            cache_position = torch.arange(shape[1], device=inputs_embeds.device) + past_length

        mask = None
        is_causal = attention_mask is None and cache is None and all(map(_takes_is_causal, self.layers))
        if not is_causal:
            mask = _causal_mask(cache_position, attention_mask, cache)
        if isinstance(cross_mask, Tensor) and cross_mask.dim() == 2:
            cross_mask = cross_mask.bool()[:, None, None, :]
        if encoder_hidden_states is not None:
            # Converted once, and not for the keys and for the values of each layer, which would keep every copy.
            (encoder_hidden_states,) = autocast(encoder_hidden_states)
        hidden_states = self.layernorm_embedding(
            inputs_embeds + self.embed_positions(shape, cache_position[:1])
        )
        states, attentions, cross_attentions = [], [], []
        with fork_rng(self.context, hidden_states.device, same_on_all_ranks=True, enabled=self.training):
            hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
            for layer in self.layers:
                if output_hidden_states:
                    states.append(hidden_states)
                if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                    continue
                # Both states go by position: reentrant checkpointing sees no gradient in keywords.
                hidden_states, *weights = layer(
                    hidden_states,
                    mask,
                    encoder_hidden_states,
                    encoder_attention_mask=cross_mask,
                    output_attentions=output_attentions,
                    use_cache=False,
                    **{_LAYER_CACHE: cache},
                    **_positions(cache_position),
                    **_causality(is_causal),
                )
                attentions += weights[:1]
                cross_attentions += weights[1:]
        if self.context is not None:
            self.context.watch(hidden_states)
        return decoder_output(
            config.return_dict if return_dict is None else return_dict,
            cache,
            last_hidden_state=hidden_states,
            hidden_states=(*states, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )


def _positions(cache_position: Tensor | None) -> dict[str, Tensor | None]:
    """Returns the argument that says where a static cache stores the tokens, in releases that have it."""
    return {"cache_position": cache_position} if _PASSES_POSITIONS else {}


def _causality(is_causal: bool) -> dict[str, bool]:
    """Returns the argument that asks for causal attention without a mask, which only layers of ours are given."""
    return {"is_causal": True} if is_causal else {}


def _takes_is_causal(layer: nn.Module) -> bool:
    """Tells whether a layer and its self-attention are ours."""
    return isinstance(layer, FusedLEDDecoderLayer) and isinstance(layer.self_attn, FusedLEDDecoderAttention)


def _causal_mask(positions: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Returns a bool mask ``[batch or 1, 1, tgt_len, keys]``, true where a token sees a key of the cache.

    Args:
        positions: int64 ``[tgt_len]``, where the tokens are in their sequence.
        attention_mask: ``[batch, keys]``, of which the last may be missing; one of four dimensions is returned.
        cache: holds the keys, after the call; without one the tokens see each other only.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    keys = positions.shape[0]
    if cache is not None:
        keys = num_keys(cache, positions)
    elif attention_mask is not None:
        keys = attention_mask.shape[1]
    mask = (torch.arange(keys, device=positions.device) <= positions[:, None])[None, None]
    if attention_mask is None:
        return mask
    exists = attention_mask[:, :keys].bool()
    exists = nn.functional.pad(exists, (0, keys - exists.shape[1]))
    return mask & exists[:, None, None, :]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the probabilities of :class:`FusedLEDDecoderAttention`, ``[batch, heads, tgt_len, keys]``."""
    if mask is not None and mask.dtype != torch.bool:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask).softmax(-1)
    return attention_weights(q, k, mask)
