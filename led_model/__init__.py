"""A Longformer-Encoder-Decoder on the kernels of ``led_kernels``."""

from led_model.cache import BeamKVCache, StaticKVCache
from led_model.config import GenerationConfig, LEDConfig
from led_model.generate import GenerateOutput
from led_model.model import LEDForConditionalGeneration, LEDModel, Seq2SeqLMOutput

__all__ = [
    "BeamKVCache",
    "GenerateOutput",
    "GenerationConfig",
    "LEDConfig",
    "LEDForConditionalGeneration",
    "LEDModel",
    "Seq2SeqLMOutput",
    "StaticKVCache",
]
