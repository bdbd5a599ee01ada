"""Text to ids and back, against transformers' tokenizer, from all forms of a tokenizer's files."""

from __future__ import annotations

import copy
import json
import pickle
import re
import threading
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from led_kernels import LongformerMask
from led_model.tokenization.batch_encoding import BatchEncoding
from led_model.tokenization.tokenizer import LEDTokenizer
from tests.model.bart_vocabulary import Unreachable, bart_files

TEXT = "The encoder reads the whole text; 12 words, naïve café ☕\n\n and two  spaces."
REAL_TEXTS = [topics[name] for name in sorted(topics)]
SPECIAL = ("bos", "eos", "sep", "cls", "unk", "pad", "mask")
# more of what is special to the tokenizer than chance would bring
PARTS = st.sampled_from(["<s>", "</s>", "<mask>", "<pad>", " ", "\n", "the encoder", "é", "🙂", "\x00", "'s"])
TEXTS = st.lists(st.one_of(st.text(max_size=12), PARTS), max_size=6).map("".join)


@pytest.fixture
def stock(tokenizer_files):
    transformers = pytest.importorskip("transformers")
    return transformers.LEDTokenizer.from_pretrained(tokenizer_files)


@pytest.fixture
def tokenizer(tokenizer_files):
    return LEDTokenizer.from_pretrained(tokenizer_files)


@pytest.fixture(scope="session")
def bart_directory(pytestconfig):
    try:
        return bart_files(pytestconfig.cache.mkdir("bart-vocabulary"))
    except Unreachable as error:
        pytest.skip(f"BART's vocabulary cannot be had: {error}")


def both(stock, ours, *texts, **settings) -> tuple[BatchEncoding, BatchEncoding]:
    expected = stock(*texts, return_special_tokens_mask=True, **settings)
    return BatchEncoding(expected), ours(*texts, return_special_tokens_mask=True, **settings)


def test_real_text(bart_directory):
    """465 kB of English with code and tables, in BART's own vocabulary."""
    transformers = pytest.importorskip("transformers")
    stock = transformers.LEDTokenizer.from_pretrained(bart_directory)
    ours = LEDTokenizer.from_pretrained(bart_directory)
    assert len(ours) == ours.vocab_size == 50265
    assert ours.mask_token_id == 50264
    expected, batch = both(stock, ours, REAL_TEXTS)
    assert batch == expected
    assert max(map(len, batch.input_ids)) > 16384
    assert ours.batch_decode(batch.input_ids, skip_special_tokens=True) == REAL_TEXTS
    assert ours.encode("Hello world") == [0, 31414, 232, 2]  # as in transformers' documentation of LED


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), data=st.data())
def test_any_text(stock, tokenizer, texts, data):
    firsts, seconds = (list(column) for column in zip(*texts, strict=True))
    arguments = [firsts, seconds] if data.draw(st.booleans(), "pairs") else [firsts]
    settings = {
        "padding": data.draw(st.sampled_from([False, True, "max_length"]), "padding"),
        "pad_to_multiple_of": data.draw(st.sampled_from([None, 8]), "pad_to_multiple_of"),
        "add_special_tokens": data.draw(st.booleans(), "add_special_tokens"),
        "truncation": data.draw(st.booleans(), "truncation"),
    }
    if settings["truncation"] or settings["padding"] == "max_length":
        lengths = st.integers(4, 20) if settings["pad_to_multiple_of"] is None else st.sampled_from([8, 16])
        settings["max_length"] = data.draw(lengths, "max_length")  # as transformers demands
    expected, batch = both(stock, tokenizer, *arguments, **settings)
    assert batch == expected
    for ids in batch.input_ids:
        for skip in (False, True):
            assert tokenizer.decode(ids, skip) == stock.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("truncation", ["longest_first", "only_first", "only_second"])
def test_truncated_pair(stock, tokenizer, truncation):
    expected, batch = both(
        stock, tokenizer, "encoder " * 30, "reads " * 30, max_length=64, truncation=truncation
    )
    assert batch == expected
    assert len(batch.input_ids) == 64


def test_forms_of_input_and_output(stock, tokenizer):
    for arguments in ((TEXT,), (TEXT, "pair"), ([TEXT, "b"],)):
        expected, batch = both(stock, tokenizer, *arguments)
        assert batch == expected
        expected, batch = both(stock, tokenizer, *arguments, padding=True, return_tensors="pt")
        assert batch.keys() == expected.keys()
        for name, tensor in batch.items():
            assert tensor.dtype == torch.int64
            assert torch.equal(tensor, expected[name]), name
    offsets = tokenizer(TEXT, return_offsets_mapping=True).offset_mapping
    assert offsets == stock(TEXT, return_offsets_mapping=True)["offset_mapping"]
    assert tokenizer([], padding=True) == {"input_ids": [], "attention_mask": []}
    assert tokenizer("a b", return_tensors="pt").to("cpu").input_ids.shape[0] == 1
    with pytest.raises(AttributeError, match="has no token_type_ids; it has input_ids, attention_mask"):
        _ = tokenizer("a").token_type_ids


def test_pair_has_two_separators(tokenizer):
    ids = tokenizer.encode("the", "text")
    assert ids == [0, *tokenizer.encode("the")[1:-1], 2, 2, *tokenizer.encode("text")[1:-1], 2]


def test_special_tokens_of_a_text_can_be_text(tokenizer):
    text = "an </s> and a <mask>"
    assert tokenizer(text).input_ids.count(2) == 2
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert ids.count(2) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text).input_ids.count(2) == 2  # nothing of it stays


def test_special_token_ids(stock, tokenizer):
    for name in SPECIAL:
        assert getattr(tokenizer, f"{name}_token") == getattr(stock, f"{name}_token")
        assert getattr(tokenizer, f"{name}_token_id") == getattr(stock, f"{name}_token_id")
    assert len(tokenizer) == len(stock)
    assert tokenizer.vocab_size == stock.vocab_size


def test_padding_of_the_global_mask(tokenizer):
    """As in transformers' LEDTokenizer up to version 4: -1, since 0 means local attention there."""
    short, long = tokenizer("the text"), tokenizer("the encoder reads the whole text")
    for encoded in (short, long):
        encoded["global_attention_mask"] = [1] + [0] * (len(encoded.input_ids) - 1)
    short_length, length = len(short.input_ids), len(long.input_ids)
    missing = length - short_length
    assert missing > 0
    batch = tokenizer.pad([short, long], return_tensors="pt")
    assert batch.input_ids[0].tolist() == short.input_ids + [tokenizer.pad_token_id] * missing
    assert batch.attention_mask.tolist() == [[1] * short_length + [0] * missing, [1] * length]
    assert batch.global_attention_mask[0].tolist() == [1] + [0] * (short_length - 1) + [-1] * missing
    mask = LongformerMask.from_padding(batch.attention_mask, batch.global_attention_mask)
    assert mask.num_globals.tolist() == [1, 1]

    columns = {name: [short[name], long[name]] for name in short}
    assert torch.equal(tokenizer.pad(columns, return_tensors="pt").input_ids, batch.input_ids)
    assert (
        tokenizer.pad(long, padding="max_length", max_length=length + 3).global_attention_mask[-3:]
        == [-1] * 3
    )
    assert tokenizer.pad({"input_ids": torch.tensor([0, 2])}, pad_to_multiple_of=4) == {
        "input_ids": [0, 2, 1, 1],
        "attention_mask": [1, 1, 0, 0],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 5}, "max_length has no effect; set truncation=True"),
        ({"truncation": True}, "truncation needs max_length"),
        ({"truncation": True, "max_length": 1}, "max_length is 1; give 2 or more"),
        ({"truncation": "last"}, "truncation is 'last'; give True, False or one of longest_first"),
        ({"padding": "left"}, "padding is 'left'"),
        ({"padding": "max_length"}, "padding='max_length' needs max_length"),
        ({"return_tensors": "np"}, "return_tensors is 'np'; give 'pt' or None"),
        ({"return_tensors": "pt"}, "differ in length and make no tensor; set padding=True"),
        ({"text_pair": ["one"]}, "text_pair has 1 texts for 2"),
        (
            {"text_pair": ["b", "b"], "truncation": "only_second", "max_length": 5},
            "max_length 5 cannot be met with truncation 'only_second'",
        ),
    ],
)
def test_bad_settings(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(["one", "and another text"], **settings)


def test_what_is_no_text(tokenizer):
    for options in ({}, {"truncation": True, "max_length": 8}):
        with pytest.raises(TypeError):
            tokenizer(["one", 2], **options)


def test_bad_padding(tokenizer):
    with pytest.raises(ValueError, match="has no input_ids"):
        tokenizer.pad({"attention_mask": [1]})
    with pytest.raises(ValueError, match="global_attention_mask and input_ids differ in length"):
        tokenizer.pad({"input_ids": [0, 5, 2], "global_attention_mask": [1]})


def test_both_forms_agree(tokenizer, tmp_path):
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0
    assert ids[-1] == 2
    assert len(ids) < len(TEXT.encode())  # merges are used
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    tokenizer.tokenizer.enable_truncation(4)  # what a saved tokenizer may ask for
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert LEDTokenizer.from_pretrained(tmp_path).encode(TEXT) == ids


ADDED = {
    "added_tokens.json": {"<doc-sep>": 300, "Ünit": 301},
    "special_tokens_map.json": {
        "mask_token": {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False},
    },
    "tokenizer_config.json": {
        "model_max_length": 30,
        "add_prefix_space": True,
        "additional_special_tokens": ["<doc-sep>"],
    },
}
DESCRIBED = {
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            "300": {"content": "<doc-sep>", "special": True, "lstrip": True, "rstrip": True},
            "301": {"content": "Ünit", "special": False, "normalized": True},
        },
        "pad_token": "<doc-sep>",
    }
}


@pytest.mark.parametrize("files", [ADDED, DESCRIBED], ids=["before version 5", "since"])
def test_added_tokens(tokenizer_files, tmp_path, files):
    """Of each form that transformers has written; saved, and read back by both."""
    transformers = pytest.importorskip("transformers")
    assert len(LEDTokenizer.from_pretrained(tokenizer_files)) == 300
    for name, content in files.items():
        (tokenizer_files / name).write_text(json.dumps(content))
    stock = transformers.LEDTokenizer.from_pretrained(tokenizer_files)
    ours = LEDTokenizer.from_pretrained(tokenizer_files)
    saved = ours.save_pretrained(tmp_path / "saved")
    assert [path.rsplit("/")[-1] for path in saved] == [
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    back = LEDTokenizer.from_pretrained(tmp_path / "saved")
    stock_back = transformers.LEDTokenizer.from_pretrained(tmp_path / "saved")
    for text in (TEXT, "a <doc-sep> b Ünit", "a <mask> b </s> c", "Ünits<doc-sep>", ""):
        expected = stock(text)["input_ids"]
        for tokenizer in (ours, back, stock_back):
            assert tokenizer(text)["input_ids"] == expected, tokenizer
        assert ours.decode(expected, skip_special_tokens=True) == stock.decode(
            expected, skip_special_tokens=True
        )
    for tokenizer in (ours, back, stock_back):
        assert len(tokenizer) == 302
        assert tokenizer.pad_token_id == stock.pad_token_id
    if "model_max_length" in files["tokenizer_config.json"]:
        assert len(ours("text " * 50, truncation=True).input_ids) == 30
        assert back.model_max_length == stock_back.model_max_length == 30


@pytest.mark.parametrize("limit", [int(1e30), 1e30, None])
def test_no_limit_in_the_spelling_of_transformers(tokenizer_files, limit):
    (tokenizer_files / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert LEDTokenizer.from_pretrained(tokenizer_files).model_max_length is None


def test_vocabulary_alone_is_read_back(stock, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab, merges = tokenizer.save_vocabulary(tmp_path / "new", "led")
    assert vocab.endswith("led-vocab.json")
    assert merges.endswith("led-merges.txt")
    tokenizer.save_vocabulary(tmp_path)
    assert transformers.LEDTokenizer.from_pretrained(tmp_path)(TEXT) == stock(TEXT)


ALTERNATING = {300 + i: {"content": f"<{i}>", "special": i % 2 == 0} for i in range(9000)}


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"vocab.json": None}, FileNotFoundError, "holds no tokenizer.json, nor vocab.json with merges.txt"),
        ({"tokenizer.json": "{}"}, ValueError, "tokenizer.json: model is None; give an object"),
        ({"vocab.json": "{"}, ValueError, "vocab.json is not valid JSON"),
        ({"merges.txt": "a"}, ValueError, "are no readable BPE"),
        (
            {"vocab.json": '{"a": true}'},
            ValueError,
            "vocab.json: vocab is {'a': True}; give an object of ids",
        ),
        ({"vocab.json": '{"a": 4294967301}'}, ValueError, "vocab.json: vocab is {'a': 4294967301}"),
        (
            {"vocab.json": '{"a": 1, "b": 1}'},
            ValueError,
            "'a' and 'b' have the id 1; give each token its own",
        ),
        (
            {"vocab.json": json.dumps({"a": 0}), "merges.txt": "#version"},
            ValueError,
            "lacks '<s>', '</s>', '<unk>'",
        ),
        ({"tokenizer_config.json": "{"}, ValueError, "tokenizer_config.json is not valid JSON"),
        (
            {"added_tokens.json": json.dumps({"<new>": 310})},
            ValueError,
            "gives added token '<new>' the id 310, but in its vocabulary it becomes 300",
        ),
        (
            {"tokenizer_config.json": json.dumps({"added_tokens_decoder": ALTERNATING})},
            ValueError,
            "has 9,005 added tokens, of which special and others alternate 9,001 times",
        ),
    ],
)
def test_damage_is_named(tokenizer_files, files, error, message):
    for name, content in files.items():
        path = tokenizer_files / name
        path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        LEDTokenizer.from_pretrained(tokenizer_files)


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
SPACES = {"type": "Replace", "pattern": {"String": "."}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [SPACES] * 7}}, {}, "normalizer is {"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, {}, "normalizer is {"),
        ({"decoder": SPACES}, {}, "decoder is {"),
        ({"decoder": None}, {}, "decoder is None; give an object of type ByteLevel"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, {}, "pre_tokenizer is {"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}},
            {},
            "pre_tokenizer is {",
        ),
        ({"added_tokens": [{"content": "<s>"}]}, {}, "added_tokens is ["),
        (
            {"added_tokens": [{"content": "<x>", "id": 7} | FLAGS]},
            {},
            "gives added token '<x>' the id 7, but in its",
        ),
        ({}, {"type": "WordPiece"}, "type is 'WordPiece'; give one of BPE"),
        ({}, {"continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'; give"),
        ({}, {"unk_token": "none"}, "unk_token is 'none', which vocab lacks"),
        ({}, {"dropout": 0.5}, "dropout is 0.5; give"),
        ({}, {"vocab": {"a": "5"}}, "vocab is {'a': '5'}; give an object of ids by tokens"),
        ({}, {"merges": ["a\x1bb"]}, "is no readable tokenizer"),
    ],
)
def test_only_a_byte_level_bpe_is_read(tokenizer, tmp_path, changes, model, message):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | changes | {"model": stored["model"] | model}))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LEDTokenizer.from_pretrained(tmp_path)
    assert str(error.value).isprintable()


def test_a_tokenizer_that_fails_at_a_text(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    words = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    of_words = LEDTokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?")))
    for call in (of_words, of_words.encode):
        with pytest.raises(ValueError, match=r"fails at a text or ids .*; take the one that belongs"):
            call("word")


def test_older_and_newer_forms_of_a_byte_level_bpe(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    merges = [" ".join(merge) for merge in stored["model"]["merges"]]
    old = {"vocab": stored["model"]["vocab"], "merges": merges}
    level = stored["pre_tokenizer"]
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    for changes in (
        {"model": old},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [level]}},
        {"post_processor": template, "normalizer": {"type": "NFC"}},
        {"padding": {"strategy": {"Fixed": 0}}, "truncation": {"direction": "Left"}},
        {"model": stored["model"] | {"dropout": 0.0}},
    ):
        path.write_text(json.dumps(stored | changes))
        assert LEDTokenizer.from_pretrained(tmp_path)(TEXT) == tokenizer(TEXT)


@pytest.mark.parametrize(("count", "run"), [(1000, 1), (50_000, 25_000)])
def test_many_added_tokens(tokenizer_files, count, run):
    """By turns, or in long runs of one kind."""
    tokens = {300 + i: {"content": f"<{i}>", "special": i // run % 2 == 0} for i in range(count)}
    (tokenizer_files / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
    assert len(tokenizer) == 300 + count
    assert tokenizer.decode([300, 300 + run], skip_special_tokens=True) == f"<{run}>"


def test_without_the_library(tokenizer_files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"run `pip install '\.\[text\]'`"):
        LEDTokenizer.from_pretrained(tokenizer_files)


def test_threads_get_their_own_settings(tokenizer):
    """Truncation is a setting of the library's object, which calls of several threads would share."""
    text = "The encoder reads the whole text and the decoder writes a short one. " * 8
    whole, cut = tokenizer(text)["input_ids"], tokenizer(text, truncation=True, max_length=9)["input_ids"]
    assert len(whole) > len(cut) == 9
    wrong = []

    def work(truncated: bool) -> None:
        for _ in range(200):
            if truncated:
                got = tokenizer(text, truncation=True, max_length=9)["input_ids"]
            else:
                got = tokenizer(text)["input_ids"]
            if got != (cut if truncated else whole) or tokenizer.encode(text) != whole:
                wrong.append(len(got))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_pickles(tokenizer):
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other("The text.") == tokenizer("The text.")


def test_targets_become_labels(stock, tokenizer):
    texts, targets = ["The encoder reads.", "The decoder"], ["the text", "writes a short one"]
    for call in ({"text_target": targets}, {"text": texts, "text_target": targets}):
        expected = stock(**call, padding=True, truncation=True, max_length=8)
        assert dict(tokenizer(**call, padding=True, truncation=True, max_length=8)) == dict(expected)
    with pytest.raises(ValueError, match="text and text_target are both missing"):
        tokenizer()


@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers_collators(tokenizer, small_model, side):
    """The global mask is padded with -1 at the side of the padding, labels with -100."""
    transformers = pytest.importorskip("transformers")
    model = small_model(0, vocab_size=len(tokenizer))
    tokenizer.padding_side = side
    rows = []
    for text, target in (("The encoder reads the whole text.", "the text"), ("A text.", "A short one.")):
        row = dict(tokenizer(text, text_target=target))
        row["global_attention_mask"] = [1] + [0] * (len(row["input_ids"]) - 1)
        rows.append(row)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=4)
    batch = collate([dict(row) for row in rows])
    length = batch["input_ids"].shape[1]
    assert length % 4 == 0
    for i, row in enumerate(rows):
        for name, fill in (("input_ids", 1), ("attention_mask", 0), ("global_attention_mask", -1)):
            padding = [fill] * (length - len(row[name]))
            expected = row[name] + padding if side == "right" else padding + row[name]
            assert batch[name][i].tolist() == expected
        kept = [label for label in batch["labels"][i].tolist() if label != -100]
        assert kept == row["labels"]
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    assert model(**batch).loss.isfinite()

    rows = [{k: v for k, v in row.items() if k != "labels"} | {"label": i} for i, row in enumerate(rows)]
    batch = transformers.DataCollatorWithPadding(tokenizer, padding="max_length", max_length=40)(rows)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["global_attention_mask"].shape == batch["input_ids"].shape == (2, 40)
    assert (batch["global_attention_mask"] == -1).sum() == (batch["attention_mask"] == 0).sum() > 0


def test_masked_language_modelling_collator(tokenizer):
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
    batch = collate([tokenizer("The encoder reads the whole text."), tokenizer("The text.")])
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert not torch.isin(batch["labels"], torch.tensor(special)).any()
    assert (batch["input_ids"] == tokenizer.mask_token_id).any()


def test_separator_of_documents(tokenizer_files):
    assert LEDTokenizer.from_pretrained(tokenizer_files).doc_sep_token_id is None
    settings = {"additional_special_tokens": ["<doc-sep>"]}
    (tokenizer_files / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
    assert tokenizer.doc_sep_token_id == tokenizer.token_id("<doc-sep>") == len(tokenizer) - 1
    assert tokenizer.doc_sep_token_id in tokenizer("One.<doc-sep>Two.")["input_ids"]
    assert tokenizer.convert_tokens_to_ids(["<doc-sep>", "nowhere"]) == [
        len(tokenizer) - 1,
        tokenizer.unk_token_id,
    ]
