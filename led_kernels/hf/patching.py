"""These functions make models of transformers fused and turn them back: live ones, and those still to be built."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakSet

import transformers
from torch import nn
from transformers.models.led.modeling_led import LEDDecoder, LEDEncoder
from transformers.models.longformer.modeling_longformer import LongformerModel

from led_kernels.hf.classes import CAUTIOUS_LED_DECODER, HEADS, LED_DECODER, LED_ENCODER, LONGFORMER
from led_kernels.hf.compat import TESTED, is_newer_than_tested
from led_kernels.hf.embedded import embedded_classes
from led_kernels.hf.probe import Decoder, encoder_difference, right_decoder
from led_kernels.hf.shared import Options
from led_kernels.hf.swap import ClassTable, fused_class, stock_class, swap, swap_back

_ROOTS = (LEDEncoder, LongformerModel, LEDDecoder, *HEADS)  # Their constructors build all the others.
_built_fused: WeakSet[nn.Module] = WeakSet()  # what they have built since apply_led_kernels()

Model = TypeVar("Model", bound=nn.Module)


def apply_led_kernels(
    model: Model | None = None, *, max_globals: int | None = None, backend: str | None = None
) -> Model | None:
    """Makes the encoder of LED or Longformer models of transformers run on the fused kernels.

    LED's decoder runs by SDPA, and with masks that make ``generate(..., cache_implementation="static")`` right, where
    transformers returns other tokens. The first call tries both decoders on a tiny model: ours is taken where it is
    right, else a release that is right keeps its own, and where neither is, static caches are refused from then on,
    after a warning.

    Outputs, gradients and state-dict keys stay those of transformers, with these differences: nothing is
    padded to a multiple of ``attention_window``, so ``global_attentions`` have the input's length; for a row with
    fewer global tokens than another they are filled with zeros; in training the returned attention
    probabilities are those before dropout; a token of the decoder that may see no key, as in a document of nothing
    but padding, gets zeros from that attention, not the mean of the padding; ``head_mask`` (transformers 4) is
    refused.

    Args:
        model: any module that holds LED or Longformer encoders, or Longformer's attention in the layers of a RoBERTa
            or its kin (the published RobertaLong classes), on any device, hooked, offloaded, quantized or with
            adapters; changed in place. Default: every LED and Longformer built from now on, by ``from_pretrained``,
            ``from_config`` or its class. Applying again replaces the options.
        max_globals: capacity for global tokens per sequence. With it a forward has shapes that depend on it
            alone and syncs nothing from the device (torch.compile, CUDA graphs), ``attentions`` have that
            many global keys, global projections always get a gradient (DistributedDataParallel), and more
            global tokens are the caller's error. Default: the largest count of each batch.
        backend: as in :func:`led_kernels.banded_attention`.

    Returns:
        ``model``.

    Raises:
        RuntimeError: when this release of transformers computes other states than the fused encoder. Nothing is
            changed then.
        TypeError: for something that is no module, or a module whose forward someone else replaced.
        ValueError: for a model without modules of LED or Longformer, or a negative max_globals.
    """
    if max_globals is not None and max_globals < 0:
        raise ValueError(f"max_globals is {max_globals}; give the capacity, 0 or more.")
    options = Options(max_globals, backend)
    if model is None:
        table = _checked(LED_ENCODER | LONGFORMER | _decoder_table() | HEADS)
        for root in _ROOTS:
            if fused_class(root, table) is not None:
                root.__init__ = _then_apply(_stock_init(root), options)
        return None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module, or nothing.")
    stock = {stock_class(module) for module in model.modules()}
    families = [
        family
        for family in (LED_ENCODER, LONGFORMER, LED_DECODER)
        if any(issubclass(cls, tuple(family)) for cls in stock)
    ]
    if not families:
        if any(cls.__module__.startswith("led_model.") for cls in stock):
            raise ValueError("model is one of led_model, which is already on the kernels; use it as it is.")
        raise ValueError("model holds no LED or Longformer modules of transformers; pass one that does.")
    table: ClassTable = dict(HEADS)
    for family in families:
        table |= _decoder_table() if family is LED_DECODER else family
    swap(model, _checked(table), options, embedded_classes(model))
    return model


def is_applied(model: nn.Module) -> bool:
    """Tells whether any module of ``model`` runs on the fused kernels."""
    return any(stock_class(module) is not type(module) for module in model.modules())


def decoder_report() -> str:
    """Returns one sentence on what was found out about LED's decoder in the installed transformers."""
    return f"the LED decoder of transformers {transformers.__version__} {right_decoder().value}."


def _decoder_table() -> ClassTable:
    """Returns what replaces the classes of LED's decoder, after a warning where no decoder is right."""
    decoder = right_decoder()
    if decoder is Decoder.NEITHER:
        _warn_once(
            f"{decoder_report()} Use another release ({TESTED[0]} to {TESTED[-1]} were tested) to have them."
        )
    return {Decoder.STOCK: {}, Decoder.FUSED: LED_DECODER, Decoder.NEITHER: CAUTIOUS_LED_DECODER}[decoder]


def _checked(table: ClassTable) -> ClassTable:
    """Returns the table itself, once the encoders in it have been compared with those of this release.

    Raises:
        RuntimeError: when they differ.
    """
    for family, encoder in (("led", LED_ENCODER), ("longformer", LONGFORMER)):
        if table.keys() & encoder.keys() and (difference := encoder_difference(family)) is not None:
            raise RuntimeError(
                f"the {family} encoder of led_kernels {difference} in transformers {transformers.__version__}; "
                f"nothing was changed, use a release from {TESTED[0]} to {TESTED[-1]}."
            )
    if is_newer_than_tested():
        _warn_once(
            f"transformers {transformers.__version__} is newer than {TESTED[-1]}, the newest that led_kernels was "
            "tested with; tiny models gave the same results in both just now."
        )
    return table


@functools.cache
def _warn_once(message: str) -> None:
    """Warns, unless the same message was given before."""
    warnings.warn(message, stacklevel=4)


def revert_led_kernels(model: nn.Module | None = None) -> None:
    """Undoes :func:`apply_led_kernels`: transformers' own code runs again.

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
    swap_back(model)


def _then_apply(init: Callable, options: Options) -> Callable:
    """Returns a constructor that calls ``init`` and then makes what it has built fused."""

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        apply_led_kernels(self, **options._asdict())
        _built_fused.add(self)

    __init__.led_kernels_replaced = init  # pyrefly: ignore[missing-attribute]
    return __init__


def _stock_init(root: type[nn.Module]) -> Callable:
    """Returns the constructor that a class of transformers has, or had before it was replaced."""
    return getattr(root.__init__, "led_kernels_replaced", root.__init__)
