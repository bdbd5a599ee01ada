"""``led convert`` of BART and LED checkpoints: the results, what is refused, and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import led_model
from led_model import LEDForConditionalGeneration, LEDTokenizer
from led_model.cli.parser import main
from led_model.conversion.convert import convert_checkpoint
from tests.model.checkpoints import edit_tensors
from tests.model.small import randomize

POSITIONS, WINDOW = 32, 64  # the window covers all texts that the source reads
SETTINGS = {
    "vocab_size": 40,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 33,
    "decoder_ffn_dim": 31,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "activation_function": "relu",
}
HEADS = ["Model", "ForConditionalGeneration", "ForQuestionAnswering", "ForSequenceClassification"]


@pytest.fixture
def save_bart(tmp_path, capsys):
    """A function: the end of a class's name and settings to (a random BART of transformers, its directory)."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()

    def save(head: str = "ForConditionalGeneration", **settings):
        config = transformers.BartConfig(**SETTINGS | settings)
        model = getattr(transformers, f"Bart{head}")(config)
        randomize(model, 3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:  # all numbers stay of the size of 1, so that rounding does
                    parameter.mul_(0.4)
        model.tie_weights()
        directory = tmp_path / f"bart-{head}"
        model.save_pretrained(directory)
        capsys.readouterr()  # transformers draws bars
        return model.eval(), directory

    return save


def convert(source: Path, **options) -> Path:
    output = source.with_name(f"{source.name}-led")
    convert_checkpoint(source, output, **{"max_positions": 100, "attention_window": WINDOW} | options)
    return output


def edit_config(directory: Path, **settings) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def texts(num_globals: int) -> dict[str, torch.Tensor]:
    """Returns two texts of 20 and 15 tokens that end in </s>, the first tokens of both global."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, 40, (2, 20), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 15:] = 0
    input_ids[attention_mask == 0] = 1
    input_ids[:, 14] = input_ids[0, 19] = 2
    input_ids[0, 14] = 5
    is_global = (torch.arange(20) < num_globals).long().expand(2, 20)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "global_attention_mask": is_global}


def results(model, num_globals: int | None, **inputs) -> list[torch.Tensor]:
    """Returns what a model makes of the texts; ``None`` for a model without global tokens."""
    batch = texts(num_globals or 0)
    is_token = batch["attention_mask"].bool()
    if num_globals is None:
        del batch["global_attention_mask"]
    with torch.no_grad():
        output = model(**batch, **inputs)
    named = [getattr(output, n, None) for n in ("logits", "start_logits", "end_logits", "last_hidden_state")]
    found = [*(x for x in named if x is not None), output.encoder_last_hidden_state]
    return [x[is_token] if x.shape[:2] == is_token.shape else x for x in found]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", HEADS)
def test_computes_what_bart_computes(head, tied, save_bart):
    import transformers

    bart, source = save_bart(head, tie_word_embeddings=tied, num_labels=3 if "Sequence" in head else 2)
    output = convert(source)
    # A classifier reads the decoder's state at </s>, and makes the decoder's tokens of the text itself.
    inputs = {} if "Sequence" in head else {"decoder_input_ids": torch.tensor([[2, 7, 9, 4], [2, 8, 30, 6]])}
    expected = results(bart, None, **inputs)
    models = [getattr(led_model, f"LED{head}").from_pretrained(output)]
    # transformers 5 has no LEDForSequenceClassification.
    if (model_class := getattr(transformers, f"LED{head}", None)) is not None:
        stock, info = model_class.from_pretrained(output, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        models.append(stock.eval())
    for model in models:
        for num_globals in (0, 1):
            for a, b in zip(results(model, num_globals, **inputs), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_writes_what_bart_writes(save_bart):
    """Settings of generation come along: from generation_config.json, and from an old config.json."""
    bart, source = save_bart()
    bart.generation_config.num_beams = 3
    bart.generation_config.forced_bos_token_id = 0
    bart.save_pretrained(source)
    edit_config(source, no_repeat_ngram_size=2, task_specific_params={"summarization": {"num_beams": 6}})
    output = convert(source)
    batch = texts(0)
    del batch["global_attention_mask"]
    expected = bart.generate(**batch, max_new_tokens=12, no_repeat_ngram_size=2)
    ours = LEDForConditionalGeneration.from_pretrained(output)
    assert (ours.generation_config.num_beams, ours.generation_config.forced_bos_token_id) == (3, 0)
    assert ours.generate(**batch, max_new_tokens=12).tolist() == expected.tolist()
    assert json.loads((output / "config.json").read_text())["task_specific_params"]


def test_rows_and_projections_are_the_sources(save_bart):
    _, source = save_bart()
    output = convert(source, max_decoder_positions=70)
    old, new = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    for side, rows in (("encoder", 100), ("decoder", 70)):
        table = new[f"led.{side}.embed_positions.weight"]
        own = old[f"model.{side}.embed_positions.weight"][2:]
        assert len(own) == POSITIONS
        assert torch.equal(table, own.repeat(4, 1)[:rows])
    for layer in range(2):
        for theirs, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            for kind in ("weight", "bias"):
                expected = old[f"model.encoder.layers.{layer}.self_attn.{theirs}.{kind}"]
                attention = f"led.encoder.layers.{layer}.self_attn.longformer_self_attn"
                assert torch.equal(new[f"{attention}.{name}.{kind}"], expected)
                assert torch.equal(new[f"{attention}.{name}_global.{kind}"], expected)
    tied = [name for name in new if new[name].shape == (40, 24)]
    assert tied == ["led.shared.weight"]
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "led"
    assert config["architectures"] == ["LEDForConditionalGeneration"]
    assert not config.keys() & {"max_position_embeddings", "scale_embedding", "num_hidden_layers"}


def test_defaults_are_those_of_published_models(save_bart):
    _, source = save_bart()
    done = convert_checkpoint(source, source.with_name("led"))
    assert (done.reach.positions, done.reach.windows) == (16384, [POSITIONS, POSITIONS])
    assert done.reach.exact_length == POSITIONS // 2 + 1
    again = convert_checkpoint(source.with_name("led"), source.with_name("again"))
    assert (again.reach.positions, again.reach.windows) == (16384, [POSITIONS, POSITIONS])
    assert again.reach.exact_length == 16384  # nothing has changed
    a, b = (load_file(source.with_name(name) / "model.safetensors") for name in ("led", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_form_of_weights(save_bart):
    """Old checkpoints: one pickle or shards of it, names without a prefix, fairseq's versions."""
    _, source = save_bart()
    expected = load_file(convert(source) / "model.safetensors")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    named = {"encoder.version": torch.ones(1), "decoder.version": torch.ones(1), **tensors}
    torch.save(named, source / "pytorch_model.bin")
    actual = load_file(convert(source, overwrite=True) / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    # Before version 5 transformers shared embeddings that the config unties, all but the head.
    edit_config(source, tie_word_embeddings=False)
    shared = tensors["model.shared.weight"]
    untied = {f"model.{side}.embed_tokens.weight": shared for side in ("encoder", "decoder")}
    torch.save({**named, **untied, "lm_head.weight": shared + 1}, source / "pytorch_model.bin")
    actual = load_file(convert(source, overwrite=True) / "model.safetensors")
    for side in ("encoder", "decoder"):
        assert torch.equal(actual[f"led.{side}.embed_tokens.weight"], shared)
    assert torch.equal(actual["lm_head.weight"], shared + 1)
    edit_config(source, tie_word_embeddings=True)
    (source / "pytorch_model.bin").unlink()
    bare = {
        name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")
    }
    save_file(bare, source / "model.safetensors")
    output = convert(source, overwrite=True)
    actual = load_file(output / "model.safetensors")
    assert actual.keys() == {n.removeprefix("led.") for n in expected if n.startswith("led.")}
    assert json.loads((output / "config.json").read_text())["architectures"] == ["LEDModel"]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_dtype(name, save_bart):
    _, source = save_bart()
    output = source.with_name("led")
    assert main(["convert", str(source), "--output", str(output), "--dtype", name]) == 0
    dtype = getattr(torch, name)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {dtype}
    assert json.loads((output / "config.json").read_text())["dtype"] == name
    model = LEDForConditionalGeneration.from_pretrained(output)
    assert model.dtype == dtype
    edit_tensors(source, lambda tensors: tensors["model.encoder.layers.0.fc1.weight"].fill_(1e6))
    if name == "float16":
        with pytest.raises(
            ValueError, match=r"fc1.weight holds numbers up to 1e\+06, which torch.float16 does"
        ):
            convert(source, dtype=dtype)


@pytest.mark.parametrize("stated", ["BartTokenizer", "BartTokenizerFast", "RobertaTokenizer", None])
def test_tokenizer_comes_along(stated, save_bart, tokenizer_files):
    from transformers import AutoTokenizer

    _, source = save_bart()
    for path in tokenizer_files.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": POSITIONS, "tokenizer_class": stated})
    )
    output = convert(source)
    tokenizer = LEDTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == 100
    assert tokenizer("The encoder reads.") == LEDTokenizer.from_pretrained(source)("The encoder reads.")
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 100, "tokenizer_class": "LEDTokenizer"}
    theirs = AutoTokenizer.from_pretrained(output)
    assert theirs.model_max_length == 100
    assert theirs("The encoder reads.")["input_ids"] == tokenizer("The encoder reads.")["input_ids"]


def test_longer_led(save):
    source = save(max_encoder_position_embeddings=30)
    output = source.with_name("longer")
    done = convert_checkpoint(source, output, max_positions=70)
    assert (done.reach.positions, done.reach.exact_length) == (70, 30)
    old, new = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    name = "led.encoder.embed_positions.weight"
    assert torch.equal(new.pop(name), old.pop(name).repeat(3, 1)[:70])
    assert all(torch.equal(old[name], new[name]) for name in old | new)
    a, b = (json.loads((path / "config.json").read_text()) for path in (source, output))
    assert b == a | {"max_encoder_position_embeddings": 70}
    ids = torch.randint(4, 40, (1, 70))
    assert LEDForConditionalGeneration.from_pretrained(output)(ids).logits.isfinite().all()


class TestCommand:
    def test_says_what_it_made(self, save_bart, capsys):
        _, source = save_bart()
        output = source.with_name("led")
        flags = ["--max-positions", "96", "--attention-window", "40", "--max-decoder-positions", "64"]
        assert main(["convert", str(source), "--output", str(output), *flags]) == 0
        captured = capsys.readouterr()
        for line in ("LEDForConditionalGeneration", "96, the source has 32", " 40\n", "up to 21 tokens"):
            assert line in captured.out
        assert "has no tokenizer's files" in captured.err
        model = LEDForConditionalGeneration.from_pretrained(output)
        assert model.config.attention_window == [40, 40]
        assert model.config.max_encoder_position_embeddings == 96
        assert model.config.max_decoder_position_embeddings == 64

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"model_type": "mbart"},
                "'mbart', and its norms stand before attention, and LED's stand after it",
            ),
            ({"model_type": "t5"}, "its positions are relative"),
            ({"model_type": "gpt2"}, "give one of bart, led, roberta"),
            ({"model_type": None}, "give one of bart"),
            (
                {"normalize_before": True},
                "normalize_before in its config.json is 'True', so that norms stand before",
            ),
            ({"add_final_layer_norm": True}, "a norm after all layers"),
            ({"normalize_embedding": False}, "embeddings are not normalized"),
            ({"static_position_embeddings": True}, "positions are computed"),
            ({"scale_embedding": True}, "multiplies embeddings by a root"),
            ({"is_decoder": True}, "no encoder to convert"),
            ({"activation_function": "softplus"}, "activation_function is 'softplus'; give one of gelu"),
            ({"d_model": 20}, "do not fit its config.json"),
            ({"encoder_layers": 3}, "has 2 encoder layers instead of 3"),
            ({"max_position_embeddings": 31}, "do not fit its config.json"),
            ({"max_position_embeddings": "many"}, "give a whole number from 1"),
        ],
        ids=str,
    )
    def test_refuses_other_models(self, settings, message, save_bart, capsys):
        _, source = save_bart()
        edit_config(source, **settings)
        self.refuses(source, message, capsys)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t: t.pop("model.encoder.layers.1.fc1.bias"), "lacks led.encoder.layers.1.fc1.bias"),
            (lambda t: t.update({"model.encoder.extra": torch.ones(2)}), "unexpected led.encoder.extra"),
            (
                lambda t: t.update({"model.encoder.embed_positions.weight": torch.ones(3)}),
                "no table of positions",
            ),
            (
                lambda t: t.update({"model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(3, 3)}),
                "query.weight (3, 3) instead of (24, 24)",
            ),
            (
                lambda t: t.update({"lm_head.weight": torch.ones(40, 24)}),
                "ties lm_head.weight to led.shared.weight",
            ),
        ],
        ids=["missing", "extra", "no table", "shape", "untied"],
    )
    def test_refuses_weights_that_do_not_fit(self, damage, message, save_bart, capsys):
        _, source = save_bart()
        edit_tensors(source, damage)
        self.refuses(source, message, capsys)

    def test_refuses_damaged_files(self, save_bart, capsys):
        _, source = save_bart()
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
        self.refuses(source, "holds no readable weights", capsys)
        weights.unlink()
        self.refuses(source, "holds no weights", capsys)
        (source / "config.json").write_text("{")
        self.refuses(source, "is not valid JSON", capsys)
        (source / "config.json").unlink()
        self.refuses(source, "holds no config.json", capsys)
        self.refuses(source / "nowhere", "is no directory", capsys)

    def refuses(self, source: Path, message: str, capsys) -> None:
        before = sorted(source.parent.iterdir())
        assert main(["convert", str(source), "--output", str(source.with_name("out"))]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("led convert: ")
        assert message in line
        assert sorted(source.parent.iterdir()) == before


class TestOutput:
    @pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("written", [False, True], ids=["new", "replaced"])
    @pytest.mark.parametrize("late", [False, True], ids=["weights", "tokenizer"])
    def test_a_failure_leaves_what_there_was(self, error, written, late, save_bart, monkeypatch, capsys):
        _, source = save_bart()
        output = source.with_name("led")
        if written:
            convert_checkpoint(source, output, max_positions=50)
        before = {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()}

        def fail(*args, **kwargs):
            if not late:
                args[1].write_bytes(b"half")
            raise error

        monkeypatch.setattr(
            f"led_model.conversion.convert.{'carry_tokenizer' if late else 'write_file'}", fail
        )
        status = main(["convert", str(source), "--output", str(output), "--overwrite"])
        assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()} == before
        there = {path.relative_to(source.parent).parts[0] for path in before}
        assert {path.name for path in source.parent.iterdir()} == there

    def test_a_full_disk_is_told(self, save_bart, monkeypatch, capsys):
        _, source = save_bart()

        def fail(*args, **kwargs):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("led_model.checkpoint.weight_formats.save_file", fail)
        assert main(["convert", str(source), "--output", str(source.with_name("led"))]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written (I/O error: No space left" in line

    def test_others_may_read_it(self, save_bart):
        _, source = save_bart()
        output = convert(source)
        modes = {path.stat().st_mode for path in output.iterdir()}
        assert modes == {(output / "config.json").stat().st_mode}

    def test_an_empty_directory_is_filled(self, save_bart):
        _, source = save_bart()
        output = source.with_name("led")
        output.mkdir()
        convert_checkpoint(source, output, max_positions=50)
        assert (output / "config.json").is_file()

    def test_a_checkpoint_is_replaced_only_on_request(self, save_bart):
        _, source = save_bart()
        output = convert(source, max_positions=50)
        (output / "merges.txt").write_text("of another")
        with pytest.raises(ValueError, match="holds a checkpoint already; give --overwrite"):
            convert(source)
        assert (
            LEDForConditionalGeneration.from_pretrained(output).config.max_encoder_position_embeddings == 50
        )
        convert(source, overwrite=True)
        assert (
            LEDForConditionalGeneration.from_pretrained(output).config.max_encoder_position_embeddings == 100
        )
        assert not (output / "merges.txt").exists()
        assert sorted(path.name for path in source.parent.iterdir()) == sorted([source.name, output.name])

    def test_a_link_stays_one(self, save_bart, tmp_path):
        _, source = save_bart()
        target, link = tmp_path / "target", tmp_path / "link"
        target.mkdir()
        link.symlink_to(target)
        convert_checkpoint(source, link, max_positions=50)
        assert link.is_symlink()
        assert (target / "model.safetensors").is_file()

    def test_what_is_never_replaced(self, save_bart, tmp_path):
        _, source = save_bart()
        foreign = tmp_path / "work"
        foreign.mkdir()
        (foreign / "thesis.tex").write_text("five years")
        (tmp_path / "file").write_text("text")
        for output, message in (
            (foreign, "holds thesis.tex, which no conversion wrote"),
            (tmp_path / "file", "is a file"),
            (source, "is the source"),
            (tmp_path / "no" / "where", "there is no directory"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                convert_checkpoint(source, output, overwrite=True)
        assert (foreign / "thesis.tex").read_text() == "five years"
        assert (source / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_positions": 0}, ValueError, "max_positions is 0; give how many tokens"),
        ({"max_decoder_positions": 2.5}, TypeError, "max_decoder_positions is 2.5; give a whole number"),
        ({"attention_window": 7}, ValueError, "attention_window is 7; give a positive even number"),
        ({"attention_window": 8.0}, ValueError, "attention_window is 8.0; give a positive even number"),
        ({"attention_window": "8"}, ValueError, "attention_window is 8; give a positive even number"),
    ],
)
def test_arguments(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        convert_checkpoint(tmp_path, tmp_path / "out", **options)
