"""Does what every search does at a step: it runs the decoder, adjusts scores, and decides whether to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from led_kernels.capture import CapturedCalls
from led_kernels.distributed.split_keys import SplitKeys
from led_kernels.gemv import few_rows_linear
from led_model.generation.cache import BeamKVCache, StaticKVCache
from led_model.generation.captured import ModuleGuards, is_capturable, is_plain_eager, is_unpatched
from led_model.generation.generation_config import GenerationConfig
from led_model.generation.logits import LogitsProcessor, build_processors
from led_model.generation.model_protocol import GenerativeModel
from led_model.masks import cross_attention_mask

# On devices where looking means waiting, this many steps lie between two looks at whether all sequences have ended.
_STOP_TEST_INTERVAL = 8


class DecoderStep:
    """Computes the logits of the next token for ``rows`` sequences of each document, over caches of fixed shape.

    A document's rows are the queries of one attention, so its cross keys and values are made and held once. From one
    step to the next only the contents of tensors change, so that a step is compiled or captured once and replayed:
    ``compiled`` uses ``torch.compile``, and otherwise, on the CPU, the kernels' calls of the first step are captured.
    """

    def __init__(
        self,
        model: GenerativeModel,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        prompt_mask: Tensor | None,
        rows: int,
        max_steps: int,
        compiled: bool,
    ) -> None:
        self.model = model
        self.cross_keys_values = model.led.decoder.cross_keys_values(encoder_hidden_states)
        key = self.cross_keys_values[0][0]  # under autocast it is narrower than what it is made of
        batch, device = encoder_hidden_states.shape[0], encoder_hidden_states.device
        context = model.led.decoder.context
        self.cross_mask: Tensor | SplitKeys | None
        if context is None:
            self.cross_mask = cross_attention_mask(attention_mask, encoder_hidden_states.dtype)
        else:
            self.cross_mask = SplitKeys.of_part(attention_mask, encoder_hidden_states, context.group)
            if compiled:
                raise ValueError(
                    "compiled is true, and documents are split over ranks, which is not compiled; leave it out."
                )
        self.prompt_mask = prompt_mask
        like = {"heads": key.shape[1], "dtype": key.dtype, "device": device}
        if rows == 1:
            self.cache = StaticKVCache(model.config, batch, max_steps, **like)
        else:
            self.cache = BeamKVCache(model.config, batch, rows, max_steps, **like)
        self.run = _compiled_step(device.type) if compiled else _step
        if compiled:
            for tensor in self.cache.tensors():  # a captured graph writes them in place
                torch._dynamo.mark_static_address(tensor)
        self.may_capture = device.type == "cpu" and not compiled and context is None
        self.captured: CapturedCalls | None = None
        self.guards: ModuleGuards | None = None  # they watch the modules that the captured calls stand for

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """Returns logits ``[batch * rows, vocab_size]`` after ``tokens [batch, rows]``, int64, at position ``step``."""
        # It is a copy, as a compiled step would need another graph for a view at another address.
        position = self.cache.positions[step : step + 1].clone()
        if (captured := self._replay_or_capture(tokens, position)) is not None:
            return captured.result + self.model.final_logits_bias
        return self.run(
            self.model,
            tokens,
            self.cross_keys_values,
            self.cross_mask,
            self.prompt_mask,
            self.cache,
            position,
        )

    def _replay_or_capture(self, tokens: Tensor, position: Tensor) -> CapturedCalls | None:
        """Makes the captured calls for these tokens, or captures them; returns them with the tokens' result.

        It returns ``None`` where torch has to run the step.
        """
        if not (self.may_capture or self.captured) or not is_plain_eager():
            return None
        if not is_unpatched(self.model, "logits"):
            return None
        parts = (self.model.led.decoder, self.model.lm_head)
        if self.guards is not None and self.guards.failed(parts):
            self.captured, self.guards, self.may_capture = None, None, True
            self._check_model()
        if self.captured is not None:
            for fixed, new in zip(self.inputs, self._inputs(tokens, position), strict=True):
                fixed.copy_(new)
            self.captured.replay()
            return self.captured
        self.may_capture = False  # a capture that fails once always will
        if is_capturable(parts):
            self.inputs = self._inputs(tokens, position)
            self.captured = CapturedCalls.capture(self._layers_and_head)
        if self.captured is not None:
            self.guards = ModuleGuards(parts)
        return self.captured

    def _check_model(self) -> None:
        """Checks that a model that a caller's function has changed still fits the caches.

        Raises:
            ValueError: when it has other layers or another dtype, or weights without memory.
        """
        decoder = self.model.led.decoder
        layers, dtype = len(decoder.layers), decoder.embed_positions.weight.dtype
        began = len(self.cross_keys_values), self.cache.keys.dtype
        if (layers, dtype) != began:
            raise ValueError(
                f"the model has {layers} decoder layers in {dtype} and began to generate with {began[0]} in "
                f"{began[1]}; change it between two calls of generate."
            )
        for name, weight in self.model.named_parameters():
            if weight.untyped_storage().nbytes() < max(1, weight.numel()) * weight.element_size():
                raise ValueError(
                    f"{name} has lost its memory while the model generates; let it be until the end."
                )

    def _inputs(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is not captured of a step: embedded tokens, what they see of the cache, where it is written."""
        return (
            self.model.led.decoder.embed(tokens, position),
            self.cache.attention_mask(position, self.prompt_mask),
            self.cache.indices_of(position),
        )

    def _layers_and_head(self) -> Tensor:
        """Returns the logits of ``inputs`` without their bias: the part of a step that is captured."""
        hidden = self.model.led.decoder.run_layers(
            *self.inputs, self.cross_keys_values, self.cross_mask, self.cache
        )
        return few_rows_linear(self.model.lm_head, hidden.flatten(0, 1))


def _step(
    model: GenerativeModel,
    tokens: Tensor,
    cross_keys_values: list[tuple[Tensor, Tensor]],
    cross_mask: Tensor | SplitKeys | None,
    prompt_mask: Tensor | None,
    cache: StaticKVCache,
    position: Tensor,
) -> Tensor:
    """Returns logits ``[batch * rows, vocab_size]`` after ``tokens``, int64 ``[batch, rows]``, at ``position [1]``."""
    hidden = model.led.decoder(
        tokens,
        cross_keys_values,
        cross_mask=cross_mask,
        attention_mask=prompt_mask,
        cache=cache,
        position=position,
    )
    return model.logits(hidden.flatten(0, 1))


@cache
def _compiled_step(device_type: str) -> Callable[..., Tensor]:
    """Returns a compiled :func:`_step`; on a GPU one captured graph is replayed for every token."""
    mode = "reduce-overhead" if device_type == "cuda" else "default"
    return torch.compile(_step, fullgraph=True, mode=mode)


@dataclass
class Search:
    """Holds what greedy search, sampling and beam search have in common.

    ``rows`` sequences of each document are generated, which begin with its ``prompt``, int64 ``[batch, any]``;
    ``limit`` is the longest one, prompt included; ``eos`` is int64 ``[any]``; ``generator`` is ``None`` for
    torch's global one.
    """

    generation: GenerationConfig
    step: DecoderStep
    prompt: Tensor
    rows: int
    limit: int
    eos: Tensor
    pad: int  # it is never written where there is no eos token
    processors: list[LogitsProcessor]
    generator: torch.Generator | None
    on_token: Callable[[Tensor], object] | None
    is_finite: Tensor | bool = True  # 0-dim, true if every step so far had a finite largest logit

    @classmethod
    def prepare(
        cls,
        model: GenerativeModel,
        generation: GenerationConfig,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
        on_token: Callable[[Tensor], object] | None,
        compiled: bool,
    ) -> Search:
        """Builds the caches and the scores' rules, and runs the decoder over all but the last token of the prompt."""
        device, limit = encoder_hidden_states.device, generation.max_sequence_length(prompt.shape[1])
        eos = torch.tensor(generation.eos_token_ids, dtype=torch.int64, device=device)
        pad = generation.pad_token_id
        if pad is None:
            pad = next(iter(generation.eos_token_ids), 0)  # transformers takes the first one too
        rows = generation.num_beams if generation.num_beams > 1 else generation.num_return_sequences
        generator = None
        if generation.seed is not None:
            generator = torch.Generator(device).manual_seed(generation.seed)
        step = DecoderStep(
            model, encoder_hidden_states, attention_mask, prompt_mask, rows, limit - 1, compiled
        )
        for position in range(prompt.shape[1] - 1):
            step(prompt[:, position, None].expand(-1, rows), position)  # writes keys and values
        return cls(
            generation,
            step=step,
            prompt=prompt,
            rows=rows,
            limit=limit,
            eos=eos,
            pad=pad,
            processors=build_processors(generation, input_ids, eos, rows, prompt.shape[1]),
            generator=generator,
            on_token=on_token,
        )

    def process(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Returns adjusted ``scores``, ``[batch * rows, vocab_size]``, after ``tokens``, ``[batch * rows, length]``."""
        for processor in self.processors:
            scores = processor(tokens, scores)
        return scores

    def exhausted_rows(self, scores: Tensor, active: Tensor, above: float = -math.inf) -> Tensor | None:
        """Returns which rows of ``scores`` ``[any, choices]`` have no finite choice ``above`` a bound, ``[any, 1]``.

        It is ``None`` if there are none, and on devices where looking means waiting.

        Raises:
            ValueError: for such a row among those ``active``, bool ``[any, 1]``, unless logits have overflowed, which
                is reported when generation is over.
        """
        if scores.device.type != "cpu":
            return None
        best = scores.amax(1, keepdim=True)
        exhausted = ~((best > above) & (best < math.inf))  # true for NaN too
        if not bool(exhausted.any()):
            return None
        if bool((exhausted & active).any()) and bool(self.is_finite):
            raise ValueError(
                "no token is left to go on with: bad_words_ids, no_repeat_ngram_size, min_length and what else is set "
                "ban all of them; ban less."
            )
        return exhausted

    def record_overflow(self, logits: Tensor) -> None:
        """Notes in ``is_finite`` whether ``[any, vocab_size]`` overflowed; -inf only forbids a token."""
        self.is_finite = logits.amax(-1).isfinite().all() & self.is_finite

    def draw(self, scores: Tensor, count: int) -> Tensor:
        """Returns ``count`` different indices per row of ``scores`` ``[any, choices]``, likely ones more often."""
        # torch.multinomial refuses NaN, so that rows that overflowed are drawn from evenly.
        weights = scores.softmax(-1).where(torch.as_tensor(self.is_finite), 1.0)
        return torch.multinomial(weights, count, generator=self.generator)

    def on_step(self, tokens: Tensor) -> None:
        """Hands the step's tokens, ``[batch * rows]``, to the caller."""
        if self.on_token is not None:
            self.on_token(tokens)

    def should_stop(self, ended: Tensor, length: int) -> bool:
        """Returns the 0-dim bool ``ended`` at a step that looks at it, and false at others.

        With an ``on_token`` or on the CPU every step looks, elsewhere every few steps.
        """
        every = self.on_token is not None or ended.device.type == "cpu"
        return (every or length % _STOP_TEST_INTERVAL == 0) and bool(ended)
