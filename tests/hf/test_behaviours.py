"""The fused models behave as transformers' own test files ask of every LED and Longformer model."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
import transformers
from hf_cases import HFCase, assert_close, fused, varied
from torch import Tensor, nn

from led_kernels.hf import is_applied

CASE = HFCase(seqlen=24, globals_per_row=((0, 9), (4,)), padding=("none", "right"))  # stock pads nothing
NAMES = (
    "LongformerModel",
    "LongformerForMaskedLM",
    "LongformerForSequenceClassification",
    "LongformerForTokenClassification",
    "LongformerForQuestionAnswering",
    "LongformerForMultipleChoice",
    "LEDModel",
    "LEDForConditionalGeneration",
    "LEDForQuestionAnswering",
    "LEDForSequenceClassification",  # not in every release
)
HEADS = [getattr(transformers, name) for name in NAMES if hasattr(transformers, name)]
every_head = pytest.mark.parametrize("head", HEADS, ids=[head.__name__ for head in HEADS])


def build(head: type[nn.Module], **overrides) -> nn.Module:
    make_config = CASE.led_config if head.__name__.startswith("LED") else CASE.longformer_config
    return varied(head(make_config(**overrides)))


def given(model: nn.Module, case: HFCase = CASE) -> dict[str, Tensor]:
    inputs = case.inputs()
    if type(model).__name__ == "LEDForSequenceClassification":  # one end of text in each row
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 2, 3)
        inputs["input_ids"][:, 3] = 2
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7]
    if type(model).__name__ == "LongformerForMultipleChoice":
        inputs = {name: value[None] for name, value in inputs.items()}  # [batch, choices, seqlen]
    return inputs


def flat(result) -> dict[str, Tensor]:
    """Returns every tensor of an output, by name and layer; caches are left out."""
    named = {}
    for name, value in result.items():
        if isinstance(value, Tensor):
            named[name] = value
        elif isinstance(value, tuple) and all(isinstance(x, Tensor) for x in value):
            named |= {f"{name}[{layer}]": x for layer, x in enumerate(value)}
    return named


@every_head
def test_shapes_and_values_of_every_output(head):
    stock = build(head)
    with torch.no_grad():
        flags = {"output_attentions": True, "output_hidden_states": True}
        expected, actual = (flat(m(**given(m), **flags)) for m in (stock, fused(stock)))
    # Where a row has fewer global tokens than another, transformers leaves filler.
    assert {n: x.shape for n, x in actual.items()} == {n: x.shape for n, x in expected.items()}
    assert_close(
        *({n: x for n, x in named.items() if "global" not in n} for named in (actual, expected)), 1e-4
    )


@every_head
def test_flags_of_the_config_are_heard(head):
    model = fused(build(head))
    with torch.no_grad():
        plain = model(**given(model))
        model.config.output_attentions = model.config.output_hidden_states = True
        spoken = model(**given(model))
    assert not [name for name in plain if "attentions" in name]
    names = [name for name in spoken if name.endswith(("attentions", "hidden_states"))]
    assert len(names) >= 3
    assert all(spoken[name] is not None for name in names)


@every_head
def test_tuples_hold_what_outputs_by_name_hold(head):
    model = fused(build(head))
    flags = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        by_name = model(**given(model), **flags).to_tuple()
        by_place = model(**given(model), **flags, return_dict=False)

    def compare(left, right) -> None:
        if isinstance(left, Tensor):
            assert torch.equal(left, right)
        elif isinstance(left, tuple):
            assert len(left) == len(right)
            for pair in zip(left, right, strict=True):
                compare(*pair)

    compare(by_name, by_place)


@every_head
def test_embeddings_instead_of_ids(head):
    model = fused(build(head))
    if head.__name__.endswith(
        ("MultipleChoice", "LEDForSequenceClassification")
    ):  # which look for ends of text
        model = model.base_model
    inputs = given(model)
    with torch.no_grad():
        expected = model(**inputs)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        if "Longformer" in head.__name__:
            inputs["position_ids"] = positions(CASE)
        actual = model(**inputs)
    real = CASE.inputs()["attention_mask"].bool()
    for name in ("last_hidden_state", "logits", "start_logits", "encoder_last_hidden_state"):
        if name in expected:
            theirs, ours = expected[name], actual[name]
            if theirs.shape[:2] == real.shape:
                theirs, ours = theirs[real], ours[real]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def positions(case: HFCase) -> Tensor:
    """Returns the positions that Longformer counts from ids: it begins with 2, and padding has 1."""
    real = case.inputs()["attention_mask"]
    return real.cumsum(1) * real + 1


@pytest.mark.parametrize("head", [head for head in HEADS if not head.__name__.endswith("MultipleChoice")])
def test_rows_do_not_see_each_other(head):
    """A batch gives what its rows give alone."""
    model = fused(build(head), max_globals=2)
    inputs = given(model)
    with torch.no_grad():
        together = flat(model(**inputs))
        for row in range(2):
            alone = flat(model(**{name: value[row : row + 1] for name, value in inputs.items()}))
            assert_close(alone, {name: value[row : row + 1] for name, value in together.items()}, 1e-5)


@pytest.mark.parametrize("head", [head for head in HEADS if head.__name__.startswith("LED")])
def test_gradients_of_hidden_states(head):
    """Gradients are kept where asked for, and are those of stock; Longformer returns slices, which have none."""
    stock = build(head)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        result = model(**given(model), output_hidden_states=True)
        names = [name for name in result if name.endswith("hidden_states")]
        kept = {f"{name}[{i}]": state for name in names for i, state in enumerate(result[name])}
        for state in kept.values():
            state.retain_grad()
        result[0].square().sum().backward()
        return {name: state.grad for name, state in kept.items()}

    expected = gradients(stock)
    assert sum(value is not None for value in expected.values()) >= 3
    assert_close(gradients(fused(stock)), expected, 1e-4)


@every_head
def test_saved_and_loaded(head, tmp_path):
    model = fused(build(head))
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path).eval()
    assert not is_applied(loaded)
    with torch.no_grad():
        assert_close(flat(fused(loaded)(**given(model))), flat(model(**given(model))), 1e-6)


@pytest.mark.parametrize(
    "problem", ["regression", "single_label_classification", "multi_label_classification"]
)
def test_kinds_of_labels(problem):
    stock = build(
        transformers.LongformerForSequenceClassification, num_labels=1 if problem == "regression" else 3
    )
    stock.config.problem_type = problem
    labels = {
        "regression": torch.tensor([0.3, -1.0]),
        "single_label_classification": torch.tensor([2, 0]),
        "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
    }[problem]
    ours = fused(stock)
    expected, actual = (model(**given(model), labels=labels).loss for model in (stock, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    actual.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", [h for h in HEADS if h.__name__ in ("LongformerModel", "LEDModel")])
def test_every_length_up_to_three_windows(head):
    """transformers pads to a multiple of the window; the fused models do not, and agree on what is no padding."""
    stock = build(head)
    ours = fused(stock)
    for seqlen in range(1, 25, 3):
        case = replace(CASE, seqlen=seqlen, globals_per_row=((0,), (seqlen // 2,)), padding=("none", "none"))
        with torch.no_grad():
            assert_close(flat(ours(**given(ours, case))), flat(stock(**given(stock, case))), 1e-4)
