"""A release of transformers is tried out: its decoder stays, is replaced, or is kept from what it does wrong."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
import transformers
from decoding import VERSION, has_decoder_of_ours
from hf_cases import HFCase, true_fp64
from torch import nn
from transformers import LEDForConditionalGeneration, StaticCache
from transformers.models.led.modeling_led import LEDDecoder

from led_kernels.hf import apply_led_kernels, compat, decoder_report, is_applied, patching, probe
from led_kernels.hf import led_encoder as fused_led
from led_kernels.hf.classes import LED_DECODER, LED_ENCODER, LONGFORMER
from led_kernels.hf.compat import is_newer_than_tested
from led_kernels.hf.led_decoder import FusedLEDDecoder, FusedLEDDecoderAttention
from led_kernels.hf.probe import Decoder, encoder_difference, right_decoder

CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))
MEMORIES = (right_decoder, encoder_difference, patching._warn_once)
TABLES = {
    f"{stock.__name__}": (stock, ours)
    for table in (LED_ENCODER, LONGFORMER, LED_DECODER)
    for stock, ours in table.items()
}


@pytest.fixture
def forgetful():
    """Forgets what was found out, before a test and after it."""
    for memory in MEMORIES:
        memory.cache_clear()
    yield
    for memory in MEMORIES:
        memory.cache_clear()


@pytest.fixture
def stock() -> nn.Module:
    torch.manual_seed(0)
    return LEDForConditionalGeneration(CASE.led_config(eos_token_id=None)).eval()


def static(model: nn.Module):
    return model.generate(**CASE.inputs(), max_new_tokens=4, cache_implementation="static")


def test_what_tested_releases_do():
    """These are facts: if the probe were wrong, some release would give another result."""
    if VERSION < (4, 56):  # which do without a cache where one of another kind is asked for
        assert right_decoder() is Decoder.STOCK
        assert "stays" in decoder_report()
    elif not is_newer_than_tested():
        assert right_decoder() is Decoder.FUSED
        assert "is replaced by ours" in decoder_report()
    assert encoder_difference("led") is None
    assert encoder_difference("longformer") is None
    assert transformers.__version__ in decoder_report()


def play_right_release(monkeypatch):
    """Gives transformers' decoder the forwards of the fused one."""
    for theirs, ours in LED_DECODER.items():
        for name, function in inspect.getmembers(ours, inspect.isfunction):
            if function.__module__.startswith("led_kernels."):
                monkeypatch.setattr(theirs, name, function, raising=False)
        if hasattr(ours, "context"):
            monkeypatch.setattr(theirs, "context", None, raising=False)


def fails(self, *args, **kwargs):
    raise AttributeError("moved")


@has_decoder_of_ours
def test_ours_is_taken_where_both_decoders_are_right(stock, monkeypatch, forgetful):
    play_right_release(monkeypatch)
    assert right_decoder() is Decoder.FUSED
    assert type(apply_led_kernels(stock).get_decoder()) is FusedLEDDecoder


@has_decoder_of_ours
def test_release_with_a_right_decoder_keeps_it_where_ours_fails(stock, monkeypatch, forgetful):
    play_right_release(monkeypatch)
    monkeypatch.setattr(FusedLEDDecoderAttention, "forward", fails)
    assert right_decoder() is Decoder.STOCK
    assert type(apply_led_kernels(stock).get_decoder()) is LEDDecoder
    assert is_applied(stock)
    apply_led_kernels()
    assert type(LEDForConditionalGeneration(CASE.led_config()).get_decoder()) is LEDDecoder
    apply_led_kernels(stock.get_decoder())  # nothing is to be done, which is no error


def play_release_of_neither(monkeypatch):
    """Makes the fused decoder fail; transformers' own is wrong, once it embeds positions that are tensors."""
    monkeypatch.setattr(FusedLEDDecoderAttention, "forward", fails)
    embedding, ours = next((t, o) for t, o in LED_DECODER.items() if issubclass(t, nn.Embedding))
    monkeypatch.setattr(embedding, "forward", ours.forward)


@has_decoder_of_ours
@pytest.mark.skipif(is_newer_than_tested(), reason="what a newer release does is not known")
def test_where_neither_is_right_static_caches_are_refused(stock, monkeypatch, forgetful):
    expected = stock.generate(**CASE.inputs(), max_new_tokens=4)
    play_release_of_neither(monkeypatch)
    assert right_decoder() is Decoder.NEITHER
    with pytest.warns(UserWarning, match="static caches are refused"):
        apply_led_kernels(stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_led_kernels(stock)  # said once
    assert torch.equal(stock.generate(**CASE.inputs(), max_new_tokens=4), expected)
    with pytest.raises(ValueError, match="leave it out, for a dynamic cache"):
        static(stock)
    prompt = {
        "decoder_input_ids": torch.tensor([[2, 7, 9], [1, 2, 8]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    }
    with pytest.raises(ValueError, match="decoder_attention_mask is forgotten"):
        stock.generate(**CASE.inputs(), **prompt, max_new_tokens=4)
    apply_led_kernels()
    with pytest.raises(ValueError, match="leave it out, for a dynamic cache"):
        static(LEDForConditionalGeneration(CASE.led_config()))


class OwnDecoder(LEDDecoder):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@has_decoder_of_ours
def test_decoder_with_a_forward_of_its_own_keeps_it_and_refuses_static_caches(stock):
    expected = stock.generate(**CASE.inputs(), max_new_tokens=4)
    stock.get_decoder().__class__ = OwnDecoder
    apply_led_kernels(stock)
    assert torch.equal(stock.generate(**CASE.inputs(), max_new_tokens=4), expected)
    with pytest.raises(ValueError, match="leave it out, for a dynamic cache"):
        static(stock)


@pytest.mark.parametrize("family", ["led", "longformer"])
def test_encoder_that_differs_is_refused_and_nothing_changed(family, stock, monkeypatch, forgetful):
    """It is played that a release has changed what its encoder computes."""
    inner = fused_led.FusedSelfAttention.forward
    for _, ours in TABLES.values():
        if issubclass(ours, fused_led.FusedSelfAttention):
            monkeypatch.setattr(
                ours, "forward", lambda self, *a, **k: tuple(1.1 * x for x in inner(self, *a[:2], **kept(k)))
            )
    assert "differs from it by" in encoder_difference(family)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        apply_led_kernels(stock)
    assert not is_applied(stock)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        apply_led_kernels()
    assert not is_applied(LEDForConditionalGeneration(CASE.led_config()))


def kept(arguments: dict) -> dict:
    names = ("hidden_states", "attention_mask", "output_attentions")
    return {name: value for name, value in arguments.items() if name in names}


def test_newer_release_says_so_once(stock, monkeypatch, forgetful):
    # transformers may replace its own module while it is imported, so that importers hold different ones.
    for importer in (compat, patching):
        monkeypatch.setattr(importer.transformers, "__version__", "99.1.0")
    assert compat.tested_note().startswith("newer than ")
    with pytest.warns(UserWarning, match=r"99\.1\.0 is newer than"):
        apply_led_kernels(stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_led_kernels(stock)


@pytest.mark.parametrize(("version", "note"), [("5.24.3", "tested"), ("5.21.0", "untested, between")])
def test_tested_note(version, note, monkeypatch):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    assert compat.tested_note().startswith(note)


def test_question_leaves_the_generator_and_the_log_alone(caplog, recwarn):
    state, verbosity = torch.get_rng_state(), transformers.utils.logging.get_verbosity()
    for question in (right_decoder.__wrapped__, lambda: encoder_difference.__wrapped__("led")):
        question()
    assert torch.equal(torch.get_rng_state(), state)
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert not caplog.records
    assert not recwarn.list


def test_answer_does_not_depend_on_the_surroundings():
    expected = right_decoder()
    with true_fp64():
        assert probe.right_decoder.__wrapped__() is expected
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert probe.right_decoder.__wrapped__() is expected
    with torch.device("meta"):
        assert probe.right_decoder.__wrapped__() is expected
        assert encoder_difference.__wrapped__("led") is None
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")
    with accelerate.init_empty_weights():
        assert probe.right_decoder.__wrapped__() is expected


@pytest.mark.parametrize(("theirs", "ours"), TABLES.values(), ids=TABLES.keys())
def test_positions_of_arguments_are_those_of_the_release(theirs, ours):
    """Returns the arguments as a caller sees them, who may give any of them by position."""
    own, stock = (
        [(p.name, p.kind) for p in inspect.signature(each.forward).parameters.values()]
        for each in (ours, theirs)
    )
    assert own == stock


def test_past_tokens_by_position_and_by_the_name_of_the_release(stock):
    """The positional embedding's second argument was renamed in 5.24."""
    shape, past = torch.Size((2, 3)), 4
    embedding = stock.get_decoder().embed_positions
    name = list(inspect.signature(type(embedding).forward).parameters)[2]
    expected = embedding(shape, past)
    embedding = apply_led_kernels(stock).get_decoder().embed_positions
    for given in (embedding(shape, past), embedding(shape, **{name: past})):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="unheard_of"):
        embedding(shape, unheard_of=past)


def test_every_position_arrives(stock):
    """Arguments of the stock forwards mean the same by position and by name."""
    inputs = CASE.inputs()
    decoder_ids = torch.tensor([[2, 7, 9], [2, 8, 8]])
    apply_led_kernels(stock)
    encoder, decoder = stock.get_encoder(), stock.get_decoder()
    for module, given in (
        (encoder, inputs | {"output_hidden_states": True}),
        (
            decoder,
            {
                "input_ids": decoder_ids,
                "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
                "encoder_hidden_states": encoder(**inputs)[0],
                "encoder_attention_mask": inputs["attention_mask"],
                "use_cache": False,
                "output_attentions": True,
                "return_dict": False,
            },
        ),
    ):
        order = list(inspect.signature(module.forward).parameters)
        last = max(order.index(name) for name in given)
        by_position = module(*(given.get(name) for name in order[: last + 1]))
        by_name = module(**given)
        torch.testing.assert_close(by_position[0], by_name[0], rtol=0, atol=0)
        assert len(by_position) == len(by_name)


@has_decoder_of_ours
@pytest.mark.parametrize("spelling", ["cache", "past_key_values", "past_key_value", "one_to_come"])
def test_every_spelling_of_the_cache(spelling, stock):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = apply_led_kernels(stock).get_decoder()
        assert isinstance(decoder, FusedLEDDecoder) or is_newer_than_tested()
        cache = compat.new_cache(stock.config)
        ids = torch.tensor([[2, 7, 9]])
        hidden = torch.randn(1, 5, stock.config.d_model)
        for position in range(3):
            last = decoder(
                ids[:, position, None], encoder_hidden_states=hidden, **{spelling: cache}, use_cache=True
            )[0]
        whole = decoder(ids, encoder_hidden_states=hidden, use_cache=False)[0]
    torch.testing.assert_close(last[:, 0], whole[:, -1])
    assert cache.get_seq_length() == 3


def test_arguments_that_ours_do_not_know_are_refused():
    """An unknown argument is not ignored, which would be silent."""

    def stock(self, hidden, bias=None, layer_head_mask=None, mask=None): ...
    def stock_of_any(self, hidden, bias=None, **kwargs): ...
    def ours(self, hidden, cache=None):
        return hidden

    strict, loose = (
        compat.takes_arguments_of(stock, ("mask",))(ours),
        compat.takes_arguments_of(stock_of_any)(ours),
    )
    assert strict(None, 1, None, mask=2) == loose(None, 1, labels=2) == loose(None, hidden=1) == 1
    for forward, given in ((strict, {"labels": 1}), (strict, {"bias": 1}), (loose, {"bias": 1})):
        with pytest.raises(TypeError, match="which led_kernels does not know"):
            forward(None, 1, **given)
    with pytest.raises(ValueError, match="head_mask is not supported"):
        strict(None, 1, layer_head_mask=1)
    with pytest.raises(TypeError, match="takes 4 arguments, not 5"):
        strict(None, 1, 2, 3, 4, 5)


def test_name_of_a_cache_to_come():
    """A cache is found by its annotation, so that a further renaming does not even break the import."""

    def forward(self, hidden: torch.Tensor, memory: compat.Cache | None = None): ...

    assert compat.cache_argument(forward) == "memory"
    assert compat._OUTPUT_CACHE in {f.name for f in fields(compat.BaseModelOutputWithPastAndCrossAttentions)}


def test_no_deprecation_warning_comes_from_our_calls(stock):
    """A fused model runs with every output, in training, and with both caches."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_led_kernels(stock)
        inputs = CASE.inputs()
        stock(
            **inputs, labels=inputs["input_ids"][:, :4].contiguous(), output_attentions=True
        ).loss.backward()
        stock.generate(**inputs, max_new_tokens=3)
        if VERSION >= (4, 56):
            static(stock)


@has_decoder_of_ours
def test_is_static():
    config = CASE.led_config()
    assert compat.is_static(StaticCache(config=config, max_cache_len=4))
    assert not compat.is_static(compat.new_cache(config))
    assert not compat.is_static(torch.zeros(1))
