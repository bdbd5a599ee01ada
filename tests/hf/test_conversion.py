"""Longformers that ``led convert`` makes of RoBERTa and BERT, in transformers, and tables of positions there."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BertConfig, EncoderDecoderConfig, EncoderDecoderModel, RobertaConfig

from led_kernels.hf import apply_led_kernels, resize_position_embeddings
from led_model.cli.parser import main
from led_model.conversion.convert import convert_checkpoint
from tests.hf.hf_cases import HFCase, led_model, longformer_model

POSITIONS, WINDOW = 32, 64  # the window covers all texts that the source reads
SETTINGS = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 33,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
}
HEADS = {
    "Model": "Model",
    "ForMaskedLM": "ForMaskedLM",
    "ForSequenceClassification": "ForSequenceClassification",
    "ForTokenClassification": "ForTokenClassification",
    "ForQuestionAnswering": "ForQuestionAnswering",
    "ForMultipleChoice": "ForMultipleChoice",
    "ForPreTraining": "ForMaskedLM",
}
CASES = [("Roberta", head) for head in HEADS if head != "ForPreTraining"] + [("Bert", head) for head in HEADS]
CASES += [("XLMRoberta", "ForMaskedLM"), ("Camembert", "ForTokenClassification")]


@pytest.fixture
def save(tmp_path):
    """A function: family, head and settings to (a random model of transformers, its directory)."""

    def make(family: str, head: str, **settings):
        own = {"max_position_embeddings": POSITIONS if family == "Bert" else POSITIONS + 2}
        own |= {} if family == "Bert" else {"type_vocab_size": 1}
        own |= {"num_labels": 3} if "Classification" in head else {}
        config = getattr(transformers, f"{family}Config")(**SETTINGS | own | settings)
        model = getattr(transformers, f"{family}{head}")(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    1 + 0.1 * noise if "norm" in name.lower() and parameter.dim() == 1 else 0.25 * noise
                )
        model.tie_weights()
        directory = tmp_path / f"{family}{head}"
        model.save_pretrained(directory)
        return model.eval(), directory

    return make


def convert(source, **options):
    output = source.with_name(f"{source.name}-long")
    done = convert_checkpoint(source, output, **{"max_positions": 100, "attention_window": WINDOW} | options)
    assert done.architecture.startswith("Longformer")
    return output


def texts(pad: int) -> dict[str, torch.Tensor]:
    """Returns two texts of 30 and 15 tokens, padded to the right; the tokens of BERT's second part are of type 1."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, 40, (2, 30), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 15:] = 0
    input_ids[attention_mask == 0] = pad
    types = (torch.arange(30) > 10).long().expand(2, 30) if pad == 0 else torch.zeros_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}


def results(model, pad: int, num_globals: int | None = None) -> list[torch.Tensor]:
    """Returns what a model makes of the texts; ``None`` for a model without global tokens."""
    batch = texts(pad)
    if num_globals is not None:
        batch["global_attention_mask"] = (torch.arange(30) < num_globals).long().expand(2, 30)
    is_token = batch["attention_mask"].bool()
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: tensor[None] for name, tensor in batch.items()}
    with torch.no_grad():
        output = model(**batch)
    names = (
        "logits",
        "prediction_logits",
        "start_logits",
        "end_logits",
        "last_hidden_state",
        "pooler_output",
    )
    found = [x for name in names if (x := getattr(output, name, None)) is not None]
    return [x[is_token] if x.shape[:2] == is_token.shape else x for x in found]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_computes_what_the_source_computes(family, head, save):
    model, source = save(family, head)
    pad = model.config.pad_token_id
    # In fp64 there is no rounding but that of transformers' softmax, which Longformer takes in fp32 all the same.
    expected = results(model.double(), pad)
    output = convert(source)
    long, info = getattr(transformers, f"Longformer{HEADS[head]}").from_pretrained(
        output, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    spare = (
        {f"longformer.pooler.dense.{kind}" for kind in ("weight", "bias")}
        if head == "ForPreTraining"
        else set()
    )
    assert set(info["unexpected_keys"]) == spare  # the head of masked language modeling has no pooler
    long.double().eval()
    for num_globals in (0, 1):
        assert_same(results(long, pad, num_globals), expected)
        assert_same(results(apply_led_kernels(long), pad, num_globals), expected)


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_and_projections_are_the_sources(family, tied, save):
    model, source = save(family, "ForMaskedLM", tie_word_embeddings=tied)
    output = convert(source)
    prefix = family.lower()
    old, new = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    table = new["longformer.embeddings.position_embeddings.weight"]
    own = old[f"{prefix}.embeddings.position_embeddings.weight"][-POSITIONS:]
    reserved = model.config.pad_token_id + 1
    assert torch.equal(table[reserved:], own.repeat(4, 1)[:100])
    assert (
        json.loads((output / "config.json").read_text())["max_position_embeddings"]
        == len(table)
        == reserved + 100
    )
    for layer in range(2):
        for name in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                expected = old[f"{prefix}.encoder.layer.{layer}.attention.self.{name}.{kind}"]
                for part in (name, f"{name}_global"):
                    assert torch.equal(
                        new[f"longformer.encoder.layer.{layer}.attention.self.{part}.{kind}"], expected
                    )
    assert ("lm_head.decoder.weight" in new) is not tied
    long = transformers.LongformerForMaskedLM.from_pretrained(output)
    words = long.get_input_embeddings().weight
    assert (long.get_output_embeddings().weight is words) is tied
    assert_same(results(long.eval(), reserved - 1, 1), results(model, reserved - 1))


def test_first_names_of_bert(save):
    """Checkpoints of 2018 call the parameters of norms gamma and beta, and hold counters as tensors."""
    _, source = save("Bert", "ForMaskedLM")
    expected = load_file(convert(source) / "model.safetensors")
    tensors = load_file(source / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    save_file(
        renamed | {"bert.embeddings.position_ids": torch.arange(POSITIONS)[None]},
        source / "model.safetensors",
    )
    actual = load_file(convert(source, overwrite=True) / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_longer_longformer(save):
    _, source = save("Roberta", "ForMaskedLM")
    first = convert(source, max_positions=50)
    config = json.loads((first / "config.json").read_text()) | {"of_their_own": 7}
    (first / "config.json").write_text(json.dumps(config))
    output = source.with_name("longer")
    done = convert_checkpoint(first, output, max_positions=120)
    assert (done.reach.exact_length, done.reach.windows) == (50, [WINDOW, WINDOW])
    old, new = load_file(first / "model.safetensors"), load_file(output / "model.safetensors")
    name = "longformer.embeddings.position_embeddings.weight"
    before, after = old.pop(name), new.pop(name)
    assert torch.equal(after[:52], before)
    assert torch.equal(after[52:], before[2:].repeat(2, 1)[:70])
    assert all(torch.equal(old[name], new[name]) for name in old | new)
    assert json.loads((output / "config.json").read_text()) == config | {"max_position_embeddings": 122}


def test_a_tokenizer_of_bert_comes_along(save):
    _, source = save("Bert", "ForQuestionAnswering")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 32, "do_lower_case": True}))
    output = convert(source)
    assert json.loads((output / "config.json").read_text())["sep_token_id"] == 3
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == 100
    assert tokenizer("A b", "C")["input_ids"] == [2, 5, 6, 3, 7, 3]
    assert tokenizer("A " * 70)["input_ids"] == [2, *[5] * 70, 3]


def test_says_what_is_left_out(save, capsys):
    _, source = save("Bert", "ForPreTraining", hidden_act="relu")
    assert main(["convert", str(source), "--output", str(source.with_name("long"))]) == 0
    captured = capsys.readouterr()
    assert "LongformerModel" in captured.out
    assert "whether two sentences follow each other is left out" in captured.err
    assert "masked language modeling is left out: it uses relu" in captured.err


@pytest.mark.parametrize(
    ("family", "head", "settings", "message"),
    [
        (
            "Roberta",
            "Model",
            {"is_decoder": True},
            "is_decoder in its config.json is 'True', and Longformer is",
        ),
        ("Bert", "Model", {"position_embedding_type": "relative_key"}, "Longformer's positions are absolute"),
        ("Bert", "Model", {"num_attention_heads": 5}, "num_attention_heads is 5 and does not divide"),
        ("Bert", "Model", {"pad_token_id": None}, "pad_token_id is None; give a whole number"),
        ("Roberta", "Model", {"max_position_embeddings": 2}, "leaves no position for a token"),
        ("Roberta", "Model", {"num_hidden_layers": 3}, "lacks longformer.encoder.layer.2."),
        ("Bert", "Model", {"num_hidden_layers": 1}, "unexpected longformer.encoder.layer.1."),
        ("Bert", "ForTokenClassification", {"architectures": None}, "does not say of what; name the class"),
        (
            "Bert",
            "ForTokenClassification",
            {"id2label": {"0": "a"}},
            "classifier.weight (3, 24) instead of (1, 24)",
        ),
        ("Bert", "Model", {"model_type": "albert"}, "its layers share one set of weights"),
        (
            "Bert",
            "Model",
            {"model_type": "longformer"},
            "lacks longformer.encoder.layer.0.attention.self.key_global",
        ),
    ],
)
def test_refuses_what_longformer_cannot_compute(family, head, settings, message, save):
    _, source = save(family, head)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source)
    assert [path.name for path in source.parent.iterdir()] == [source.name]


WILD = [None, "four", -1, 0, 3, 1.5, float("nan"), 2**31 - 1, 10**30, [1], {"a": 1}]


def test_wild_settings_end_in_one_sentence(save):
    """Whatever a setting is: a checkpoint, or a refusal that leaves nothing."""
    _, source = save("Bert", "ForSequenceClassification")
    path, output = source / "config.json", source.with_name("long")
    config = json.loads(path.read_text())
    names = {*config, "pad_token_id", "architectures", "id2label", "num_labels", "is_decoder"}
    refusals = {}
    for name in names - {"transformers_version", "dtype", "torch_dtype", "classifier_dropout", "use_cache"}:
        for value in WILD:
            path.write_text(json.dumps(config | {name: value}))
            try:
                convert_checkpoint(source, output, max_positions=40, overwrite=True)
            except ValueError as refusal:
                refusals[name, str(value)] = str(refusal)
            assert {entry.name for entry in source.parent.iterdir()} <= {source.name, output.name}
    assert len(refusals) > 120
    assert not [case for case, text in refusals.items() if len(text.splitlines()) != 1]


def test_a_wider_window_is_exact_as_far_as_the_old_one_reached(save):
    _, source = save("Roberta", "Model")
    narrow = convert(source, attention_window=8)
    wide = narrow.with_name("wide")
    done = convert_checkpoint(narrow, wide, attention_window=20)
    assert done.reach.exact_length == 5
    models = [transformers.LongformerModel.from_pretrained(path).eval() for path in (narrow, wide)]
    for length, is_exact in ((5, True), (6, False)):
        ids = torch.arange(4, 4 + length)[None]
        with torch.no_grad():
            a, b = (model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state for model in models)
        assert torch.allclose(a, b, rtol=0, atol=2e-6) is is_exact


def test_several_tokens_that_end_a_text(save):
    _, source = save("Roberta", "Model")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 3]}))
    output = convert(source)
    assert transformers.LongformerConfig.from_pretrained(output).sep_token_id == 2


def test_no_decoder_to_lengthen(save):
    _, source = save("Bert", "Model")
    with pytest.raises(ValueError, match="max_decoder_positions is for LED, and bert has no decoder"):
        convert(source, max_decoder_positions=50)


CASE = HFCase(positions=24, seqlen=24, globals_per_row=((0,), (3, 5)), padding=("none", "right"))


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_led_gets_more_positions(fused, tmp_path):
    model = led_model(CASE)
    if fused:
        apply_led_kernels(model)
    tables = {side: getattr(model, f"get_{side}")().embed_positions for side in ("encoder", "decoder")}
    old = {side: table.weight.detach().clone() for side, table in tables.items()}
    inputs = CASE.inputs() | {"decoder_input_ids": torch.tensor([[2, 7, 9]] * 2)}
    expected = model(**inputs).logits
    resize_position_embeddings(model, 100, max_decoder_positions=90)
    assert torch.equal(tables["encoder"].weight, old["encoder"].repeat(5, 1)[:100])
    assert torch.equal(tables["decoder"].weight, old["decoder"].repeat(2, 1)[:90])
    assert torch.equal(model(**inputs).logits, expected)
    assert model.config.max_encoder_position_embeddings == model.get_encoder().max_source_positions == 100
    assert model.config.max_decoder_position_embeddings == 90
    ids = torch.randint(4, 40, (1, 96))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.eval()(ids, decoder_input_ids=ids[:, :90]).logits.isfinite().all()


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_longformer_gets_more_positions(fused, tmp_path):
    model = longformer_model(CASE)
    if fused:
        apply_led_kernels(model)
    table = model.longformer.embeddings.position_embeddings
    old = table.weight.detach().clone()
    expected = model(**CASE.inputs()).logits
    resize_position_embeddings(model, 60)
    assert torch.equal(table.weight[:26], old)
    assert torch.equal(table.weight[26:], old[2:].repeat(2, 1)[:36])
    assert torch.equal(model(**CASE.inputs()).logits, expected)
    assert model.config.max_position_embeddings == table.num_embeddings == 62
    assert model(torch.randint(4, 40, (1, 60))).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.longformer.embeddings.position_embeddings.weight, table.weight)


def test_only_the_longformer_of_a_composite_model_gets_them():
    encoder, decoder = CASE.longformer_config(), BertConfig(**SETTINGS, max_position_embeddings=40)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    resize_position_embeddings(model, 50)
    assert model.config.encoder.max_position_embeddings == 52
    assert model.config.decoder.max_position_embeddings == 40
    assert model.decoder.bert.embeddings.position_embeddings.weight.shape[0] == 40


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: led_model(CASE), {}, "both missing"),
        (lambda: led_model(CASE), {"max_positions": 0}, "max_positions is 0; give"),
        (
            lambda: longformer_model(CASE),
            {"max_decoder_positions": 50},
            "max_decoder_positions is given and model holds",
        ),
        (
            lambda: transformers.RobertaModel(RobertaConfig(**SETTINGS)),
            {"max_positions": 50},
            "max_positions is given",
        ),
        (lambda: nn.Linear(2, 2), {"max_positions": 50}, "max_positions is given and model holds no table"),
        (lambda: led_model(CASE).to("meta"), {"max_positions": 50}, "on the meta device"),
    ],
)
def test_misuse(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_position_embeddings(make(), **arguments)
