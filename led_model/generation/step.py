"""What every search does at a step: run the decoder, adjust scores, and ask now and then whether to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from led_kernels.decode import CapturedCalls, few_rows_linear
from led_model.generation.cache import BeamKVCache, StaticKVCache
from led_model.generation.captured import Watched, is_plain_here, runs_imported, runs_only_layers
from led_model.generation.generation_config import GenerationConfig
from led_model.generation.logits import Processor, build_processors
from led_model.modeling.attention import padding_scores

if TYPE_CHECKING:
    from led_model.modeling.model import LEDForConditionalGeneration

# Steps between two looks at whether all sequences have ended, on devices where looking means waiting.
_STOP_TEST_INTERVAL = 8


class DecoderStep:
    """Logits of the next token for ``rows`` sequences of each document, over caches of fixed shape.

    A document's rows are the queries of one attention, so its cross keys and values are made and held once. From one
    step to the next only the contents of tensors change: ``compiled`` compiles the first and replays the others, and
    on the CPU the kernels' calls of the first are captured and replayed.
    """

    def __init__(
        self,
        model: LEDForConditionalGeneration,
        encoded: Tensor,
        attention_mask: Tensor,
        prompt_mask: Tensor | None,
        rows: int,
        max_steps: int,
        compiled: bool,
    ) -> None:
        self.model = model
        self.cross_keys_values = model.led.decoder.cross_keys_values(encoded)
        key = self.cross_keys_values[0][0]  # under autocast narrower than what it is made of
        batch, place = encoded.shape[0], {"dtype": key.dtype, "device": encoded.device}
        self.cross_mask = _cross_mask(attention_mask, encoded.dtype)
        self.prompt_mask = prompt_mask
        if rows == 1:
            self.cache = StaticKVCache(model.config, batch, max_steps, **place)
        else:
            self.cache = BeamKVCache(model.config, batch, rows, max_steps, **place)
        self.run = _compiled_step(encoded.device.type) if compiled else _step
        if compiled:
            for tensor in self.cache.tensors():  # written in place by a captured graph
                torch._dynamo.mark_static_address(tensor)
        self.may_capture = encoded.device.type == "cpu" and not compiled
        self.captured: CapturedCalls | None = None
        self.watched: Watched | None = None  # what the captured calls point to

    def __call__(self, tokens: Tensor, step: int) -> Tensor:
        """int64 ``[batch, rows]``, the tokens at position ``step``, to ``[batch * rows, vocab_size]``."""
        # a view at another address would be another graph
        position = self.cache.slots[step : step + 1].clone()
        if self._replays(tokens, position):
            return self.captured.result + self.model.final_logits_bias
        return self.run(
            self.model,
            tokens,
            self.cross_keys_values,
            self.cross_mask,
            self.prompt_mask,
            self.cache,
            position,
        )

    def _replays(self, tokens: Tensor, position: Tensor) -> bool:
        """Makes the captured calls for these tokens, or captures them; false where torch has to run the step."""
        if not (self.may_capture or self.captured) or not is_plain_here():
            return False
        if not runs_imported(self.model, "logits"):
            return False
        parts = (self.model.led.decoder, self.model.lm_head)
        if self.captured is not None and self.watched.changed(parts):
            self.captured, self.may_capture = None, True
            self._check_model()
        if self.captured is not None:
            for fixed, new in zip(self.inputs, self._inputs(tokens, position), strict=True):
                fixed.copy_(new)
            self.captured.replay()
            return True
        self.may_capture = False  # if it fails, it always will
        if runs_only_layers(parts):
            self.inputs = self._inputs(tokens, position)
            self.captured = CapturedCalls.of(self._layers_and_head)
        if self.captured is not None:
            self.watched = Watched(parts)
        return self.captured is not None

    def _check_model(self) -> None:
        """A model that a caller's function has changed must still go with the caches.

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
        """What of a step is not captured: embedded tokens, what they see of the cache, where it is written."""
        return (
            self.model.led.decoder.embed(tokens, position),
            self.cache.attention_mask(position, self.prompt_mask),
            self.cache.slots_of(position),
        )

    def _layers_and_head(self) -> Tensor:
        hidden = self.model.led.decoder.run_layers(
            *self.inputs, self.cross_keys_values, self.cross_mask, self.cache
        )
        return few_rows_linear(self.model.lm_head, hidden.flatten(0, 1))


def _step(
    model: LEDForConditionalGeneration,
    tokens: Tensor,
    cross_keys_values: list[tuple[Tensor, Tensor]],
    cross_mask: Tensor | None,
    prompt_mask: Tensor | None,
    cache: StaticKVCache,
    position: Tensor,
) -> Tensor:
    """``tokens`` ``[batch, rows]`` at ``position [1]`` to logits ``[batch * rows, vocab_size]``."""
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
    """On a GPU one captured graph is replayed for every token."""
    mode = "reduce-overhead" if device_type == "cuda" else "default"
    return torch.compile(_step, fullgraph=True, mode=mode)


def _cross_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``[batch, source]`` as the decoder takes it; ``None`` if all are tokens."""
    present = attention_mask != 0
    all_present, none_empty = torch.stack([present.all(), present.any(1).all()]).tolist()  # one sync
    if all_present:
        return None
    return present[:, None, None, :] if none_empty else padding_scores(attention_mask, dtype)


@dataclass
class Search:
    """What greedy search, sampling and beam search have in common.

    ``rows`` sequences of each document are worked on, which begin with its ``prompt``, int64 ``[batch, any]``;
    ``limit`` is the longest one, prompt included; ``eos`` is int64 ``[any]``; ``generator`` is ``None`` for
    torch's global one.
    """

    generation: GenerationConfig
    step: DecoderStep
    prompt: Tensor
    rows: int
    limit: int
    eos: Tensor
    pad: int | None
    processors: list[Processor]
    generator: torch.Generator | None
    on_token: Callable[[Tensor], object] | None
    is_finite: Tensor | bool = True  # 0-dim: every step so far had a token to choose, and no overflow

    @classmethod
    def prepare(
        cls,
        model: LEDForConditionalGeneration,
        generation: GenerationConfig,
        input_ids: Tensor,
        encoded: Tensor,
        attention_mask: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor | None,
        on_token: Callable[[Tensor], object] | None,
        compiled: bool,
    ) -> Search:
        device, limit = encoded.device, generation.length_limit(prompt.shape[1])
        eos = torch.tensor(generation.eos_token_ids, dtype=torch.int64, device=device)
        pad = generation.pad_token_id
        if pad is None and generation.eos_token_ids:
            pad = generation.eos_token_ids[0]  # as transformers does
        rows = generation.num_beams if generation.num_beams > 1 else generation.num_return_sequences
        generator = None
        if generation.seed is not None:
            generator = torch.Generator(device).manual_seed(generation.seed)
        step = DecoderStep(model, encoded, attention_mask, prompt_mask, rows, limit - 1, compiled)
        for position in range(prompt.shape[1] - 1):
            step(prompt[:, position, None].expand(-1, rows), position)  # its keys and values
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
        """``tokens`` ``[batch * rows, length]`` so far and ``scores`` ``[batch * rows, vocab_size]`` to scores."""
        for processor in self.processors:
            scores = processor(tokens, scores)
        return scores

    def rows_lost(self, scores: Tensor, working: Tensor, above: float = -math.inf) -> Tensor | None:
        """Rows of ``scores`` ``[any, choices]`` without a finite choice ``above`` a bound, bool ``[any, 1]``.

        ``None`` if there are none, and on devices where looking means waiting.

        Raises:
            ValueError: for such a row among those ``working``, bool ``[any, 1]``, unless its numbers have overflowed,
                which is said at the end.
        """
        if scores.device.type != "cpu":
            return None
        best = scores.amax(1, keepdim=True)
        lost = ~((best > above) & (best < math.inf))  # nor is NaN
        if not bool(lost.any()):
            return None
        if bool((lost & working).any()) and bool(self.is_finite):
            raise ValueError(
                "no token is left to go on with: bad_words_ids, no_repeat_ngram_size, min_length and what else is set "
                "ban all of them; ban less."
            )
        return lost

    def watch(self, logits: Tensor) -> None:
        """Notes whether ``[any, vocab_size]`` overflowed; -inf only forbids a token."""
        self.is_finite = logits.amax(-1).isfinite().all() & self.is_finite

    def draw(self, scores: Tensor, count: int) -> Tensor:
        """``count`` different indices per row of ``scores`` ``[any, choices]``, likely ones more often."""
        weights = scores.softmax(-1).where(torch.as_tensor(self.is_finite), 1.0)  # of NaN none can be drawn
        return torch.multinomial(weights, count, generator=self.generator)

    def hear(self, tokens: Tensor) -> None:
        """Hands the step's tokens, ``[batch * rows]``, to the caller."""
        if self.on_token is not None:
            self.on_token(tokens)

    def should_stop(self, ended: Tensor, length: int) -> bool:
        """Reads the 0-dim bool ``ended``: at every token for a listener or on the CPU, else every few steps."""
        every = self.on_token is not None or ended.device.type == "cpu"
        return (every or length % _STOP_TEST_INTERVAL == 0) and bool(ended)
