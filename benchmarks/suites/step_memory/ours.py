"""What the drop-in and led_model keep for the backward, named tensor by named tensor."""

from __future__ import annotations

from benchmarks.suites.encoder import OWN
from benchmarks.suites.step_memory import kinds
from benchmarks.suites.step_memory.parts import Part, embeddings
from benchmarks.suites.step_memory.step import Step
from led_kernels.loss import PIECE
from led_kernels.recompute import PIECE_ROWS


def parts(provider: str, step: Step) -> list[Part]:
    """Returns the parts in the order of the forward."""
    sizes = step.sizes
    return [
        embeddings("encoder", step, step.source),
        *(encoder_layer(step, layer) for layer in range(sizes.encoder_layers)),
        embeddings("decoder", step, step.target),
        *(decoder_layer(provider, step, layer) for layer in range(sizes.decoder_layers)),
        loss(step),
    ]


def encoder_layer(step: Step, layer: int) -> Part:
    sizes, batch, globals_ = step.sizes, step.batch, step.num_globals
    part = Part(f"encoder layer {layer}", step, batch * step.source)
    if layer == 0:  # one mask for all layers
        part.add(kinds.SMALL, "token_kind", part.rows, 1)
        part.add(kinds.SMALL, "padding_before", part.rows, 4)
        part.add(
            kinds.SMALL,
            "seq_start, seq_len, num_globals, position_offset, global_index",
            batch * (4 + globals_),
            4,
        )
    part.states(kinds.HIDDEN, "input of the layer")
    part.states(kinds.QKV, "queries", "keys", "values")
    part.states(kinds.ATTENDED, "output of the attention")
    part.add(kinds.SMALL, "lse", part.rows * sizes.heads, 4)
    part.add(kinds.SMALL, "input of query_global, global queries", 2 * batch * globals_ * sizes.d_model)
    part.add(kinds.SMALL, "places of global tokens", batch * (1 + globals_), 8)
    part.add(kinds.SMALL, "slots in use", batch * globals_, 1)
    part.casts("projections", 6 * sizes.d_model**2)  # not of output, fc1 and fc2, which are cast once more
    if globals_ * sizes.heads >= sizes.d_model:
        part.states(kinds.QKV, "keys of global attention", "values of global attention")
        part.add(kinds.SMALL, "output of global attention", batch * globals_ * sizes.d_model)
        part.add(kinds.SMALL, "lse of global attention", batch * globals_ * sizes.heads, 4)
    part.add(kinds.FEED_FORWARD, "output of fc1", part.rows * sizes.ffn_dim)
    part.states(kinds.NORMS, "input of final_layer_norm")
    part.add_input(kinds.HIDDEN, "input", part.rows * sizes.d_model, step.residual_itemsize)

    piece = min(part.rows, PIECE_ROWS) * sizes.ffn_dim
    for name in ("output of the activation", "its gradient", "gradient of fc1's output"):
        part.pass_by(f"{name}, of a piece of rows", piece)
    for name in (
        "gradient of the layer's output",
        "gradient of final_layer_norm's input",
        "input of self_attn_layer_norm",
        "its output",
    ):
        part.pass_by(name, part.rows * sizes.d_model, step.residual_itemsize)
    part.pass_by("gradient of fc2's output", part.rows * sizes.d_model)
    part.pass_by("dropout after output", part.rows * sizes.d_model, 1 if step.device == "cuda" else None)
    if step.residual_itemsize != step.itemsize:
        part.pass_by("input of the layer, cast back", part.rows * sizes.d_model, step.residual_itemsize)
    for name in ("fc1", "fc2"):
        part.pass_by(f"gradient of {name}'s weight", sizes.ffn_dim * sizes.d_model, 4)
    return part


def decoder_layer(provider: str, step: Step, layer: int) -> Part:
    sizes, batch = step.sizes, step.batch
    part = Part(f"decoder layer {layer}", step, batch * step.target)
    part.casts("projections", 8 * sizes.d_model**2)
    part.linear_input(kinds.HIDDEN, *(("qkv",) if provider == OWN else ("q_proj", "k_proj", "v_proj")))
    part.states(kinds.QKV, "queries", "keys", "values")
    part.add(kinds.SMALL, "lse", part.rows * sizes.heads, 4)
    part.states(kinds.ATTENDED, "output of the attention")
    part.dropout("after self_attn")
    part.norm("self_attn_layer_norm")

    source = batch * step.source
    part.linear_input(kinds.HIDDEN, "q_proj")
    part.cross_inputs(layer, cast_once=True)
    if layer == 0 and provider == OWN:
        part.add_input(kinds.SMALL, "mask of the source", source, step.itemsize)
    part.states(kinds.CROSS, "cross keys", "cross values", rows=source)
    part.states(kinds.QKV, "queries of the source")
    if provider != OWN or layer == 0:
        part.add(kinds.SMALL, "mask of the source, in numbers", source)
    part.add(kinds.SMALL, "lse over the source", part.rows * sizes.heads, 4)
    part.states(kinds.ATTENDED, "output of encoder_attn")
    part.dropout("after encoder_attn")
    part.norm("encoder_attn_layer_norm")
    part.feed_forward()
    part.cross_gradients()
    return part


def loss(step: Step) -> Part:
    """Returns what the loss has: its gradients are made in the forward, from pieces of the logits."""
    sizes = step.sizes
    part = Part(kinds.LOSS, step, step.batch * step.target)
    part.states(kinds.LOGITS, "input of lm_head", "its gradient")
    part.add(kinds.LOGITS, "gradient of the weight", sizes.table, 4)
    part.add(kinds.SMALL, "what both are multiplied by", 1, 4)
    in_backward = 4 * sizes.table  # the same, times the gradient of the loss
    piece = min(part.rows * sizes.vocab_size, PIECE)
    part.pass_by("logits", part.rows * sizes.vocab_size)
    part.pass_by("a piece of them with the bias", piece, step.weight_itemsize)
    part.pass_by("a piece of the log-softmax", piece, 4)
    if step.itemsize != 4:
        part.pass_by("the piece's gradient", piece)
        part.pass_by("its share in the gradient of the weight", sizes.table)
    if step.itemsize != step.weight_itemsize:
        part.pass_by("weight", sizes.table)
    if in_backward > sum(tensor.nbytes for tensor in part.transient):
        part.transient.clear()
        part.pass_by("gradient of the weight, scaled", sizes.table, 4)
    part.fullest_in_forward()
    return part
