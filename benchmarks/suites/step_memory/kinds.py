"""Saved tensors are sorted here by the part of the model that keeps them, and by what they hold."""

from __future__ import annotations

import re
from math import prod

from benchmarks.harness.saved_tensors import CHECKPOINT, Saved
from benchmarks.suites.step_memory.step import Step

HIDDEN = "hidden states"
QKV = "q, k, v"
CROSS = "cross keys and values"
PROBABILITIES = "probabilities and chunks"
ATTENDED = "attention output"
FEED_FORWARD = "feed-forward"
NORMS = "norms"
DROPOUT = "dropout"
SMALL = "lse, masks, global rows"
LOGITS = "logits and loss"
CASTS = "weight casts"
KINDS = (HIDDEN, QKV, CROSS, PROBABILITIES, ATTENDED, FEED_FORWARD, NORMS, DROPOUT, SMALL, LOGITS, CASTS)

LOSS = "loss"
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)")
_STACK = re.compile(r"(encoder|decoder)\b")
# The names of linear layers by what goes into them, in transformers and in led_model.
_READS_HIDDEN = {
    "query", "key", "value", "key_global", "value_global", "qkv", "q_proj", "k_proj", "v_proj", "fc1", "lm_head",
}  # fmt: skip
_READS_ATTENDED = {"output", "out_proj"}
_TAIL = "recomputed"  # the function of led_kernels that keeps what follows an attention


def place_of(saved: Saved) -> str:
    """Returns ``encoder layer 0`` and so on, ``encoder embeddings``, the same of the decoder, or ``loss``."""
    module = saved.sites[0][0]
    if layer := _LAYER.search(module):
        return f"{layer[1]} layer {layer[2]}"
    stack = _STACK.search(module)
    return f"{stack[1]} embeddings" if stack else LOSS


def kind_of(saved: Saved, step: Step) -> str:
    """Returns one of :data:`KINDS`."""
    sizes, shape, numel = step.sizes, saved.shape, prod(saved.shape)
    modules = {module.rpartition(".")[2] for module, _ in saved.sites}
    functions = {function for _, function in saved.sites}
    module, function = saved.sites[0]
    rows = step.batch * (step.source if "encoder.layers" in module else step.target)
    if saved.is_weight:
        return CASTS
    if "dropout" in functions:
        return DROPOUT
    if any("norm" in name for name in modules):
        return NORMS
    is_mask = len(shape) == 4 and shape[1] == 1  # [batch or 1, 1, queries, keys]
    if not saved.dtype.is_floating_point or numel < rows * sizes.d_model or is_mask:
        return SMALL
    if place_of(saved) == LOSS:
        return HIDDEN if modules & _READS_HIDDEN else LOGITS
    if shape[-1] == sizes.ffn_dim:
        return FEED_FORWARD
    if modules & _READS_HIDDEN or function == CHECKPOINT:
        return HIDDEN
    if function == _TAIL:  # of the two that nobody else keeps, fc1's output has the width of the feed-forward
        return NORMS
    if modules & _READS_ATTENDED or _TAIL in functions:
        return ATTENDED
    return _kind_in_attention(saved, step)


def _kind_in_attention(saved: Saved, step: Step) -> str:
    """Returns the kind of what only the attention itself keeps."""
    sizes, shape = step.sizes, saved.shape
    module, function = saved.sites[0]
    if "encoder.layers" in module:
        return QKV if function == "encoder_self_attention" else PROBABILITIES
    if sizes.head_dim not in shape[-2:]:
        return PROBABILITIES
    return CROSS if prod(shape) == step.batch * step.source * sizes.d_model else QKV
