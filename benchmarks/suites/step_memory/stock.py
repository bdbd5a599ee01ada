"""What transformers' own LED keeps for the backward, named tensor by named tensor."""

from __future__ import annotations

from benchmarks.suites.step_memory import kinds
from benchmarks.suites.step_memory.parts import Part, embeddings
from benchmarks.suites.step_memory.step import AUTOCAST, Step


def parts(step: Step) -> list[Part]:
    """Returns the parts in the order of the forward.

    Raises:
        ValueError: for a source that transformers would pad to whole windows.
    """
    sizes = step.sizes
    if step.source % (2 * sizes.window):
        raise ValueError(f"source is {step.source}; give a multiple of {2 * sizes.window}, two windows.")
    first = embeddings("encoder", step, step.source)
    first.transient.clear()
    for name in ("as numbers", "inverted", "filled", "signed"):
        first.pass_by(f"mask of all pairs of tokens, {name}", mask_of_pairs(step), step.weight_itemsize)
    first.fullest_in_forward()
    second = embeddings("decoder", step, step.target)
    second.pass_by("sum of the table's gradients", step.sizes.table, step.weight_itemsize)
    return [
        first,
        *(encoder_layer(step, layer) for layer in range(sizes.encoder_layers)),
        second,
        *(decoder_layer(step, layer) for layer in range(sizes.decoder_layers)),
        loss(step),
    ]


def mask_of_pairs(step: Step) -> int:
    """Returns the numbers in the encoder's mask: one row is used for all, but all are in memory until the end."""
    return step.batch * step.source**2


def encoder_layer(step: Step, layer: int) -> Part:
    sizes, batch, globals_ = step.sizes, step.batch, step.num_globals
    d_model, heads, window = sizes.d_model, sizes.heads, sizes.window
    part = Part(f"encoder layer {layer}", step, batch * step.source)
    rows = part.rows
    # They read [source, batch, d_model], a view that linear layers copy each for itself when batch > 1.
    readers = ("query", "key", "value", "key_global", "value_global")
    if batch > 1 or step.precision == AUTOCAST:
        part.states(kinds.HIDDEN, *(f"input of {reader}" for reader in readers))
    else:
        part.states(kinds.HIDDEN, "input of query, key, value, key_global, value_global")
    part.casts("projections", 7 * d_model**2)

    # Blocks of two windows, each overlapping the next by one.
    blocks = batch * (step.source // window - 1) * 2 * window * d_model
    part.add(kinds.PROBABILITIES, "blocks of queries", blocks)
    part.add(kinds.PROBABILITIES, "blocks of keys", blocks)
    for end in ("first", "last"):
        part.add(kinds.SMALL, f"mask of the {end} window", batch * window * heads * (window + 1), 1)
    part.add(kinds.PROBABILITIES, "queries for global keys", rows * d_model)
    part.add(kinds.SMALL, "places of global tokens, in two orders", 4 * batch * globals_, 8)
    if layer == 0:
        part.add(kinds.SMALL, "padding", rows, 1)
    scores = globals_ + 2 * window + 1
    part.add(kinds.PROBABILITIES, "softmax", rows * heads * scores, 4)
    # Each row of probabilities is padded by window + 1 zeros, which shifts the next by one.
    part.add(kinds.PROBABILITIES, "shifted rows of probabilities", rows * heads * (3 * window + 2))
    part.add(kinds.PROBABILITIES, "blocks of values", 3 * rows * d_model)
    for name in ("queries", "keys", "values", "output of global keys", "output of the band"):
        part.pass_by(name, rows * d_model)
    part.pass_by("rounded probabilities", rows * heads * scores)
    part.pass_by("probabilities of the band", rows * heads * (2 * window + 1))
    part.pass_by("values, padded", (rows + 2 * batch * window) * d_model)
    part.pass_by("mask of the band", rows * (2 * window + 1))
    part.pass_by("mask of all pairs of tokens", mask_of_pairs(step), step.weight_itemsize)
    part.fullest_in_forward()
    part.add(kinds.SMALL, "probabilities of global keys", rows * heads * globals_)
    part.add(kinds.SMALL, "global keys, global values", 2 * batch * globals_ * d_model)

    part.add(kinds.SMALL, "input of query_global", batch * globals_ * d_model)
    part.add(kinds.SMALL, "global queries", batch * globals_ * d_model)
    part.states(kinds.PROBABILITIES, "keys of global attention", "values of global attention")
    part.add(kinds.SMALL, "softmax of global attention", batch * heads * globals_ * step.source, 4)
    if step.itemsize != 4:
        part.add(kinds.SMALL, "the same, rounded", batch * heads * globals_ * step.source)
    part.states(kinds.ATTENDED, "input of output")
    part.dropout("after output")
    part.norm("self_attn_layer_norm")
    part.feed_forward()
    part.add_input(kinds.HIDDEN, "input", rows * d_model, step.residual_itemsize)
    return part


def decoder_layer(step: Step, layer: int) -> Part:
    sizes, batch = step.sizes, step.batch
    part = Part(f"decoder layer {layer}", step, batch * step.target)
    pairs = batch * sizes.heads * step.target
    part.casts("projections", 8 * sizes.d_model**2)
    part.linear_input(kinds.HIDDEN, "q_proj", "k_proj", "v_proj")
    part.states(kinds.QKV, "queries", "keys", "values")
    is_autocast = step.precision == AUTOCAST
    part.add(kinds.PROBABILITIES, "softmax", pairs * step.target, 4 if is_autocast else None)
    if is_autocast:
        part.add(kinds.PROBABILITIES, "the same, rounded", pairs * step.target)
    part.states(kinds.ATTENDED, "input of out_proj")
    part.dropout("after self_attn")
    part.norm("self_attn_layer_norm")

    source = batch * step.source
    part.linear_input(kinds.HIDDEN, "q_proj")
    part.cross_inputs(layer)
    if layer == 0:
        part.add_input(kinds.SMALL, "causal mask", part.rows * step.target, step.residual_itemsize)
    part.states(kinds.CROSS, "cross keys", "cross values", rows=source)
    part.states(kinds.QKV, "queries of the source")
    if is_autocast and step.device == "cuda":  # whose autocast computes every softmax in fp32
        part.add(kinds.PROBABILITIES, "softmax over the source", pairs * step.source, 4)
    part.add(kinds.PROBABILITIES, "probabilities over the source", pairs * step.source)
    part.states(kinds.ATTENDED, "input of encoder_attn.out_proj")
    part.dropout("after encoder_attn")
    part.norm("encoder_attn_layer_norm")
    part.feed_forward()
    part.cross_gradients()
    softmax_itemsize = 4 if is_autocast and step.device == "cuda" else None
    for name in ("gradient of the probabilities", "gradient of the scores"):
        part.pass_by(name, pairs * step.source, softmax_itemsize)
    return part


def loss(step: Step) -> Part:
    part = Part(kinds.LOSS, step, step.batch * step.target)
    part.linear_input(kinds.HIDDEN, "lm_head")
    part.casts("lm_head", step.sizes.vocab_size * step.sizes.d_model)
    part.add(kinds.LOGITS, "log-softmax", part.rows * step.sizes.vocab_size, step.residual_itemsize)
    part.add(kinds.SMALL, "labels", part.rows, 8)
    part.add(kinds.SMALL, "number of labels", 1, step.residual_itemsize)
    for name in ("gradient of the log-softmax", "gradient of the logits"):
        part.pass_by(name, part.rows * step.sizes.vocab_size, step.residual_itemsize)
    return part
