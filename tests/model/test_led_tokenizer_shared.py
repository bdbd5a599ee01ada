"""A tokenizer that threads and child processes use at once, and what it is told that it cannot do."""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading
import time
from collections import Counter

import pytest
import torch

from led_model.tokenization.tokenizer import LEDTokenizer

TEXT = "The encoder reads the whole text and the decoder writes a short one. " * 40


@pytest.fixture
def tokenizer(tokenizer_files):
    return LEDTokenizer.from_pretrained(tokenizer_files)


@pytest.fixture
def while_another_truncates(tokenizer):
    """The tokenizer, of which another thread truncates texts all the time."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            tokenizer(TEXT * 20, truncation=True, max_length=9, split_special_tokens=True)

    thread = threading.Thread(target=work)
    thread.start()
    yield tokenizer
    stop.set()
    thread.join()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_do_not_truncate(while_another_truncates, tokenizer_files, tmp_path, how):
    tokenizer = while_another_truncates
    whole = LEDTokenizer.from_pretrained(tokenizer_files)(TEXT + "</s>")["input_ids"]
    lengths = Counter()
    end = time.time() + 1.5
    while time.time() < end:
        if how == "save":
            tokenizer.save_pretrained(tmp_path / "saved")
            assert '"truncation": null' in (tmp_path / "saved/tokenizer.json").read_text()
            continue
        other = copy.deepcopy(tokenizer) if how == "deepcopy" else pickle.loads(pickle.dumps(tokenizer))
        lengths[len(other(TEXT + "</s>")["input_ids"]), other.tokenizer.truncation is None] += 1
    assert set(lengths) <= {(len(whole), True)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_may_tokenize(while_another_truncates):
    tokenizer = while_another_truncates
    whole = len(tokenizer("The text.")["input_ids"])
    for attempt in range(8):
        time.sleep(0.003 * attempt)
        child = os.fork()
        if child == 0:
            lengths = [
                len(tokenizer("The text.")["input_ids"]),
                len(copy.deepcopy(tokenizer).encode("The text.")),
            ]
            cut = tokenizer(TEXT, truncation=True, max_length=9)["input_ids"]
            os._exit(0 if lengths == [whole, whole] and len(cut) == 9 else 1)
        end = time.time() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.time() < end:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda t: t(3), TypeError, "text is a int"),
        (lambda t: t(b"a"), TypeError, "text is a bytes"),
        (lambda t: t(["a", 3]), TypeError, "text holds a int"),
        (lambda t: t("a", 3), TypeError, "text_pair is a int"),
        (lambda t: t(text_target=3), TypeError, "text is a int"),
        (lambda t: t("a", truncation=True, max_length="5"), ValueError, "max_length is '5'"),
        (lambda t: t("a", truncation=True, max_length=5.0), ValueError, "max_length is 5.0"),
        (lambda t: t("a", truncation=True, max_length=-1), ValueError, "max_length is -1"),
        (lambda t: t("a", padding="max_length", max_length=-4), ValueError, "max_length is -4"),
        (lambda t: t("a", padding=True, pad_to_multiple_of=-4), ValueError, "pad_to_multiple_of is -4"),
        (lambda t: t("a", truncation=[]), ValueError, "truncation is []"),
        (lambda t: t("a", padding={}), ValueError, "padding is {}"),
        (lambda t: t.encode(3), TypeError, "text is a int"),
        (lambda t: t.encode(["a"]), TypeError, "text is a list"),
        (lambda t: t.encode("a", 3), TypeError, "text_pair is a int"),
        (lambda t: t.decode([-1]), ValueError, "token_ids holds -1"),
        (lambda t: t.decode([5, 2**40]), ValueError, f"token_ids holds {2**40}"),
        (lambda t: t.decode([1.5]), ValueError, "token_ids holds a float"),
        (lambda t: t.decode(torch.zeros(2)), ValueError, "token_ids holds a float"),
        (lambda t: t.decode(torch.zeros(2, 2, dtype=torch.long)), ValueError, "token_ids holds a list"),
        (lambda t: t.decode("a"), ValueError, "token_ids holds a str"),
        (lambda t: t.decode(None), ValueError, "token_ids holds a NoneType"),
        (lambda t: t.batch_decode([[5, -100]]), ValueError, "token_ids holds -100"),
        (lambda t: t.batch_decode(3), TypeError, "sequences is a int"),
        (lambda t: t.pad("a"), TypeError, "encoded is a str"),
        (lambda t: t.pad(3), TypeError, "encoded is a int"),
        (lambda t: t.pad([3]), TypeError, "encoded is a list"),
        (
            lambda t: t.pad([t("a"), {"input_ids": [1]}]),
            ValueError,
            "encoded has rows with input_ids, attention_mask and with input_ids",
        ),
        (lambda t: t.pad([{"input_ids": [1]}, t("a")]), ValueError, "encoded has rows with input_ids and"),
        (lambda t: t.token_id(3), TypeError, "token is a int"),
        (lambda t: t.convert_tokens_to_ids(3), TypeError, "tokens is a int"),
        (lambda t: t.convert_tokens_to_ids([3]), TypeError, "tokens is a int"),
    ],
)  # fmt: skip
def test_misuse_is_told(tokenizer, call, kind, said):
    with pytest.raises(kind, match=f"^{re.escape(said)}"):
        call(tokenizer)


def test_a_single_id_is_decoded(tokenizer):
    ids = tokenizer.encode("The text.")
    assert tokenizer.decode(ids[1]) == tokenizer.decode([ids[1]]) == tokenizer.decode(torch.tensor(ids[1]))
