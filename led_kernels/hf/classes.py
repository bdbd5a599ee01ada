"""These tables say which fused class replaces which class of transformers."""

from __future__ import annotations

from transformers.models.led.modeling_led import (
    LEDDecoder,
    LEDDecoderAttention,
    LEDDecoderLayer,
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

from led_kernels.hf.heads import heads
from led_kernels.hf.led_decoder import (
    CautiousLEDDecoder,
    FusedLEDDecoder,
    FusedLEDDecoderAttention,
    FusedLEDDecoderLayer,
    FusedLEDLearnedPositionalEmbedding,
)
from led_kernels.hf.led_encoder import FusedLEDEncoder, FusedLEDEncoderLayer, FusedLEDEncoderSelfAttention
from led_kernels.hf.longformer_encoder import (
    FusedLongformerEncoder,
    FusedLongformerModel,
    FusedLongformerSelfAttention,
)
from led_kernels.hf.swap import ClassTable, set_stock_class

LED_ENCODER: ClassTable = {
    LEDEncoder: FusedLEDEncoder,
    LEDEncoderLayer: FusedLEDEncoderLayer,
    LEDEncoderSelfAttention: FusedLEDEncoderSelfAttention,
}
LONGFORMER: ClassTable = {
    LongformerModel: FusedLongformerModel,
    LongformerEncoder: FusedLongformerEncoder,
    LongformerSelfAttention: FusedLongformerSelfAttention,
}
LED_DECODER: ClassTable = {
    LEDDecoder: FusedLEDDecoder,
    LEDDecoderLayer: FusedLEDDecoderLayer,
    LEDDecoderAttention: FusedLEDDecoderAttention,
    LEDLearnedPositionalEmbedding: FusedLEDLearnedPositionalEmbedding,
}
CAUTIOUS_LED_DECODER: ClassTable = {LEDDecoder: CautiousLEDDecoder}
HEADS: ClassTable = heads()

for _table in (LED_ENCODER, LONGFORMER, LED_DECODER, CAUTIOUS_LED_DECODER, HEADS):
    for _stock, _fused in _table.items():
        set_stock_class(_fused, _stock)
