"""Packed documents, without padding, give the losses, logits and gradients that padded ones give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pad_sequence

from led_kernels import LongformerMask
from led_model import LEDConfig, LEDForConditionalGeneration

SOURCES, TARGETS = (23, 5, 40, 1), (7, 11, 1, 4)


def build(**overrides) -> LEDForConditionalGeneration:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 61,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "attention_window": [8, 16],
        "max_encoder_position_embeddings": 40,
        "max_decoder_position_embeddings": 11,
        "init_std": 0.3,
        "dropout": 0.0,
    }
    return LEDForConditionalGeneration(LEDConfig(**settings | overrides)).train()


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def sequences(globals_at: str = "first") -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns ids, marks of global tokens and labels of each document."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 61, (length,), generator=generator) for length in SOURCES]
    labels = [torch.randint(3, 61, (length,), generator=generator) for length in TARGETS]
    labels[1][3:5] = -100
    marks = [torch.zeros_like(x) for x in ids]
    for number, x in enumerate(marks):
        if globals_at == "first" or (globals_at == "some" and number % 2 == 0):
            x[:: 9 if globals_at == "some" else len(x)] = 1
    return ids, marks, labels


def packed(ids: list[Tensor], marks: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(ids),
        "global_attention_mask": torch.cat(marks),
        "labels": torch.cat(labels),
        "cu_seqlens": cu_seqlens(SOURCES),
        "decoder_cu_seqlens": cu_seqlens(TARGETS),
    }


def padded(ids: list[Tensor], marks: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=1),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "global_attention_mask": pad_sequence(marks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def step(model, batch: dict[str, Tensor], **more) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    output = model(**batch, **more)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("globals_at", ["first", "some", "nowhere"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_those_of_padded_documents(globals_at, checkpointing):
    model = build().double()
    if checkpointing:
        model.gradient_checkpointing_enable()
    parts = sequences(globals_at)
    loss, logits, gradients = step(model, packed(*parts))
    expected_loss, padded_logits, expected = step(model, padded(*parts))
    rows = torch.cat([padded_logits[b, :length] for b, length in enumerate(TARGETS)])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, rows, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None)
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_fp32_gradients_differ_by_rounding():
    model, parts = build(init_std=0.02), sequences()
    _, _, gradients = step(model, packed(*parts))
    _, _, expected = step(model, padded(*parts))
    difference = torch.cat([(gradients[name] - g).flatten() for name, g in expected.items()]).norm()
    assert difference <= 1e-6 * torch.cat([g.flatten() for g in expected.values()]).norm()


def test_any_split_of_the_documents_gives_the_same_gradients():
    model = build().double()
    ids, marks, labels = sequences()
    items = sum(int((x != -100).sum()) for x in labels)
    _, _, expected = step(model, packed(ids, marks, labels))
    model.zero_grad()  # sets them to None, and leaves the tensors
    for b in range(len(ids)):
        one = {
            "input_ids": ids[b],
            "global_attention_mask": marks[b],
            "labels": labels[b],
            "cu_seqlens": cu_seqlens(SOURCES[b : b + 1]),
            "decoder_cu_seqlens": cu_seqlens(TARGETS[b : b + 1]),
        }
        model(**one, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_documents_do_not_see_each_other():
    model, parts = build().eval(), sequences("some")
    with torch.no_grad():
        before = model(**packed(*parts)).logits
        parts[0][2][:] = 7
        parts[2][2][:] = 9
        after = model(**packed(*parts)).logits
    last = slice(sum(TARGETS[:2]), sum(TARGETS[:3]))
    changed = (before != after).any(1)
    assert changed[last].any()
    assert not changed[: last.start].any()
    assert not changed[last.stop :].any()


def test_embeddings_in_place_of_ids():
    model, parts = build().eval(), sequences()
    batch = packed(*parts)
    with torch.no_grad():
        expected = model(**batch).logits
        shifted = model.shift_right(batch["labels"], "labels", batch["decoder_cu_seqlens"])
        embedded = {
            "inputs_embeds": model.led.shared(batch.pop("input_ids")),
            "decoder_inputs_embeds": model.led.shared(shifted),
        }
        assert torch.equal(model(**batch, **embedded).logits, expected)


def test_the_decoder_begins_each_target_anew():
    model, (_, _, labels) = build(), sequences()
    expected = [model.shift_right(x[None])[0] for x in labels]
    shifted = model.shift_right(torch.cat(labels), cu_seqlens=cu_seqlens(TARGETS))
    assert torch.equal(shifted, torch.cat(expected))


def test_the_encoder_takes_a_packed_mask():
    model, (ids, marks, _) = build().eval(), sequences()
    index = [[0]] * len(SOURCES)
    exact = LongformerMask.packed(cu_seqlens(SOURCES), index)
    # A mask that was made without a look at the lengths knows a bound on them only.
    bounded = LongformerMask.packed(cu_seqlens(SOURCES), index, max_globals=1, total_rows=sum(SOURCES))
    assert bounded.max_seqlen > model.config.max_encoder_position_embeddings
    with torch.no_grad():
        states = [model.led.encoder(torch.cat(ids), mask) for mask in (exact, bounded)]
        alone = [model.led.encode(x[None], None, mark[None])[0] for x, mark in zip(ids, marks, strict=True)]
    for found in states:
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model, parts = build(), sequences()
    exact, _, _ = step(copy.deepcopy(model).double(), packed(*parts))
    with torch.autocast("cpu", dtype):
        ours, theirs = (model(**make(*parts)).loss for make in (packed, padded))
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 1e-3 * exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(4, 40)}, "attention_mask and cu_seqlens are both given"),
        ({"decoder_attention_mask": torch.ones(23)}, "decoder_attention_mask and cu_seqlens are both given"),
        ({"cu_seqlens": None}, "decoder_cu_seqlens is given and cu_seqlens is not; pack the documents"),
        ({"cu_seqlens": [0, 69]}, r"cu_seqlens is a list of 2; give int32 or int64 \[batch \+ 1\]"),
        ({"cu_seqlens": cu_seqlens((23, 5, 40))}, "cu_seqlens is .* for the 69 tokens of input_ids"),
        ({"cu_seqlens": cu_seqlens((23, 0, 45, 1))}, "each 1 or more"),
        (
            {"cu_seqlens": cu_seqlens((23, 5, 41)), "decoder_cu_seqlens": cu_seqlens((7, 11, 5))},
            r"input_ids has a sequence of 41 tokens but .* holds 40",
        ),
        (
            {"decoder_cu_seqlens": cu_seqlens((7, 11, 1))},
            "decoder_cu_seqlens is .* for the 23 tokens of labels",
        ),
        ({"decoder_cu_seqlens": cu_seqlens((7, 11, 5))}, "has 3 sequences and cu_seqlens 4"),
        ({"decoder_cu_seqlens": cu_seqlens((12, 9, 1, 1))}, "has a sequence of 12 tokens but .* holds 11"),
        ({"decoder_cu_seqlens": None}, r"labels is torch.int64 of shape \(23,\); give .* \[batch, length\]"),
        ({"input_ids": torch.ones(1, 69).long()}, r"input_ids is .* \(1, 69\); give \[total\]"),
        ({"labels": torch.ones(1, 23).long()}, r"labels is .* \(1, 23\); give \[total\]"),
        (
            {"global_attention_mask": torch.ones(68)},
            "global_attention_mask has shape .*; give a mark for each",
        ),
        ({"input_ids": torch.full((69,), 61)}, "input_ids holds id 61, outside the vocabulary"),
        ({"output_attentions": True}, "are not served with cu_seqlens; give padded documents"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        build()(**packed(*sequences()) | change)


def test_targets_are_packed_as_documents_are():
    model, (ids, _, _) = build(), sequences()
    source, bounds = torch.cat(ids), cu_seqlens(SOURCES)
    model.led.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran before the check"))
    with pytest.raises(
        ValueError, match="cu_seqlens is given and decoder_cu_seqlens is not; pack the decoder's"
    ):
        model(source, cu_seqlens=bounds, decoder_input_ids=torch.ones(4, 3).long())
    with pytest.raises(ValueError, match="decoder_cu_seqlens is given and the decoder's input is not"):
        model.led(source, cu_seqlens=bounds, decoder_cu_seqlens=cu_seqlens((60, 3, 3, 3)))
    with pytest.raises(ValueError, match=r"^cu_seqlens is \[0, 68\] for the 69 tokens of input_ids"):
        model.led(source, cu_seqlens=torch.tensor([0, 68]))


def test_bounds_cannot_be_traced():
    model, (ids, _, _) = build().eval(), sequences()
    with pytest.raises(
        ValueError, match="cu_seqlens are looked at, and cannot be traced; give padded sequences"
    ):
        make_fx(lambda x, bounds: model.led(x, cu_seqlens=bounds).last_hidden_state, tracing_mode="fake")(
            torch.cat(ids), cu_seqlens(SOURCES)
        )
