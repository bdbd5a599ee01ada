"""Releases of transformers differ in the argument that holds a cache and in its interface; this module hides it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

TESTED = ("4.53", "4.57", "5.0", "5.12", "5.23", "5.24")

# The names that the argument has had: 5.24 renamed it, and so did 4.56 in decoder layers. Other names are found by
# what they hold.
_CACHE_SPELLINGS = ("cache", "past_key_values", "past_key_value")
# Up to 5.0 a cache is given the positions, of which it needs only the number.
_MASK_SIZES_TAKE_LENGTH = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters


def _cache_name(annotations: Iterable[tuple[str, Any]]) -> str:
    """Returns the name, among names with their annotations, that belongs to a cache."""
    annotations = tuple(annotations)
    known = (name for name, _ in annotations if name in _CACHE_SPELLINGS)
    annotated = (name for name, annotation in annotations if "Cache" in str(annotation))
    return next(chain(known, annotated), _CACHE_SPELLINGS[0])


_OUTPUT_CACHE = _cache_name((f.name, f.type) for f in fields(BaseModelOutputWithPastAndCrossAttentions))


def tested_note() -> str:
    """Returns half a sentence on whether the installed transformers is among the tested releases."""
    release = _release(transformers.__version__)
    if release in map(_release, TESTED):
        return "tested"
    if release > _release(TESTED[-1]):
        return f"newer than {TESTED[-1]}, the newest tested"
    return "untested, between tested releases"


def is_newer_than_tested() -> bool:
    """Tells whether the installed transformers is newer than the newest release that was tested."""
    return _release(transformers.__version__) > _release(TESTED[-1])


def _release(version: str) -> tuple[int, ...]:
    """Returns the major and the minor number of a version."""
    return tuple(map(int, version.split(".")[:2]))


def takes_arguments_of(
    stock_forward: Callable, ignores: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Decorates a forward so that it can be called as this release calls ``stock_forward``.

    Positional arguments come in the order of ``stock_forward``, and the cache, under whatever name it comes, arrives as
    ``cache``. An argument that the decorated forward does not name must be None or False, unless it is among those that
    the forward ``ignores``, or one of the ``**kwargs`` that the stock forward ignores.
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

        called.__signature__ = stock  # pyrefly: ignore[missing-attribute]
        return called

    return decorate


def takes_names_of(stock_forward: Callable) -> Callable[[Callable], Callable]:
    """Decorates a forward so that its arguments, which stand in the order of ``stock_forward``, have its names."""
    stock = inspect.signature(stock_forward)

    def decorate(forward: Callable) -> Callable:
        own = dict(zip(stock.parameters, inspect.signature(forward).parameters, strict=True))

        @functools.wraps(forward)
        def called(self, *args, **kwargs):
            return forward(self, *args, **{own.get(name, name): value for name, value in kwargs.items()})

        called.__signature__ = stock  # pyrefly: ignore[missing-attribute]
        return called

    return decorate


def _refuse_head_mask(head_mask: Tensor | None) -> None:
    """Raises ValueError for a head mask, an argument of transformers 4."""
    if head_mask is not None:
        raise ValueError(
            "head_mask is not supported by led_kernels; leave it out or call revert_led_kernels."
        )


def cache_argument(function: Callable) -> str:
    """Returns the name by which a forward of this release takes its cache."""
    return _cache_name((p.name, p.annotation) for p in inspect.signature(function).parameters.values())


def with_one_cache(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns named arguments in which a cache has this ``name`` alone; peft gives an older one besides."""
    others = {key: value for key, value in arguments.items() if key not in _CACHE_SPELLINGS}
    caches = [arguments[key] for key in (name, *_CACHE_SPELLINGS) if arguments.get(key) is not None]
    return {**others, name: caches[0]} if caches else others


def accepts(function: Callable, name: str) -> bool:
    """Tells whether ``function`` has an argument called ``name``."""
    return name in inspect.signature(function).parameters


def as_cache(cache: Cache | tuple | None) -> Cache | None:
    """Returns a cache object for whatever a model was given as one.

    transformers 4 also takes a tuple for each layer: key and value of the tokens, and then those of the document.
    """
    if not isinstance(cache, (tuple, list)):
        return cache
    converted = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer, states in enumerate(cache):
        converted.self_attention_cache.update(*states[:2], layer)
        if len(states) > 2:
            converted.cross_attention_cache.update(*states[2:4], layer)
            converted.is_updated[layer] = True
    return converted


def layer_keys_values(cache: Cache, layer: int) -> tuple[Tensor, Tensor]:
    """Returns the keys and the values that a layer of a cache holds, ``[batch, heads, capacity, head_dim]``."""
    holder: Any = cache  # Releases declare different attributes.
    if hasattr(holder, "layers"):
        return holder.layers[layer].keys, holder.layers[layer].values
    return holder.key_cache[layer], holder.value_cache[layer]  # before 4.54


def num_keys(cache: Cache, positions: Tensor) -> int:
    """Returns how many keys attention over ``cache`` sees, once the tokens at ``positions`` are stored.

    ``positions``: int64 ``[tgt_len]``.
    """
    tokens: Any = positions.shape[0] if _MASK_SIZES_TAKE_LENGTH else positions
    return cache.get_mask_sizes(tokens, 0)[0]


def is_static(value: Any) -> bool:
    """Tells whether a value is a cache whose capacity is allocated before the tokens come."""
    if isinstance(value, EncoderDecoderCache):
        value = value.self_attention_cache
    return isinstance(value, Cache) and bool(getattr(value, "is_compileable", False))


def decoder_output(return_dict: bool | None, cache: Cache | None, **values: Any):
    """Returns what transformers' decoders return: ``last_hidden_state``, the cache, and the other ``values``."""
    last = values.pop("last_hidden_state")
    values = {"last_hidden_state": last, _OUTPUT_CACHE: cache, **values}
    if return_dict:
        return BaseModelOutputWithPastAndCrossAttentions(**values)
    return tuple(value for value in values.values() if value is not None)


def new_cache(config) -> EncoderDecoderCache:
    """Returns an empty dynamic cache for a decoder."""
    settings = {"config": config} if accepts(DynamicCache.__init__, "config") else {}
    return EncoderDecoderCache(DynamicCache(**settings), DynamicCache(**settings))
