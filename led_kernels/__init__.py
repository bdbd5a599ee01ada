"""Fused banded (sliding-window) and global attention for Longformer and Longformer-Encoder-Decoder (LED) models.

What the models compute, and every backend here with them:

- Each token is padding, local or global. transformers says it by ``attention_mask * (global_attention_mask + 1)``: 0 is
  padding, 1 local, 2 global, and padding wins. :class:`LongformerMask` holds it for a batch, padded or packed.
- A *local* token attends to the keys of its window, ``w = attention_window // 2`` to each side, inclusive, and to the
  *global keys*, those of the global tokens of its own sequence, wherever they are; to each key once, in one softmax of
  ``q·k / sqrt(head_dim)``, and never to padding: ``allowed[i, j] = is_token(j) and (|i - j| <= w or is_global(j))``
  (:func:`banded_attention`).
- A *global* token attends to every token of its sequence, by projections of its own, ``query_global``, ``key_global``
  and ``value_global`` (:func:`global_attention`), and its row replaces the local one (:func:`longformer_attention`
  does both).
- A row of padding is zeros and sends no gradient, whatever its q, k and v hold, also in a sequence of padding alone.
- Softmax and sums are taken in fp32 (fp64 for fp64), where transformers rounds to the dtype of its inputs. Dropout
  acts on probabilities after the softmax, drawn by a counter (:mod:`led_kernels.philox`), so that every backend drops
  the same ones.
- Nothing is padded to a multiple of the window, which changes no token's result.

Sources: Beltagy, Peters and Cohan, "Longformer: The Long-Document Transformer", 2020, section 3
(https://arxiv.org/abs/2004.05150), for the attention; ``models/led/modeling_led.py`` of transformers 5.23, for what
checkpoints were trained with; Dao, "FlashAttention-2", 2023 (https://arxiv.org/abs/2307.08691), for how it is computed
without writing the scores.
"""

from led_kernels.absorbed import absorbed_global_attention
from led_kernels.api import banded_attention, global_attention, longformer_attention
from led_kernels.dispatch import BackendUnavailable
from led_kernels.mask import LongformerMask

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "LongformerMask",
    "absorbed_global_attention",
    "banded_attention",
    "global_attention",
    "longformer_attention",
]
