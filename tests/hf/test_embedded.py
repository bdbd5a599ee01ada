"""Longformer's attention in the layers of RoBERTa and BERT, as the published RobertaLong classes put it there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaForMaskedLM, RobertaModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from led_kernels.hf import apply_led_kernels, is_applied, resize_position_embeddings, revert_led_kernels
from led_kernels.hf.shared import FusedSelfAttention

SEQLEN, WINDOW, PAD = 23, 64, 1  # the window covers the texts, and transformers would have to pad them


class OfTheNotebook(LongformerSelfAttention):
    """Passes its mask on as RoBERTa gave it, which Longformer's attention took in 2020."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
    ):
        return super().forward(
            hidden_states, attention_mask=attention_mask, output_attentions=output_attentions
        )


class WithMasks(LongformerSelfAttention):
    """Makes the masks that Longformer's attention takes since 2021."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        attention_mask = attention_mask.squeeze(dim=2).squeeze(dim=1)
        is_index_masked, is_index_global_attn = attention_mask < 0, attention_mask > 0
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            is_index_masked=is_index_masked,
            is_index_global_attn=is_index_global_attn,
            is_global_attn=bool(is_index_global_attn.any()),
            output_attentions=output_attentions,
        )


class WithArgumentsOfLongformer(LongformerSelfAttention):
    def forward(
        self,
        hidden_states,
        attention_mask=None,
        layer_head_mask=None,
        is_index_masked=None,
        is_index_global_attn=None,
        is_global_attn=None,
        output_attentions=False,
    ):
        return super(WithArgumentsOfLongformer, self).forward(  # noqa: UP008, as it is published
            hidden_states, attention_mask=attention_mask, output_attentions=output_attentions
        )


class FirstTokenGlobal(WithMasks):
    """Changes the mask."""

    def forward(self, hidden_states, attention_mask=None, head_mask=None, **kwargs):
        attention_mask = attention_mask.clone()
        attention_mask[..., 0] = 10_000
        return super().forward(hidden_states, attention_mask)


def own_mask(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns Longformer's mask of any mask that a layer of RoBERTa gives."""
    if attention_mask is None:
        return hidden_states.new_zeros(hidden_states.shape[:2])
    mask = attention_mask[:, 0, 0]
    return torch.where(mask, 0.0, -10_000.0) if mask.dtype == torch.bool else mask


class OfToday(LongformerSelfAttention):
    """Is written for the layers of any release."""

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        mask = own_mask(hidden_states, attention_mask)
        out = super().forward(
            hidden_states,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=bool((mask > 0).any()),
        )
        return out[0], None


class Around(RobertaSelfAttention):
    """Is RoBERTa's attention and holds Longformer's."""

    def __init__(self, config, layer_id):
        super().__init__(config)
        self.longformer_self_attn = LongformerSelfAttention(config, layer_id)

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        mask = own_mask(hidden_states, attention_mask)
        out = self.longformer_self_attn(
            hidden_states,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=bool((mask > 0).any()),
        )
        return out[0], None


OF_4 = [OfTheNotebook, WithMasks, WithArgumentsOfLongformer, LongformerSelfAttention]


def make(
    attention: Callable[..., nn.Module],
    base: type[nn.Module] = RobertaModel,
    window: int = WINDOW,
    **settings,
) -> tuple[nn.Module, nn.Module]:
    """Returns a model with ``attention`` in its layers, global projections like the local ones, and one without."""
    torch.manual_seed(0)
    config_class = BertConfig if base is BertModel else RobertaConfig
    defaults = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 102,
    }
    config = config_class(**defaults | settings)
    short = base(config).eval()
    long = copy.deepcopy(short)
    long.config.attention_window = [window] * config.num_hidden_layers
    for number, layer in enumerate(long.base_model.encoder.layer):
        own = attention(long.config, number)
        inner = own.longformer_self_attn if isinstance(own, Around) else own
        for name in ("query", "key", "value"):
            projection = getattr(layer.attention.self, name)
            setattr(inner, name, projection)
            setattr(inner, f"{name}_global", copy.deepcopy(projection))
        layer.attention.self = own.eval()
    return long, short


def texts(seqlen: int = SEQLEN) -> tuple[Tensor, Tensor]:
    input_ids = torch.randint(3, 60, (2, seqlen), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, seqlen - 8 :] = 0
    return input_ids.masked_fill(attention_mask == 0, PAD), attention_mask


def states(model: nn.Module, attention_mask: Tensor | None, seqlen: int = SEQLEN) -> Tensor:
    """Returns the states of all tokens that ``attention_mask`` has, ``[tokens, hidden_size]``."""
    input_ids, real = texts(seqlen)
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    return output[0][(real if attention_mask is None else attention_mask).bool()]


def close(actual: Tensor, expected: Tensor, atol: float = 4e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("base", [RobertaModel, BertModel])
@pytest.mark.parametrize("attention", [*OF_4, OfToday, Around])
def test_computes_what_the_model_computes(attention, base, implementation):
    """No release runs all of these by itself, and none texts that do not fill the window."""
    long, short = make(attention, base, attn_implementation=implementation)
    names = list(long.state_dict())
    assert apply_led_kernels(long) is long
    assert any(isinstance(module, FusedSelfAttention) for module in long.modules())
    real = texts()[1]
    for mask in (real, torch.ones_like(real)):
        close(states(long, mask), states(short, mask))
    full = torch.ones_like(real)
    with torch.no_grad():
        close(long(input_ids=texts()[0])[0], short(input_ids=texts()[0], attention_mask=full)[0])
    assert list(long.state_dict()) == names
    assert isinstance(long.encoder.layer[0].attention.self, attention)
    revert_led_kernels(long)
    assert not is_applied(long)
    assert {type(layer.attention.self) for layer in long.encoder.layer} == {attention}


@pytest.mark.parametrize("attention", OF_4)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_twos_in_the_mask_are_global(attention, implementation):
    """A narrow band and a global token give what Longformer itself gives, on every release."""
    long, _ = make(attention, window=8, attn_implementation=implementation)
    config = transformers.LongformerConfig(**long.config.to_dict() | {"attention_window": [8, 8]})
    longformer = transformers.LongformerModel(config).eval()
    longformer.load_state_dict(long.state_dict(), strict=False)
    with torch.no_grad():
        for model in (long, longformer):
            for name, parameter in model.named_parameters():
                if "_global" in name:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2
                    )
    apply_led_kernels(long)
    real = texts()[1]
    mask = real.clone()
    mask[:, 0] = mask[0, 9] = 2
    expected = states(longformer, mask)
    close(states(long, mask), expected)
    assert (states(long, real) - expected).abs().max() > 0.01


def test_a_release_that_runs_the_class_gives_the_same():
    """OfToday runs everywhere on texts that fill the window: attentions, states and gradients stay."""
    long, _ = make(OfToday, window=8)
    seqlen = 24
    expected = states(long, texts(seqlen)[1], seqlen)
    apply_led_kernels(long)
    close(states(long, texts(seqlen)[1], seqlen), expected)


def test_an_override_keeps_what_it_does():
    long, _ = make(FirstTokenGlobal, window=4)
    other, _ = make(WithMasks, window=4)
    apply_led_kernels(long)
    apply_led_kernels(other)
    real = texts()[1]
    mask = real.clone()
    mask[:, 0] = 2
    close(states(long, real), states(other, mask), atol=0)


def test_gradients_with_and_without_checkpointing():
    long, short = make(WithMasks)
    apply_led_kernels(long)
    input_ids, mask = texts()

    def gradients(model):
        model.zero_grad()
        model(input_ids=input_ids, attention_mask=mask)[0][mask.bool()].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(short)
    long.train()
    for _ in range(2):
        found = gradients(long)
        for name, gradient in expected.items():
            if "pooler" not in name:
                torch.testing.assert_close(found[name], gradient, rtol=2e-5, atol=2e-5)
        long.gradient_checkpointing_enable({"use_reentrant": False})


def test_in_a_model_with_a_head():
    long, short = make(WithMasks, RobertaForMaskedLM)
    signature = inspect.signature(long.roberta.forward)
    apply_led_kernels(long)
    assert inspect.signature(long.roberta.forward) == signature
    apply_led_kernels(long, backend="reference")
    assert long.roberta.encoder.layer[0].attention.self.led_kernels_options.backend == "reference"
    real = texts()[1]
    close(states(long, real), states(short, real), atol=1e-5)
    assert long.accepts_loss_kwargs is False  # Trainer would add up the means of accumulated batches
    revert_led_kernels(long)
    assert type(long) is RobertaForMaskedLM
    assert not hasattr(long, "accepts_loss_kwargs")
    assert "led_kernels_mask" not in vars(long.roberta.encoder)


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_under_peft(adapter):
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    long, _ = make(WithMasks)
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["query"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    }[adapter]()
    model = peft.get_peft_model(long, config).eval()
    apply_led_kernels(model)
    real = texts()[1]
    with torch.no_grad():
        found = [
            model(input_ids=texts()[0], attention_mask=mask)[0] for mask in (real, torch.ones_like(real))
        ]
    assert (found[0] - found[1])[1].abs().max() > 0.01
    if adapter == "lora":  # which begins as nothing
        close(found[0][real.bool()], states(long, real))


def test_more_positions():
    long, _ = make(WithMasks)
    apply_led_kernels(long)
    table = long.embeddings.position_embeddings.weight.detach().clone()
    resize_position_embeddings(long, 400)
    assert torch.equal(long.embeddings.position_embeddings.weight[:102], table)
    assert torch.equal(long.embeddings.position_embeddings.weight[102:202], table[2:])
    assert long.config.max_position_embeddings == 402
    assert long(input_ids=torch.randint(3, 60, (1, 390)))[0].isfinite().all()


class WithoutSuper(LongformerSelfAttention):
    def forward(self, hidden_states, attention_mask=None, head_mask=None, **kwargs):
        return LongformerSelfAttention.forward(self, hidden_states, attention_mask)


class TestRefusals:
    def refused(self, model: nn.Module, message: str) -> None:
        classes = [type(module) for module in model.modules()]
        with pytest.raises(TypeError, match=message):
            apply_led_kernels(model)
        assert [type(module) for module in model.modules()] == classes

    def test_an_override_that_does_not_call_its_base(self):
        self.refused(make(WithoutSuper)[0], "WithoutSuper overrides the forward of .* without super")

    def test_a_decoder(self):
        self.refused(make(WithMasks, is_decoder=True)[0], "RobertaModel is a decoder")

    def test_some_layers_only(self):
        long, short = make(WithMasks)
        long.encoder.layer[1].attention.self = short.encoder.layer[1].attention.self
        self.refused(long, "Longformer's attention in 1 of 2 layers")

    def test_masks_of_other_shapes(self):
        long = apply_led_kernels(make(WithMasks)[0])
        input_ids, mask = texts()
        with pytest.raises(
            ValueError, match=r"attention_mask has shape \(2, 23, 23\).* give \[batch, seqlen\]"
        ):
            long(input_ids=input_ids, attention_mask=mask[:, None] * mask[:, :, None])

    def test_states_of_another_encoder(self):
        long = apply_led_kernels(make(WithMasks)[0])
        with pytest.raises(TypeError, match="got encoder_hidden_states; Longformer's attention has none"):
            long.encoder.layer[0].attention.self(
                torch.ones(1, 3, 32), torch.zeros(1, 1, 1, 3), encoder_hidden_states=torch.ones(1, 2, 32)
            )

    def test_a_mask_that_is_no_mask_of_longformer(self):
        attention = apply_led_kernels(make(LongformerSelfAttention)[0]).encoder.layer[0].attention.self
        for mask in (torch.zeros(1, 1, 3, 3), torch.zeros(1, 4), torch.ones(1, 3, dtype=torch.bool)):
            with pytest.raises(ValueError, match="attention_mask has shape"):
                attention(torch.ones(1, 3, 32), mask)
