"""Settings of generate at the ends of their ranges: the right tokens, or a sentence that names the setting."""

from __future__ import annotations

import time

import pytest
import torch

from tests.model.small import VOCAB_SIZE
from tests.model.test_led_beam_search import encoder_inputs

BEAMS, DRAWN = {"num_beams": 3}, {"do_sample": True, "seed": 0}
SEARCHES = [{}, BEAMS, DRAWN, BEAMS | DRAWN]
EVERY = [[token] for token in range(VOCAB_SIZE)]


@pytest.fixture
def model(small_model):
    return small_model(5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eos_token_id": VOCAB_SIZE, "min_length": 5}, "eos_token_id holds id 40, outside the vocabulary of 40"),
        ({"eos_token_id": [2, 10**6]}, "eos_token_id holds id 1000000, outside"),
        ({"pad_token_id": VOCAB_SIZE}, "pad_token_id holds id 40, outside"),
        ({"temperature": 1e-38} | DRAWN, "temperature is 1e-38; give a number from 0.001 to 1000"),
        ({"temperature": 1e308, "bad_words_ids": [[5]]} | DRAWN, r"temperature is 1e\+308"),
        ({"repetition_penalty": 1e-38} | DRAWN, "repetition_penalty is 1e-38; give a number from 0.001 to 1000"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9 and max_new_tokens 8; give"),
        ({"min_length": 9, "max_length": 8}, "min_length is 9 and max_length 8; give"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(model, settings, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        model.generate(**encoder_inputs(5), **{"max_new_tokens": 8} | settings)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize(
    "rules", [{"bad_words_ids": EVERY}, {"bad_words_ids": EVERY, "min_new_tokens": 8}], ids=len
)
def test_nothing_left_to_write(model, search, rules):
    """The end alone is left, for it may not be banned, until the least length bans it, too."""
    if "min_new_tokens" not in rules:
        tokens = model.generate(**encoder_inputs(5), **search | rules, max_new_tokens=8, eos_token_id=2)
        assert tokens[:, 1].tolist() == [2] * len(tokens)
        return
    with pytest.raises(ValueError, match=r"^no token is left to go on with"):
        model.generate(**encoder_inputs(5), **search | rules, max_new_tokens=8)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(model, search, number):
    with torch.no_grad():
        model.final_logits_bias[0, 7] = number
    with pytest.raises(ValueError, match=r"^the model's numbers overflowed float32"):
        model.generate(**encoder_inputs(5), **search, max_new_tokens=4)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_rows_that_have_ended_do_not_run_out_of_tokens(model, search):
    """Each token once, for longer than there are tokens: only rows that still write would have none left."""
    settings = {"no_repeat_ngram_size": 1, "eos_token_id": list(range(3, VOCAB_SIZE)), "pad_token_id": 1}
    tokens = model.generate(**encoder_inputs(5), **search | settings, max_new_tokens=40)
    assert tokens.shape[1] < 40


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("eos", [list(range(VOCAB_SIZE)), [2] * 100, [2, 5] * 90], ids=len)
def test_many_ends(model, search, eos):
    tokens = model.generate(**encoder_inputs(5), **search, max_new_tokens=6, eos_token_id=eos)
    once = model.generate(**encoder_inputs(5), **search, max_new_tokens=6, eos_token_id=sorted(set(eos)))
    assert torch.equal(tokens, once)
    if len(set(eos)) == VOCAB_SIZE:
        assert tokens.shape[1] == 2


@pytest.mark.parametrize("length_penalty", [12, 30, 50, -12, -50])
def test_whole_length_penalties(model, length_penalty):
    settings = encoder_inputs(5) | {"num_beams": 3, "max_new_tokens": 40}
    tokens = model.generate(**settings, length_penalty=length_penalty)
    assert torch.equal(tokens, model.generate(**settings, length_penalty=float(length_penalty)))
    assert tokens.shape[1] > 2


@pytest.mark.parametrize("settings", [{"length_penalty": -9.0}, {"temperature": 0.001} | DRAWN], ids=str)
def test_low_scores_are_scores(small_model, settings):
    """Of texts of which there is one, however little it is worth."""
    model = small_model(5)
    with torch.no_grad():
        model.led.shared.weight.mul_(100)  # far apart
    tokens = model.generate(**encoder_inputs(5), **BEAMS | settings, max_new_tokens=40, min_new_tokens=30)
    assert (tokens[:, 1:30] != 2).all()
    assert tokens.shape[1] > 30


def test_a_checkpoints_least_length_yields_to_a_callers_longest(model):
    model.generation_config.min_length = 20
    model.generation_config.min_new_tokens = 20
    assert model.generate(**encoder_inputs(5), max_new_tokens=5).shape[1] == 6
    assert model.generate(**encoder_inputs(5), max_length=5).shape[1] == 5


def test_many_banned_words_take_little_time(model):
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(4, VOCAB_SIZE, (500_000, 2), generator=generator).tolist()
    lengths = [torch.randint(4, VOCAB_SIZE, (n,), generator=generator).tolist() for n in range(2, 1500)]
    for words in (pairs, lengths):
        began = time.perf_counter()
        model.generate(
            **encoder_inputs(5), max_new_tokens=40, eos_token_id=None, bad_words_ids=words[:-1] or None
        )
        assert time.perf_counter() - began < 30
