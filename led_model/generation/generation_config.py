"""Defines the dataclass of what Hugging Face's generation_config.json says of how tokens are chosen."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from led_model.schema import (
    BOOLEAN,
    TOKEN_ID,
    TOKEN_IDS,
    check_names,
    check_values,
    convert_numbers,
    integer,
    list_of,
    number,
    one_of,
    printable,
)

# These settings of transformers choose other tokens and are not here; each has the value that turns it off.
_UNSUPPORTED_GENERATION = {
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_decoder_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_p": None,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
# These change how fast tokens come, or what is returned beside them.
_NO_OTHER_TOKENS = re.compile(
    r"_.*|assistant_.*|cache_.*|compile_config|continuous_batching_config|disable_compile|is_assistant|"
    r"low_memory|max_cache_len|max_matching_ngram_size|num_assistant_.*|output_.*|prefill_chunk_size|prompt_lookup_.*|"
    r"remove_invalid_values|return_.*|speculation_type|target_lookbehind|transformers_version|use_cache|use_mtp"
)

_COUNT = integer(0)
_RULES = {
    "decoder_start_token_id": TOKEN_ID,
    "bos_token_id": TOKEN_ID.optional,
    "pad_token_id": TOKEN_ID.optional,
    "eos_token_id": (TOKEN_ID | TOKEN_IDS).optional,
    "forced_bos_token_id": TOKEN_ID.optional,
    "forced_eos_token_id": (TOKEN_ID | TOKEN_IDS).optional,
    "max_length": integer(1).optional,
    "max_new_tokens": _COUNT.optional,
    "min_length": _COUNT,
    "min_new_tokens": _COUNT.optional,
    "num_beams": integer(1, 1024),
    "num_return_sequences": integer(1, 1024),
    "length_penalty": number(-50, 50),  # beyond, powers of a length leave the range of floats
    "early_stopping": one_of(True, False, "never"),
    "do_sample": BOOLEAN,
    "temperature": number(0),
    "top_k": _COUNT,
    "top_p": number(0, 1),
    "seed": integer(-(2**63), 2**63 - 1).optional,
    "repetition_penalty": number(1e-3, 1e3),  # beyond, scores leave the range of floats
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "bad_words_ids": list_of(
        list_of(TOKEN_ID, "token ids", least=1), "non-empty lists of token ids"
    ).optional,
}


@dataclass
class GenerationConfig:
    """Says how tokens are chosen and when that starts and stops, by the names and defaults of transformers.

    ``max_length`` counts the start token; ``max_new_tokens`` does not, and wins; with neither, 20 are made.
    ``min_length`` and ``min_new_tokens`` are related likewise. ``seed`` (not in transformers) makes sampling
    repeatable; without one torch's global generator is drawn from. ``bos_token_id`` is what a checkpoint says it is;
    sequences begin with ``decoder_start_token_id``. ``unsupported`` holds what a checkpoint asks for beyond these
    fields, by name.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    decoder_start_token_id: int = 2
    bos_token_id: int | None = None
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
    _from_model_config = False  # transformers' Seq2SeqTrainer asks for it

    def __post_init__(self) -> None:
        check_values(vars(self), _RULES)
        convert_numbers(self)
        self.length_penalty = float(self.length_penalty)  # powers of integers would be integers of any size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> GenerationConfig:
        """Returns what generation_config.json says, or config.json, where older checkpoints keep the same keys.

        Args:
            own: the part of ``values`` that is about generation alone, whose unknown settings are thus unsupported.

        ``None`` means "not given", except that ``pad_token_id`` and ``eos_token_id`` may be none at all.
        """
        known = {f.name for f in fields(cls)} - {"unsupported"}
        unsupported = {
            key: values[key]
            for key, neutral in _UNSUPPORTED_GENERATION.items()
            if values.get(key) is not None and values[key] != neutral
        }
        for key, value in (own or {}).items():
            is_off = value is None or value is False
            if (
                not is_off
                and key not in (*known, *_UNSUPPORTED_GENERATION)
                and not _NO_OTHER_TOKENS.fullmatch(key)
            ):
                unsupported[key] = value
        given = {
            key: values[key]
            for key in known & values.keys()
            if values[key] is not None or key in ("pad_token_id", "eos_token_id")
        }
        return cls(**given, unsupported=unsupported)

    def updated(self, **settings: Any) -> GenerationConfig:
        """Returns a copy with the caller's settings, whose limits win over those that this one has in another unit.

        Raises:
            TypeError: for a setting that is no field.
            ValueError: as for the class, and for a least length above the longest, if both are the caller's.
        """
        check_names(settings, (f.name for f in fields(self)), "generate")
        for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            if (low := settings.get(least)) is not None and (high := settings.get(most)) is not None:
                check_values({least: low, most: high}, _RULES)
                if low > high:
                    raise ValueError(f"{least} is {low} and {most} {high}; give a {least} of at most {most}.")
        for length, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if length in settings:
                settings = {new_tokens: None} | settings
        return replace(self, **settings)

    def replaced_by(self, other: Any) -> GenerationConfig:
        """Returns the settings of ``other``, of this class or transformers', completed where it has ``None``.

        Raises:
            TypeError: when it is neither.
            ValueError: for settings of transformers that are not here.
        """
        if isinstance(other, GenerationConfig):
            return other
        if not callable(getattr(other, "to_dict", None)):
            raise TypeError(f"generation_config is a {type(other).__name__}; give a GenerationConfig.")
        given = {name: value for name, value in other.to_dict().items() if value is not None}
        wanted = GenerationConfig.from_dict(given)
        if wanted.unsupported:
            raise ValueError(
                f"generation_config asks for {', '.join(sorted(wanted.unsupported))}, which generate does not have; "
                "leave that out."
            )
        known = {f.name for f in fields(self)} - {"unsupported"}
        return self.updated(**{name: given[name] for name in known & given.keys()})

    def _get_default_generation_params(self) -> dict[str, Any]:
        """Returns what transformers' Seq2SeqTrainer completes the settings by: the length it pads predictions to."""
        return {"max_length": self.max_sequence_length()}

    def update(self, defaults_only: bool = False, **settings: Any) -> None:
        """Changes settings, or those alone that are ``None``; transformers' Trainer calls it.

        Raises:
            TypeError: for a name that is no setting.
        """
        taken = {
            name: value
            for name, value in settings.items()
            if not defaults_only or getattr(self, name, None) is None
        }
        vars(self).update(vars(replace(self, **taken)))

    def describe_unsupported(self) -> str:
        """Returns the ``unsupported`` settings as a message lists them."""
        return ", ".join(
            f"{printable(name)}={printable(reprlib.repr(value))}" for name, value in self.unsupported.items()
        )

    def check(self, vocab_size: int) -> None:
        """Refuses settings that have no meaning or contradict each other.

        Raises:
            ValueError: naming the setting and what to give instead.
        """
        check_values(vars(self), _RULES)
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
        if self.do_sample and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(
                f"temperature is {self.temperature}; give a number from 0.001 to 1000, or do_sample=False for no "
                "chance."
            )
        if self.do_sample and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and at most 1.")
        self.check_ids(vocab_size)

    def check_ids(self, vocab_size: int) -> None:
        """Refuses ids that the vocabulary does not have, where they are written or read.

        Raises:
            ValueError: naming the setting and the id.
        """
        for name, ids in (
            ("decoder_start_token_id", [self.decoder_start_token_id]),
            ("pad_token_id", _as_list(self.pad_token_id)),
            ("eos_token_id", self.eos_token_ids),
            ("forced_bos_token_id", _as_list(self.forced_bos_token_id)),
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
        """Returns the ids that end a sequence, each once."""
        return list(dict.fromkeys(_as_list(self.eos_token_id)))

    @property
    def forced_eos_token_ids(self) -> list[int]:
        """Returns the ids of which one must end a sequence of the greatest length."""
        return _as_list(self.forced_eos_token_id)

    def max_sequence_length(self, prompt: int = 1) -> int:
        """Returns the length of the longest sequence, its ``prompt`` tokens (1: the start token) included."""
        if self.max_new_tokens is not None:
            return prompt + self.max_new_tokens
        return self.max_length if self.max_length is not None else prompt + 20

    def min_sequence_length(self, prompt: int = 1) -> int:
        """Returns the length before which no sequence ends, prompt included; the limit wins over it."""
        return self.min_length if self.min_new_tokens is None else prompt + self.min_new_tokens


def _as_list(token_id: int | list[int] | None) -> list[int]:
    if token_id is None:
        return []
    return list(token_id) if isinstance(token_id, (list, tuple)) else [token_id]
