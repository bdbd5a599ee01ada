"""Says what is in a Longformer checkpoint of transformers: settings, heads, and the shapes of all tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from led_model.checkpoint.checkpoint import errors_about
from led_model.schema import (
    ANYTHING,
    BOOLEAN,
    EVEN,
    LAYERS,
    PROBABILITY,
    STRING,
    TOKEN_ID,
    TOKEN_IDS,
    WIDTH,
    check_values,
    integer,
    list_of,
    mapping_of,
    number,
)

BASE = "longformer."  # the encoder's tensors have it in checkpoints with a head

_RULES = {
    "vocab_size": integer(1),
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": integer(1),
    "intermediate_size": WIDTH,
    "hidden_act": STRING,
    "hidden_dropout_prob": PROBABILITY,
    "attention_probs_dropout_prob": PROBABILITY,
    "max_position_embeddings": integer(1),
    "type_vocab_size": integer(1, 2**16),
    "initializer_range": number(0, 1e6),
    "layer_norm_eps": number(0, 1),
    "pad_token_id": integer(0),
    "bos_token_id": TOKEN_ID.optional,
    "eos_token_id": (TOKEN_ID | TOKEN_IDS).optional,
    "sep_token_id": TOKEN_ID.optional,
    "tie_word_embeddings": BOOLEAN,
    "attention_window": EVEN | list_of(EVEN, "such numbers"),
    "id2label": mapping_of(ANYTHING, STRING, "labels by their numbers").optional,
    "num_labels": integer(1, 2**16),
}
# transformers 4 leaves settings out of config.json that are the default of their class.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_ROBERTA_IDS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "bert": {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    "roberta": {"vocab_size": 50265} | _ROBERTA_IDS,
    "longformer": {"attention_window": 512, "sep_token_id": 2} | _ROBERTA_IDS,
}
# These settings are about heads and training, and are taken over where they are.
_CARRIED = ("id2label", "label2id", "problem_type", "num_labels", "finetuning_task", "task_specific_params")

# The head's tensors stand with their shapes, in which a text is a setting's name.
_HEADS: dict[str, dict[str, tuple[str | int, ...]]] = {
    "Model": {},
    "ForMaskedLM": {
        "lm_head.dense.weight": ("hidden_size", "hidden_size"),
        "lm_head.dense.bias": ("hidden_size",),
        "lm_head.layer_norm.weight": ("hidden_size",),
        "lm_head.layer_norm.bias": ("hidden_size",),
        "lm_head.bias": ("vocab_size",),
    },
    "ForSequenceClassification": {
        "classifier.dense.weight": ("hidden_size", "hidden_size"),
        "classifier.dense.bias": ("hidden_size",),
        "classifier.out_proj.weight": ("num_labels", "hidden_size"),
        "classifier.out_proj.bias": ("num_labels",),
    },
    "ForQuestionAnswering": {
        "qa_outputs.weight": ("num_labels", "hidden_size"),
        "qa_outputs.bias": ("num_labels",),
    },
    "ForTokenClassification": {
        "classifier.weight": ("num_labels", "hidden_size"),
        "classifier.bias": ("num_labels",),
    },
    "ForMultipleChoice": {"classifier.weight": (1, "hidden_size"), "classifier.bias": (1,)},
}
# transformers ties these two to others by default, and then leaves them out of most checkpoints.
TIED_DECODER = {
    "lm_head.decoder.weight": ("vocab_size", "hidden_size"),
    "lm_head.decoder.bias": ("vocab_size",),
}


def longformer_config(stored: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Returns Longformer's settings of a config.json of BERT, RoBERTa or Longformer, all of them.

    Raises:
        ValueError: when one has no meaning, or heads do not divide the width.
    """
    family = stored["model_type"] if stored["model_type"] in _DEFAULTS_OF else "roberta"
    config: dict[str, Any] = _DEFAULTS | _DEFAULTS_OF[family]
    known = (*config, *_CARRIED)
    config |= {name: stored[name] for name in known if name in stored}
    with errors_about(f"config.json of {source}"):
        check_values(config, _RULES)
        if config["hidden_size"] % config["num_attention_heads"]:
            raise ValueError(
                f"num_attention_heads is {config['num_attention_heads']} and does not divide hidden_size "
                f"{config['hidden_size']}; change one of them."
            )
        if config["pad_token_id"] >= config["vocab_size"]:
            raise ValueError(
                f"pad_token_id is {config['pad_token_id']}, outside the vocabulary of {config['vocab_size']}; change "
                "one."
            )
        if config["max_position_embeddings"] <= (0 if family == "bert" else config["pad_token_id"] + 1):
            raise ValueError(
                f"max_position_embeddings is {config['max_position_embeddings']}, which leaves no position for a "
                "token; use the config.json that was saved with the weights."
            )
        windows = config.get("attention_window", [])
        layers = config["num_hidden_layers"]
        if isinstance(windows, int):
            config["attention_window"] = [windows] * layers
        elif windows and len(windows) != layers:
            raise ValueError(
                f"attention_window lists {len(windows)} widths for {layers} layers; give one per layer, or one number."
            )
    return config


def head_of(names: Collection[str], architectures: Any, source: object) -> str:
    """Returns the head whose tensors are among ``names``, as the end of its class's name.

    Args:
        names: of tensors, as Longformer calls them.
        architectures: what config.json says, which tells heads apart that look alike.

    Raises:
        ValueError: when it does not.
    """
    if "classifier.weight" in names:
        stated = architectures if isinstance(architectures, list) else []
        alike = ("ForTokenClassification", "ForMultipleChoice", "ForSequenceClassification")
        for head in alike:
            if any(isinstance(name, str) and name.endswith(head) for name in stated):
                return head
        raise ValueError(
            f"{source} has a classifier, and architectures in its config.json does not say of what; name the class of "
            "the model there, such as BertForTokenClassification."
        )
    marks = {
        "ForMaskedLM": "lm_head.",
        "ForQuestionAnswering": "qa_outputs.",
        "ForSequenceClassification": "classifier.",
    }
    return next((head for head, mark in marks.items() if any(n.startswith(mark) for n in names)), "Model")


def expected_tensors(
    config: Mapping[str, Any], head: str, names: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of a Longformer with the head that :func:`head_of` returns.

    Args:
        names: those that there are; of parts that a checkpoint need not have, these are expected.
    """
    width, expanded = config["hidden_size"], config["intermediate_size"]
    shapes = {
        f"{BASE}embeddings.{name}_embeddings.weight": (rows, width)
        for name, rows in (
            ("word", config["vocab_size"]),
            ("position", config["max_position_embeddings"]),
            ("token_type", config["type_vocab_size"]),
        )
    }
    shapes |= _norm(f"{BASE}embeddings.LayerNorm", width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"{BASE}encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{prefix}attention.self.{name}", width, width)
            shapes |= _linear(f"{prefix}attention.self.{name}_global", width, width)
        shapes |= _linear(f"{prefix}attention.output.dense", width, width)
        shapes |= _norm(f"{prefix}attention.output.LayerNorm", width)
        shapes |= _linear(f"{prefix}intermediate.dense", expanded, width)
        shapes |= _linear(f"{prefix}output.dense", width, expanded)
        shapes |= _norm(f"{prefix}output.LayerNorm", width)
    if head == "ForMultipleChoice" or any(name.startswith(f"{BASE}pooler.") for name in names):
        shapes |= _linear(f"{BASE}pooler.dense", width, width)
    own = _HEADS[head]
    if head == "ForMaskedLM":
        needed = () if config["tie_word_embeddings"] else ("lm_head.decoder.weight",)
        own = own | {name: shape for name, shape in TIED_DECODER.items() if name in names or name in needed}
    sizes = {**config, "num_labels": _num_labels(config)}
    return shapes | {
        name: tuple(size if isinstance(size, int) else sizes[size] for size in shape)
        for name, shape in own.items()
    }


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return config.get("num_labels", 2) if labels is None else len(labels)


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
