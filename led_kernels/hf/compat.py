"""Where releases of transformers differ: the argument that holds a cache, its interface, and which were tested."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

TESTED = ("4.53", "4.57", "5.0", "5.12", "5.23", "5.24")

# 5.24 renamed it, and so did 4.56 in decoder layers
_CACHE_SPELLINGS = ("cache", "past_key_values", "past_key_value")
# up to 5.0 a cache wants the positions, of which it needs the number
_MASK_SIZES_TAKE_LENGTH = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters
_OUTPUT_CACHE = next(
    field.name
    for field in fields(BaseModelOutputWithPastAndCrossAttentions)
    if field.name in _CACHE_SPELLINGS
)


def tested_note() -> str:
    """Whether the installed transformers is among the tested releases, as half a sentence."""
    release = _release(transformers.__version__)
    if transformers.__version__.rsplit(".", 1)[0] in TESTED:
        return "tested"
    if release > _release(TESTED[-1]):
        return f"newer than {TESTED[-1]}, the newest tested"
    return "untested, between tested releases"


def is_newer_than_tested() -> bool:
    return _release(transformers.__version__) > _release(TESTED[-1])


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def takes_arguments_of(stock_forward: Callable) -> Callable[[Callable], Callable]:
    """A forward that is called as this release calls ``stock_forward``: positions in its order, any spelling of the
    cache, which arrives as ``cache``, and no ``head_mask`` but None.

    Arguments that the decorated forward does not name are dropped where the stock forward takes any, and refused
    otherwise, or if one of them is a cache.
    """
    stock = inspect.signature(stock_forward)
    order = tuple(n for n, p in stock.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in stock.parameters.values())

    def decorate(forward: Callable) -> Callable:
        served = frozenset(tuple(inspect.signature(forward).parameters)[1:])

        @functools.wraps(forward)
        def called(self, *args, **kwargs):
            if len(args) > len(order):
                raise TypeError(
                    f"{type(self).__name__}.forward takes {len(order)} arguments, not {len(args)}."
                )
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            named: dict[str, Any] = {}
            for name, value in given.items():
                name = "cache" if name in _CACHE_SPELLINGS else name
                if name in served:
                    if named.get(name) is None:
                        named[name] = value
                elif name.endswith("head_mask"):
                    refuse_head_mask(value)
                elif isinstance(value, Cache) or (not takes_any and name not in order):
                    raise TypeError(
                        f"{type(self).__name__}.forward got {name!r}, which led_kernels does not know in "
                        f"transformers {transformers.__version__}; leave it out or call revert_led_kernels."
                    )
            return forward(self, **named)

        called.__signature__ = stock
        return called

    return decorate


def cache_argument(function: Callable) -> str:
    """The name by which a forward of this release takes its cache."""
    names = inspect.signature(function).parameters
    return next((name for name in _CACHE_SPELLINGS if name in names), _CACHE_SPELLINGS[0])


def accepts(function: Callable, name: str) -> bool:
    """Whether a forward names an argument."""
    return name in inspect.signature(function).parameters


def refuse_head_mask(head_mask: Tensor | None) -> None:
    if head_mask is not None:
        raise ValueError(
            "head_mask is not supported by led_kernels; leave it out or call revert_led_kernels."
        )


def as_cache(cache: Cache | tuple | None) -> Cache | None:
    """The cache itself, or one of the tuples of transformers 4: key and value of the tokens, and then of the document,
    per layer."""
    if not isinstance(cache, (tuple, list)):
        return cache
    converted = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer, states in enumerate(cache):
        converted.self_attention_cache.update(*states[:2], layer)
        if len(states) > 2:
            converted.cross_attention_cache.update(*states[2:4], layer)
            converted.is_updated[layer] = True
    return converted


def layer_states(cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a layer of a cache holds, ``[batch, heads, slots, head_dim]``."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]  # before 4.54


def cached_keys(cache: Cache, positions: Tensor) -> int:
    """Keys that attention over ``cache`` sees at ``positions``, int64 ``[tgt_len]``, which are stored in the call."""
    return cache.get_mask_sizes(positions.shape[0] if _MASK_SIZES_TAKE_LENGTH else positions, 0)[0]


def is_static(value: Any) -> bool:
    """Whether a value is a cache with slots for tokens that are still to come."""
    if isinstance(value, EncoderDecoderCache):
        value = value.self_attention_cache
    return isinstance(value, Cache) and bool(getattr(value, "is_compileable", False))


def decoder_output(return_dict: bool, cache: Cache | None, **values: Any):
    """What transformers' decoders return: ``last_hidden_state``, the cache, and what else there is in ``values``."""
    last = values.pop("last_hidden_state")
    values = {"last_hidden_state": last, _OUTPUT_CACHE: cache, **values}
    if return_dict:
        return BaseModelOutputWithPastAndCrossAttentions(**values)
    return tuple(value for value in values.values() if value is not None)


def new_cache(config) -> EncoderDecoderCache:
    """An empty dynamic cache for a decoder."""
    settings = {"config": config} if accepts(DynamicCache.__init__, "config") else {}
    return EncoderDecoderCache(DynamicCache(**settings), DynamicCache(**settings))
