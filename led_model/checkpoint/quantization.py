"""Quantizes the weights of linear layers: to 4 bits by bitsandbytes, or to 8 by torchao.

Embeddings, norms, biases and heads keep their dtype, and so do the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from led_kernels.extras import install_extra
from led_model.checkpoint.stored_model import StoredModel

# A function of this type takes a linear layer, whose weights are on the device that is to hold them, and returns the
# layer that replaces it.
Quantize = Callable[[nn.Linear], nn.Linear]

_BLOCK, _ROWS_AT_ONCE = (
    64,
    32,
)  # of bitsandbytes: weights with one largest magnitude, and rows of a layout for the CPU


def choose_quantizer(
    load_in_4bit: bool, load_in_8bit: bool, quantization_config: Any | None
) -> Quantize | None:
    """Returns what these arguments of ``LEDPreTrainedModel.from_pretrained`` ask for; ``None`` if they ask for nothing.

    Raises:
        ValueError: for more than one request, or a config that asks for something else than 4 bits.
        ImportError: when the package that the request needs is not installed.
    """
    if load_in_4bit + load_in_8bit + (quantization_config is not None) > 1:
        raise ValueError(
            "load_in_4bit, load_in_8bit and quantization_config are given together; give one of them."
        )
    if load_in_8bit:
        return _int8()
    if load_in_4bit:
        return _four_bits("nf4")
    if quantization_config is None:
        return None
    if not getattr(quantization_config, "load_in_4bit", False):
        raise ValueError(
            f"quantization_config is a {type(quantization_config).__name__} without load_in_4bit=True; "
            "give a BitsAndBytesConfig with it, or load_in_8bit=True for int8 weights."
        )
    if getattr(quantization_config, "llm_int8_skip_modules", None):
        raise ValueError(
            "quantization_config.llm_int8_skip_modules names modules to skip; leave it out, for all linear "
            "layers of encoder and decoder are quantized."
        )
    return _four_bits(
        quantization_config.bnb_4bit_quant_type,
        compute_dtype=quantization_config.bnb_4bit_compute_dtype,
        compress_statistics=quantization_config.bnb_4bit_use_double_quant,
        quant_storage=quantization_config.bnb_4bit_quant_storage,
    )


def quantizable_linears(model: StoredModel) -> dict[str, nn.Linear]:
    """Returns the linear layers inside the encoder's and the decoder's layers, by name."""
    base = model.base_model
    inside = {
        linear
        for stack in (base.encoder.layers, base.decoder.layers)
        for linear in stack.modules()
        if isinstance(linear, nn.Linear)
    }
    return {name: module for name, module in model.named_modules() if module in inside}


def _four_bits(
    quant_type: str,
    *,
    compute_dtype: torch.dtype | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> Quantize:
    """Returns a function that stores blocks of 64 weights as a largest magnitude and 4-bit indices into one table.

    Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314, section 3. ``compute_dtype``, by default that of
    the weights, is what products are computed in; they are returned in the input's dtype.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise _missing("load_in_4bit", "bitsandbytes") from error

    def quantize(linear: nn.Linear) -> nn.Linear:
        if linear.weight.dtype == torch.float64:
            raise ValueError("load_in_4bit takes no float64; load them as float32, by dtype or --dtype.")
        smaller = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype or linear.weight.dtype,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            device="meta",
        )
        smaller.weight = Params4bit(linear.weight.data, **vars(smaller.weight))
        smaller.bias = linear.bias
        if linear.in_features % _BLOCK or linear.out_features % _ROWS_AT_ONCE:
            # bitsandbytes lays weights out anew for processors with AVX-512 BF16, and fails for other sizes.
            smaller.support_avx512bf16_for_cpu = False
        return smaller.to(linear.weight.device)  # bitsandbytes quantizes a weight when it is first moved

    return quantize


def _int8() -> Quantize:
    """Returns a function that stores weights as ``round(127 w / max |w|)``, with one fp32 scale for each output."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise _missing("load_in_8bit", "torchao") from error

    def quantize(linear: nn.Linear) -> nn.Linear:
        linear.weight.data = linear.weight.data.float()  # quotients in half precision round to other steps
        quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
        return linear

    return quantize


def _missing(argument: str, package: str) -> ImportError:
    return ImportError(f"{argument} needs {package}; {install_extra('quant')}.")
