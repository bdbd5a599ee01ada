"""What ray.data, datasets and Spark call with batches of rows: all columns kept, bad rows with their error."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from led_model import LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.batch import Answerer, Classifier, Summarizer, callables
from led_model.batch.loading import TaskSpec
from tests.model.commands import LIMIT, PARAGRAPHS, TEXT, TEXTS, inputs, led, records, written

NEW = ["summary", "tokens", "pieces", "truncated", "error"]
LONG = "".join(PARAGRAPHS)
BAD = {
    None: "the row has no text in 'text'; give a string that is not blank, or a list of such strings.",
    7: "the row has no text in 'text'; give a string that is not blank, or a list of such strings.",
    " \n": "the row has no text in 'text'; give a string that is not blank, or a list of such strings.",
    "\ud800": "the row holds half of a surrogate pair; escape the character in full.",
    LONG: f"but the model reads at most {LIMIT}; cut it, or let --long truncate or --long chunk do so.",
}


@pytest.fixture
def summarizer(save):
    callables._loaded.clear()
    return Summarizer(str(save()), max_new_tokens=12)


def test_the_text_is_that_of_the_model_and_bad_rows_spoil_nothing(summarizer):
    texts = [TEXTS[0], *BAD, TEXTS[2], TEXTS[0]]
    batch = {"n": list(range(8)), "text": texts}
    result = summarizer(batch)
    assert list(batch) == ["n", "text"]  # what was handed in is left as it is
    assert list(result) == ["n", "text", *NEW]
    assert result["n"] == batch["n"]
    assert result["text"] is texts
    good = {0: TEXTS[0], 6: TEXTS[2], 7: TEXTS[0]}
    for row in range(8):
        if row in good:
            assert result["summary"][row] == written(
                Path(summarizer.spec.model), good[row], max_new_tokens=12
            )
            ids = inputs(Path(summarizer.spec.model), good[row])["input_ids"]
            values = [result[name][row] for name in NEW[1:]]
            assert values == [ids.shape[1] - 2, 1, False, None]
        else:
            assert [result[name][row] for name in NEW[:-1]] == [None] * 4
            assert result["error"][row].endswith(list(BAD.values())[row - 1])
    assert "the text has " in result["error"][5]


@pytest.mark.parametrize("long", ["truncate", "chunk", "condense"])
def test_long_texts_as_on_the_command_line(save, documents, capsys, long):
    directory = save()
    Path("docs/4.txt").write_text(LONG)
    flags = ["--model", directory, "--long", long, "--max-new-tokens", 12, "--batch-tokens", 200]
    assert led("summarize", "docs", *flags, "--output", "out.jsonl") == 0
    expected = {record["source"]: [record[name] for name in NEW[:-1]] for record in records()}
    result = Summarizer(directory, long=long, max_new_tokens=12, batch_tokens=200)({"text": [*TEXTS, [LONG]]})
    for number in range(5):
        assert [result[name][number] for name in NEW[:-1]] == expected[f"docs/{number}.txt"]
    assert "led: the text" not in capsys.readouterr().err


def table_of(result) -> pa.Table:
    if isinstance(result, pd.DataFrame):
        return pa.Table.from_pandas(result, preserve_index=False)
    return result if isinstance(result, pa.Table) else pa.table(result)


@pytest.mark.parametrize("kind", ["DataFrame", "Table", "numpy of ray", "iterator"])
def test_kinds_of_batches(summarizer, kind, monkeypatch):
    """Columns have the same type, whether all rows are good, or none is."""
    if kind == "numpy of ray":
        monkeypatch.setitem(sys.modules, "ray", pytest)  # anything that is there
    make = {
        "DataFrame": lambda rows: pd.DataFrame(rows, index=[10 + i for i in range(len(rows["text"]))]),
        "Table": pa.table,
        "numpy of ray": lambda rows: {name: np.array(values, object) for name, values in rows.items()},
        "iterator": lambda rows: iter([pd.DataFrame(rows)]),
    }[kind]
    schemas = []
    for texts in (TEXTS, [None, None], [*TEXTS, None]):
        rows = {"n": list(range(len(texts))), "text": texts}
        expected = summarizer(rows)
        batch = make(rows)
        result = summarizer(batch)
        if kind == "iterator":
            [result] = list(result)
        else:
            assert type(result) is type(batch)
        if kind == "DataFrame":
            assert (result.index == batch.index).all()
        table = table_of(result)
        assert {name: table[name].to_pylist() for name in expected} == expected
        schemas.append([table.schema.field(name).type for name in NEW])
    strings = {pa.string(), pa.large_string()}  # pandas makes either, by its version
    assert all(schema == schemas[0] for schema in schemas)
    assert {schemas[0][0], schemas[0][-1]} <= strings
    assert schemas[0][1:-1] == [pa.int64(), pa.int64(), pa.bool_()]


def test_numpy_without_ray(summarizer, monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    result = summarizer({"text": np.array([TEXTS[1], None], object)})
    assert all(isinstance(values, np.ndarray) and values.shape == (2,) for values in result.values())
    assert result["summary"][0] == written(Path(summarizer.spec.model), TEXTS[1], max_new_tokens=12)
    assert result["summary"][1] is None


def test_an_empty_batch(summarizer):
    table = summarizer(pa.table({"text": pa.array([], pa.string())}))
    assert table.num_rows == 0
    assert table.schema.field("error").type == pa.string()
    assert summarizer({"text": []}) == {name: [] for name in ("text", *NEW)}


def test_it_is_pickled_without_its_model_and_loads_once(summarizer, monkeypatch):
    loads = []
    load = TaskSpec.load
    monkeypatch.setattr(TaskSpec, "load", lambda spec: loads.append(spec) or load(spec))
    before = pickle.dumps(summarizer)
    first = summarizer({"text": TEXTS})
    assert pickle.dumps(summarizer) == before
    assert len(before) < 2000
    again = pickle.loads(before)
    assert again == summarizer
    assert again({"text": TEXTS}) == first
    assert loads == [summarizer.spec]  # as Spark unpickles it for each of its tasks


def test_in_a_fork(save):
    """As datasets' num_proc makes them, after the parent has run the model in several threads."""
    code = """
import os, sys, torch
from led_model.batch import Summarizer
torch.set_num_threads(2)
summarize = Summarizer(sys.argv[1], max_new_tokens=4)
batch = {"text": ["The encoder reads a long text. " * 9] * 20}
expected = summarize(batch)
if (pid := os.fork()) == 0:
    os._exit(0 if summarize(batch) == expected else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, str(save())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_other_library_is_needed(save):
    """In a process that cannot import them, dicts are served; importing the names loads no torch."""
    code = """
import sys
for name in ("ray", "datasets", "pandas", "pyarrow", "transformers"):
    sys.modules[name] = None
import led_model.batch
assert "torch" not in sys.modules or "torch" in before
from led_model.batch import Summarizer
summarize = Summarizer(sys.argv[1], max_new_tokens=4)
print(summarize({"text": ["The encoder reads.", None]}))
"""
    code = code.replace("import led_model.batch\n", "before = set(sys.modules)\nimport led_model.batch\n", 1)
    done = subprocess.run([sys.executable, "-c", code, str(save())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'error': [None, \"the row has no text in 'text'" in done.stdout


def test_datasets(summarizer):
    """All rows of the first batches are good, and of a later one bad: datasets takes a column's type from the first."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets.fingerprint import Hasher

    features = Features({"text": Value("string"), "kind": ClassLabel(names=["a", "b"])})
    texts = [*TEXTS, *TEXTS, None, None]
    dataset = Dataset.from_dict({"text": texts, "kind": [0, 1] * 5}, features=features)
    before = Hasher.hash(summarizer)
    found = dataset.map(summarizer, batched=True, batch_size=2, writer_batch_size=2)
    assert Hasher.hash(summarizer) == before  # by which datasets finds what it has made before
    assert found.features["kind"] == features["kind"]
    assert {name: found.features[name].dtype for name in NEW} == {
        "summary": "string", "tokens": "int64", "pieces": "int64", "truncated": "bool", "error": "string",
    }  # fmt: skip
    expected = summarizer({"text": texts})
    assert {name: list(found[name]) for name in expected} == expected


@pytest.mark.parametrize("model_class", [None, LEDForQuestionAnswering])
def test_a_question_for_each_row(save, documents, model_class):
    directory = save(model_class) if model_class else save()
    questions = ["Who reads?", "What does the decoder write?", "Who reads?", "Which?"]
    flags = ["--model", directory, "--max-new-tokens", 8]
    expected = []
    for number, question in enumerate(questions):
        output = f"{number}.jsonl"
        led("answer", f"docs/{number}.txt", "--question", question, *flags, "--output", output)
        expected += records(output)
    answer = Answerer(directory, question_column="ask", max_new_tokens=8)
    batch = {"ask": [*questions, None, "Who? " * LIMIT], "text": [*TEXTS, "A text.", "A text."]}
    found = answer(batch)
    for name in ("answer", "score", "start", "end", "tokens", "pieces"):
        assert found[name][:4] == pytest.approx([record.get(name) for record in expected], abs=1e-5)
    assert found["error"][:5] == [None] * 4 + [
        "the row has no question in 'ask'; give a string that is not blank."
    ]
    assert found["error"][5].startswith("the question takes ")
    assert found["answer"][4:] == [None, None]

    assert led("answer", "docs", "--question", "Who reads?", *flags, "--output", "all.jsonl") == 0
    same = Answerer(directory, question="Who reads?", max_new_tokens=8)({"text": TEXTS})
    by_source = sorted(records("all.jsonl"), key=lambda record: record["source"])
    assert same["answer"] == [record["answer"] for record in by_source]


@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [(None, 3), ("multi_label_classification", 3), ("regression", 2), (None, 1)],
)
def test_labels(save, documents, problem_type, num_labels):
    names = {i: f"label {i}" for i in range(num_labels)}
    directory = save(
        LEDForSequenceClassification, num_labels=num_labels, problem_type=problem_type, id2label=names
    )
    assert led("classify", "docs", "--model", directory, "--output", "out.jsonl") == 0
    expected = sorted(records(), key=lambda record: record["source"])
    numbers = pa.struct([(name, pa.float64()) for name in names.values()])
    is_regression = problem_type == "regression" or num_labels == 1
    label = numbers if is_regression else pa.string()
    label = pa.list_(pa.string()) if problem_type == "multi_label_classification" else label
    for make in (pa.table, pd.DataFrame):
        for texts in (TEXTS, [None], [*TEXTS, None]):
            found = table_of(Classifier(directory)(make({"text": pd.Series(texts, dtype="string")})))
            assert str(found.schema.field("label").type).removeprefix("large_") == str(label)
            assert ("probabilities" in found.column_names) == (not is_regression)
            for row, record in zip(found.to_pylist(), expected if texts[0] else [], strict=False):
                given = {name: record[name] for name in ("label", "probabilities") if name in record}
                assert json.dumps({name: row[name] for name in given}) == json.dumps(given)
            assert (found["error"][-1].as_py() is None) == (texts == TEXTS)


def test_what_is_refused(summarizer):
    with pytest.raises(TypeError, match="there is no setting 'beams'; give some of max_new_tokens, "):
        Summarizer("m", beams=3)
    with pytest.raises(ValueError, match="long is 'cut'; give one of error, truncate, chunk, condense"):
        Summarizer("m", long="cut")
    with pytest.raises(ValueError, match="dtype is 'int8'; give one of float32, bfloat16, float16"):
        Classifier("m", dtype=torch.int8)
    for arguments in ({}, {"question": "Who?", "question_column": "ask"}):
        with pytest.raises(ValueError, match="either a question, about all texts, or a question_column"):
            Answerer("m", **arguments)
    with pytest.raises(ValueError, match="there is a column 'error' already; rename or drop it"):
        summarizer({"text": TEXTS, "error": [1] * 4})
    with pytest.raises(ValueError, match="there is no column 'text' but 'body'; name the column"):
        summarizer(pa.table({"body": TEXTS}))
    with pytest.raises(TypeError, match=r"give map_batches a batch_format, or datasets.map batched=True"):
        summarizer(TEXTS)
    with pytest.raises(
        TypeError, match=r"'text' is a str and no list of rows; give datasets.map batched=True"
    ):
        summarizer({"text": TEXT})
    assert Summarizer("m", dtype=torch.bfloat16).spec.dtype == "bfloat16"
