"""Rules on scores and drawn tokens, against transformers' with the same weights and the same seed."""

from __future__ import annotations

import json

import pytest
import torch

from led_model import GenerationConfig
from led_model.generation import step as decoder_step
from tests.model.small import VOCAB_SIZE
from tests.model.test_led_beam_search import encoder_inputs

RULES = [
    {"min_length": 9},
    {"min_new_tokens": 9},
    {"min_length": 30, "max_new_tokens": 8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 4},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 3},
    {"encoder_no_repeat_ngram_size": 50},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.5},
    {"bad_words_ids": [[7], [2], [35, 36], [32, 35], [35, 35], [2, 35, 35, 32]]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_length": 6, "forced_eos_token_id": 2},
]
SAMPLING = [
    {},
    {"top_k": 0},
    {"temperature": 2.5, "top_k": 0},
    {"top_k": 3, "temperature": 3.0},
    {"top_k": 0, "top_p": 0.7, "temperature": 2.0},
    {"top_k": 9, "top_p": 0.9, "temperature": 2.0, "num_return_sequences": 3},
    {"temperature": 2.0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_return_sequences": 2},
]


def case(rules: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Inputs and settings under which ``rules`` matter: for the source's n-grams, sources of few words."""
    inputs = encoder_inputs(5, batch=4)
    if "encoder_no_repeat_ngram_size" in rules:
        inputs["input_ids"] = 32 + inputs["input_ids"] % 8
        return inputs, {"max_new_tokens": 25}
    return inputs, {"max_new_tokens": 25, "eos_token_id": [2, 35, 37]}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules_equal_transformers(led_pair, rules, beams):
    stock, ours = led_pair(5)
    inputs, settings = case(rules)
    settings |= {"num_beams": beams} | rules
    assert torch.equal(ours.generate(**inputs, **settings), stock.generate(**inputs, **settings))


def test_rules_change_tokens(led_pair):
    """Each rule above bites, or its comparison would say nothing; n-grams longer than the source cannot."""
    _, ours = led_pair(5)
    unchanged = []
    for rules in RULES:
        inputs, settings = case(rules)
        if torch.equal(ours.generate(**inputs, **settings | rules), ours.generate(**inputs, **settings)):
            unchanged.append(rules)
    assert unchanged == [{"encoder_no_repeat_ngram_size": 50}]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_drawn_tokens_equal_transformers(led_pair, settings):
    stock, ours = led_pair(4)
    inputs = encoder_inputs(4)
    settings = {"max_new_tokens": 20, "eos_token_id": [2, 7, 9], "do_sample": True} | settings
    torch.manual_seed(5)
    expected = stock.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, seed=5, **settings), expected)
    torch.manual_seed(5)
    assert torch.equal(ours.generate(**inputs, **settings), expected)  # without seed: the global generator


def test_seed_repeats_and_leaves_the_global_generator_alone(small_model):
    model, inputs = small_model(4), encoder_inputs(4)
    settings = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12}
    state = torch.get_rng_state()
    first = model.generate(**inputs, seed=1, **settings)
    assert torch.equal(model.generate(**inputs, seed=1, **settings), first)
    assert not torch.equal(model.generate(**inputs, seed=2, **settings), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_looking_for_the_end_now_and_then_changes_nothing(small_model, monkeypatch, interval):
    model, inputs = small_model(5), encoder_inputs(5, batch=2)
    settings = {"max_new_tokens": 40, "eos_token_id": list(range(2, VOCAB_SIZE - 5))}
    expected = model.generate(**inputs, **settings)
    assert expected.shape[1] < 40
    calls = []
    step = decoder_step.DecoderStep.__call__
    monkeypatch.setattr(decoder_step.DecoderStep, "__call__", lambda *args: (calls.append(1), step(*args))[1])
    monkeypatch.setattr(
        decoder_step.Search, "should_stop", lambda self, ended, length: length % interval == 0 and bool(ended)
    )
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert len(calls) == min(40, -(-(expected.shape[1] - 1) // interval) * interval)


def test_settings_of_a_checkpoint_are_used(led_pair):
    """Those of led-large-16384-arxiv, with shorter lengths."""
    stock, ours = led_pair(3)
    settings = {
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "min_length": 10,
        "max_length": 30,
    }
    for name, value in settings.items():
        setattr(stock.generation_config, name, value)
        setattr(ours.generation_config, name, value)
    inputs = encoder_inputs(3)
    assert torch.equal(ours.generate(**inputs), stock.generate(**inputs))
    assert torch.equal(ours.generate(**inputs, num_beams=1), stock.generate(**inputs, num_beams=1))


def test_what_is_not_supported_is_kept_by_name():
    config = GenerationConfig.from_dict(
        {"num_beams": 4, "min_length": None, "typical_p": 0.9, "num_beam_groups": 1, "suppress_tokens": [3]}
    )
    assert (config.num_beams, config.min_length) == (4, 0)
    assert config.unsupported == {"typical_p": 0.9, "suppress_tokens": [3]}


def test_callers_limits_win_over_the_checkpoints():
    config = GenerationConfig(max_new_tokens=5, min_new_tokens=3)
    updated = config.updated(max_length=9, min_length=2)
    assert (updated.max_sequence_length(), updated.min_sequence_length()) == (9, 2)
    assert (config.max_sequence_length(), config.min_sequence_length()) == (6, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; give a whole number from 1"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0; give a whole number from 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3 but num_beams is 2"),
        ({"num_return_sequences": 2}, "greedy decoding finds one sequence; set num_beams or do_sample=True"),
        ({"num_beams": 2, "early_stopping": "always"}, "'always'; give True, False or 'never'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0; .*do_sample=False"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0; give a number above 0 and at most 1"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1; give a whole number from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give a number from 0.001 to 1000"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; give a whole number from 0"),
        ({"bad_words_ids": [3]}, r"bad_words_ids is \[3\]; give a list of non-empty lists"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids is \[\[\]\]; give a list of non-empty lists"),
        ({"bad_words_ids": [[40]]}, "bad_words_ids holds id 40, outside the vocabulary of 40"),
        ({"forced_bos_token_id": 40}, "forced_bos_token_id holds id 40, outside the vocabulary"),
        ({"forced_eos_token_id": [2, 41]}, "forced_eos_token_id holds id 41, outside the vocabulary"),
    ],
    ids=str,
)
def test_settings_that_contradict_are_named(small_model, settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(0).generate(**encoder_inputs(0), **settings)


def test_settings_that_are_not_obeyed_are_named(small_model, tmp_path):
    """From whichever file, also those that nobody knows; but none that only make it faster."""
    model = small_model(0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    ignored = {"stop_strings": ["x\x1b"], "max_time": 3.0, "force_words_ids": [[3]], "no_such_setting": 1}
    silent = {"prompt_lookup_num_tokens": 3, "use_cache": True, "_from_model_config": True, "top_k": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | ignored | silent))
    with pytest.warns(UserWarning, match="asks for .*; generate decodes without it") as warned:
        loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.unsupported == ignored
    assert len(warned) == 1
    assert str(warned[0].message).isprintable()
