"""Implements ``generate``: greedy search, sampling and beam search with transformers' meaning of every setting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from led_kernels import LongformerMask
from led_kernels.distributed.context import even_part, fork_rng
from led_kernels.processes import unsharded
from led_model.checks import (
    check_binary,
    check_encoder_hidden_states,
    check_ids,
    check_mask,
    check_not_empty,
    check_traceable,
)
from led_model.generation.beam_search import beam_search
from led_model.generation.generation_config import GenerationConfig
from led_model.generation.model_protocol import GenerativeModel
from led_model.generation.sampling import sample
from led_model.generation.step import Search
from led_model.overflow import check_finite
from led_model.schema import BOOLEAN, check_values


@dataclass
class GenerateOutput:
    """Holds ``sequences``, int64 ``[batch * num_return_sequences, length]``, and with beams ``sequences_scores``.

    The scores are float32 ``[batch * num_return_sequences]``: log-probability over new tokens ** length_penalty.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None


def _with_all_weights(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a model so that it has the whole of all weights that FSDP has sharded.

    Where documents are split over ranks, it draws the same numbers on all of them.
    """

    @functools.wraps(generate)
    def generate_unsharded(model: GenerativeModel, *args: Any, **kwargs: Any) -> Any:
        device = model.final_logits_bias.device
        with unsharded(model), fork_rng(model.led.decoder.context, device, same_on_all_ranks=True):
            return generate(model, *args, **kwargs)

    return generate_unsharded


@torch.no_grad()
@_with_all_weights
def generate(
    model: GenerativeModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    global_attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    streamer: Any | None = None,
    generation_config: Any | None = None,
    use_cache: bool = True,
    compiled: bool = False,
    return_dict_in_generate: bool = False,
    labels: Tensor | None = None,
    synced_gpus: bool | None = None,
    **settings: Any,
) -> Tensor | GenerateOutput:
    """Writes a sequence, or several, for each document: greedily, by beam search or by sampling.

    ``num_beams`` above 1 means beam search and ``do_sample`` sampling; with neither, the likeliest next token is taken
    at each step. The decoder runs over caches allocated once, a document's sequences share its cross-attention
    keys and values, and the host waits for the device every few steps only.

    Args:
        input_ids: int ``[batch, source]``.
        attention_mask: ``[batch, source]``, nonzero for tokens; default: all but the padding id.
        global_attention_mask: ``[batch, source]``, 1 for tokens that all others see. Usually the first.
        encoder_hidden_states: ``[batch, source, d_model]``, the encoder's output for ``input_ids``, which is the
            ``encoder_last_hidden_state`` of a model's output, not its ``encoder_hidden_states``; by default it is
            computed. Where documents are split over ranks, these are the own rows.
        decoder_input_ids: int ``[batch, prompt]``, what the sequences begin with; the start token comes before
            them if none of them begins with it. Default: the start token alone.
        decoder_attention_mask: ``[batch, prompt]``, nonzero for tokens of the prompt, which is padded to the left.
        on_token: called after each step with the last tokens of all running sequences, int64
            ``[batch * num_beams]`` or ``[batch * num_return_sequences]``; the end is then tested at every step.
        streamer: transformers' ``TextStreamer`` or its like: ``put`` gets the prompt and then each step's tokens,
            on the CPU, and ``end`` is called at last. Not for beams, which change their past.
        generation_config: this model's class of it, or transformers', whose settings replace the checkpoint's.
        use_cache: for transformers' callers; the tokens are the same without, and the caches are always used.
        compiled: run the decoder's step through ``torch.compile``, as a captured graph on a GPU. The first call
            compiles, which takes a minute, the second once more, for documents of any length.
        return_dict_in_generate: return a :class:`GenerateOutput`, which has the scores of beams.
        labels, synced_gpus: for transformers' Trainer, which gives its whole batch, and says whether processes wait for
            each other; neither changes what is written.
        settings: fields of :class:`GenerationConfig` that replace the others, ``max_new_tokens=256``.

    Returns:
        int64 ``[batch * num_return_sequences, length]``, a document's sequences together, best first with
        beams; start token or prompt first; a sequence that has ended goes on with padding.

    Raises:
        ValueError: for ids, masks or ``encoder_hidden_states`` of another shape, batch or length than each other, when
            the length asked for is 0 or exceeds the decoder's position table, and for settings that have no meaning
            or contradict each other.
        TypeError: for a setting that is no field of :class:`GenerationConfig`, and for an ``on_token`` or ``streamer``
            that cannot be called.
    """
    check_traceable("generate looks at its tokens to know when to stop", None, "trace the model's forward")
    generation = model.generation_config
    if generation_config is not None:
        generation = generation.replaced_by(generation_config)
    generation = generation.updated(**settings)
    generation.check(model.config.vocab_size)
    flags = {"use_cache": use_cache, "compiled": compiled, "return_dict_in_generate": return_dict_in_generate}
    check_values(flags, dict.fromkeys(flags, BOOLEAN))
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token is a {type(on_token).__name__}; give a function of the step's tokens.")
    check_ids("input_ids", input_ids, model.led.encoder.embed_tokens)
    check_not_empty("input_ids", input_ids)
    check_mask("attention_mask", attention_mask, input_ids, "input_ids")
    check_mask("global_attention_mask", global_attention_mask, input_ids, "input_ids")
    if encoder_hidden_states is not None:
        context, ids = model.led.decoder.context, input_ids
        if context is not None:
            ids = ids[:, even_part(ids.shape[1], context.group)]
        check_encoder_hidden_states(encoder_hidden_states, ids, model.led.encoder.embed_tokens)
        if attention_mask is not None:  # the encoder, which would check its values, is not run
            LongformerMask.from_padding(attention_mask, global_attention_mask)
    if streamer is not None:
        on_token = _call_both(on_token, _streamer_callback(streamer, generation))
    prompt, prompt_mask = _prompt(
        input_ids,
        decoder_input_ids,
        decoder_attention_mask,
        generation.decoder_start_token_id,
        model.led.decoder.embed_tokens,
    )
    limit = generation.max_sequence_length(prompt.shape[1])
    _check_limit(limit, prompt.shape[1], model.led.decoder.embed_positions.weight.shape[0])
    if len(prompt) == 0:  # a batch of no documents
        output = GenerateOutput(prompt, prompt.new_zeros(0, dtype=torch.float32))
        return output if return_dict_in_generate else output.sequences
    if attention_mask is None:
        attention_mask = _mask_from_padding(input_ids, generation)
    if encoder_hidden_states is None:
        encoder_hidden_states = model.led.encode(input_ids, attention_mask, global_attention_mask)
    search = Search.prepare(
        model,
        generation,
        input_ids,
        encoder_hidden_states,
        attention_mask,
        prompt,
        prompt_mask,
        on_token,
        compiled,
    )
    del encoder_hidden_states  # the decoder needs no more than the cross keys and values
    if streamer is not None:
        streamer.put(prompt.cpu())
    try:
        if generation.num_beams > 1:
            output = GenerateOutput(*beam_search(search))
        else:
            output = GenerateOutput(sample(search))
    finally:
        if streamer is not None:  # a thread that waits for the next token must not wait for ever
            streamer.end()
    check_finite(torch.as_tensor(search.is_finite), model.dtype)
    return output if return_dict_in_generate else output.sequences


def _streamer_callback(streamer: Any, generation: GenerationConfig) -> Callable[[Tensor], object]:
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise TypeError(f"streamer is a {type(streamer).__name__} without {name}(); give a TextStreamer.")
    if generation.num_beams > 1:
        raise ValueError(
            f"streamer is given with num_beams {generation.num_beams}, whose tokens still change; give num_beams=1."
        )
    return lambda tokens: streamer.put(tokens.cpu())


def _call_both(
    first: Callable[[Tensor], object] | None, second: Callable[[Tensor], object]
) -> Callable[[Tensor], object]:
    if first is None:
        return second
    return lambda tokens: (first(tokens), second(tokens))


def _prompt(
    input_ids: Tensor,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
    start: int,
    embed_tokens: nn.Embedding,
) -> tuple[Tensor, Tensor | None]:
    """Returns what the sequences begin with, int64 ``[batch, any]``, and its mask.

    The start token is put before it where it lacks it, as in transformers.
    """
    starts = torch.full((input_ids.shape[0], 1), start, dtype=torch.int64, device=input_ids.device)
    if decoder_input_ids is None:
        if decoder_attention_mask is not None:
            raise ValueError("decoder_attention_mask is given without decoder_input_ids; give both.")
        return starts, None
    check_ids("decoder_input_ids", decoder_input_ids, embed_tokens)
    if decoder_input_ids.shape[0] != starts.shape[0]:
        raise ValueError(
            f"decoder_input_ids has shape {tuple(decoder_input_ids.shape)} for {starts.shape[0]} documents; give "
            "[batch, prompt]."
        )
    mask = decoder_attention_mask
    check_mask("decoder_attention_mask", mask, decoder_input_ids, "decoder_input_ids")
    check_binary("decoder_attention_mask", mask)
    prompt = decoder_input_ids.to(torch.int64)
    if prompt.shape[1] == 0 or (prompt[:, :1] != starts).all():
        prompt = torch.cat([starts, prompt], dim=1)
        mask = mask if mask is None else torch.cat([torch.ones_like(starts, dtype=mask.dtype), mask], dim=1)
    return prompt, mask


def _check_limit(limit: int, prompt: int, positions: int) -> None:
    new_tokens, most = limit - prompt, positions + 1 - prompt
    if new_tokens > most:
        raise ValueError(
            f"max_new_tokens or max_length asks for {new_tokens} new tokens but the decoder has {positions} "
            f"positions; give max_new_tokens of at most {most}."
        )
    if new_tokens < 1:
        raise ValueError(
            f"max_new_tokens or max_length allows {new_tokens} new tokens; give max_new_tokens of 1 or more."
        )


def _mask_from_padding(input_ids: Tensor, generation: GenerationConfig) -> Tensor:
    """Returns a mask of everything but padding, or of everything if padding cannot be told from the end of a text."""
    pad = generation.pad_token_id
    if pad is None or pad in generation.eos_token_ids:
        return torch.ones_like(input_ids)
    return (input_ids != pad).to(input_ids.dtype)
