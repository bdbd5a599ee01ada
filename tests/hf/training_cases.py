"""The tests of training share these models with the same weights, rows of documents, and the run of a Trainer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_cases import VOCABULARY, HFCase, fused, led_model
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from led_kernels.trainer import AcceptsNumItems
from led_model import LEDConfig, LEDForConditionalGeneration
from led_model.checkpoint.tensor_names import to_hf_state_dict

ROWS, SOURCE, TARGET = 8, 19, 6
CASE = HFCase(positions=32)
# A release whose label smoothing does not know the number of labels gives it to no model, so that every batch counts as
# much, whatever it holds.
WEIGHS_TOKENS = AcceptsNumItems().__get__(None, nn.Module)


@functools.cache
def _stock() -> nn.Module:
    return led_model(CASE, decoder_layers=2, decoder_attention_heads=2, init_std=0.1)


def stock_model() -> nn.Module:
    return copy.deepcopy(_stock())


def drop_in() -> nn.Module:
    return fused(_stock())


def own_model() -> nn.Module:
    stock = _stock()
    model = LEDForConditionalGeneration(LEDConfig.from_dict(stock.config.to_dict())).eval()
    with torch.no_grad():
        for name, tensor in to_hf_state_dict(model.state_dict()).items():
            tensor.copy_(stock.state_dict()[name])
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"drop-in": drop_in, "led_model": own_model}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all weights by transformers' names."""
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return {name: tensor.clone() for name, tensor in to_hf_state_dict(found).items()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def row(index: int, equal: bool = False, has_global: bool = True) -> dict[str, Tensor]:
    """Returns a document of ``SOURCE`` tokens and its summary, of 2 to 5 tokens, or of 4 if all are to be ``equal``."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, VOCABULARY, (SOURCE,), generator=generator)
    labels = torch.randint(3, VOCABULARY, (TARGET,), generator=generator)
    labels[4 if equal else 2 + index % 4 :] = -100
    start = torch.tensor([2])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(SOURCE) < SOURCE - index % 3).long(),
        "global_attention_mask": (torch.arange(SOURCE) == 0).long() * has_global,
        "labels": labels,
        # Trainer takes the labels away where it smooths them.
        "decoder_input_ids": torch.cat([start, labels[:-1]]).clamp(min=1),
    }


def batch(indices: range, **options: bool) -> dict[str, Tensor]:
    rows = [row(index, **options) for index in indices]
    return {name: torch.stack([one[name] for one in rows]) for name in rows[0]}


class Rows(torch.utils.data.Dataset):
    def __init__(self, equal: bool = not WEIGHS_TOKENS) -> None:
        self.equal = equal

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return row(index, self.equal)


def trainer_of(
    model: nn.Module, directory: Path | str, equal: bool = not WEIGHS_TOKENS, **settings: Any
) -> Seq2SeqTrainer:
    """Returns a Trainer that steps by plain gradients, as Adam makes noise of a gradient that should be 0 large."""
    arguments = {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.03,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = Seq2SeqTrainingArguments(**arguments | settings)
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=Rows(equal), eval_dataset=Rows(equal))


def trained(trainer: Seq2SeqTrainer, **settings: Any) -> dict[str, Any]:
    """Trains, and returns losses and norms of gradients by steps, and the weights afterwards."""
    trainer.train(**settings)
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "weights": weights(trainer.model),
    }


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest difference of two dicts of tensors, in units of the largest number of each tensor."""
    assert actual.keys() == expected.keys()
    return max(
        ((actual[name].double() - value.double()).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    )


def assert_same_run(actual: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-6) -> None:
    for name in ("losses", "grad_norms"):
        torch.testing.assert_close(
            torch.tensor(actual[name]),
            torch.tensor(expected[name]),
            rtol=rtol,
            atol=0,
            msg=lambda m, n=name: n + m,
        )
    assert difference(actual["weights"], expected["weights"]) <= rtol
