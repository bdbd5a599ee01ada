"""What the parts of a model keep is put together from named tensors, of which the common ones are defined here."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.suites.step_memory import kinds
from benchmarks.suites.step_memory.step import AUTOCAST, BF16, Step


class Named(NamedTuple):
    """Names a tensor: its place, its kind as in :mod:`benchmarks.suites.step_memory.kinds`, and its bytes."""

    place: str
    kind: str
    name: str
    nbytes: int


class Part:
    """Collects the tensors of one part of a model, with ``rows`` tokens of the batch.

    Attributes:
        kept: what autograd keeps.
        inputs: what is kept instead when the part is computed again in the backward.
        transient: what lives beside at the part's fullest moment, which is in its backward.
        at_fullest: what of the part lives at its fullest moment, where that is in its forward.
    """

    def __init__(self, place: str, step: Step, rows: int) -> None:
        self.place = place
        self.step = step
        self.rows = rows
        self.kept: list[Named] = []
        self.inputs: list[Named] = []
        self.transient: list[Named] = []
        self.at_fullest: list[Named] | None = None

    @property
    def held(self) -> list[Named]:
        """Returns what is kept of the part from its forward to its backward."""
        return self.inputs if self.is_recomputed else self.kept

    @property
    def is_recomputed(self) -> bool:
        return self.step.checkpointing and bool(self.inputs)

    @property
    def fullest(self) -> list[Named]:
        """Returns what is there of the part at its fullest moment."""
        at_work = [*self.kept, *self.transient] if self.at_fullest is None else self.at_fullest
        return [*self.inputs, *at_work] if self.is_recomputed else at_work

    def add(self, kind: str, name: str, numel: int, itemsize: int | None = None) -> None:
        """Adds a tensor that is kept, by default in the dtype of products."""
        self.kept.append(Named(self.place, kind, name, numel * (itemsize or self.step.itemsize)))

    def add_input(self, kind: str, name: str, numel: int, itemsize: int) -> None:
        self.inputs.append(Named(self.place, kind, name, numel * itemsize))

    def fullest_in_forward(self) -> None:
        """Says that what was added up to now is what lives at the part's fullest moment, in its forward."""
        self.at_fullest = [*self.kept, *self.transient]

    def pass_by(self, name: str, numel: int, itemsize: int | None = None) -> None:
        """Adds a transient tensor, by default in the dtype of products."""
        self.transient.append(Named(self.place, "", name, numel * (itemsize or self.step.itemsize)))

    def states(self, kind: str, *names: str, rows: int | None = None) -> None:
        """Adds tensors ``[rows, d_model]``."""
        for name in names:
            self.add(kind, name, (rows or self.rows) * self.step.sizes.d_model)

    def linear_input(self, kind: str, *readers: str) -> None:
        """Adds what linear layers keep of one input: itself, or under autocast the copy that each of them makes."""
        is_copied = self.step.precision == AUTOCAST
        self.states(kind, *(f"input of {reader}" for reader in (readers if is_copied else readers[:1])))

    def casts(self, name: str, numel: int) -> None:
        """Adds the copies of weights that autocast makes and linear layers keep."""
        if self.step.precision == AUTOCAST:
            self.add(kinds.CASTS, name, numel)

    def norm(self, name: str) -> None:
        """Adds what a layer norm keeps: its input, and the mean and the reciprocal deviation of each row."""
        step = self.step
        self.add(kinds.NORMS, f"input of {name}", self.rows * step.sizes.d_model, step.residual_itemsize)
        in_bf16 = step.precision == BF16 and step.device == "cpu"
        self.add(kinds.NORMS, f"mean and deviation of {name}", 2 * self.rows, 2 if in_bf16 else 4)

    def dropout(self, name: str, itemsize: int | None = None) -> None:
        """Adds the mask, or on the CPU the factors, that dropout keeps of ``[rows, d_model]``."""
        itemsize = 1 if self.step.device == "cuda" else itemsize
        self.add(kinds.DROPOUT, name, self.rows * self.step.sizes.d_model, itemsize)

    def feed_forward(self) -> None:
        """Adds what autograd keeps of the second half of a layer."""
        sizes = self.step.sizes
        self.linear_input(kinds.HIDDEN, "fc1")
        for name in ("output of fc1", "input of fc2"):
            self.add(kinds.FEED_FORWARD, name, self.rows * sizes.ffn_dim)
        self.casts("fc1 and fc2", 2 * sizes.d_model * sizes.ffn_dim)
        self.dropout("after fc2")
        self.norm("final_layer_norm")

    def cross_inputs(self, layer: int, cast_once: bool = False) -> None:
        """Adds what the keys and values of the cross-attention are computed from: the encoder's output.

        It also adds what a decoder's layer is computed again from, but for its masks. With ``cast_once`` the encoder's
        output is cast before the first layer, and not by each linear layer.
        """
        step, numel = self.step, self.step.batch * self.step.source * self.step.sizes.d_model
        if step.precision == AUTOCAST and not cast_once:
            self.states(kinds.HIDDEN, "source of k_proj", "source of v_proj", rows=step.batch * step.source)
        elif layer == 0:
            self.add(kinds.HIDDEN, "source of k_proj and v_proj of all layers", numel)
        self.add_input(kinds.HIDDEN, "input", self.rows * step.sizes.d_model, step.residual_itemsize)
        if layer == 0:
            itemsize = step.itemsize if cast_once else step.residual_itemsize
            self.add_input(kinds.HIDDEN, "encoder's output", numel, itemsize)

    def cross_gradients(self) -> None:
        """Adds what is made while the cross-attention's keys and values send their gradients to the encoder."""
        step, numel = self.step, self.step.batch * self.step.source * self.step.sizes.d_model
        self.pass_by("gradients of cross keys and cross values", 2 * numel)
        self.pass_by("gradient of the encoder's output", numel, step.residual_itemsize)
        self.pass_by("a layer's share in it", numel)


def embeddings(stack: str, step: Step, length: int) -> Part:
    """Returns what encoder or decoder have before their layers."""
    part = Part(f"{stack} embeddings", step, step.batch * length)
    part.add(kinds.SMALL, "ids", part.rows, 8)
    part.add(kinds.SMALL, "positions", length, 8)
    part.norm("layernorm_embedding")
    part.dropout("after layernorm_embedding", step.residual_itemsize)
    part.pass_by("gradient of the table", step.sizes.table, step.weight_itemsize)
    return part
