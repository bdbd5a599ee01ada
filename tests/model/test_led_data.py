"""Batches of documents: what the collator makes of features, by each rule for global tokens, padded and packed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from led_model import (
    EveryKthToken,
    FirstTokens,
    LEDConfig,
    LEDDataCollator,
    LEDForQuestionAnswering,
    LEDTokenizer,
    QuestionTokens,
    TokensWithId,
    unpack,
)
from led_model.batch.documents import Document
from led_model.batch.pieces import Reader
from tests.model.small import small_config

TOKENIZERS = ("led_model", "LEDTokenizer", "LEDTokenizerFast")
BOS, PAD, EOS = 0, 1, 2
IDS = st.lists(st.integers(3, 30), min_size=1, max_size=12)
FEATURES = st.lists(
    st.fixed_dictionaries(
        {"input_ids": IDS, "labels": IDS},
        optional={"global_attention_mask": st.just("own"), "padding": st.tuples(*[st.integers(0, 3)] * 2)},
    ),
    min_size=1,
    max_size=5,
)


def read_tokenizer(directory, kind: str):
    if kind == "led_model":
        return LEDTokenizer.from_pretrained(directory)
    return getattr(pytest.importorskip("transformers"), kind).from_pretrained(directory)


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(tokenizer_files, request):
    return read_tokenizer(tokenizer_files, request.param)


@pytest.fixture
def tokenizer(tokenizer_files):
    return LEDTokenizer.from_pretrained(tokenizer_files)


@pytest.fixture(scope="module")
def ids_only():
    """What the collator reads of a tokenizer."""

    class Tokenizer:
        pad_token_id, eos_token_id, sep_token_id, unk_token_id = PAD, EOS, EOS, 3

        def convert_tokens_to_ids(self, token):
            return self.unk_token_id

    return Tokenizer()


def positions(mask: torch.Tensor) -> list[int]:
    return (mask == 1).nonzero().flatten().tolist()


def features_of(tokenizer) -> list[dict]:
    texts, targets = ["The encoder reads the whole text.", "A text."], ["a short one", "the decoder writes"]
    return [dict(tokenizer(text, text_target=target)) for text, target in zip(texts, targets, strict=True)]


def test_padded_as_by_transformers(any_tokenizer, small_model):
    transformers = pytest.importorskip("transformers")
    model = small_model(0, vocab_size=300)
    rows = features_of(any_tokenizer)
    expected = transformers.DataCollatorForSeq2Seq(any_tokenizer, model=model, pad_to_multiple_of=4)(
        [dict(row) for row in rows]
    )
    batch = LEDDataCollator(any_tokenizer, model=model, pad_to_multiple_of=4)(rows)
    assert batch.keys() == {*expected, "global_attention_mask"}
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor)
    mask = batch["global_attention_mask"]
    assert mask[:, 0].tolist() == [1, 1]
    assert ((mask == -1) == (batch["attention_mask"] == 0)).all()
    assert mask.dtype == torch.int64
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda x: np.array(x, np.uint16)])
@pytest.mark.parametrize("packing", [False, True])
def test_lists_arrays_and_tensors(tokenizer, kind, packing):
    rows = features_of(tokenizer)
    collate = LEDDataCollator(tokenizer, packing=packing)
    expected = collate(rows)
    batch = collate([{name: kind(value) for name, value in row.items()} for row in rows])
    assert batch.keys() == expected.keys()
    for name, tensor in batch.items():
        assert tensor.dtype == (torch.int32 if "cu_seqlens" in name else torch.int64)
        assert torch.equal(tensor, expected[name])


def test_what_the_packed_form_is(ids_only):
    batch = LEDDataCollator(ids_only, packing=True)(
        [
            {"input_ids": [BOS, 5, EOS], "labels": [7, EOS]},
            {"input_ids": [BOS, 6, 8, EOS], "labels": [9, 10, EOS]},
        ]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [BOS, 5, EOS, BOS, 6, 8, EOS],
        "cu_seqlens": [0, 3, 7],
        "global_attention_mask": [1, 0, 0, 1, 0, 0, 0],
        "labels": [7, EOS, 9, 10, EOS],
        "decoder_cu_seqlens": [0, 2, 5],
    }


@given(features=FEATURES)
@settings(max_examples=80, deadline=None)
def test_packed_and_padded_hold_the_same(ids_only, features):
    """Both give back each document, whose own padding is gone, with its global tokens and labels."""
    rows, expected = [], []
    for feature in features:
        ids, labels = feature["input_ids"], feature["labels"]
        left, right = feature.get("padding", (0, 0))
        own = "global_attention_mask" in feature
        mask = [int(token % 3 == 0) for token in ids] if own else [int(i < 2) for i in range(len(ids))]
        row = {
            "input_ids": [PAD] * left + ids + [PAD] * right,
            "attention_mask": [0] * left + [1] * len(ids) + [0] * right,
            "labels": labels + [-100] * right,
        }
        if own:
            row["global_attention_mask"] = [-1] * left + mask + [-1] * right
        rows.append(row)
        expected.append({"input_ids": ids, "global_attention_mask": mask, "labels": labels})
    padded = LEDDataCollator(ids_only, global_tokens=2)(rows)
    packed = LEDDataCollator(ids_only, global_tokens=2, packing=True)(rows)
    real = {"labels": padded["labels"] != -100, "": padded["attention_mask"] == 1}
    for name, cu_seqlens in (
        ("input_ids", "cu_seqlens"),
        ("global_attention_mask", "cu_seqlens"),
        ("labels", "decoder_cu_seqlens"),
    ):
        of_packed = [row.tolist() for row in unpack(packed[name], packed[cu_seqlens])]
        of_padded = [
            row[kept].tolist() for row, kept in zip(padded[name], real.get(name, real[""]), strict=True)
        ]
        assert of_packed == of_padded == [row[name] for row in expected]
    assert "attention_mask" not in packed


def test_decoder_input_ids_of_packed_labels(ids_only, small_model):
    """The decoder's input starts anew in each sequence."""
    model = small_model(0)
    rows = [{"input_ids": [4], "labels": labels} for labels in ([5, -100, 7, EOS], [8, EOS], [-100])]
    batch = LEDDataCollator(ids_only, packing=True, model=model)(rows)
    expected = [model.prepare_decoder_input_ids_from_labels(torch.tensor([row["labels"]])) for row in rows]
    assert torch.equal(batch["decoder_input_ids"], torch.cat(expected, 1)[0])


def test_the_model_computes_the_same_of_both(ids_only, small_model):
    """The loss and its gradient, and the logits where the loss is another's, as with label smoothing."""
    model = small_model(0).train()
    rows = [
        {"input_ids": list(range(4, 30)), "labels": [5, -100, 7, EOS]},
        {"input_ids": [BOS, 9, 8, EOS], "labels": [8, EOS], "global_attention_mask": [0, 1, 0, 1]},
        {"input_ids": list(range(30, 15, -1)), "labels": list(range(20, 31))},
    ]
    losses, gradients, logits = [], [], []
    for packing in (False, True):
        batch = LEDDataCollator(ids_only, packing=packing, model=model)(rows)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
        labels = batch.pop("labels")
        found = model(**batch).logits
        ends = batch.get("decoder_cu_seqlens")
        by_row = (
            unpack(found, ends) if packing else [found[i, : len(row["labels"])] for i, row in enumerate(rows)]
        )
        logits.append(torch.cat(by_row))
        assert found.shape[:-1] == labels.shape
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


class TestGlobalTokens:
    IDS = (BOS, 9, 5, EOS, EOS, 6, 5, 7, EOS)

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ("first", [0]),
            ("none", []),
            (3, [0, 1, 2]),
            (0, []),
            (99, list(range(9))),
            ("question", [0, 1, 2]),
            ("separators", [3, 4, 8]),
            (FirstTokens(2), [0, 1]),
            (EveryKthToken(3), [0, 3, 6]),
            (EveryKthToken(100), [0]),
            (TokensWithId([5, 7]), [2, 6, 7]),
            (QuestionTokens(5), [0, 1]),
            (["first", TokensWithId((5,)), EveryKthToken(4)], [0, 2, 4, 6, 8]),
            (["question", ["separators", 2]], [0, 1, 2, 3, 4, 8]),
            (lambda ids: ids > 6, [1, 7]),
        ],
    )
    @pytest.mark.parametrize("packing", [False, True])
    def test_rules(self, ids_only, rule, expected, packing):
        other = {"input_ids": [BOS, 4, EOS, 5, 9]}
        collate = LEDDataCollator(ids_only, global_tokens=rule, packing=packing)
        batch = collate([{"input_ids": self.IDS}, other])
        mask = batch["global_attention_mask"]
        mask = unpack(mask, batch["cu_seqlens"])[0] if packing else mask[0]
        assert positions(mask) == expected

    def test_every_tokenizer_has_its_separators(self, any_tokenizer):
        encoded = any_tokenizer("the encoder", "the whole text", return_tensors=None)
        batch = LEDDataCollator(any_tokenizer, global_tokens="question")([dict(encoded)])
        question = any_tokenizer("the encoder")["input_ids"][:-1]  # without </s>
        assert positions(batch["global_attention_mask"][0]) == list(range(len(question)))
        batch = LEDDataCollator(any_tokenizer, global_tokens="separators")([dict(encoded)])
        assert torch.equal(
            batch["global_attention_mask"] == 1, batch["input_ids"] == any_tokenizer.eos_token_id
        )

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_separator_of_documents(self, tokenizer_files, kind):
        tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
        tokenizer.tokenizer.add_special_tokens(["<doc-sep>"])
        tokenizer.save_pretrained(tokenizer_files)
        other = read_tokenizer(tokenizer_files, kind)
        ids = other("the text<doc-sep>a text")["input_ids"]
        mask = LEDDataCollator(other, global_tokens=["first", "separators"])([{"input_ids": ids}])
        assert positions(mask["global_attention_mask"][0]) == [0, ids.index(tokenizer.doc_sep_token_id)]

    def test_the_question_is_that_of_led_answer(self, tokenizer):
        reader = Reader(tokenizer, 64, question="the encoder")
        (piece,) = reader.pieces(Document("d", "d", "the whole text", 14))
        expected = reader.batch([piece], "cpu")
        encoded = tokenizer("the encoder", "the whole text")
        batch = LEDDataCollator(tokenizer, global_tokens="question")([encoded])
        for name in ("input_ids", "attention_mask", "global_attention_mask"):
            assert torch.equal(batch[name], expected[name])

    def test_an_own_mask_wins(self, ids_only):
        rows = [
            {"input_ids": [4, 5, 6], "global_attention_mask": [0, 0, 1]},
            {"input_ids": [4, 5], "global_attention_mask": None},
            {"input_ids": [4, 5], "global_attention_mask": [False, True]},
            {"input_ids": [4, 5], "global_attention_mask": [0, 0]},
        ]
        mask = LEDDataCollator(ids_only)(rows)["global_attention_mask"]
        assert mask.tolist() == [[0, 0, 1], [1, 0, -1], [0, 1, -1], [0, 0, -1]]

    @pytest.mark.parametrize(
        ("rule", "kind", "said"),
        [
            ("last", ValueError, "global_tokens is 'last'; give one of first, question"),
            ([], ValueError, "empty list; give 'none'"),
            (True, TypeError, "global_tokens is a bool"),
            (0.5, TypeError, "global_tokens is a float"),
            (-1, ValueError, "count is -1"),
        ],
    )
    def test_refused_rules(self, ids_only, rule, kind, said):
        with pytest.raises(kind, match=said):
            LEDDataCollator(ids_only, global_tokens=rule)

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: EveryKthToken(0), "k is 0"),
            (lambda: TokensWithId(()), "token_ids"),
            (lambda: TokensWithId((-1,)), "token_ids"),
            (lambda: QuestionTokens(None), "separator_id is None"),
        ],
    )
    def test_refused_settings_of_rules(self, make, said):
        with pytest.raises(ValueError, match=said):
            make()

    def test_a_document_alone_is_no_question(self, ids_only):
        collate = LEDDataCollator(ids_only, global_tokens="question")
        pair = {"input_ids": [BOS, 4, EOS, EOS, 5, EOS]}
        for ids in ([BOS, 4, 5, EOS], [BOS, 4, 5]):
            with pytest.raises(ValueError, match=r"feature 1: nothing follows a separator.*as a pair"):
                collate([pair, {"input_ids": ids}])

    def test_a_rule_of_another_shape(self, ids_only):
        collate = LEDDataCollator(ids_only, global_tokens=lambda ids: ids[:1] > 0)
        with pytest.raises(ValueError, match=r"returned shape \(1,\) for 2 ids"):
            collate([{"input_ids": [4, 5]}])


class TestLengths:
    def test_truncation_is_that_of_tokenizers(self, any_tokenizer):
        text, target = "The encoder reads the whole text. " * 3, "the decoder writes a short one"
        for source, length in ((9, 5), (300, 300)):
            batch = LEDDataCollator(any_tokenizer, max_length=source, max_target_length=length)(
                [dict(any_tokenizer(text, text_target=target))]
            )
            expected = any_tokenizer(text, truncation=True, max_length=source)["input_ids"]
            assert batch["input_ids"].tolist() == [expected]
            expected = any_tokenizer(target, truncation=True, max_length=length)["input_ids"]
            assert batch["labels"].tolist() == [expected]

    def test_masks_are_cut_with_their_tokens(self, ids_only):
        row = {"input_ids": [BOS, 4, 5, 6, EOS], "global_attention_mask": [1, 0, 1, 1, 0]}
        batch = LEDDataCollator(ids_only, max_length=3)([row])
        assert batch["input_ids"].tolist() == [[BOS, 4, EOS]]
        assert batch["global_attention_mask"].tolist() == [[1, 0, 0]]
        row["input_ids"][-1] = 7  # it ends in the middle of a text
        assert LEDDataCollator(ids_only, max_length=3)([row])["input_ids"].tolist() == [[BOS, 4, 5]]

    @pytest.mark.parametrize("labels", [[7, EOS, -100, -100], [7, EOS, PAD, PAD], [7, EOS, PAD, -100]])
    def test_padding_of_labels_is_no_target(self, ids_only, labels):
        for packing in (False, True):
            batch = LEDDataCollator(ids_only, packing=packing)([{"input_ids": [4], "labels": labels}])
            assert batch["labels"].flatten().tolist() == [7, EOS]

    def test_a_padding_token_that_ends_texts_is_kept(self, ids_only):
        ids_only = type(ids_only)()
        ids_only.pad_token_id = EOS
        batch = LEDDataCollator(ids_only)([{"input_ids": [4], "labels": [7, EOS]}])
        assert batch["labels"].tolist() == [[7, EOS]]

    def test_labels_without_a_target(self, ids_only):
        rows = [{"input_ids": [4], "labels": [-100, -100]}, {"input_ids": [4], "labels": [-100, 5]}]
        assert LEDDataCollator(ids_only)(rows)["labels"].tolist() == [[-100, -100], [-100, 5]]
        batch = LEDDataCollator(ids_only, packing=True)(rows)
        assert [row.tolist() for row in unpack(batch["labels"], batch["decoder_cu_seqlens"])] == [
            [-100],
            [-100, 5],
        ]

    def test_padding_between_tokens(self, ids_only):
        row = {"input_ids": [4, PAD, 5, PAD], "attention_mask": [1, 0, 1, 0]}
        batch = LEDDataCollator(ids_only)([row])
        assert batch["input_ids"].tolist() == [[4, PAD, 5]]
        assert batch["attention_mask"].tolist() == [[1, 0, 1]]
        with pytest.raises(ValueError, match="feature 0 has padding between tokens"):
            LEDDataCollator(ids_only, packing=True)([row])

    def test_other_padding_of_labels(self, ids_only):
        rows = [{"input_ids": [4], "labels": [5]}, {"input_ids": [4], "labels": [5, 6, 7]}]
        batch = LEDDataCollator(ids_only, label_pad_token_id=-1, pad_to_multiple_of=2)(rows)
        assert batch["labels"].tolist() == [[5, -1, -1, -1], [5, 6, 7, -1]]


def test_classes_and_answers(ids_only):
    rows = [
        {"input_ids": [4, 5], "label": 1, "start_positions": 0, "end_positions": [1]},
        {
            "input_ids": [PAD, 4, 5, 6], "attention_mask": [0, 1, 1, 1], "label": 0,
            "start_positions": 2, "end_positions": [3],
        },
    ]  # fmt: skip
    batch = LEDDataCollator(ids_only)(rows)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["start_positions"].tolist() == [0, 1]
    assert batch["end_positions"].tolist() == [1, 2]
    many = LEDDataCollator(ids_only)([{"input_ids": [4], "labels": [0.0, 1.0]}] * 2)["labels"]
    assert many.dtype == torch.float32
    assert many.tolist() == [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="packed batches hold ids to write as labels"):
        LEDDataCollator(ids_only, packing=True)(rows)


def test_answers_that_are_cut_off_are_left_out_of_the_loss(ids_only):
    eos = ids_only.eos_token_id
    ids = [*range(4, 23), eos]
    rows = [{"input_ids": ids, "start_positions": at, "end_positions": at} for at in (8, 9, 15, 19)]
    batch = LEDDataCollator(ids_only, max_length=10, pad_to_multiple_of=8)(rows)
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"][0, :11].tolist() == [*range(4, 13), eos, PAD]
    for name in ("start_positions", "end_positions"):
        assert batch[name][0] == 8
        assert (batch[name][1:] > 16).all()
    torch.manual_seed(0)
    model = LEDForQuestionAnswering(LEDConfig(**small_config(0))).eval()
    kept = LEDDataCollator(ids_only, max_length=10, pad_to_multiple_of=8)(rows[:1])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**kept).loss)


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        (3, TypeError, "feature 1 is a int"),
        ({"labels": [1]}, ValueError, "feature 1 has no input_ids"),
        ({"input_ids": []}, ValueError, "feature 1 has no tokens"),
        ({"input_ids": [4], "attention_mask": [0]}, ValueError, "feature 1 has no tokens"),
        ({"input_ids": [[4, 5]]}, ValueError, r"input_ids of feature 1 has shape \(1, 2\).*without return_tensors"),
        ({"input_ids": 4}, ValueError, r"input_ids of feature 1 has shape \(\)"),
        ({"input_ids": [4.5]}, ValueError, "input_ids of feature 1 holds torch.float32"),
        ({"input_ids": "text"}, TypeError, "input_ids of feature 1 is no row of numbers"),
        ({"input_ids": [4, "a"]}, TypeError, "input_ids of feature 1 is no row of numbers"),
        ({"input_ids": [[4], [5, 6]]}, TypeError, "input_ids of feature 1 is no row of numbers"),
        ({"input_ids": [1j]}, TypeError, "input_ids of feature 1 is complex"),
        ({"input_ids": [4], "attention_mask": [1, 1]}, ValueError, "attention_mask of feature 1 has 2 elements for 1"),
        ({"input_ids": [4], "attention_mask": [2]}, ValueError, "attention_mask of feature 1 holds 2; give 0 for"),
        ({"input_ids": [4], "global_attention_mask": [2]}, ValueError, "global_attention_mask of feature 1 holds 2"),
        ({"input_ids": [4], "global_attention_masks": [1]}, ValueError, "feature 1 holds global_attention_masks; give"),
        ({"input_ids": [4], "text": "a"}, ValueError, "feature 1 holds text; give input_ids"),
        ({"input_ids": [4], "labels": [[5]]}, ValueError, r"labels of feature 1 has shape \(1, 1\)"),
        ({"input_ids": [4], "labels": []}, ValueError, r"labels of feature 1 has shape \(0,\)"),
        ({"input_ids": [4], "start_positions": [0, 0]}, ValueError, r"start_positions of feature 1 has shape \(2,\)"),
        ({"input_ids": [4], "end_positions": 0.5}, ValueError, "end_positions of feature 1 has .*; give one place"),
    ],
)  # fmt: skip
def test_refused_features(ids_only, row, kind, said):
    with pytest.raises(kind, match=said) as error:
        LEDDataCollator(ids_only)([{"input_ids": [4]}, row])
    assert "\n" not in str(error.value)


def test_features_that_do_not_fit_each_other(ids_only):
    collate = LEDDataCollator(ids_only)
    with pytest.raises(ValueError, match="features is empty"):
        collate([])
    with pytest.raises(ValueError, match="feature 1 has no labels, and others have"):
        collate([{"input_ids": [4], "labels": [4]}, {"input_ids": [4], "labels": None}])
    with pytest.raises(ValueError, match="ids to write in some features and classes in others"):
        collate([{"input_ids": [4], "labels": [4]}, {"input_ids": [4], "labels": 1}])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"max_target_length": 0}, "max_target_length is 0"),
        ({"packing": "yes"}, "packing is 'yes'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"pad_to_multiple_of": 8, "packing": True}, "pad_to_multiple_of has no effect on packed batches"),
    ],
)
def test_refused_settings(ids_only, settings, said):
    with pytest.raises(ValueError, match=said):
        LEDDataCollator(ids_only, **settings)


@pytest.mark.parametrize("missing", ["pad_token", "sep_token"])
def test_a_tokenizer_without(ids_only, missing):
    ids_only = type(ids_only)()
    setattr(ids_only, f"{missing}_id", None)
    with pytest.raises(ValueError, match=f"the tokenizer has no {missing}"):
        LEDDataCollator(ids_only, global_tokens="question")


def test_columns_of_tokenizers_are_left_aside(tokenizer):
    encoded = tokenizer("the text", return_special_tokens_mask=True, return_offsets_mapping=True)
    batch = LEDDataCollator(tokenizer)([{**encoded, "length": 4, "labels": None}])
    assert batch.keys() == {"input_ids", "attention_mask", "global_attention_mask"}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pickles_without_the_model(tokenizer_files, small_model, kind):
    tokenizer = read_tokenizer(tokenizer_files, kind)
    model = small_model(0, vocab_size=300)
    rules = ["question", EveryKthToken(4), TokensWithId((5,))]
    collate = LEDDataCollator(tokenizer, global_tokens=rules, model=model, packing=True)
    pickled = pickle.dumps(collate)
    assert len(pickled) < 5_000
    row = dict(tokenizer("the encoder", "the whole text")) | {"labels": [5, 6]}
    expected = collate([row])
    for name, tensor in pickle.loads(pickled)([row]).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("packing", [False, True])
def test_workers_of_a_loader(tokenizer, packing):
    rows = features_of(tokenizer) * 3
    collate = LEDDataCollator(tokenizer, packing=packing)
    loader = DataLoader(rows, batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    assert len(batches) == 3
    expected = collate(rows[:2])
    for batch in batches:
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_unpack_refuses_what_does_not_fit():
    logits = torch.randn(5, 3)
    assert [tuple(row.shape) for row in unpack(logits, torch.tensor([0, 2, 2, 5]))] == [
        (2, 3),
        (0, 3),
        (3, 3),
    ]
    for ends in ([0, 4], [1, 5], [0, 4, 3, 5], []):
        with pytest.raises(ValueError, match="cu_seqlens does not ascend from 0 to the 5 rows"):
            unpack(logits, torch.tensor(ends))
