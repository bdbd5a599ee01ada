"""This suite measures how 128 tokens are written about a document, by led_model and by transformers.

The encoder's output is given, so that a case is what the decoder does: projecting it to cross-attention's keys and
values once, and then a step for each token. Peak memory is that of the whole, encoder included. The models are of
led-base's shape with its vocabulary and the same seeded random weights; nothing ends a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import FORWARD, Call, Case, Group
from benchmarks.harness.figures import Figure, Run, ratio, seqlen_of
from benchmarks.harness.shapes import SMOKE, Shape
from benchmarks.harness.suite import Suite
from benchmarks.suites import encoder
from benchmarks.suites.encoder import OWN, STOCK, make_arguments

GREEDY, BEAMS = "greedy", "4 beams"
VOCAB_SIZE = 50265
NEW_TOKENS = 128
SEARCHES = {GREEDY: 1, BEAMS: 4}  # and their numbers of beams
GENERATE = "generate"
_POSITION = 64  # of the step that is timed by itself


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else Shape()
    cases = [Case("read", "torch.sum", FORWARD, _read, bytes=step_bytes(shape))]
    for search in SEARCHES:
        cases.append(
            Case("step", OWN, search, functools.partial(_prepare_step, search), bytes=step_bytes(shape))
        )
        truth = functools.partial(tokens_of, search)
        for provider, load in _MODELS.items():
            cases.append(Case(search, provider, GENERATE, functools.partial(_prepare, load, search), truth))
    memory = tuple(
        encoder.memory_case(provider, functools.partial(_build, load)) for provider, load in _MODELS.items()
    )
    return [Group(f"generation_{shape.seqlen}", shape, tuple(cases), memory)]


def step_bytes(shape: Shape) -> int:
    """Counts what a step reads at least.

    These are the decoder's weights but for cross-attention's key and value projections, the head, and every layer's
    keys and values of the document.
    """
    d_model = shape.d_model
    weights = 6 * d_model**2 + 2 * d_model * shape.ffn_dim  # q, k, v, out, and cross-attention's q, out
    keys_values = 2 * shape.seqlen * d_model
    return shape.torch_dtype.itemsize * (shape.layers * (weights + keys_values) + VOCAB_SIZE * d_model)


@functools.lru_cache(maxsize=2)
def tokens_of(search: str, shape: Shape) -> dict[str, Tensor]:
    """Returns the tokens that transformers writes."""
    return _prepare(stock_model, search, shape)()


def stock_model(shape: Shape) -> nn.Module:
    model = encoder.stock_model(
        shape, vocab_size=VOCAB_SIZE, decoder_layers=shape.layers, max_decoder_position_embeddings=1024
    )
    model.generation_config.eos_token_id = None
    return model


def _settings(search: str) -> dict[str, int | bool | None]:
    return {
        "num_beams": SEARCHES[search],
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
    }


def _load_own(shape: Shape) -> nn.Module:
    return encoder.own_model(stock_model(shape))


_MODELS = {OWN: _load_own, STOCK: stock_model}


def _prepare(load: Callable[[Shape], nn.Module], search: str, shape: Shape) -> Call:
    model, (ids, attention_mask, _) = _model_of(load, shape), make_arguments(shape)
    encoded = _encoded(shape)
    if load is stock_model:
        from transformers.modeling_outputs import BaseModelOutput

        # generate expands what it is given in place
        given = lambda: {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}  # noqa: E731
    else:
        given = lambda: {"encoder_hidden_states": encoded}  # noqa: E731

    @torch.no_grad()
    def generate() -> dict[str, Tensor]:
        tokens = model.generate(input_ids=ids, attention_mask=attention_mask, **given(), **_settings(search))
        return {"tokens": tokens}

    return generate


def _prepare_step(search: str, shape: Shape) -> Call:
    from led_model.generation.step import DecoderStep

    model, attention_mask = _model_of(_load_own, shape), make_arguments(shape)[1]
    rows = SEARCHES[search]
    with torch.no_grad():
        step = DecoderStep(model, _encoded(shape), attention_mask, None, rows, NEW_TOKENS, compiled=False)
    tokens = torch.full((1, rows), 5)
    return torch.no_grad()(lambda: {"logits": step(tokens, _POSITION)})


def _read(shape: Shape) -> Call:
    weights = torch.ones(step_bytes(shape) // shape.torch_dtype.itemsize, dtype=shape.torch_dtype)
    return lambda: {"sum": weights.sum()}


@functools.lru_cache(maxsize=2)
def _model_of(load: Callable[[Shape], nn.Module], shape: Shape) -> nn.Module:
    return load(shape)


@functools.lru_cache(maxsize=1)
def _encoded(shape: Shape) -> Tensor:
    return torch.randn(1, shape.seqlen, shape.d_model, generator=torch.Generator().manual_seed(1))


def _build(load: Callable[[Shape], nn.Module], shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    model = load(shape)

    @torch.no_grad()
    def summarize(ids: Tensor, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        return model.generate(
            input_ids=ids,
            attention_mask=attention_mask,
            global_attention_mask=global_attention_mask,
            **_settings(BEAMS),
        )

    return summarize


def figures(run: Run) -> Iterator[Figure]:
    for group in run.groups("generation"):
        seqlen, read = seqlen_of(group), run.row(group, "read", "torch.sum")
        for search, reach in ((GREEDY, 1.6), (BEAMS, 7)):
            stock, ours = (run.row(group, search, provider, GENERATE) for provider in (STOCK, OWN))
            name = f"{search} (led_model) vs transformers"
            yield Figure(name, seqlen, reach, ratio(stock, ours), unit=" ×")
        for search in (GREEDY, BEAMS):
            step = ratio(run.row(group, "step", OWN, search), read)
            name = f"{search} (led_model), time of a step ÷ reading its weights and keys"
            yield Figure(name, seqlen, 1.3, step, is_limit=True)
        stock, ours = (run.row(group, "memory", provider) for provider in (STOCK, OWN))
        name = f"{BEAMS} (led_model), peak memory ÷ transformers'"
        yield Figure(name, seqlen, 0.5, ratio(ours, stock, "peak_mib"), is_limit=True)


def floors(run: Run) -> list[str]:
    """Returns for every decoding step what its bytes need when they are only read, and its time."""
    reading = {row.group: row.median_ms for row in run.rows if row.what == "read"}
    steps = [row for row in run.rows if row.what == "step" and row.group in reading]
    lines = [f"{row.direction:12}{reading[row.group]:10.2f}{row.median_ms:10.2f}" for row in steps]
    return ["reading a step's bytes, the step (ms, medians)", *lines] if lines else []


SUITE = Suite("generation", "writing about a document, greedily and with beams", groups, figures, floors)
