"""Defines the base of all models, which loads and saves checkpoints, ties weights and resizes the vocabulary."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from led_kernels.positions import check_num_positions, resize_table
from led_model.checkpoint.checkpoint import Model, load_pretrained, save_pretrained
from led_model.checkpoint.hub import HUB_OPTIONS
from led_model.checkpoint.quantization import choose_quantizer
from led_model.checkpoint.tied_tensors import keep_tied_tensors_once
from led_model.checkpoint.trained_model import TrainedModel
from led_model.checkpoint.weights import WEIGHT_DTYPES
from led_model.checks import check_id_shape
from led_model.config import LEDConfig
from led_model.packing import packed_inputs, packed_lengths, shift_right
from led_model.schema import check_names


class LEDPreTrainedModel(TrainedModel):
    """A base of ``LEDModel`` and of the models with a head, whose ``led`` is an ``LEDModel``."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        keep_tied_tensors_once(self)
        self.register_load_state_dict_post_hook(_tie_again)  # assign=True makes a parameter for each name

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        revision: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        quantization_config: Any | None = None,
        max_positions: int | None = None,
        **settings: Any,
    ) -> Model:
        """Returns a model, in eval mode, from a directory that transformers wrote or from the Hugging Face hub.

        A checkpoint of another head's model will do: its head is left aside. A question answering or
        classification head that the checkpoint lacks starts out random, with a warning.

        Args:
            path_or_id: directory with config.json and the weights (``model.safetensors``,
                ``pytorch_model.bin``, or either in shards with its index), or a hub id (extra ``text``).
            dtype: also by its name, ``"bfloat16"``; default, or ``"auto"``: the checkpoint's own.
            torch_dtype: the older name of ``dtype``.
            device_map: a device instead of ``device``, also as transformers' ``{"": device}``; ``"auto"``: the
                accelerator if there is one.
            revision: branch, tag or commit on the hub.
            load_in_4bit: keep the weights of the layers as NF4 (bitsandbytes; extra ``quant``), multiplied in
                the model's dtype.
            load_in_8bit: keep them as int8, one scale per output (torchao; extra ``quant``).
            quantization_config: transformers' BitsAndBytesConfig with ``load_in_4bit=True``, for its other
                4-bit settings.
            max_positions: how many tokens a text may have, by :meth:`resize_position_embeddings`; default: as many as
                the checkpoint says.
            settings: replace those of config.json, ``num_labels=5``; and ``cache_dir``, ``force_download``,
                ``local_files_only`` and ``token``, as ``huggingface_hub.hf_hub_download`` takes them.

        Raises:
            FileNotFoundError: when a file is not there.
            ValueError: when a file cannot be read, or tensors are missing, unexpected or of another shape; for
                another ``dtype``, ``device_map`` or ``max_positions``, and for arguments that contradict each other.
            TypeError: for a setting that neither config.json nor the hub has.
            ImportError: when the package that quantizes is not installed.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype is {dtype} and torch_dtype {torch_dtype}; give dtype alone.")
        if max_positions is not None:  # before a long download
            check_num_positions("max_positions", max_positions)
        hub_options = {name: settings.pop(name) for name in HUB_OPTIONS if name in settings}
        own = set(inspect.signature(LEDPreTrainedModel.from_pretrained).parameters) - {"settings"}
        fields = {field.name for field in dataclasses.fields(LEDConfig)}
        check_names(settings, own | fields | {*HUB_OPTIONS, "label2id"}, "from_pretrained")
        if (label2id := settings.pop("label2id", None)) is not None:  # it is id2label, inverted
            settings.setdefault("id2label", {label_id: label for label, label_id in dict(label2id).items()})
        model = load_pretrained(
            cls,
            path_or_id,
            dtype=_dtype(dtype if torch_dtype is None else torch_dtype),
            device=device if device_map is None else _device(device_map),
            revision=revision,
            quantize=choose_quantizer(load_in_4bit, load_in_8bit, quantization_config),
            settings=settings,
            hub_options=hub_options,
        )
        if max_positions is not None:
            model.resize_position_embeddings(max_positions)
        return model

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes config.json, model.safetensors and, for a generating model, generation_config.json.

        :meth:`from_pretrained` and transformers read them back, every bit the same. Tied tensors are stored
        once. The directory is made if need be; files of these names in it are replaced.

        Args:
            state_dict: weights to write instead of the model's own, by the names of its state dict. Of a model that
                several processes share, all gather them and one writes::

                    weights = led_kernels.distributed.full_state_dict(model)
                    if torch.distributed.get_rank() == 0:
                        model.save_pretrained(directory, state_dict=weights)

        Raises:
            ValueError: when embeddings that the config ties are no longer one tensor, when weights are quantized or
                sharded, and for a ``state_dict`` that lacks tensors, or has others, or of another shape.
        """
        save_pretrained(self, Path(directory), state_dict)

    @property
    def device(self) -> torch.device:
        """Returns the device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the embeddings, which the model computes in."""
        return self.base_model.shared.weight.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns how many numbers all parameters hold, or those that are to be trained, each counted once."""
        left_out = {m.weight for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if p not in left_out)
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)

    def tie_weights(self) -> None:
        """Makes encoder, decoder and head read the shared embedding again, after it was replaced."""
        base = self.base_model
        if not self.config.tie_word_embeddings:
            return
        for stack in (base.encoder, base.decoder):
            if type(base.shared) is not nn.Embedding or type(stack.embed_tokens) is not nn.Embedding:
                stack.embed_tokens = base.shared  # a caller's own module may hold more than a weight
                continue
            for name in ("weight", "num_embeddings", "embedding_dim", "padding_idx"):
                setattr(stack.embed_tokens, name, getattr(base.shared, name))

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Gives every embedding table, and the head, ``new_num_tokens`` rows, and returns the shared table.

        Old rows keep every bit; new ones are the mean of the old ones, with a logits bias of 0 (Hewitt, 2021,
        "Initializing New Word Embeddings for Pretrained Language Models"). The parameters are new ones: build
        the optimizer afterwards.

        Args:
            pad_to_multiple_of: rounds ``new_num_tokens`` up.

        Raises:
            ValueError: when the padding token would be cut off.
        """
        step = pad_to_multiple_of or 1
        rows = -(-new_num_tokens // step) * step
        lowest = 0 if self.config.pad_token_id is None else self.config.pad_token_id
        if rows <= lowest:
            raise ValueError(
                f"new_num_tokens is {new_num_tokens} but the padding token has id {lowest}; "
                f"keep at least {lowest + 1} rows."
            )
        base = self.base_model
        tables = {base.shared}
        if not self.config.tie_word_embeddings:
            tables |= {base.encoder.embed_tokens, base.decoder.embed_tokens}
        for table in tables:
            table.weight = resized(table.weight, rows)
            table.num_embeddings = rows
        self.config.vocab_size = rows
        self.tie_weights()
        return base.shared

    def resize_position_embeddings(
        self, max_positions: int | None = None, *, max_decoder_positions: int | None = None
    ) -> None:
        """Lets texts have ``max_positions`` tokens, and what is written ``max_decoder_positions``.

        Old positions keep every bit; new ones are copies of them, repeated (Longformer,
        https://arxiv.org/abs/2004.05150), and want training on long texts. The parameters are new ones: build the
        optimizer afterwards. Fewer positions cut the tables.

        Raises:
            TypeError, ValueError: for a number that is no positive integer, and for none.
        """
        if max_positions is None and max_decoder_positions is None:
            raise ValueError("max_positions and max_decoder_positions are both missing; give one of them.")
        base = self.base_model
        wanted = (
            ("max_positions", max_positions, base.encoder, "max_encoder_position_embeddings"),
            ("max_decoder_positions", max_decoder_positions, base.decoder, "max_decoder_position_embeddings"),
        )
        for name, number, _, _ in wanted:
            if number is not None:
                check_num_positions(name, number)
        for _, number, stack, setting in wanted:
            if number is not None:
                resize_table(stack.embed_positions, number)
                setattr(self.config, setting, number)

    def shift_right(self, ids: Tensor, name: str = "ids", cu_seqlens: Tensor | None = None) -> Tensor:
        """Returns the decoder input for teacher forcing: start token, then all but the last id; -100 becomes padding.

        Args:
            ids: int ``[batch, length]``; with ``cu_seqlens``, int ``[batch + 1]``, packed sequences ``[total]``.

        Raises:
            ValueError: with the ``name`` of ids that are of another shape.
        """
        if cu_seqlens is None:
            check_id_shape(name, ids)
        else:
            check_id_shape(name, packed_inputs(name, ids, "", None)[1][None])
            # Labels are packed beside documents that have bounds of their own.
            bounds_name = "decoder_cu_seqlens" if name == "labels" else "cu_seqlens"
            packed_lengths(bounds_name, cu_seqlens, len(ids), name)
        return shift_right(ids, self.config.decoder_start_token_id, self.config.pad_token_id, cu_seqlens)

    def init_weights(self, module: nn.Module) -> None:
        """Fills the linear layers and embeddings in ``module`` as before training; biases and padding become 0."""
        filled = set()
        for part in module.modules():
            if (
                not isinstance(part, (nn.Linear, nn.Embedding))
                or part.weight in filled
                or part.weight.is_meta
            ):
                continue  # drawing numbers for the meta device would only take time
            filled.add(part.weight)
            nn.init.normal_(part.weight, std=self.config.init_std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                with torch.no_grad():
                    part.weight[part.padding_idx].zero_()


def _tie_again(model: LEDPreTrainedModel, incompatible_keys: object) -> None:
    model.tie_weights()


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype of a name or of a dtype, ``None`` for the checkpoint's own."""
    if given is None or given == "auto":
        return None
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if dtype not in WEIGHT_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in WEIGHT_DTYPES)
        raise ValueError(f"dtype is {given!r}; give 'auto' or one of {names}.")
    return dtype


def _device(device_map: Any) -> torch.device | str:
    """Returns the one device that a ``device_map`` names."""
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or "cpu"
    place = device_map
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        place = device_map[""]
    try:
        if isinstance(place, (str, int, torch.device)):
            return torch.device(place)
    except RuntimeError:
        pass  # refused below, in one sentence
    raise ValueError(f'device_map is {device_map!r}; give "auto" or one device, such as "cpu" or "cuda:0".')


def resized(table: Tensor, rows: int) -> nn.Parameter:
    """Returns ``[old rows, dim]`` cut to ``[rows, dim]``, or filled up to it with the mean row."""
    with torch.no_grad():
        mean = table.to(torch.promote_types(table.dtype, torch.float32)).mean(0).to(table.dtype)
        filled = torch.cat([table[:rows], mean.expand(max(rows - len(table), 0), -1)])
    return nn.Parameter(filled, requires_grad=table.requires_grad)
