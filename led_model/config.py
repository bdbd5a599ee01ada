"""What Hugging Face's config.json and generation_config.json say of an LED, as dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

# names that transformers accepts for the same thing (LEDConfig.attribute_map)
_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
}

# settings of transformers that choose other tokens and are not here, with the value that leaves them off
_UNSUPPORTED_GENERATION = {
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "min_p": None,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "renormalize_logits": False,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
}


@dataclass
class LEDConfig:
    """Shape and special tokens of an LED; names and defaults are those of transformers' ``LEDConfig``.

    ``attention_window`` is the even total width as in config.json, one for all layers or one per layer;
    attention reaches ``attention_window // 2`` tokens to either side (:meth:`window_size`). ``num_labels``,
    ``id2label`` and ``problem_type`` concern sequence classification only.

    Raises:
        ValueError: for a window that is odd or not positive, windows that do not match the layers, or heads
            that do not divide ``d_model``.
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
        if isinstance(self.attention_window, int):
            self.attention_window = [self.attention_window] * self.encoder_layers
        if len(self.attention_window) != self.encoder_layers:
            raise ValueError(
                f"attention_window lists {len(self.attention_window)} widths for {self.encoder_layers} "
                "encoder layers; give one per layer, or a single number."
            )
        for window in self.attention_window:
            if window <= 0 or window % 2:
                raise ValueError(f"attention_window holds {window}; give positive even widths.")
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if heads < 1 or self.d_model % heads:
                raise ValueError(
                    f"{side}_attention_heads is {heads} and does not divide d_model {self.d_model}; "
                    "change one of them."
                )

    def window_size(self, layer: int) -> int:
        """How many tokens encoder layer ``layer`` sees to either side."""
        return self.attention_window[layer] // 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LEDConfig:
        """From the contents of config.json; keys that do not concern the model's shape are left aside.

        Raises:
            ValueError: when ``model_type`` names another architecture.
        """
        model_type = values.get("model_type", "led")
        if model_type != "led":
            raise ValueError(f"model_type in config.json is {model_type!r}; give a checkpoint of 'led'.")
        labels = values.get("id2label")
        if labels is not None:
            labels = {int(label_id): label for label_id, label in labels.items()}  # JSON has no integer keys
            values = {**values, "id2label": labels, "num_labels": len(labels)}
        renamed = {_ALIASES[key]: value for key, value in values.items() if key in _ALIASES}
        known = {f.name for f in fields(cls)}
        return cls(**renamed | {key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, as transformers reads them: labels by ``id2label`` alone."""
        values = {key: value for key, value in vars(self).items() if key != "num_labels"}
        labels = self.id2label or {label_id: f"LABEL_{label_id}" for label_id in range(self.num_labels)}
        label2id = {label: label_id for label_id, label in labels.items()}
        return values | {"model_type": "led", "id2label": labels, "label2id": label2id}


@dataclass
class GenerationConfig:
    """How tokens are chosen and when that starts and stops; names and defaults are those of transformers.

    ``max_length`` counts the start token; ``max_new_tokens`` does not, and wins; with neither, 20 are made.
    ``min_length`` and ``min_new_tokens`` likewise. ``seed`` (not in transformers) makes sampling repeatable;
    without one torch's global generator is drawn from. ``unsupported`` holds what a checkpoint asks for
    beyond these fields, by name.
    """

    decoder_start_token_id: int = 2
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    unsupported: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """From generation_config.json, or from config.json, where older checkpoints keep the same keys.

        ``None`` means "not given", except that ``pad_token_id`` and ``eos_token_id`` may be none at all.
        """
        known = {f.name for f in fields(cls)} - {"unsupported"}
        unsupported = {
            key: values[key]
            for key, neutral in _UNSUPPORTED_GENERATION.items()
            if values.get(key) is not None and values[key] != neutral
        }
        given = {
            key: values[key]
            for key in known & values.keys()
            if values[key] is not None or key in ("pad_token_id", "eos_token_id")
        }
        return cls(**given, unsupported=unsupported)

    def updated(self, **settings: Any) -> GenerationConfig:
        """A copy with the caller's settings, whose limits win over those that this one has in another unit.

        Raises:
            TypeError: for a setting that is no field.
        """
        for length, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if length in settings:
                settings = {new_tokens: None} | settings
        return replace(self, **settings)

    def check(self, vocab_size: int) -> None:
        """Refuses what has no meaning or contradicts itself.

        Raises:
            ValueError: naming the setting and what to give instead.
        """
        for name in ("num_beams", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("min_length", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; give True, False or 'never'.")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences} but num_beams is {self.num_beams}; "
                "return at most as many sequences as there are beams."
            )
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences} but greedy decoding finds one sequence; "
                "set num_beams or do_sample=True."
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give a number above 0.")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature}; give a number above 0, or do_sample=False for no chance."
            )
        if self.do_sample and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and at most 1.")
        if self.bad_words_ids is not None and not all(
            isinstance(word, (list, tuple)) and word for word in self.bad_words_ids
        ):
            raise ValueError(
                "bad_words_ids is not a list of non-empty lists of token ids; give one list a word."
            )
        forced_bos = [] if self.forced_bos_token_id is None else [self.forced_bos_token_id]
        for name, ids in (
            ("forced_bos_token_id", forced_bos),
            ("forced_eos_token_id", self.forced_eos_token_ids),
            ("bad_words_ids", [token for word in self.bad_words_ids or [] for token in word]),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name} holds id {token}, outside the vocabulary of {vocab_size}; "
                        "use the tokenizer that belongs to the checkpoint."
                    )

    @property
    def eos_token_ids(self) -> list[int]:
        return _as_list(self.eos_token_id)

    @property
    def forced_eos_token_ids(self) -> list[int]:
        return _as_list(self.forced_eos_token_id)

    def length_limit(self, prompt: int = 1) -> int:
        """Longest sequence to return, its ``prompt`` tokens (1: the start token) included."""
        if self.max_new_tokens is not None:
            return prompt + self.max_new_tokens
        return self.max_length if self.max_length is not None else prompt + 20

    def least_length(self, prompt: int = 1) -> int:
        """Shortest sequence to return before any end of text, prompt included; the limit wins over it."""
        return self.min_length if self.min_new_tokens is None else prompt + self.min_new_tokens


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: when the file is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch it again.")
    return values


def _as_list(token_id: int | list[int] | None) -> list[int]:
    if token_id is None:
        return []
    return list(token_id) if isinstance(token_id, (list, tuple)) else [token_id]
