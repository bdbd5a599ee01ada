"""Makes an LED of a BART, or of an LED with fewer positions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from led_kernels.positions import with_positions
from led_model.checkpoint.checkpoint import errors_about
from led_model.checkpoint.pretrained import LEDPreTrainedModel
from led_model.checkpoint.tensor_names import (
    ARCHITECTURE_OF,
    EMBEDDINGS,
    check_size,
    check_tensors,
    expected_shapes,
    fill_embeddings,
    named_as_head_model,
)
from led_model.config import LEDConfig
from led_model.conversion.converted import PROVENANCE, Converted, Request, check_flags, reach_of
from led_model.modeling.heads import LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.modeling.model import LEDForConditionalGeneration, LEDModel

_LED_POSITIONS = 16384  # as allenai/led-base-16384 has
_BART_OFFSET = 2  # BART's tables begin with two rows that no position uses
_BART_REFUSED = {
    "normalize_before": (False, "so that norms stand before attention, and LED's stand after it"),
    "add_final_layer_norm": (False, "which is a norm after all layers, and LED has none"),
    "normalize_embedding": (True, "so that embeddings are not normalized, and LED's are"),
    "static_position_embeddings": (False, "so that positions are computed, and LED's are a table"),
    "scale_embedding": (False, "which multiplies embeddings by a root, and LED does not"),
    "extra_pos_embeddings": (_BART_OFFSET, "and BART has 2 unused positions"),
    "is_decoder": (False, "so that there is no encoder to convert"),
}
_BART_ONLY = (
    *_BART_REFUSED, "add_bias_logits", "classif_dropout", "force_bos_token_to_be_generated",
    "max_position_embeddings", "num_hidden_layers",
)  # fmt: skip
_ENCODER_ATTENTION = re.compile(
    r"(led\.encoder\.layers\.\d+\.self_attn)\.(q_proj|k_proj|v_proj|out_proj)\.(\w+)"
)
_LONGFORMER_NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_POSITIONS = {side: f"led.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
_CLASSES = {
    "LEDForQuestionAnswering": LEDForQuestionAnswering,
    "LEDForSequenceClassification": LEDForSequenceClassification,
}


def led_from_bart(
    stored: Mapping[str, Any], tensors: Mapping[str, Tensor], request: Request, source: object
) -> Converted:
    """Returns the LED that computes what a BART computes on texts that its window covers.

    Args:
        stored: the contents of BART's config.json.
        tensors: its tensors, by their names there.

    Raises:
        ValueError: for a BART that LED cannot compute, and weights that do not fit the config.
    """
    check_flags(stored, _BART_REFUSED, source)
    config = {key: value for key, value in stored.items() if key not in (*PROVENANCE, *_BART_ONLY)}
    if stored.get("force_bos_token_to_be_generated") and stored.get("forced_bos_token_id") is None:
        config["forced_bos_token_id"] = stored.get("bos_token_id", 0)
    positions = stored.get("max_position_embeddings", 1024)
    config |= {f"max_{side}_position_embeddings": positions for side in _POSITIONS}
    return _led(config, _named_as_led(tensors, source), request, source, None)


def longer_led(
    stored: Mapping[str, Any], tensors: Mapping[str, Tensor], request: Request, source: object
) -> Converted:
    """Returns an LED with other positions or windows; the arguments are those of :func:`led_from_bart`."""
    config = {key: value for key, value in stored.items() if key not in PROVENANCE}
    with errors_about(f"config.json of {source}"):
        windows = LEDConfig.from_dict(config).attention_window
    assert isinstance(windows, list)  # which is what LEDConfig makes of a number
    return _led(config, named_as_head_model(dict(tensors)), request, source, windows)


def _named_as_led(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Returns BART's tensors by LED's names, with global projections, and tables of positions without unused rows."""
    is_bare = not any(name.startswith("model.") for name in tensors)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("encoder.version", "decoder.version")):  # fairseq's, which old checkpoints keep
            continue
        name = f"led.{name}" if is_bare else re.sub(r"^model\.", "led.", name)
        if name in _POSITIONS.values():
            if tensor.dim() != 2 or tensor.shape[0] <= _BART_OFFSET:
                raise ValueError(
                    f"the weights of {source} hold {name.removeprefix('led.')} of shape {tuple(tensor.shape)}, which "
                    "is no table of positions; use the checkpoint as it was saved."
                )
            tensor = tensor[_BART_OFFSET:]
        if (match := _ENCODER_ATTENTION.fullmatch(name)) is None:
            renamed[name] = tensor
        elif match[2] == "out_proj":
            renamed[f"{match[1]}.output.{match[3]}"] = tensor
        else:
            part = f"{match[1]}.longformer_self_attn.{_LONGFORMER_NAMES[match[2]]}"
            renamed[f"{part}.{match[3]}"] = tensor
            renamed[f"{part}_global.{match[3]}"] = tensor
    return renamed


def _led(
    stored: dict[str, Any],
    tensors: dict[str, Tensor],
    request: Request,
    source: object,
    old_windows: list[int] | None,
) -> Converted:
    """Returns the checkpoint of LED's ``tensors`` with the positions and windows that are asked for.

    Args:
        stored: the contents of config.json for the tensors as they are, without windows if there are none yet.
        tensors: by the names of a model with a head.
    """
    with errors_about(f"config.json of {source}"):
        config = LEDConfig.from_dict({"attention_window": 2} | stored)
    check_size(config, tensors, source)
    model_class = _class_of(tensors)
    fill_embeddings(tensors, config.tie_word_embeddings, source)
    if model_class is LEDForConditionalGeneration:
        bias = torch.zeros(1, config.vocab_size, dtype=tensors["led.encoder.layernorm_embedding.bias"].dtype)
        tensors.setdefault("final_logits_bias", bias)
    else:
        tensors.pop("lm_head.weight", None)
    prefix = model_class.base_prefix
    expected = expected_shapes(model_class, config)
    check_tensors({name if prefix else f"led.{name}": expected[name] for name in expected}, tensors, source)

    reach = reach_of(
        request, config.max_encoder_position_embeddings, _LED_POSITIONS, config.encoder_layers, old_windows
    )
    rows = {
        "encoder": reach.positions,
        "decoder": request.max_decoder_positions or config.max_decoder_position_embeddings,
    }
    for side, name in _POSITIONS.items():
        tensors[name] = with_positions(tensors[name], rows[side])
    if config.tie_word_embeddings:
        for name in EMBEDDINGS[1:]:
            tensors.pop(name, None)
    new = {f"max_{side}_position_embeddings": rows[side] for side in rows} | {
        "attention_window": reach.windows
    }
    written = stored | LEDConfig.from_dict(stored | new).to_dict() | {"architectures": [model_class.__name__]}
    named = {name if prefix else name.removeprefix("led."): tensor for name, tensor in tensors.items()}
    return Converted(written, named, reach)


def _class_of(tensors: Mapping[str, Tensor]) -> type[LEDPreTrainedModel]:
    """Returns the class of the model whose head is among ``tensors``."""
    for head, architecture in ARCHITECTURE_OF.items():
        if any(name.startswith(f"{head}.") for name in tensors):
            return _CLASSES[architecture]
    writes = tensors.keys() & {"lm_head.weight", "final_logits_bias"}
    return LEDForConditionalGeneration if writes else LEDModel
