"""Question answering and sequence classification against transformers', with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from led_model import LEDConfig, LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.checkpoint.tensor_names import to_hf_state_dict
from tests.model.small import random_inputs, randomize, small_config
from tests.model.test_led_outputs import ASK, assert_same_outputs

EOS = 2


@pytest.fixture
def head_pair(tmp_path):
    """A function: ours' class, seed and config overrides to (transformers' model, ours), same weights."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()

    def make(model_class, seed: int = 0, **overrides):
        config = transformers.LEDConfig(**small_config(seed, **overrides))
        if model_class is LEDForQuestionAnswering:
            stock = transformers.LEDForQuestionAnswering(config)
        else:
            stock = stock_classifier(transformers, config)
        randomize(stock, seed)
        stock.save_pretrained(tmp_path / "head")
        return stock.eval(), model_class.from_pretrained(tmp_path / "head")

    return make


def stock_classifier(transformers, config):
    """Returns transformers' own class where it still has one (before 5), else its parts put together likewise."""
    if hasattr(transformers, "LEDForSequenceClassification"):
        return transformers.LEDForSequenceClassification(config)
    from transformers.models.led import modeling_led

    class LEDForSequenceClassification(modeling_led.LEDPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.led = modeling_led.LEDModel(config)
            self.classification_head = modeling_led.LEDClassificationHead(
                config.d_model, config.d_model, config.num_labels, config.classifier_dropout
            )
            self.post_init()

        def forward(self, input_ids, labels=None, **inputs):
            output = self.led(input_ids, **inputs)
            states = output.last_hidden_state
            is_eos = input_ids == self.config.eos_token_id
            logits = self.classification_head(states[is_eos].view(len(states), -1, states.shape[-1])[:, -1])
            loss = None
            if labels is not None and self.config.num_labels == 1:
                loss = nn.MSELoss()(logits.squeeze(), labels.squeeze())
            elif labels is not None:
                integers = labels.dtype in (torch.int32, torch.int64)
                loss = (nn.CrossEntropyLoss() if integers else nn.BCEWithLogitsLoss())(logits, labels)
            values = dict(output) | {"loss": loss, "logits": logits}
            del values["last_hidden_state"]
            return modeling_led.LEDSeq2SeqSequenceClassifierOutput(**values)

    return LEDForSequenceClassification(config)


def text_inputs(seed: int, seqlen: int = 37, eos: int = 2) -> dict[str, torch.Tensor]:
    """Makes random texts with ``eos`` end tokens a row, the last not at the end; the decoder reads them too."""
    inputs = random_inputs(seed, seqlen=seqlen)
    del inputs["decoder_input_ids"]
    for row, ids in enumerate(inputs["input_ids"]):
        ids[[7 * (i + 1) + row for i in range(eos)]] = EOS
    return inputs


def assert_same_gradients(stock, ours) -> None:
    gradients = to_hf_state_dict({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("seed", range(3))
def test_question_answering(head_pair, seed):
    stock, ours = head_pair(LEDForQuestionAnswering, seed)
    inputs = random_inputs(seed, target=11)
    labels = {"start_positions": torch.tensor([2, 11, 0]), "end_positions": torch.tensor([[4], [30], [-3]])}
    with torch.no_grad():
        for extra in ({}, labels):
            expected = stock(**inputs, **{k: v.clone() for k, v in extra.items()}, **ASK)
            output = ours(**inputs, **extra, **ASK)
            assert_same_outputs(expected, output, inputs)
    assert (output.loss is None) is (not labels)
    assert output.start_logits.shape == output.end_logits.shape == (3, 11)


def test_question_answering_reads_the_text_itself_by_default(head_pair):
    stock, ours = head_pair(LEDForQuestionAnswering, 1)
    inputs = text_inputs(1)
    with torch.no_grad():
        expected, output = stock(**inputs), ours(**inputs)
    torch.testing.assert_close(output.start_logits, expected.start_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.end_logits, expected.end_logits, atol=1e-4, rtol=0)
    assert output.start_logits.shape == (3, 37)


def test_question_answering_gradients(head_pair):
    stock, ours = head_pair(LEDForQuestionAnswering, 2, attention_window=[8, 8])
    inputs = random_inputs(2)
    labels = {"start_positions": torch.tensor([2, 5, 0]), "end_positions": torch.tensor([4, 8, 3])}
    for model in (stock.train(), ours.train()):
        model(**inputs, **labels).loss.backward()
    assert_same_gradients(stock, ours)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (4, torch.tensor([3, 0, 2])),
        (2, torch.tensor([1, 0, 1])),
        (1, torch.tensor([0.5, -1.0, 2.0])),
        (5, torch.tensor([[0.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])),
    ],
    ids=["classes", "two classes", "regression", "multi-label"],
)
@pytest.mark.parametrize("eos", [1, 3])
def test_sequence_classification(head_pair, num_labels, labels, eos):
    stock, ours = head_pair(LEDForSequenceClassification, num_labels, num_labels=num_labels)
    assert ours.config.num_labels == num_labels
    inputs = text_inputs(num_labels, eos=eos)
    with torch.no_grad():
        for extra in ({}, {"labels": labels}):
            assert_same_outputs(stock(**inputs, **extra, **ASK), ours(**inputs, **extra, **ASK), inputs)


def test_sequence_classification_gradients(head_pair):
    stock, ours = head_pair(LEDForSequenceClassification, 3, attention_window=[8, 8], num_labels=3)
    inputs = text_inputs(3)
    for model in (stock.train(), ours.train()):
        model(**inputs, labels=torch.tensor([2, 0, 1])).loss.backward()
    assert_same_gradients(stock, ours)


def test_problem_type_of_the_config_wins():
    model = LEDForSequenceClassification(
        LEDConfig(**small_config(0), num_labels=3, problem_type="regression")
    ).eval()
    inputs, labels = text_inputs(0), torch.randn(3, 3)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())
        model.config.problem_type = "ranking"
        with pytest.raises(ValueError, match="problem_type is 'ranking'; give 'regression'"):
            model(**inputs, labels=labels)


def test_several_eos_ids():
    model = LEDForSequenceClassification(LEDConfig(**small_config(0), eos_token_id=[EOS, 3])).eval()
    inputs = text_inputs(0, eos=1)
    with torch.no_grad():
        one = model(**inputs).logits
        model.config.eos_token_id = EOS
        assert torch.equal(model(**inputs).logits, one)


def test_dropout_of_the_classifier():
    model = LEDForSequenceClassification(LEDConfig(**small_config(0), classifier_dropout=0.5)).train()
    inputs = text_inputs(0)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda i: i["input_ids"].clamp_(min=4), "rows of input_ids have 0 to 0 eos tokens"),
        (lambda i: i["input_ids"][0].clamp_(min=4), "rows of input_ids have 0 to 2 eos tokens"),
        (lambda i: i["input_ids"][1, 0].fill_(EOS), "rows of input_ids have 2 to 3 eos tokens"),
        (lambda i: i.update(decoder_input_ids=i["input_ids"][:, :9]), "has 9 tokens and input_ids 37"),
    ],
)
def test_eos_tokens_that_do_not_match(spoil, message):
    model = LEDForSequenceClassification(LEDConfig(**small_config(0)))
    inputs = text_inputs(0)
    spoil(inputs)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**inputs)
