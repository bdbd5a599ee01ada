"""The three constructors of LongformerMask fill its fields, refuse wrong values, and sync at most once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from led_kernels import LongformerMask, longformer_attention
from led_kernels.mask import PADDING


def check(mask: LongformerMask, kinds: list[list[int]], max_globals: int | None = None) -> None:
    """Asserts every field by plain Python; ``kinds`` has for each sequence its rows (packed: of its own length)."""
    counts = [row.count(2) for row in kinds]
    width = max(counts, default=0) if max_globals is None else max_globals
    lengths = [max((i + 1 for i, kind in enumerate(row) if kind), default=0) for row in kinds]
    rows = [len(row) for row in kinds]
    starts = [sum(rows[:b]) if mask.is_packed else 0 for b in range(len(kinds))]
    index = [[i for i, kind in enumerate(row) if kind == 2] for row in kinds]
    flat = [kind for row in kinds for kind in row]
    before = [row[:i].count(0) for row in kinds for i in range(len(row))]
    assert mask.batch == len(kinds)
    assert mask.max_globals == width
    assert mask.seq_start.tolist() == starts
    assert mask.seq_len.tolist() == lengths
    assert mask.token_kind.flatten().tolist() == flat
    assert mask.padding_before.flatten().tolist() == before
    assert mask.num_globals.tolist() == counts
    assert mask.global_index.tolist() == [row + [-1] * (width - len(row)) for row in index]
    assert mask.max_seqlen >= max(lengths, default=0)
    dtypes = {name: x.dtype for name, x in mask.tensors()._asdict().items()}
    assert dtypes == dict.fromkeys(dtypes, torch.int32) | {"token_kind": torch.uint8}
    assert all(x.is_contiguous() for x in mask.tensors())


KINDS = {
    "plain": [[1, 1, 1], [1, 1, 1]],
    "right padding": [[2, 1, 1, 1], [1, 1, 0, 0]],
    "left padding": [[0, 0, 2, 1], [0, 1, 1, 2]],
    "holes": [[1, 0, 2, 0, 1, 0], [0, 2, 2, 0, 0, 1]],
    "a row of padding": [[0, 0, 0], [1, 2, 1]],
    "nothing but padding": [[0, 0], [0, 0]],
    "all global": [[2, 2, 2], [2, 2, 2]],
    "one token": [[1]],
    "one global token": [[2]],
    "no rows": [],
}


def as_tensor(kinds: list[list[int]]) -> Tensor:
    return torch.tensor(kinds, dtype=torch.int64).reshape(len(kinds), len(kinds[0]) if kinds else 3)


class TestFromPadding:
    @pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
    @pytest.mark.parametrize("max_globals", [None, 6])
    def test_merged_form(self, kinds, max_globals):
        check(LongformerMask.from_padding(as_tensor(kinds), max_globals=max_globals), kinds, max_globals)

    @pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16]
    )
    def test_two_masks_of_any_dtype(self, kinds, dtype):
        merged = as_tensor(kinds)
        mask = LongformerMask.from_padding((merged > 0).to(dtype), (merged == 2).to(dtype))
        check(mask, kinds)

    def test_any_strides(self):
        kinds = [[2, 1, 0], [1, 2, 1]]
        transposed = torch.tensor(kinds).T.contiguous().T
        for dtype in (torch.uint8, torch.int64, torch.float32):
            check(LongformerMask.from_padding(transposed.to(dtype)), kinds)
        check(LongformerMask.from_padding(torch.ones(1, 1).expand(2, 3)), [[1, 1, 1], [1, 1, 1]])

    def test_padding_wins_over_global(self):
        mask = LongformerMask.from_padding(torch.tensor([[1, 0, 1]]), torch.tensor([[0, 1, 1]]))
        check(mask, [[1, 0, 2]])

    def test_minus_one_in_the_global_mask_is_padding(self):
        mask = LongformerMask.from_padding(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 0, -1, -1]]))
        check(mask, [[2, 1, 0, 0]])

    @pytest.mark.parametrize("value", [3, -1, 0.5, float("nan")])
    def test_other_values(self, value):
        with pytest.raises(ValueError, match=r"attention_mask holds a value other than 0 \(padding\)"):
            LongformerMask.from_padding(torch.tensor([[1, value, 1]]))

    def test_other_values_of_the_global_mask(self):
        with pytest.raises(ValueError, match="after merging with global_attention_mask"):
            LongformerMask.from_padding(torch.ones(1, 3), torch.tensor([[0, 2, 0]]))

    def test_shapes(self):
        with pytest.raises(
            ValueError, match=r"attention_mask has shape \(3,\); give it as \[batch, seqlen\]"
        ):
            LongformerMask.from_padding(torch.ones(3))
        with pytest.raises(ValueError, match="attention_mask has no columns"):
            LongformerMask.from_padding(torch.ones(2, 0))
        with pytest.raises(
            ValueError, match=r"global_attention_mask has shape \(1, 4\); give it attention_mask's"
        ):
            LongformerMask.from_padding(torch.ones(1, 3), torch.ones(1, 4))
        with pytest.raises(ValueError, match="max_globals is -1; give the capacity"):
            LongformerMask.from_padding(torch.ones(1, 3), max_globals=-1)

    def test_devices(self):
        with pytest.raises(ValueError, match="global_attention_mask is on meta and attention_mask on cpu"):
            LongformerMask.from_padding(torch.ones(1, 3), torch.ones(1, 3, device="meta"))


class TestFromLengths:
    @pytest.mark.parametrize("max_globals", [None, 4])
    def test_fields(self, max_globals):
        index = torch.tensor([[4, 0], [-1, 1], [-1, -1]])
        mask = LongformerMask.from_lengths(torch.tensor([5, 2, 0]), 5, index, max_globals)
        check(mask, [[2, 1, 1, 1, 2], [1, 2, 0, 0, 0], [0, 0, 0, 0, 0]], max_globals or 2)

    def test_lists_and_one_index_for_all(self):
        check(LongformerMask.from_lengths([3, 2], 3, [1]), [[1, 2, 1], [1, 2, 0]])
        check(LongformerMask.from_lengths([3, 2], 3), [[1, 1, 1], [1, 1, 0]])

    def test_duplicates_and_order(self):
        mask = LongformerMask.from_lengths([5], 5, [[3, 0, 3, -1, 0]])
        check(mask, [[2, 1, 1, 2, 1]], max_globals=5)

    def test_agrees_with_from_padding(self):
        merged = torch.tensor([[2, 1, 1, 2, 1, 0], [1, 1, 2, 0, 0, 0]])
        a = LongformerMask.from_padding(merged)
        b = LongformerMask.from_lengths([5, 3], 6, [[3, 0], [2, -1]])
        for name, x in a.tensors()._asdict().items():
            assert torch.equal(x, getattr(b, name)), name
        assert a.max_seqlen == b.max_seqlen

    @pytest.mark.parametrize("lengths", [[6], [-1]])
    def test_lengths_out_of_range(self, lengths):
        with pytest.raises(ValueError, match="lengths holds a value outside 0 … 5"):
            LongformerMask.from_lengths(lengths, 5)

    @pytest.mark.parametrize("position", [3, 4, -2])
    def test_global_index_out_of_range(self, position):
        with pytest.raises(ValueError, match="global_index holds a position outside its sequence"):
            LongformerMask.from_lengths([3], 5, [[position]])

    def test_shapes(self):
        with pytest.raises(ValueError, match="seqlen is 0; give a padded length of at least 1"):
            LongformerMask.from_lengths([0], 0)
        with pytest.raises(ValueError, match=r"lengths has shape \(1, 1\); give it as \[batch\]"):
            LongformerMask.from_lengths([[3]], 5)
        with pytest.raises(
            ValueError, match=r"global_index has shape \(3, 1\); give it as \[2, n\] or \[n\]"
        ):
            LongformerMask.from_lengths([3, 3], 5, [[0], [0], [0]])
        with pytest.raises(ValueError, match="max_globals is -2; give the capacity"):
            LongformerMask.from_lengths([3], 5, max_globals=-2)


class TestPacked:
    @pytest.mark.parametrize("known", [{}, {"max_globals": 3, "total_rows": 7}, {"max_globals": 3}])
    def test_fields(self, known):
        index = torch.tensor([[2, 0, 2], [-1, -1, -1], [1, -1, 3]])
        mask = LongformerMask.packed(torch.tensor([0, 3, 3, 7]), index, **known)
        check(mask, [[2, 1, 2], [], [1, 2, 1, 2]], max_globals=3)
        assert mask.is_packed
        assert mask.max_seqlen == (7 if len(known) == 2 else 4)

    def test_known_longest(self):
        mask = LongformerMask.packed([0, 3, 7], max_globals=0, total_rows=7, max_seqlen=5)
        assert mask.max_seqlen == 5
        check(mask, [[1, 1, 1], [1, 1, 1, 1]])

    def test_no_sequence(self):
        check(LongformerMask.packed([0]), [])

    @pytest.mark.parametrize("cu_seqlens", [[1, 3], [0, 5, 4], [0, -1]])
    def test_not_ascending(self, cu_seqlens):
        with pytest.raises(ValueError, match="cu_seqlens does not start at 0 and ascend"):
            LongformerMask.packed(cu_seqlens)

    @pytest.mark.parametrize("position", [3, -2])
    def test_global_index_out_of_range(self, position):
        with pytest.raises(ValueError, match="global_index holds a position outside its sequence"):
            LongformerMask.packed([0, 4, 7], [[0], [position]])

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"cu_seqlens has shape \(1, 2\); give it as \[batch \+ 1\]"):
            LongformerMask.packed([[0, 3]])
        with pytest.raises(ValueError, match="cu_seqlens is empty"):
            LongformerMask.packed([])
        with pytest.raises(ValueError, match="total_rows is 8 but cu_seqlens ends at 7"):
            LongformerMask.packed([0, 7], total_rows=8)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
    def test_marks_are_positions(self, dtype):
        marks = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]).to(dtype)
        mask = LongformerMask.packed([0, 3, 3, 8], global_attention_mask=marks)
        check(mask, [[2, 1, 1], [], [2, 2, 1, 1, 2]])
        check(LongformerMask.packed([0, 3, 8], global_attention_mask=marks * 0), [[1] * 3, [1] * 5])
        check(LongformerMask.packed([0], global_attention_mask=marks[:0]), [])

    @pytest.mark.parametrize(
        ("cu_seqlens", "marks", "more", "message"),
        [
            ([0, 3], [1, 0], {}, r"has shape \(2,\); give a mark for each of the 3 rows"),
            ([0, 3], [[1, 0, 0]], {}, r"has shape \(1, 3\)"),
            ([0, 2], [2, 0], {}, "another value than 0 and 1"),
            ([0, 2], [-1, 0], {}, "another value than 0 and 1"),
            ([0, 5, 3], [1, 1, 1], {}, "cu_seqlens does not start at 0 and ascend"),
            ([2, 3], [1, 1, 1], {}, "cu_seqlens does not start at 0 and ascend"),
            ([3], [1, 1, 1], {}, "cu_seqlens does not start at 0 and ascend"),
            ([0, 2], [1, 0], {"global_index": [0]}, "are both given; give one of them"),
        ],
    )
    def test_marks_are_checked(self, cu_seqlens, marks, more, message):
        with pytest.raises(ValueError, match=message):
            LongformerMask.packed(cu_seqlens, global_attention_mask=torch.tensor(marks), **more)


class CountSyncs(TorchDispatchMode):
    """Counts reads of tensor values by the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.count = 0
        to_list = torch.Tensor.tolist

        def counted(x: Tensor) -> list:  # on the CPU it passes no dispatcher
            self.count += 1
            return to_list(x)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # nonzero has a shape that only the host's read reveals
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


CONSTRUCTORS: dict[str, Callable[..., LongformerMask]] = {
    "from_padding": lambda **known: LongformerMask.from_padding(torch.ones(2, 5), torch.eye(5)[:2], **known),
    "from_lengths": lambda **known: LongformerMask.from_lengths(
        torch.tensor([5, 2]), 5, torch.tensor([0]), **known
    ),
    "packed": lambda **known: LongformerMask.packed(
        torch.tensor([0, 3, 7]), torch.tensor([0]), **known, **({"total_rows": 7} if known else {})
    ),
}


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
@pytest.mark.parametrize(("known", "syncs"), [({}, 1), ({"max_globals": 2}, 0)], ids=["measured", "capacity"])
def test_syncs(constructor, known, syncs, monkeypatch):
    with CountSyncs(monkeypatch) as counter:
        constructor(**known)
    assert counter.count == syncs


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_layers_do_not_sync(name, monkeypatch):
    """Only a packed batch on the torch backend reads its lengths, once per call."""
    mask = CONSTRUCTORS[name](max_globals=2)
    qkv = torch.randn(6, *mask.token_kind.shape, 2, 8)
    with CountSyncs(monkeypatch) as counter:
        longformer_attention(*qkv, mask, window_size=2, backend="torch")
    assert counter.count == (2 if mask.is_packed else 0)


def test_debug_checks_the_capacity(monkeypatch):
    """A device assert checks the values where looking at them would mean waiting for a GPU."""
    monkeypatch.setattr("led_kernels.mask.is_checkable", lambda *tensors: False)
    attention_mask = torch.full((1, 4), 2)
    LongformerMask.from_padding(attention_mask, max_globals=2)  # the caller's error, not looked for
    monkeypatch.setenv("LED_KERNELS_DEBUG", "1")
    with pytest.raises(RuntimeError, match="more globals than max_globals"):
        LongformerMask.from_padding(attention_mask, max_globals=2)
    with pytest.raises(RuntimeError, match="lengths or global_index out of range"):
        LongformerMask.from_lengths([9], 5, max_globals=2)
    with pytest.raises(RuntimeError, match="cu_seqlens not ascending"):
        LongformerMask.packed([0, 5, 4], max_globals=2, total_rows=4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LongformerMask.packed([0, 5000], max_seqlen=5), "max_seqlen is 5 but a sequence has 5000"),
        (lambda: LongformerMask.packed([0, 600, 1200], max_seqlen=256), "max_seqlen is 256"),
        (lambda: LongformerMask.packed([0, 10**8], total_rows=100, max_globals=0), "cu_seqlens ends at"),
        (lambda: LongformerMask.packed([0, 5, 4], max_globals=2, total_rows=4), "does not start at 0 and"),
        (lambda: LongformerMask.packed([0, 4], [4], max_globals=1, total_rows=4), "outside its sequence"),
        (lambda: LongformerMask.packed([0, 4], [1, 2], max_globals=1, total_rows=4), "max_globals is 1 but"),
        (lambda: LongformerMask.from_lengths([100000, 5], 450, max_globals=0), "value outside 0 … 450"),
        (lambda: LongformerMask.from_lengths([9], 9, [5000000], max_globals=1), "outside its sequence"),
        (lambda: LongformerMask.from_lengths([9], 9, [2, 4, 2], max_globals=1), "max_globals is 1 but"),
        (lambda: LongformerMask.from_padding(torch.full((1, 4), 2), max_globals=2), "max_globals is 2 but"),
        (lambda: LongformerMask.from_padding(torch.full((1, 4), 3), max_globals=2), "value other than 0"),
    ],
)
def test_values_are_checked_on_the_cpu_with_a_capacity_too(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def two_sequences(packed: bool) -> LongformerMask:
    if packed:
        return LongformerMask.packed([0, 4, 7], [[0, 2], [1, -1]])
    return LongformerMask.from_padding(torch.tensor([[2, 1, 2, 1], [0, 2, 1, 0]]))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("global_index", lambda x: torch.full_like(x, 2**30), ValueError, "holds values that do not go"),
        ("global_index", lambda x: x.flip(1).contiguous(), ValueError, "holds values that do not go"),
        ("global_index", lambda x: x[:1], ValueError, r"give it as \[batch, max_globals\]"),
        ("global_index", lambda x: x[:, ::2], ValueError, "not contiguous"),
        ("num_globals", lambda x: x + 2, ValueError, "holds values that do not go"),
        ("num_globals", lambda x: x - 3, ValueError, "holds values that do not go"),
        ("seq_start", lambda x: x - 1, ValueError, "holds values that do not go"),
        ("seq_start", lambda x: x + 5, ValueError, "holds values that do not go"),
        ("seq_start", lambda x: torch.full_like(x, 2**31 - 1), ValueError, "holds values that do not go"),
        ("seq_len", lambda x: x + 9, ValueError, "holds values that do not go"),
        ("seq_len", lambda x: -x, ValueError, "holds values that do not go"),
        ("seq_len", lambda x: x[:1], ValueError, "has shape"),
        ("token_kind", lambda x: x + 3, ValueError, "holds values that do not go"),
        ("position_offset", lambda x: x + 2, ValueError, "holds values that do not go"),
        ("position_offset", lambda x: x[:1], ValueError, "position_offset of a mask has shape"),
        ("position_offset", lambda x: x.long(), TypeError, "has dtype torch.int64; give torch.int32"),
        ("global_position", lambda x: x - 3, ValueError, "holds values that do not go"),
        ("global_position", lambda x: x.abs(), ValueError, "holds values that do not go"),
        (
            "global_position",
            lambda x: x[:, :1].contiguous(),
            ValueError,
            "global_position of a mask has shape",
        ),
        ("token_kind", lambda x: x.long(), TypeError, "has dtype torch.int64; give torch.uint8"),
        ("token_kind", lambda x: x.to("meta"), ValueError, "move both to one device"),
        ("padding_before", lambda x: x.float(), TypeError, "has dtype torch.float32; give torch.int32"),
        ("padding_before", lambda x: x[..., :2], ValueError, "is not contiguous|has shape"),
        ("seq_len", lambda x: x.tolist(), TypeError, "is a list; give a torch.Tensor"),
    ],
)
def test_a_mask_made_by_hand_is_checked(packed, name, change, error, message):
    mask = two_sequences(packed)
    with pytest.raises(error, match=message):
        replace(mask, **{name: change(getattr(mask, name))})


def test_a_mask_made_by_hand_of_right_tensors():
    for packed in (False, True):
        mask = two_sequences(packed)
        again = replace(mask, global_index=mask.global_index.clone())
        assert again.global_index.tolist() == mask.global_index.tolist()
    with pytest.raises(ValueError, match="padding_before of a mask holds"):
        replace(mask := two_sequences(False), padding_before=mask.padding_before + 1)
    with pytest.raises(ValueError, match="token_kind of a mask has shape"):
        replace(mask, max_seqlen=5)
    with pytest.raises(ValueError, match="seq_len of a mask holds"):
        replace(two_sequences(True), max_seqlen=3)
    with pytest.raises(ValueError, match="seq_len of a mask holds"):  # the last position is padding
        replace(mask, token_kind=torch.tensor([[2, 1, 2, 0], [0, 2, 1, 0]]).byte())


def test_a_mask_of_a_piece():
    """Rows of a halo, and positions in the whole sequence; no token stands before its start."""
    mask = two_sequences(False)
    kind = torch.tensor([[2, 3, 2, 1], [0, 2, 3, 0]]).byte()
    moved = replace(mask, token_kind=kind, position_offset=mask.position_offset + 8)
    assert moved.token_kind.tolist() == kind.tolist()
    shifted = torch.tensor([0, -4]).int()
    only_global = torch.tensor([[2, 3, 2, 1], [0, 2, 0, 0]]).byte(), torch.tensor([4, 2]).int()
    padding_before = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 2]]).int()
    tensors = dict(zip(("token_kind", "seq_len"), only_global, strict=True)) | {
        "padding_before": padding_before
    }
    assert replace(mask, position_offset=shifted, **tensors).position_offset.tolist() == [0, -4]
    with pytest.raises(ValueError, match="position_offset of a mask holds"):
        replace(mask, position_offset=shifted)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_constructors_give_positions_of_whole_sequences(packed):
    mask = two_sequences(packed)
    assert mask.position_offset.tolist() == [0, 0]
    assert mask.global_position is mask.global_index


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_mask_of_its_tensors(packed):
    mask = two_sequences(packed)
    again = LongformerMask.from_tensors(mask.tensors(), mask.max_seqlen)
    assert again.max_seqlen == mask.max_seqlen
    assert all(x is y for x, y in zip(again.tensors(), mask.tensors(), strict=True))
    wrong = mask.tensors()._replace(num_globals=mask.num_globals + 2)
    LongformerMask.from_tensors(wrong, mask.max_seqlen)  # values are the caller's
    with pytest.raises(ValueError, match="num_globals of a mask has shape"):
        LongformerMask.from_tensors(wrong._replace(num_globals=mask.num_globals[:1]), mask.max_seqlen)


def test_to_takes_a_device_only():
    with pytest.raises(TypeError, match=r"device is torch\.float16; a mask has dtypes of its own"):
        two_sequences(False).to(torch.float16)


def test_to_and_device():
    mask = LongformerMask.from_padding(torch.tensor([[2, 1, 0]]))
    assert mask.device == torch.device("cpu")
    moved = mask.to("meta")
    assert moved.device == torch.device("meta")
    assert moved.max_seqlen == mask.max_seqlen
    assert (mask.token_kind == PADDING).tolist() == [[False, False, True]]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_compiles_without_a_graph_break(name):
    """With max_globals the mask is built inside the compiled function."""

    def attend(x: Tensor, *qkv: Tensor) -> Tensor:
        if name == "from_padding":
            mask = LongformerMask.from_padding(x, max_globals=2)
        elif name == "from_lengths":
            mask = LongformerMask.from_lengths(x, 9, torch.tensor([0, 3]), max_globals=2)
        else:
            mask = LongformerMask.packed(x, torch.tensor([0]), max_globals=2, total_rows=9)
        return longformer_attention(*qkv, mask, window_size=2, backend="torch")

    x = {
        "from_padding": torch.tensor([[2, 1, 1, 0, 1, 1, 2, 1, 1], [1, 1, 2, 1, 1, 0, 0, 0, 0]]),
        "from_lengths": torch.tensor([9, 4]),
        "packed": torch.tensor([0, 4, 9]),
    }[name]
    shape = (9,) if name == "packed" else (2, 9)
    qkv = torch.randn(6, *shape, 2, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *qkv), attend(x, *qkv))
