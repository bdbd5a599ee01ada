"""Small random configs, weights and inputs."""

from __future__ import annotations

import random

import torch

VOCAB_SIZE = 40


def small_config(seed: int = 0, **overrides) -> dict:
    """Returns keyword arguments for either LEDConfig."""
    draw = random.Random(seed)
    heads, decoder_heads = draw.choice([(1, 2), (2, 3), (3, 2), (4, 1)])
    config = {
        "vocab_size": VOCAB_SIZE,
        "d_model": heads * decoder_heads * draw.choice([5, 8]),
        "encoder_layers": 2,
        "decoder_layers": draw.choice([1, 2]),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": decoder_heads,
        "encoder_ffn_dim": draw.choice([17, 32]),
        "decoder_ffn_dim": draw.choice([24, 31]),
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 48,
        "attention_window": draw.choice([[8, 8], [4, 16], [4, 8]]),
        "activation_function": draw.choice(["gelu", "relu", "gelu_new"]),
        "dropout": 0.0,
    }
    return config | overrides


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is far from uniform and every bias matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif "bias" in name:
                tensor.copy_(0.2 * noise)
            elif "embed_positions" in name:
                tensor.copy_(2 * noise)  # or greedy generation repeats one token
            elif "embed" in name or "shared" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * (2 / tensor.shape[-1]) ** 0.5)


def random_inputs(seed: int, batch: int = 3, seqlen: int = 37, target: int = 9) -> dict[str, torch.Tensor]:
    """Returns ids, an attention mask with right padding, left padding and holes, and globals that differ per row."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(4, VOCAB_SIZE, shape, generator=generator)

    attention_mask = torch.ones(batch, seqlen, dtype=torch.int64)
    attention_mask[0, seqlen - seqlen // 4 :] = 0
    if batch > 1:
        attention_mask[1, : seqlen // 5] = 0
    if batch > 2:
        attention_mask[2] = (torch.rand(seqlen, generator=generator) > 0.2).long()
        attention_mask[2, 0] = 1
    global_attention_mask = (torch.rand(batch, seqlen, generator=generator) > 0.9).long()
    global_attention_mask[0] = 0
    global_attention_mask[0, 0] = 1
    return {
        "input_ids": integers(batch, seqlen),
        "attention_mask": attention_mask,
        "global_attention_mask": global_attention_mask,
        "decoder_input_ids": integers(batch, target),
    }
