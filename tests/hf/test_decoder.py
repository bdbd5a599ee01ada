"""LED's fused decoder is right under every cache and mask, in its gradients, and in all releases."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from decoding import CASE, STATIC, STEPS, decoding_model, generate, has_decoder_of_ours
from hf_cases import PAD, assert_close, fused, true_fp64
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    LEDForConditionalGeneration,
    StaticCache,
)
from transformers.models.led.modeling_led import (
    LEDDecoder,
    LEDDecoderAttention,
)

from led_kernels.hf import apply_led_kernels, revert_led_kernels
from led_kernels.hf.compat import cache_argument, is_newer_than_tested
from led_kernels.hf.led_decoder import FusedLEDDecoderAttention

pytestmark = has_decoder_of_ours
known_release = pytest.mark.skipif(is_newer_than_tested(), reason="what a newer release does is not known")

PROMPTS = {
    "no-prompt": {},
    "prompt": {"decoder_input_ids": torch.tensor([[2, 7, 9, 30], [2, 8, 8, 41]])},
    "left-padded-prompt": {
        "decoder_input_ids": torch.tensor([[2, 7, 9, 30], [PAD, PAD, 2, 8]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    },
}
SEARCHES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.fixture
def stock() -> nn.Module:
    return decoding_model()


def is_fused(model: nn.Module) -> bool:
    kinds = {
        isinstance(m, FusedLEDDecoderAttention) for m in model.modules() if isinstance(m, LEDDecoderAttention)
    }
    assert len(kinds) == 1
    return kinds.pop()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_generation_with_every_cache(prompt, search, stock):
    """The oracle has no cache: it builds the whole causal mask at each step."""
    expected, logits = generate(stock, **prompt, **search, use_cache=False)
    assert expected.unique().numel() > 4
    for cache in ({}, STATIC, {"use_cache": False}):
        tokens, ours = generate(fused(stock), **prompt, **search, **cache)
        assert torch.equal(tokens, expected), cache
        if logits is not None:
            assert_close({"logits": ours}, {"logits": logits}, 1e-6)


@known_release
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_stock_fails_or_generates_other_tokens_with_a_static_cache(search, stock):
    """Transformers' own decoder gives other tokens with a static cache, which is why it is replaced."""
    expected, _ = generate(stock, **search)
    try:
        tokens, _ = generate(stock, **search, **STATIC)
    except TypeError:  # 5.12 cannot embed positions that its cache counts in a tensor
        return
    assert tokens.shape != expected.shape or not torch.equal(tokens, expected)


@known_release
def test_stock_forgets_the_mask_of_a_prompt(stock):
    prompt = PROMPTS["left-padded-prompt"]
    _, logits = generate(stock, **prompt, use_cache=False)
    _, cached = generate(stock, **prompt)
    assert (cached - logits).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(6))
def test_random_models_with_a_static_cache(seed):
    stock = decoding_model(
        seed, decoder_attention_heads=1 + seed % 2, encoder_layers=2, decoder_layers=1 + seed % 2
    )
    expected, logits = generate(stock)
    tokens, ours = generate(fused(stock), **STATIC)
    assert torch.equal(tokens, expected)
    assert_close({"logits": ours}, {"logits": logits}, 1e-6)


def test_second_generation_with_a_longer_cache(stock):
    """transformers keeps the length of the longest static cache."""
    ours = fused(stock)
    generate(ours, **STATIC, max_new_tokens=2 * STEPS)
    assert torch.equal(generate(ours, **STATIC)[0], generate(stock)[0])


@pytest.mark.parametrize("globally", [False, True], ids=["live", "global"])
def test_model_card(globally, stock, tmp_path):
    """A user loads a model, gives it a global_attention_mask and a static cache, and turns it back to stock."""
    stock.save_pretrained(tmp_path)
    if globally:
        apply_led_kernels()
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).double().eval()
    if not globally:
        apply_led_kernels(model)
    assert is_fused(model)
    assert torch.equal(generate(model, **STATIC)[0], generate(stock)[0])
    revert_led_kernels(*() if globally else (model,))
    assert not is_fused(model)
    assert type(model.get_decoder()) is LEDDecoder
    assert torch.equal(generate(model)[1], generate(stock)[1])


@pytest.mark.parametrize("attach", ["offload", "dispatch"])
def test_accelerate_hooks(attach, stock):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")
    expected = generate(stock)[0]
    if attach == "offload":
        accelerate.cpu_offload(stock, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(stock, {"": "cpu"}, main_device="cpu", force_hooks=True)
    apply_led_kernels(stock)
    assert torch.equal(generate(stock, **STATIC)[0], expected)
    revert_led_kernels(stock)
    assert torch.equal(generate(stock)[0], expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cross_keys_are_projected_once(cache, stock):
    ours, calls = fused(stock), []
    ours.get_decoder().layers[1].encoder_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    generate(ours, **(STATIC if cache == "static" else {}))
    assert len(calls) == 1


def test_lora_on_the_decoder(stock):
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    model = peft.get_peft_model(stock, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero
            nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    expected = generate(model)
    with model.disable_adapter():
        assert not torch.equal(generate(model)[1], expected[1])
    apply_led_kernels(model)
    tokens, logits = generate(model, **STATIC)
    assert torch.equal(tokens, expected[0])
    assert_close({"logits": logits}, {"logits": expected[1]}, 1e-6)


def decoded(model: nn.Module, **inputs) -> dict[str, Tensor]:
    """Returns outputs of the decoder and gradients of a loss over its tokens that are no padding."""
    mask = inputs["decoder_attention_mask"].bool()
    model.zero_grad()
    result = model(
        **CASE.inputs(), **inputs, output_attentions=True, output_hidden_states=True, use_cache=False
    )
    loss = nn.functional.cross_entropy(result.logits[mask], inputs["decoder_input_ids"][mask])
    loss.backward()
    named = {"loss": loss, "logits": result.logits[mask]}
    for name in ("decoder_attentions", "cross_attentions"):
        named |= {f"{name}[{i}]": x.transpose(1, 2)[mask] for i, x in enumerate(result[name])}
    named |= {f"decoder_hidden_states[{i}]": x[mask] for i, x in enumerate(result.decoder_hidden_states)}
    named |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_decoder_attention_mask(padding, stock):
    """Every output and gradient equals that of transformers in fp64."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 9).long()
    mask[1] = {
        "left": torch.arange(9) >= 3,
        "right": torch.arange(9) < 5,
        "holes": torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0]),
    }[padding]
    ids = torch.randint(3, 60, (2, 9), generator=generator)
    inputs = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    with true_fp64():
        assert_close(decoded(fused(stock), **inputs), decoded(stock, **inputs), 1e-10)


def test_attention_called_by_itself_has_the_mask_that_it_is_given(stock):
    states = torch.randn(2, 4, stock.config.d_model, generator=torch.Generator().manual_seed(0)).double()
    fast = fused(stock)
    with torch.no_grad(), true_fp64():
        for mask in (None, torch.zeros(2, 1, 4, 4).double()):
            expected, ours = (
                model.led.decoder.layers[0].self_attn(states, attention_mask=mask)[0]
                for model in (stock, fast)
            )
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_four_dimensional_mask_is_taken_as_it_is(stock):
    ids = torch.tensor([[2, 7, 9, 30], [2, 8, 8, 41]])
    allowed = torch.ones(4, 4).tril().bool().expand(2, 1, 4, 4)
    bias = torch.zeros(2, 1, 4, 4).double().masked_fill(~allowed, torch.finfo(torch.float64).min)
    with torch.no_grad(), true_fp64():
        expected = stock(**CASE.inputs(), decoder_input_ids=ids, output_attentions=True)
        for mask in (allowed, bias):
            given = {"decoder_input_ids": ids, "decoder_attention_mask": mask, "output_attentions": True}
            result = fused(stock)(**CASE.inputs(), **given)
            assert_close({"logits": result.logits}, {"logits": expected.logits}, 1e-6)
            for ours, theirs in zip(result.decoder_attentions, expected.decoder_attentions, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_document_of_padding_gets_zeros_from_cross_attention(stock):
    ours, seen = fused(stock), []
    out_proj = ours.get_decoder().layers[0].encoder_attn.out_proj
    out_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    inputs = CASE.inputs()
    inputs["attention_mask"][1] = 0
    loss = ours(**inputs, labels=inputs["input_ids"][:, :7].contiguous()).loss
    loss.backward()
    assert not seen[0][1].any()
    assert seen[0][0].all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_attention_dropout_has_the_mean_and_variance_of_stock():
    stock, samples = decoding_model(attention_dropout=0.3), 4000
    hidden = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 5).tril().bool()[None, None]
    bias = torch.zeros(1, 1, 5, 5).double().masked_fill(~mask, torch.finfo(torch.float64).min)
    modules = [model.get_decoder().layers[0].self_attn for model in (fused(stock), stock)]
    torch.manual_seed(1)
    with torch.no_grad():
        exact = modules[0](hidden, attention_mask=mask)[0][0]
        draws = [
            module.train()(hidden.expand(samples, -1, -1), attention_mask=given.expand(samples, -1, -1, -1))[
                0
            ]
            for module, given in zip(modules, (mask, bias), strict=True)
        ]
    (mean, variance), (_, stock_variance) = ((x.mean(0), x.var(0)) for x in draws)
    # They are means of `samples` draws: five standard errors are allowed.
    assert ((mean - exact).abs() <= 5 * (variance / samples).sqrt() + 1e-6).all()
    assert (variance.sum() / stock_variance.sum() - 1).abs() < 0.05


def test_static_step_compiles_once_without_a_graph_break(stock):
    """Every step of a static cache has one shape: the graph of the second serves all that follow."""
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    tokens = torch.tensor([[2, 7, 9, 30, 11, 12], [2, 8, 8, 41, 5, 6]])
    with torch.no_grad(), true_fp64():
        expected = stock(**CASE.inputs(), decoder_input_ids=tokens).logits
        encoded = stock.get_encoder()(**CASE.inputs()).last_hidden_state
    ours = fused(stock)
    cache = EncoderDecoderCache(
        *(StaticCache(config=stock.config, max_cache_len=n) for n in (16, encoded.shape[1]))
    )
    torch._dynamo.reset()
    step = torch.compile(ours.get_decoder(), backend=counting, fullgraph=True, dynamic=False)
    logits = []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            decoder = ours.get_decoder() if position == 0 else step
            hidden = decoder(
                input_ids=tokens[:, position : position + 1],
                encoder_hidden_states=encoded,
                encoder_attention_mask=CASE.inputs()["attention_mask"],
                cache=cache,
                cache_position=torch.tensor([position]),
            ).last_hidden_state
            logits.append(ours.lm_head(hidden))
    assert_close({"logits": torch.cat(logits, 1)}, {"logits": expected}, 1e-6)
    assert len(graphs) == 1


def test_steps_without_cache_positions(stock):
    """Callers that hold the cache themselves call the decoder so."""
    name = cache_argument(LEDForConditionalGeneration.forward)
    tokens = torch.tensor([[2, 7, 9, 30, 11, 12], [2, 8, 8, 41, 5, 6]])
    with torch.no_grad(), true_fp64():
        expected = stock(**CASE.inputs(), decoder_input_ids=tokens).logits
        ours, encoded = fused(stock), stock.get_encoder()(**CASE.inputs(), return_dict=True)
        for self_cache in (DynamicCache(), StaticCache(config=stock.config, max_cache_len=16)):
            cache, logits = EncoderDecoderCache(self_cache, DynamicCache()), []
            for start, stop in ((0, 3), (3, 5), (5, 6)):
                result = ours(
                    encoder_outputs=encoded,
                    attention_mask=CASE.inputs()["attention_mask"],
                    decoder_input_ids=tokens[:, start:stop],
                    use_cache=True,
                    **{name: cache},
                )
                assert result[name] is cache
                logits.append(result.logits)
            assert_close({"logits": torch.cat(logits, 1)}, {"logits": expected}, 1e-6)


ALIEN = {
    "decoder_input_ids has 1 rows": {"decoder_input_ids": torch.tensor([[2, 7, 9]])},
    "decoder_input_ids has 3 rows": {"decoder_input_ids": torch.tensor([[2, 7, 9]] * 3)},
    "decoder_input_ids has 2 rows": {"encoder_outputs": lambda states: (states[:1],)},
    r"decoder_attention_mask has shape \(1, 4\)": {"decoder_attention_mask": torch.ones(1, 4)},
    r"decoder_attention_mask has shape \(3, 4\)": {"decoder_attention_mask": torch.ones(3, 4)},
    r"decoder_attention_mask has shape \(2, 3\)": {"decoder_attention_mask": torch.ones(2, 3)},
    r"attention_mask has shape \(2, 3\)": {"attention_mask": torch.ones(2, 3)},
    r"attention_mask has shape \(2, 19\)": {"encoder_outputs": lambda states: (states[:, :7],)},
}


@pytest.mark.parametrize("said", ALIEN)
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_a_row_does_not_serve_for_a_batch(stock, said, use_cache):
    """Broadcasting would let these pass."""
    states = stock.get_encoder()(**CASE.inputs())[0]
    arguments = CASE.inputs() | PROMPTS["prompt"] | {"use_cache": use_cache, "encoder_outputs": (states,)}
    [(name, value)] = ALIEN[said].items()
    arguments[name] = value(states) if callable(value) else value.long()
    if said.startswith("decoder_input_ids"):
        with pytest.raises((ValueError, RuntimeError)):
            stock(**arguments)
    if use_cache and said.startswith("decoder_attention_mask has shape \\(2"):
        return  # a cache may hold other tokens, too
    with pytest.raises(ValueError, match=f"^{said}"):
        fused(stock)(**arguments)
