"""Models with heads say in these classes how their loss is normalized, which transformers' Trainer goes by.

It gives ``num_items_in_batch`` to every model whose forward takes any keyword, and then adds up the losses of
accumulated batches and of processes as they are. The gradients of a model that ignores the number are as many times too
large as there are batches and processes.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import LEDForConditionalGeneration, LEDPreTrainedModel, LongformerPreTrainedModel
from transformers.models.led.modeling_led import LEDSeq2SeqLMOutput

from led_kernels.distributed.context import fork_rng
from led_kernels.hf.checks import check_can_generate
from led_kernels.hf.compat import cache_argument, with_one_cache
from led_kernels.hf.shared import Options
from led_kernels.loss import vocabulary_loss
from led_kernels.processes import unsharded
from led_kernels.trainer import AcceptsNumItems

_SIGNATURE = inspect.signature(LEDForConditionalGeneration.forward)
_CACHE = cache_argument(LEDForConditionalGeneration.forward)


class _AsDeclared:
    """Answers what the replaced class says of its own forward, and no where it says nothing."""

    def __get__(self, model: Any, model_class: type) -> bool:
        return getattr(getattr(model_class, "stock_class", None), "accepts_loss_kwargs", False)


class HeadWithMeanLoss(nn.Module):
    """Says that the loss is the mean of a batch, which Trainer divides by the number of accumulated batches."""

    led_kernels_options = Options()
    accepts_loss_kwargs = _AsDeclared()


HeadWithMeanLoss.where_overridden = HeadWithMeanLoss  # another forward, too, ignores the number


class FusedLEDForConditionalGeneration(LEDForConditionalGeneration):
    """Divides the loss by ``num_items_in_batch``, where Trainer gives it, and generates under FSDP."""

    led_kernels_options = Options()
    where_overridden = HeadWithMeanLoss
    accepts_loss_kwargs = AcceptsNumItems()

    @functools.wraps(LEDForConditionalGeneration.forward)
    def forward(self, *args: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any):
        """Takes the arguments of transformers' model, and ``num_items_in_batch``; the loss is computed in pieces.

        The sum of the cross-entropies of ``labels`` is divided by that, in place of their number.
        """
        kwargs = with_one_cache(kwargs, _CACHE)
        given = dict(_SIGNATURE.bind(self, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        labels = given.pop("labels", None)
        if labels is None:
            return super().forward(*args, **kwargs)
        if given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
            given["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        del given["self"]
        output = self.led(**given | {"use_cache": False})
        hidden, bias = output[0], self.final_logits_bias
        loss, logits = vocabulary_loss(
            hidden, self.lm_head, bias.to(hidden.device), labels.to(hidden.device), num_items_in_batch
        )
        if isinstance(output, tuple):
            return loss, logits, *output[1:]
        others = {name: value for name, value in output.items() if name != "last_hidden_state"}
        return LEDSeq2SeqLMOutput(loss=loss, logits=logits, **others)

    @functools.wraps(LEDForConditionalGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any):
        """Takes the arguments of transformers' model, and has the whole of all weights that FSDP has sharded."""
        context = getattr(self.get_decoder(), "context", None)
        if context is not None:
            # A config is given by name, or as the second argument.
            configs = (*args[1:2], kwargs.get("generation_config"), self.generation_config)
            check_can_generate(kwargs.get("max_time"), *configs)
        with unsharded(self), fork_rng(context, self.device, same_on_all_ranks=True):
            return super().generate(*args, **kwargs)


def _with_mean_loss(stock: type[nn.Module]) -> type[nn.Module]:
    """Returns a class for models of ``stock``, which pickle finds in this module."""
    name = f"Fused{stock.__name__}"
    globals()[name] = type(name, (HeadWithMeanLoss, stock), {"__module__": __name__})
    return globals()[name]


def heads() -> dict[type[nn.Module], type[nn.Module]]:
    """Returns the classes that replace those of all models with heads in this release of transformers."""
    found = [
        value
        for name in dir(transformers)
        if name.startswith(("LEDFor", "LongformerFor"))
        and isinstance(value := getattr(transformers, name), type)
        and issubclass(value, (LEDPreTrainedModel, LongformerPreTrainedModel))
    ]
    return {
        stock: FusedLEDForConditionalGeneration
        if stock is LEDForConditionalGeneration
        else _with_mean_loss(stock)
        for stock in found
    }
