"""A Longformer-Encoder-Decoder on the kernels of ``led_kernels``."""

from led_model.cache import BeamKVCache, StaticKVCache
from led_model.config import LEDConfig
from led_model.generate import GenerateOutput
from led_model.generation_config import GenerationConfig
from led_model.heads import LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.model import LEDForConditionalGeneration, LEDModel
from led_model.outputs import (
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
)
from led_model.tokenizer import LEDTokenizer

__all__ = [
    "BeamKVCache",
    "GenerateOutput",
    "GenerationConfig",
    "LEDConfig",
    "LEDForConditionalGeneration",
    "LEDForQuestionAnswering",
    "LEDForSequenceClassification",
    "LEDModel",
    "LEDTokenizer",
    "Seq2SeqLMOutput",
    "Seq2SeqModelOutput",
    "Seq2SeqQuestionAnsweringModelOutput",
    "Seq2SeqSequenceClassifierOutput",
    "StaticKVCache",
]
