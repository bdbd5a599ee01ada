"""Defines the dataclass of what Hugging Face's config.json says of an LED."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from led_model.activations import ACTIVATIONS
from led_model.schema import (
    BOOLEAN,
    EVEN,
    LAYERS,
    PROBABILITY,
    STRING,
    TOKEN_ID,
    TOKEN_IDS,
    WIDTH,
    Rule,
    check_values,
    convert_numbers,
    integer,
    list_of,
    mapping_of,
    number,
    one_of,
)

# transformers accepts these names for the same settings (LEDConfig.attribute_map).
_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
}

_DIFFERENT = Rule("one at least and none twice", lambda labels: 0 < len(labels) == len(set(labels.values())))
_RULES = {
    "vocab_size": integer(1),
    "max_encoder_position_embeddings": integer(1),
    "max_decoder_position_embeddings": integer(1),
    "encoder_layers": LAYERS,
    "encoder_ffn_dim": WIDTH,
    "encoder_attention_heads": integer(1),
    "decoder_layers": LAYERS,
    "decoder_ffn_dim": WIDTH,
    "decoder_attention_heads": integer(1),
    "encoder_layerdrop": PROBABILITY,
    "decoder_layerdrop": PROBABILITY,
    "activation_function": one_of(*ACTIVATIONS),
    "d_model": WIDTH,
    "dropout": PROBABILITY,
    "attention_dropout": PROBABILITY,
    "activation_dropout": PROBABILITY,
    "classifier_dropout": PROBABILITY,
    "init_std": number(0, 1e6),
    "attention_window": EVEN | list_of(EVEN, "such numbers"),
    "decoder_start_token_id": TOKEN_ID,
    "pad_token_id": TOKEN_ID.optional,
    "bos_token_id": TOKEN_ID.optional,
    "eos_token_id": (TOKEN_ID | TOKEN_IDS).optional,
    "use_cache": BOOLEAN,
    "tie_word_embeddings": BOOLEAN,
    "num_labels": integer(1, 2**16),
    "id2label": (mapping_of(TOKEN_ID, STRING, "labels by their numbers") & _DIFFERENT).optional,
    "problem_type": one_of(
        "regression", "single_label_classification", "multi_label_classification"
    ).optional,
}
# JSON has no integer keys, so that ids are spelled as texts.
_LABELS_OF_JSON = {
    "id2label": mapping_of(
        TOKEN_ID
        | Rule("digits", lambda key: isinstance(key, str) and bool(re.fullmatch(r"0|[1-9][0-9]{0,8}", key))),
        STRING,
        "labels by their numbers",
    )
    & _DIFFERENT
}


@dataclass
class LEDConfig:
    """Holds the shape and the special tokens of an LED, by the names and defaults of transformers' ``LEDConfig``.

    ``attention_window`` is the even total width as in config.json, one for all layers or one per layer;
    attention reaches ``attention_window // 2`` tokens to either side (:meth:`window_size`). ``num_labels``,
    ``id2label`` and ``problem_type`` concern sequence classification only.

    Raises:
        ValueError: for a value of another type or out of range, a window that is odd or not positive, windows
            that do not match the layers, heads that do not divide ``d_model``, and ids outside the vocabulary.
    """

    vocab_size: int = 50265
    max_encoder_position_embeddings: int = 16384
    max_decoder_position_embeddings: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    d_model: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    init_std: float = 0.02
    attention_window: int | list[int] = 512
    decoder_start_token_id: int = 2
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        check_values(vars(self), _RULES)
        convert_numbers(self)
        if not isinstance(self.attention_window, (list, tuple)):
            self.attention_window = [self.attention_window] * self.encoder_layers
        if len(self.attention_window) != self.encoder_layers:
            raise ValueError(
                f"attention_window lists {len(self.attention_window)} widths for {self.encoder_layers} "
                "encoder layers; give one per layer, or a single number."
            )
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if self.d_model % heads:
                raise ValueError(
                    f"{side}_attention_heads is {heads} and does not divide d_model {self.d_model}; "
                    "change one of them."
                )
        for name in ("decoder_start_token_id", "pad_token_id"):
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, outside the vocabulary of {self.vocab_size}; change one."
                )
        if self.id2label is not None and sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError("id2label skips a number; give a label for each number from 0 on.")

    def window_size(self, layer: int) -> int:
        """Returns how many tokens the encoder layer ``layer`` sees to either side."""
        widths = self.attention_window
        # It is a list since __post_init__, unless a caller has set a single width afterwards.
        return (widths if isinstance(widths, int) else widths[layer]) // 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LEDConfig:
        """Returns the config that config.json describes; keys that do not concern the model's shape are left aside.

        Raises:
            ValueError: when ``model_type`` names another architecture, and as for the class.
        """
        model_type = values.get("model_type", "led")
        if model_type != "led":
            raise ValueError(
                f"model_type in config.json is {reprlib.repr(model_type)}; give a checkpoint of 'led'."
            )
        labels = values.get("id2label")
        if labels is not None:
            check_values({"id2label": labels}, _LABELS_OF_JSON)
            labels = {int(label_id): label for label_id, label in labels.items()}
            values = {**values, "id2label": labels, "num_labels": len(labels)}
        renamed = {_ALIASES[key]: value for key, value in values.items() if key in _ALIASES}
        known = {f.name for f in fields(cls)}
        return cls(**renamed | {key: value for key, value in values.items() if key in known})

    def get_text_config(self) -> LEDConfig:
        """Returns this config, in which transformers' Trainer looks for the special tokens."""
        return self

    def to_json_string(self) -> str:
        """Returns the text of config.json, which transformers' Trainer logs."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of config.json, as transformers reads them: labels by ``id2label`` alone."""
        values = {key: value for key, value in vars(self).items() if key != "num_labels"}
        labels = self.id2label or {label_id: f"LABEL_{label_id}" for label_id in range(self.num_labels)}
        label2id = {label: label_id for label_id, label in labels.items()}
        return values | {"model_type": "led", "id2label": labels, "label2id": label2id}
