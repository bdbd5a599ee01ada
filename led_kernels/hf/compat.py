"""Where releases of transformers differ: the argument that holds a cache, its interface, and which were tested."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

TESTED = ("4.53", "4.57", "5.0", "5.12", "5.23", "5.24")

# 5.24 renamed it, and so did 4.56 in decoder layers; a name that is not here is found by what it holds
_CACHE_SPELLINGS = ("cache", "past_key_values", "past_key_value")
# up to 5.0 a cache wants the positions, of which it needs the number
_MASK_SIZES_TAKE_LENGTH = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters


def _name_of_cache(annotations: Iterable[tuple[str, Any]]) -> str:
    """Which of some names, with their annotations, is a cache's."""
    annotations = tuple(annotations)
    known = (name for name, _ in annotations if name in _CACHE_SPELLINGS)
    annotated = (name for name, annotation in annotations if "Cache" in str(annotation))
    return next(chain(known, annotated), _CACHE_SPELLINGS[0])


_OUTPUT_CACHE = _name_of_cache((f.name, f.type) for f in fields(BaseModelOutputWithPastAndCrossAttentions))


def tested_note() -> str:
    """Whether the installed transformers is among the tested releases, as half a sentence."""
    release = _release(transformers.__version__)
    if release in map(_release, TESTED):
        return "tested"
    if release > _release(TESTED[-1]):
        return f"newer than {TESTED[-1]}, the newest tested"
    return "untested, between tested releases"


def is_newer_than_tested() -> bool:
    return _release(transformers.__version__) > _release(TESTED[-1])


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def takes_arguments_of(
    stock_forward: Callable, ignores: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """A forward that is called as this release calls ``stock_forward``.

    Positions are in its order, and the cache, under whatever name it comes, arrives as ``cache``. An argument that the
    decorated forward does not name must be None or False, unless it is among those that it ``ignores``, or one of the
    ``**kwargs`` that the stock forward ignores.
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
                if name in _CACHE_SPELLINGS or isinstance(value, Cache):
                    name = "cache"
                if name in served:
                    if named.get(name) is None:
                        named[name] = value
                elif name.endswith("head_mask"):
                    _refuse_head_mask(value)
                elif not (value is None or value is False or name in ignores) and (
                    name in order or not takes_any
                ):
                    raise TypeError(
                        f"{type(self).__name__}.forward got {name!r}, which led_kernels does not know in "
                        f"transformers {transformers.__version__}; leave it out or call revert_led_kernels."
                    )
            return forward(self, **named)

        called.__signature__ = stock
        return called

    return decorate


def _refuse_head_mask(head_mask: Tensor | None) -> None:
    if head_mask is not None:
        raise ValueError(
            "head_mask is not supported by led_kernels; leave it out or call revert_led_kernels."
        )


def cache_argument(function: Callable) -> str:
    """The name by which a forward of this release takes its cache."""
    return _name_of_cache((p.name, p.annotation) for p in inspect.signature(function).parameters.values())


def accepts(function: Callable, name: str) -> bool:
    """Whether a forward names an argument."""
    return name in inspect.signature(function).parameters


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
