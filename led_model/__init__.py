"""A Longformer-Encoder-Decoder on the kernels of ``led_kernels``. Its names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULE_OF = {
    "BeamKVCache": "led_model.cache",
    "StaticKVCache": "led_model.cache",
    "LEDConfig": "led_model.config",
    "GenerateOutput": "led_model.generate",
    "GenerationConfig": "led_model.generation_config",
    "LEDForQuestionAnswering": "led_model.heads",
    "LEDForSequenceClassification": "led_model.heads",
    "LEDForConditionalGeneration": "led_model.model",
    "LEDModel": "led_model.model",
    "Seq2SeqLMOutput": "led_model.outputs",
    "Seq2SeqModelOutput": "led_model.outputs",
    "Seq2SeqQuestionAnsweringModelOutput": "led_model.outputs",
    "Seq2SeqSequenceClassifierOutput": "led_model.outputs",
    "LEDTokenizer": "led_model.tokenizer",
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
