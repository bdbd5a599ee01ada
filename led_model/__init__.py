"""Provides a Longformer-Encoder-Decoder on the kernels of ``led_kernels``; names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from led_model.config import LEDConfig
    from led_model.conversion.convert import convert_checkpoint
    from led_model.data.batching import LengthBatchSampler, TokenBatchSampler
    from led_model.data.collator import LEDDataCollator
    from led_model.data.global_tokens import EveryKthToken, FirstTokens, QuestionTokens, TokensWithId
    from led_model.generation.cache import BeamKVCache, StaticKVCache
    from led_model.generation.generate import GenerateOutput
    from led_model.generation.generation_config import GenerationConfig
    from led_model.modeling.heads import LEDForQuestionAnswering, LEDForSequenceClassification
    from led_model.modeling.model import LEDForConditionalGeneration, LEDModel
    from led_model.modeling.outputs import (
        Seq2SeqLMOutput,
        Seq2SeqModelOutput,
        Seq2SeqQuestionAnsweringModelOutput,
        Seq2SeqSequenceClassifierOutput,
    )
    from led_model.packing import unpack
    from led_model.tokenization.tokenizer import LEDTokenizer

_MODULE_OF = {
    "BeamKVCache": "led_model.generation.cache",
    "StaticKVCache": "led_model.generation.cache",
    "LEDConfig": "led_model.config",
    "LengthBatchSampler": "led_model.data.batching",
    "TokenBatchSampler": "led_model.data.batching",
    "LEDDataCollator": "led_model.data.collator",
    "EveryKthToken": "led_model.data.global_tokens",
    "FirstTokens": "led_model.data.global_tokens",
    "QuestionTokens": "led_model.data.global_tokens",
    "TokensWithId": "led_model.data.global_tokens",
    "unpack": "led_model.packing",
    "GenerateOutput": "led_model.generation.generate",
    "GenerationConfig": "led_model.generation.generation_config",
    "LEDForQuestionAnswering": "led_model.modeling.heads",
    "LEDForSequenceClassification": "led_model.modeling.heads",
    "LEDForConditionalGeneration": "led_model.modeling.model",
    "LEDModel": "led_model.modeling.model",
    "Seq2SeqLMOutput": "led_model.modeling.outputs",
    "Seq2SeqModelOutput": "led_model.modeling.outputs",
    "Seq2SeqQuestionAnsweringModelOutput": "led_model.modeling.outputs",
    "Seq2SeqSequenceClassifierOutput": "led_model.modeling.outputs",
    "LEDTokenizer": "led_model.tokenization.tokenizer",
    "convert_checkpoint": "led_model.conversion.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'led_model' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


__all__ = [
    "BeamKVCache",
    "EveryKthToken",
    "FirstTokens",
    "GenerateOutput",
    "GenerationConfig",
    "LEDConfig",
    "LEDDataCollator",
    "LEDForConditionalGeneration",
    "LEDForQuestionAnswering",
    "LEDForSequenceClassification",
    "LEDModel",
    "LEDTokenizer",
    "LengthBatchSampler",
    "QuestionTokens",
    "Seq2SeqLMOutput",
    "Seq2SeqModelOutput",
    "Seq2SeqQuestionAnsweringModelOutput",
    "Seq2SeqSequenceClassifierOutput",
    "StaticKVCache",
    "TokenBatchSampler",
    "TokensWithId",
    "convert_checkpoint",
    "unpack",
]
