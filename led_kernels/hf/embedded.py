"""Longformer's self-attention inside RoBERTa and its kin runs on the fused kernels by these classes.

The published RobertaLong classes put a subclass of LongformerSelfAttention into each layer of a RobertaModel. Its
forward has the arguments that RoBERTa's attention had when it was written, changes the mask a little and calls
Longformer's. It stays as it is here: what it calls becomes fused, and where it was written for transformers before 5 it
is called as it was then, whatever the installed release passes and expects.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.longformer.modeling_longformer import LongformerEncoder, LongformerSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from led_kernels.hf.heads import HeadWithMeanLoss
from led_kernels.hf.longformer_encoder import FusedLongformerSelfAttention
from led_kernels.hf.swap import class_in_place_of, stock_class

# The order in which this release's layers give arguments to their attention.
_ORDER = tuple(inspect.signature(RobertaSelfAttention.forward).parameters)[1:]
# A forward with one of these arguments was written for transformers before 5.
_ARGUMENTS_OF_4 = ("head_mask", "layer_head_mask")
_LARGE = 10_000.0  # what Longformer's masks have for global tokens, and negated for padding; fp16 reaches it


class CalledAsIn4(nn.Module):
    """Is an attention whose forward was written for the layers of transformers 4, in a layer of any release."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Computes the attention; returns it and the probabilities, ``None`` if they are not asked for.

        Raises:
            TypeError: for an encoder's states or a cache, which Longformer's attention has no use for.
        """
        given = {**dict(zip(_ORDER, args, strict=False)), **kwargs}
        for name, value in given.items():
            if isinstance(value, Cache) or (name == "encoder_hidden_states" and value is not None):
                raise TypeError(f"{type(self).__name__}.forward got {name}; Longformer's attention has none.")
        accepted = inspect.signature(super().forward).parameters
        result = super().forward(**{name: value for name, value in given.items() if name in accepted})
        return (*result, None)[:2]


class HostModel(nn.Module):
    """Is a model whose encoder gets Longformer's mask: releases make other masks of 0, 1 and 2, and lose the 2."""

    encoder: HostEncoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; ``attention_mask`` ``[batch, seqlen]`` is 0 for padding, 1 for local, 2 for global tokens."""
        bound = inspect.signature(super().forward).bind(*args, **kwargs)
        mask = bound.arguments.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, and Longformer's attention knows padding and global "
                "tokens only; give [batch, seqlen]."
            )
        bound.arguments["attention_mask"] = None
        self.encoder.led_kernels_mask = (mask,)
        try:
            return super().forward(*bound.args, **bound.kwargs)
        finally:
            del self.encoder.led_kernels_mask


class HostEncoder(nn.Module):
    """Gives all its layers the mask that its model was given, in the form that RoBERTa's layers of 4 had."""

    led_kernels_mask: tuple[Tensor | None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the encoder under ``[batch, 1, 1, seqlen]``: negative for padding, 0, positive for global tokens."""
        bound = inspect.signature(super().forward).bind(*args, **kwargs)
        if self.led_kernels_mask is not None:
            hidden_states = bound.arguments["hidden_states"]
            kind = self.led_kernels_mask[0]
            scores = hidden_states.new_zeros(hidden_states.shape[0], 1, 1, hidden_states.shape[1])
            if kind is not None:
                kind = kind.to(scores.device)[:, None, None]
                scores = scores.masked_fill(kind <= 0, -_LARGE).masked_fill(kind > 1, _LARGE)
            bound.arguments["attention_mask"] = scores
        return super().forward(*bound.args, **bound.kwargs)


def embedded_classes(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """Returns the classes that Longformer's attention outside Longformer's encoder gets, and the models around it.

    Those with a head say that their loss is a mean.

    Raises:
        TypeError: for an attention that cannot be served: its forward does not call that of its base by ``super()``, or
            it stands in a decoder, or beside attention of another kind.
    """
    at_home = {
        part
        for module in model.modules()
        if isinstance(module, LongformerEncoder)
        for part in module.modules()
    }
    planned: dict[nn.Module, type[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, LongformerSelfAttention) and module not in at_home:
            cls = stock_class(module)
            if _overriding(cls):
                planned[module] = _fused_below(cls)
    for host in model.modules():
        own = _attention_of(host)
        long = [module for module in own if isinstance(module, LongformerSelfAttention)]
        if not long or long[0] in at_home or not any(map(_is_called_as_in_4, long)):
            continue
        if len(long) < len(own):
            raise TypeError(
                f"{type(host).__name__} has Longformer's attention in {len(long)} of {len(own)} layers, and the others "
                "take other masks; give it to all of them, or leave this model stock."
            )
        if getattr(getattr(host, "config", None), "is_decoder", False):
            raise TypeError(
                f"{type(host).__name__} is a decoder, and Longformer's attention sees later tokens; set is_decoder to "
                "False in its config."
            )
        for module in long:
            cls = stock_class(module)
            planned[module] = class_in_place_of(cls, CalledAsIn4, _fused_below(cls))
        encoder = host.get_submodule("encoder")
        for module, mixin, needed in (
            (host, HostModel, {"attention_mask"}),
            (encoder, HostEncoder, {"attention_mask", "hidden_states"}),
        ):
            cls = stock_class(module)
            if missing := needed - inspect.signature(cls.forward).parameters.keys():
                raise TypeError(
                    f"{cls.__name__} has Longformer's attention in its layers and takes no {min(missing)}, so that no "
                    "mask can reach it; leave this model stock."
                )
            planned[module] = _with(mixin, cls)
    for head in model.modules():
        base = head.base_model if isinstance(head, PreTrainedModel) else head
        if base is not head and issubclass(planned.get(base, nn.Module), HostModel):
            cls = stock_class(head)
            planned[head] = class_in_place_of(cls, HeadWithMeanLoss, cls)
    return planned


def _attention_of(host: nn.Module) -> list[nn.Module]:
    """Returns the self-attention of each layer of a model that is built like BERT; none for all other modules."""
    layers = getattr(host._modules.get("encoder"), "layer", None)  # wrappers have it as an attribute, too
    if not isinstance(layers, nn.ModuleList):
        return []
    found = [getattr(getattr(layer, "attention", None), "self", None) for layer in layers]
    return [module for module in found if isinstance(module, nn.Module)]


def _is_called_as_in_4(module: nn.Module) -> bool:
    """Tells whether an attention's forward has arguments of RoBERTa's in transformers 4, or is Longformer's own."""
    forwards = _overriding(stock_class(module))
    return not forwards or any(name in inspect.signature(forwards[0]).parameters for name in _ARGUMENTS_OF_4)


def _overriding(cls: type[nn.Module]) -> list[Any]:
    """Returns the forwards that replace LongformerSelfAttention's in a subclass of it, the first called first."""
    below = cls.__mro__[: cls.__mro__.index(LongformerSelfAttention)]
    return [inspect.unwrap(vars(part)["forward"]) for part in below if "forward" in vars(part)]


@functools.cache
def _fused_below(cls: type[nn.Module]) -> type[nn.Module]:
    """Makes a class, once, that is a ``cls`` whose ``super().forward`` is the fused one.

    Raises:
        TypeError: when its forward does not call that.
    """
    for forward in _overriding(cls):
        if "super" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            raise TypeError(
                f"{cls.__name__} overrides the forward of LongformerSelfAttention without super(), and led_kernels "
                "would change nothing in it; call super().forward there, or leave this model stock."
            )
    bases = (
        (cls, FusedLongformerSelfAttention)
        if cls is not LongformerSelfAttention
        else (FusedLongformerSelfAttention,)
    )
    return class_in_place_of(cls, *bases)


@functools.cache
def _with(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Makes a class, once, that is a ``cls`` and a ``mixin``, whose forward shows the signature of the stock one."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    made = class_in_place_of(cls, mixin, cls)
    made.forward = forward
    return made
