"""Users load fused models, resize, extend, train and wrap them, and put them into pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
import transformers
from decoding import CASE, VERSION, decoding_model
from hf_cases import (
    BUILDERS,
    VOCABULARY,
    assert_close,
    assert_same_function,
    fused,
    led_model,
    longformer_model,
    outputs,
    varied,
)
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    EncoderDecoderModel,
    LongformerModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from led_kernels.hf import apply_led_kernels, is_applied

every_family = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def named_outputs(model: nn.Module) -> dict[str, Tensor]:
    return outputs(model, CASE.inputs())


@every_family
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resized_token_embeddings(tied, build, tmp_path):
    """Embeddings are resized before fusing or afterwards.

    What is saved then loads into a stock model, where transformers itself can load it.
    """
    stock = build(CASE, tie_word_embeddings=tied)
    ours = fused(stock)
    for model in (stock, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY + 7)
    for theirs, new in zip(stock.parameters(), ours.parameters(), strict=True):
        new.data.copy_(theirs.data)
    assert ours.get_input_embeddings().weight.shape[0] == VOCABULARY + 7
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    expected = named_outputs(stock)
    assert expected["logits"].shape[-1] == VOCABULARY + 7
    assert_close(named_outputs(ours), expected, 1e-4)
    assert_same_function(stock, named_outputs)
    if not tied:  # which transformers saves without what an untied head needs
        return
    ours.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path).eval()
    assert not is_applied(loaded)
    assert_close(named_outputs(loaded), expected, 1e-6)


@every_family
def test_positions_extended_in_memory(build):
    """PRIMERA's recipe repeats the rows of the table for longer documents, and leaves the config its old number."""
    stock = build(CASE)
    tables = (
        [stock.get_encoder().embed_positions, stock.get_decoder().embed_positions]
        if build is led_model
        else []
    )
    if build is longformer_model:
        tables = [stock.longformer.embeddings.position_embeddings]
        for name in ("position_ids", "token_type_ids"):
            if name in dict(stock.longformer.embeddings.named_buffers()):
                ids = torch.arange(300)[None] if name == "position_ids" else torch.zeros(1, 300).long()
                setattr(stock.longformer.embeddings, name, ids)
    for table in tables:
        table.weight = nn.Parameter(table.weight.data.repeat(3, 1)[2:])
        table.num_embeddings = table.weight.shape[0]
    ids = torch.randint(3, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["global_attention_mask"] = (torch.arange(150) % 100 == 0).long()[None]
    if build is led_model:
        inputs["decoder_input_ids"] = ids.flip(1)

    def states(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model(**inputs).logits}

    assert_same_function(stock, states)
    if build is led_model:
        expected = stock.generate(ids, max_new_tokens=80, min_new_tokens=80, do_sample=False)
        assert torch.equal(
            fused(stock).generate(ids, max_new_tokens=80, min_new_tokens=80, do_sample=False), expected
        )


@every_family
@pytest.mark.parametrize("where", ["torch.device", "init_empty_weights"])
def test_meta_device_under_a_global_apply(where, build, tmp_path):
    stock = build(CASE)
    apply_led_kernels()
    if where == "torch.device":
        context = torch.device("meta")
    else:
        accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")
        context = accelerate.init_empty_weights(include_buffers=False)
    with context:
        model = type(stock)(stock.config)
    assert is_applied(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(stock.state_dict(), assign=True)
    for name, buffer in stock.named_buffers():  # those that no checkpoint holds
        if model.get_buffer(name).is_meta:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, buffer.clone())
    model.tie_weights()
    assert_close(named_outputs(model.eval()), named_outputs(stock), 1e-4)


@every_family
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_frozen_model_whose_inputs_require_gradients(reentrant, build):
    """Adapters on checkpointed layers need gradients of the embeddings."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    targets = ["q_proj", "v_proj"] if build is led_model else ["query", "value", "query_global"]

    def gradients(is_fused: bool, **checkpointing) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(build(CASE), peft.LoraConfig(r=2, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero
                nn.init.constant_(parameter, 0.1)
        if is_fused:
            apply_led_kernels(model)
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
            model.enable_input_require_grads()
        inputs = CASE.inputs()
        labels = inputs["input_ids"][:, :7] if build is led_model else inputs["input_ids"]
        model.train()(**inputs, labels=labels.contiguous()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(False)
    assert len(expected) >= 8
    assert_close(gradients(True, use_reentrant=reentrant), expected, 1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", ["decoder_attentions", "cross_attentions"])
def test_gradients_of_the_decoders_attentions(name, training):
    """Gradients are those of a loss over the logits, and of one over the attentions themselves."""
    stock = led_model(CASE, decoder_layers=2, decoder_attention_heads=2).train(training)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        labels = CASE.inputs()["input_ids"][:, :7].contiguous()
        result = model(**CASE.inputs(), labels=labels, output_attentions=True)
        for weights in result[name]:
            weights.retain_grad()
        (result.loss + sum(weights.square().sum() for weights in result[name])).backward()
        named = {f"d {name}[{layer}]": weights.grad for layer, weights in enumerate(result[name])}
        return named | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert all(value is not None for value in gradients(fused(stock)).values())
    assert_same_function(stock, gradients)


class Documents(torch.utils.data.Dataset):
    """Returns documents of random tokens, with global attention to the first, and their beginnings as summaries."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (19,), generator=torch.Generator().manual_seed(index))
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(19) < 19 - index).long(),
            "global_attention_mask": (torch.arange(19) == 0).long(),
            "labels": ids[:5],
        }


def trained(model: nn.Module, directory: Path) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """Returns the losses of three steps, the tokens then predicted, and the weights."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        predict_with_generate=True,
        generation_max_length=8,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=Documents())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    predictions = torch.as_tensor(trainer.predict(Documents()).predictions)
    return losses, predictions, {name: p.detach() for name, p in model.named_parameters()}


def test_seq2seq_trainer_that_predicts_with_generate(tmp_path):
    stock = led_model(CASE, decoder_layers=2)
    ours = fused(stock)
    losses, tokens, weights = trained(stock, tmp_path)
    fused_losses, fused_tokens, fused_weights = trained(ours, tmp_path)
    assert is_applied(ours)
    assert len(losses) == 3
    assert fused_losses == pytest.approx(losses, rel=1e-3)
    assert torch.equal(fused_tokens, tokens)
    assert_close(fused_weights, weights, 1e-3)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with a word per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(4, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_pipeline_of_masked_words(tokenizer):
    tokenizer.mask_token = "<unk>"
    text = " ".join(f"w{4 + index % 50}" for index in range(40)) + " <unk> w9"

    def answers(model: nn.Module) -> list[dict]:
        return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(text)

    stock = longformer_model(CASE)
    for ours, theirs in zip(answers(fused(stock)), answers(stock), strict=True):
        assert ours["token"] == theirs["token"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


@pytest.mark.skipif(
    VERSION >= (5, 0), reason="transformers 5 has no pipeline that writes a text about a text"
)
@pytest.mark.parametrize("task", ["summarization", "text2text-generation"])
def test_pipeline_of_texts(task, tokenizer):
    texts = [" ".join(f"w{4 + (start + index) % 50}" for index in range(start + 9)) for start in (3, 17)]

    def answers(model: nn.Module) -> list:
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        return pipe(texts, max_new_tokens=8, min_length=1, do_sample=False, batch_size=2)

    stock = decoding_model().float()
    expected = answers(stock)
    assert all(len(answer[next(iter(answer))].split()) > 1 for answer in expected)
    assert answers(fused(stock)) == expected


@pytest.mark.parametrize("when", ["live", "global"])
def test_encoder_decoder_model_with_a_longformer(when, tmp_path):
    decoder = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        dropout=0.0,
        is_decoder=True,
        add_cross_attention=True,
    )
    encoder = LongformerModel(CASE.longformer_config(), add_pooling_layer=False)
    stock = EncoderDecoderModel(encoder=encoder, decoder=BartForCausalLM(decoder))
    stock = varied(stock)
    stock.config.decoder_start_token_id, stock.config.pad_token_id = 2, 1
    stock.generation_config.decoder_start_token_id, stock.generation_config.pad_token_id = 2, 1
    stock.generation_config.eos_token_id = None

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        inputs = CASE.inputs()
        result = model(**inputs, labels=inputs["input_ids"][:, :7].contiguous())
        result.loss.backward()
        named = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": result.loss.detach(), "logits": result.logits.detach(), **named}

    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    expected = stock.generate(**CASE.inputs(), **settings)
    if when == "live":
        assert_same_function(stock, evaluate)
        ours = fused(stock)
    else:
        stock.save_pretrained(tmp_path)
        apply_led_kernels()
        ours = EncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert is_applied(ours)
    assert torch.equal(ours.generate(**CASE.inputs(), **settings), expected)
