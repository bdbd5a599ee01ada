"""Turning transformers' models into fused ones and back: live instances, and models still to be built.

A module becomes fused by a change of ``__class__`` to a subclass that adds only methods: its parameters,
hooks and state-dict keys stay.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple
from weakref import WeakSet

from torch import nn
from transformers.models.led.modeling_led import (
    LEDDecoder,
    LEDDecoderAttention,
    LEDEncoder,
    LEDEncoderLayer,
    LEDEncoderSelfAttention,
    LEDLearnedPositionalEmbedding,
)
from transformers.models.longformer.modeling_longformer import (
    LongformerEncoder,
    LongformerModel,
    LongformerSelfAttention,
)

from led_kernels.hf.decoder import (
    FusedLEDDecoder,
    FusedLEDDecoderAttention,
    FusedLEDLearnedPositionalEmbedding,
    stock_decoder_fails,
)
from led_kernels.hf.encoder import FusedSelfAttention, Options
from led_kernels.hf.led import FusedLEDEncoder, FusedLEDEncoderLayer, FusedLEDEncoderSelfAttention
from led_kernels.hf.longformer import (
    FusedLongformerEncoder,
    FusedLongformerModel,
    FusedLongformerSelfAttention,
)

_FUSED_ENCODERS = {
    LEDEncoder: FusedLEDEncoder,
    LEDEncoderLayer: FusedLEDEncoderLayer,
    LEDEncoderSelfAttention: FusedLEDEncoderSelfAttention,
    LongformerModel: FusedLongformerModel,
    LongformerEncoder: FusedLongformerEncoder,
    LongformerSelfAttention: FusedLongformerSelfAttention,
}
_FUSED_DECODER = {
    LEDDecoder: FusedLEDDecoder,
    LEDDecoderAttention: FusedLEDDecoderAttention,
    LEDLearnedPositionalEmbedding: FusedLEDLearnedPositionalEmbedding,
}
for _stock, _fused in (_FUSED_ENCODERS | _FUSED_DECODER).items():
    _fused.stock_class = _stock
    # transformers and accelerate find modules by __name__ (_no_split_modules, config.architectures); pickle
    # goes by __qualname__, which stays
    _fused.__name__ = _stock.__name__

_ROOTS = (LEDEncoder, LongformerModel, LEDDecoder)  # their constructors build all the others
_built_fused: WeakSet[nn.Module] = WeakSet()


def apply_led_kernels(
    model: nn.Module | None = None, *, max_globals: int | None = None, backend: str | None = None
) -> None:
    """Run the encoder of LED or Longformer models of transformers through the fused kernels.

    LED's decoder runs by SDPA, and with masks that make ``generate(..., cache_implementation="static")`` right, where
    transformers returns other tokens. A release whose own decoder passes a test of this at the first call keeps it.

    Outputs, gradients and state-dict keys stay those of transformers, with these differences: nothing is
    padded to a multiple of ``attention_window``, so ``global_attentions`` have the input's length; their
    columns past a row's own number of global tokens are zeros; in training the returned attention
    probabilities are those before dropout; a token of the decoder that may see no key, as in a document of nothing
    but padding, gets zeros from that attention, not the mean of the padding; ``head_mask`` (transformers 4) is
    refused.

    Args:
        model: any module that holds LED or Longformer encoders, on any device, hooked, offloaded, quantised
            or with adapters; changed in place. Default: every model built from now on, by
            ``from_pretrained``, ``from_config`` or its class. Applying again replaces the options.
        max_globals: capacity for global tokens per sequence. With it a forward has shapes that depend on it
            alone and syncs nothing from the device (torch.compile, CUDA graphs), ``attentions`` have that
            many global columns, global projections always get a gradient (DistributedDataParallel), and more
            global tokens are the caller's error. Default: the largest count of each batch.
        backend: as in :func:`led_kernels.banded_attention`.

    Raises:
        TypeError: for something that is no module, or a module whose forward someone else replaced.
        ValueError: for a model without modules of LED or Longformer, or a negative max_globals.
    """
    if max_globals is not None and max_globals < 0:
        raise ValueError(f"max_globals is {max_globals}; give the capacity, 0 or more.")
    options = Options(max_globals, backend)
    if model is None:
        for root in filter(_fused_class, _ROOTS):
            root.__init__ = _then_apply(_stock_init(root), options)
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module, or nothing.")
    modules = [(module, _fused_class(_stock_class(module))) for module in model.modules()]
    changes = [_Change.plan(module, fused) for module, fused in modules if fused is not None]
    if not changes:
        raise ValueError("model holds no LED or Longformer modules of transformers; pass one that does.")
    for change in changes:
        change.make()
        change.module.led_kernels_options = options


def revert_led_kernels(model: nn.Module | None = None) -> None:
    """Undo :func:`apply_led_kernels`: transformers' own code runs again.

    Args:
        model: a model to turn back, in place; one that is not fused stays as it is. Default: turn back every
            live model that ``apply_led_kernels()`` without a model made fused (not its copies), and build
            stock ones from now on.
    """
    if model is None:
        for root in _ROOTS:
            root.__init__ = _stock_init(root)
        for built in tuple(_built_fused):
            revert_led_kernels(built)
        _built_fused.clear()
        return
    fused = [module for module in model.modules() if _stock_class(module) is not type(module)]
    for change in [_Change.plan(module, _stock_class(module)) for module in fused]:
        change.make()
        del change.module.led_kernels_options


def _then_apply(init: Callable, options: Options) -> Callable:
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        apply_led_kernels(self, **options._asdict())
        _built_fused.add(self)

    __init__.led_kernels_replaced = init
    return __init__


def _stock_init(root: type[nn.Module]) -> Callable:
    return getattr(root.__init__, "led_kernels_replaced", root.__init__)


def _stock_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "stock_class", type(module))


@functools.cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The fused class of a stock class or of a subclass that inherits its forward; None for all others."""
    for stock, fused in (_FUSED_ENCODERS | (_FUSED_DECODER if stock_decoder_fails() else {})).items():
        if cls is stock:
            return fused
        if issubclass(cls, stock):
            # transformers wraps the forward of subclasses of checkpointed layers, also one they inherit
            if inspect.unwrap(cls.forward) is inspect.unwrap(stock.forward):
                return type(cls.__name__, (fused, cls), {"__module__": cls.__module__, "stock_class": cls})
            if issubclass(fused, (FusedSelfAttention, FusedLEDDecoderAttention)):
                raise TypeError(
                    f"{cls.__name__} overrides the forward of {stock.__name__}, which led_kernels would "
                    "replace; leave this model stock."
                )
    return None


class _Change(NamedTuple):
    """A module, the class it is to get, and which instance attributes hold the forward of its present one."""

    module: nn.Module
    new_class: type[nn.Module]
    bound: list[str]

    @classmethod
    def plan(cls, module: nn.Module, new_class: type[nn.Module]) -> _Change:
        attributes, forward = vars(module), type(module).forward
        # accelerate's hooks keep the forward they wrap in _old_forward, and leave it in forward once removed
        bound = [
            name
            for name in ("forward", "_old_forward")
            if getattr(attributes.get(name), "__func__", None) is forward
        ]
        if "forward" in attributes and not bound and new_class.forward is not forward:
            raise TypeError(
                f"the forward of a {type(module).__name__} was replaced on the instance and would go on "
                "running old code; call this before it is wrapped."
            )
        return cls(module, new_class, bound)

    def make(self) -> None:
        self.module.__class__ = self.new_class
        for name in self.bound:
            setattr(self.module, name, MethodType(self.new_class.forward, self.module))
