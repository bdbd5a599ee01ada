"""Sequences that begin with a prompt, against transformers' without a cache, which alone heeds a prompt's padding."""

from __future__ import annotations

import pytest
import torch

from tests.model.small import VOCAB_SIZE, random_inputs

START = 2


def inputs_and_prompt(seed: int, *, start: bool, padded: bool) -> dict[str, torch.Tensor]:
    inputs = random_inputs(seed, batch=3)
    del inputs["decoder_input_ids"]
    prompt = torch.randint(4, VOCAB_SIZE, (3, 4), generator=torch.Generator().manual_seed(seed))
    if start:
        prompt[0, 0] = START  # where one row begins with it, it is not put before the others either
    inputs["decoder_input_ids"] = prompt
    if padded:
        mask = torch.ones_like(prompt)
        mask[1, :2] = 0
        inputs["decoder_attention_mask"] = mask
    return inputs


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 10},
        {"max_length": 9, "min_length": 8},
        {"max_new_tokens": 8, "min_new_tokens": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"max_new_tokens": 6, "forced_eos_token_id": 7, "forced_bos_token_id": 5},
    ],
    ids=str,
)
def test_tokens_equal_transformers(led_pair, beams, start, padded, settings):
    stock, ours = led_pair(3)
    settings = settings | {"eos_token_id": list(range(2, 9)), "num_beams": beams}
    if beams > 1:
        settings |= {"length_penalty": 2.0, "num_return_sequences": 2, "early_stopping": "never"}
    inputs = inputs_and_prompt(3, start=start, padded=padded)
    expected = stock.generate(
        **inputs,
        **settings,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    output = ours.generate(**inputs, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected.sequences)
    if beams > 1:
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=0)


def test_sampled_sequences_begin_with_their_prompt(small_model):
    model = small_model(0)
    inputs = inputs_and_prompt(0, start=True, padded=True)
    tokens = model.generate(**inputs, do_sample=True, seed=0, num_return_sequences=2, max_new_tokens=5)
    assert tokens.shape == (6, 9)
    assert torch.equal(tokens[:, :4], inputs["decoder_input_ids"].repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder_input_ids": torch.ones(2, 3, dtype=torch.int64)},
            r"decoder_input_ids has shape \(2, 3\) for 3",
        ),
        (
            {"decoder_attention_mask": torch.ones(3, 3)},
            r"decoder_attention_mask is .* of shape \(3, 3\); give",
        ),
        ({"max_length": 4}, "allows 0 new tokens"),
        ({"max_new_tokens": 46}, "give max_new_tokens of at most 45"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(small_model, changes, message):
    inputs = inputs_and_prompt(0, start=True, padded=False) | {"max_new_tokens": 5}
    if "max_length" in changes:
        del inputs["max_new_tokens"]
    with pytest.raises(ValueError, match=message):
        small_model(0).generate(**inputs | changes)
