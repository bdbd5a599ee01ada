"""``--engine ray`` on a Ray of this machine: the command line's own text, each document once, whatever is killed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from led_model.batch import Summarizer
from led_model.batch.documents import Source
from led_model.batch.loading import TaskSpec
from led_model.cli import ray_engine
from led_model.cli.output_directory import OutputDirectory, ShardFiles
from led_model.cli.parser import build_parser
from led_model.cli.ray_engine import find_shards
from led_model.cli.shard_runner import Job, Report, ShardRunner
from tests.model.commands import PARAGRAPHS, TEXT, TEXTS, led, records
from tests.model.deadly import Deadly

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """A Ray that is there before the command, with processors for two actors and one that is left to read."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the actors
    cluster = Cluster(True, head_node_args={"num_cpus": 3, "object_store_memory": 2**27})
    yield cluster
    cluster.shutdown()


def command(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "led_model", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def results(directory: str = "out") -> list[dict]:
    return [record for path in sorted(Path(directory).glob("results-*")) for record in records(path)]


def errors(directory: str = "out") -> list[str]:
    paths = sorted(Path(directory).glob("errors-*"))
    return [record["error"] for path in paths for record in records(path)]


def by_name(all_records: list[dict]) -> list[dict]:
    return sorted(all_records, key=lambda record: (record["source"], str(record["id"])))


def until(happens: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not happens():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_ray_of_its_own(save, documents, monkeypatch):
    """Files of all kinds, and what the command without an engine makes of the same."""
    Path("docs/long.txt").write_text("".join(PARAGRAPHS))
    Path("docs/a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, *TEXTS]))
    flags = ["--model", save(), "--max-new-tokens", 12, "--threads", 1]
    assert led("summarize", "docs", *flags, "--output", "one.jsonl") == 3
    pq.write_table(pa.table({"id": ["p0", None, "p2"], "text": [TEXTS[0], TEXTS[1], None]}), "docs/b.parquet")
    done = command("summarize", "docs", *flags, "--engine", "ray", "--output", "docs/out", "--shard-rows", 3)
    _, said = done.communicate()
    assert done.returncode == 3, said
    assert "led: 14 documents done, 2 failed; 1 actor read" in said
    parquet = [record for record in results("docs/out") if record["source"] == "docs/b.parquet"]
    assert by_name([record for record in results("docs/out") if record not in parquet]) == by_name(
        records("one.jsonl")
    )
    text = {record["source"]: record["summary"] for record in records("one.jsonl")}
    assert [(record["id"], record["summary"]) for record in parquet] == [
        ("p0", text["docs/0.txt"]), (2, text["docs/1.txt"]),
    ]  # fmt: skip
    assert len(errors("docs/out")) == 2
    assert all(f"led summarize: {error}" in said.splitlines() for error in errors("docs/out"))
    assert not list(Path("docs/out").glob(".unfinished*"))
    again = ["--engine", "ray", "--output", "docs/out", "--shard-rows", 3]  # which is no input of its own
    monkeypatch.setattr("led_model.cli.ray_engine._run", None)
    assert led("summarize", "docs", *flags, *again) == 3


def many(count: int, bad: int) -> Counter:
    """Writes documents of which some cannot be read, and returns the ids of the others."""
    texts = [TEXT * (1 + number % 3) for number in range(count)]
    lines = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate(texts)]
    ids = Counter(f"d{number}" for number in range(count))
    for number in range(7, count, count // bad):
        lines[number] = "{" if number % 2 else json.dumps({"id": f"d{number}", "text": "".join(PARAGRAPHS)})
        del ids[f"d{number}"]
    Path("many.jsonl").write_text("\n".join(lines))
    assert len(ids) == count - bad
    return ids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_actor_and_the_command_are_killed(save, tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)
    ids = many(1000, 20)
    flags = ["many.jsonl", "--model", save(), "--max-new-tokens", 60, "--batch-size", 4]
    assert led("summarize", *flags, "--output", "one.jsonl") == 3
    flags += ["--engine", "ray", "--ray-address", cluster.address, "--output", "out", "--shard-rows", 20]
    flags += ["--threads", 1, "--devices", 2]

    def shards() -> int:
        return len(list(Path("out").glob("results-*")))

    def actors() -> list[psutil.Process]:
        raylet = psutil.Process(cluster.head_node.all_processes["raylet"][0].process.pid)
        return [child for child in raylet.children(recursive=True) if child.name().startswith("ray::MapWork")]

    running = command("summarize", *flags)
    until(lambda: shards() >= 3, running)
    before = actors()
    assert len(before) == 2
    before[0].kill()
    until(lambda: shards() >= 12 and len(actors()) == 2, running)  # another has taken its place
    assert before[0].pid not in [actor.pid for actor in actors()]
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert shards() < 50
    there = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("results-*")}
    done = command("summarize", *flags)
    _, said = done.communicate()
    assert done.returncode == 3, said
    assert Counter(record["id"] for record in results()) == ids
    assert by_name(results()) == by_name(records("one.jsonl"))
    assert len(errors()) == 20
    assert shards() == 50
    kept = [name for name, time_ns in there.items() if (Path("out") / name).stat().st_mtime_ns == time_ns]
    # An actor may still end the shard that it has in hand when the command is gone.
    assert len(kept) >= len(there) - 2
    assert (
        led("summarize", *flags) == 3
    )  # there is nothing left to do, and what failed is still told by the status


@pytest.mark.slow
def test_a_ray_of_its_own_ends_with_the_command(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = many(200, 4)
    flags = ["many.jsonl", "--model", save(), "--max-new-tokens", 60, "--batch-size", 1, "--engine", "ray"]
    flags += ["--output", "out", "--shard-rows", 10]
    running = command("summarize", *flags)
    until(lambda: len(list(Path("out").glob("results-*"))) >= 2, running)
    children = psutil.Process(running.pid).children(recursive=True)
    actors = [child for child in children if child.name().startswith("ray::MapWork")]
    assert actors
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(actors, timeout=30)
    assert alive == []
    running = command("summarize", *flags)
    _, said = running.communicate()
    assert running.returncode == 3, said
    assert Counter(record["id"] for record in results()) == ids
    assert len(errors()) == 4
    _, alive = psutil.wait_procs(
        children, timeout=120
    )  # Ray's own helpers look for their parent now and then
    assert alive == []


@pytest.mark.slow
def test_a_shard_that_kills_is_told_and_the_others_are_there(save, documents, capsys, monkeypatch):
    Path("docs/9.txt").write_text("poison")
    monkeypatch.setenv(
        "PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    )  # the actors need this module
    monkeypatch.setattr(
        "led_model.cli.ray_engine.task_spec",
        lambda args: Deadly("summarize", args.model, generation=(("max_new_tokens", 3),)),
    )
    flags = ["--max-new-tokens", 3, "--engine", "ray", "--output", "out", "--shard-rows", 1]
    assert led("summarize", "docs", "--model", save(), *flags) == 3
    error = capsys.readouterr().err
    assert "shard 4 (docs/9.txt) is left out, as its actors died 4 times" in error
    assert "4 documents done, 0 failed" in error
    assert sorted(record["source"] for record in results()) == [f"docs/{number}.txt" for number in range(4)]


@pytest.mark.slow
def test_map_batches(save, tmp_path, monkeypatch, cluster):
    """The callable in actors of Ray Data: all columns, and files of one schema, whether a row is bad or none is."""
    import ray

    ray.init(cluster.address)
    try:
        summarize = Summarizer(str(save()), max_new_tokens=12)
        rows = [{"n": number, "text": TEXTS[number % 4]} for number in range(40)]
        rows[33]["text"] = None
        dataset = ray.data.from_items(rows, override_num_blocks=4)
        dataset = dataset.map_batches(summarize, batch_size=10)
        dataset.write_parquet(str(tmp_path / "out"))
        actors = ray.data.from_items(rows, override_num_blocks=4).map_batches(
            Summarizer,
            fn_constructor_args=(summarize.spec.model,),
            fn_constructor_kwargs={"max_new_tokens": 12},
            concurrency=2,
        )
        found = sorted(actors.take_all(), key=lambda row: row["n"])
    finally:
        ray.shutdown()
    files = sorted((tmp_path / "out").iterdir())
    tables = [pq.read_table(path) for path in files]
    assert len(tables) > 1
    assert len({str(table.schema.remove_metadata()) for table in tables}) == 1
    written = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["n"])
    expected = summarize(pa.Table.from_pylist(rows)).to_pylist()
    assert written == expected
    assert found == expected


def test_what_is_refused(save, documents, capsys, monkeypatch):
    monkeypatch.setattr("led_model.cli.ray_engine._run", None)  # nothing is run here
    model = ["--model", save(), "--engine", "ray"]

    def refused(*flags: object) -> str:
        assert led("summarize", *flags, *model) == 1
        return capsys.readouterr().err

    for flag, value in (("--ray-address", "a:1"), ("--shard-rows", 3)):
        assert led("summarize", "docs", *model[:2], flag, value) == 1
        assert f"{flag} is for --engine ray; give that too, or leave it out." in capsys.readouterr().err
    out = ["--output", "out"]
    assert "--engine ray writes many files; give it a directory by --output." in refused("docs")
    for flag in (["--join"], ["--shard", "1/2"], ["--format", "text"]):
        assert f"{flag[0]} is not for --engine ray; leave one of the two out." in refused("docs", *flag, *out)
    assert "stdin is no file, and --engine ray reads files" in refused("-", *out)
    assert "--output docs.jsonl is a file; give --engine ray a directory." in refused(
        "docs", "--output", "docs.jsonl"
    )
    assert not Path("out").exists()
    Path("other").mkdir()
    Path("other/mine").touch()
    assert "--output other holds mine, which is no result of this program" in refused(
        "docs", "--output", "other"
    )
    assert [path.name for path in Path("other").iterdir()] == ["mine"]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--engine ray needs Ray (" in refused("docs", *out)


def test_dry_run(save, documents, capsys):
    pq.write_table(pa.table({"text": [*TEXTS, None]}), "docs/b.parquet")
    flags = ["docs", "--model", save(), "--engine", "ray", "--output", "out", "--dry-run"]
    assert led("summarize", *flags) == 3
    output = capsys.readouterr()
    assert output.out.startswith("8 documents, ")
    assert "docs/b.parquet line 5 has no text in 'text'" in output.err
    assert not Path("out").exists()


def test_an_output_goes_on_only_with_what_began_it(tmp_path):
    plan = {"command": "summarize", "model": "m", "--long": "error", "inputs": [["a", 1, 2], ["b", 1, 2]]}
    path = str(tmp_path / "out")
    with OutputDirectory(path, plan) as directory:
        run = directory.begin()
        directory.shard(0).write(['{"a": 1}', '{"a": 2}'], ['{"error": "it is bad."}'])
        (tmp_path / "out" / ".unfinished-1").touch()
        with pytest.raises(OSError, match=f"--output {path} is being written by another process"):
            OutputDirectory(path, plan)
    with OutputDirectory(path, plan | {"model": "../m"}) as directory:
        assert directory.begin() == run  # what an actor of the killed run still writes is the same
        assert directory.shard(0).count() == (2, ["it is bad."])
        assert not directory.shard(1).are_there
        assert not (tmp_path / "out" / ".unfinished-1").exists()
    for changes, sentence in (
        ({"--long": "chunk"}, "was made with --long 'error' and this run has 'chunk'; give --overwrite"),
        ({"inputs": [["a", 1, 2], ["b", 1, 3]]}, "b has changed since --output"),
        ({"inputs": [["b", 1, 2], ["a", 1, 2]]}, "the order of the inputs has changed since --output"),
        ({"inputs": [["a", 1, 2], ["b", 1, 2], ["c", 1, 2]]}, "c has changed since --output"),
    ):
        with pytest.raises(ValueError, match=sentence):
            OutputDirectory(path, plan | changes)
    with OutputDirectory(path, plan | {"--long": "chunk"}, overwrite=True) as directory:
        assert not directory.holds(0)
        assert directory.shard(0).are_there  # until there is something to write with
        assert directory.begin() != run
        assert sorted(item.name for item in directory.path.iterdir()) == [".lock", "run.json"]
        with pytest.raises(OSError, match="was begun anew by another run; this one ends"):
            ShardFiles(path, 0, run).write(["{}"], [])
        assert not directory.holds(0)


def test_errors_of_an_attempt_that_was_killed_do_not_stay(tmp_path):
    with OutputDirectory(str(tmp_path), {"inputs": []}) as directory:
        directory.begin()
        files = directory.shard(0)
        files.errors.write_text('{"error": "memory ran out."}\n')
        files.write(["{}"], [])
        assert files.count() == (1, [])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["results-final.xlsx", "errors-notes.txt", "run.json.bak", "results-000000.jsonl"]
)
def test_files_of_others_are_left_alone(tmp_path, name, overwrite):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}"):
        OutputDirectory(str(tmp_path), {"inputs": []}, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"inputs": []}'])
def test_a_damaged_plan(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged; remove it"):
        OutputDirectory(str(tmp_path), {"inputs": []})


def test_a_directory_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    def fails(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("led_model.cli.locking.fcntl.flock", fails)
    with OutputDirectory(str(tmp_path), {"inputs": []}):
        assert (
            "cannot be locked (No locks available); let no other run write into it."
            in capsys.readouterr().err
        )


def test_a_shard_that_cannot_be_read_here_is_not_written(save, tmp_path, monkeypatch):
    """It is another node's turn then, and at last it is reported; its documents are not lost."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "A text."}\n' * 5)
    flags = ["--model", str(save()), "--engine", "ray", "--output", "out", "--shard-rows", "2"]
    args = build_parser().parse_args(["summarize", "a.jsonl", *flags])
    _, shards, problems = find_shards(args)
    assert (len(shards), problems) == (3, [])
    with OutputDirectory("out", {"inputs": []}) as directory:
        job = Job(
            TaskSpec("summarize", args.model, generation=(("max_new_tokens", 2),)), {}, 1, {"command": "summarize"},
            "out", directory.begin(), os.getcwd(), True,
        )  # fmt: skip
        runner = ShardRunner(job)

        def run(number: int) -> dict:
            row = {"number": [number], "sources": [pickle.dumps(shards[number])]}
            return json.loads(runner(row)["report"][0])

        assert run(0)["done"] == 2
        text = Path("a.jsonl").read_bytes()
        Path("a.jsonl").write_bytes(text[:-9])  # the last line is damaged, which is a fault of a document
        assert len(run(2)["failed"]) == 1
        Path("a.jsonl").write_bytes(text[: len(text) // 2])
        report = run(1)
        assert report["unread"].startswith(
            "a.jsonl cannot be read (it ends after line 3 and was longer before); "
        )
        Path("a.jsonl").unlink()
        report = run(1)
        assert report["unread"] == "a.jsonl cannot be read (No such file or directory); it is there no more."
        assert not directory.holds(1)
        assert not list(Path("out").glob(".unfinished-tries*"))


@pytest.mark.parametrize("rounds", [2, 9])
def test_a_shard_that_was_not_read_is_tried_again(monkeypatch, capsys, rounds):
    """At most four times, by whatever actor takes it."""
    asked = []

    def reports(ray, args, made, run, shards):
        asked.append(sorted(shards))
        found = [Report(number, done=2) for number in shards if number != 1 or len(asked) == rounds]
        return 1, iter(found + [Report(1, unread="a.txt cannot be read.")] * (len(found) < len(shards)))

    monkeypatch.setattr("led_model.cli.ray_engine._reports", reports)
    shards = {number: (Source("a.txt", False),) for number in range(3)}
    failed = ray_engine._run(None, Namespace(command="summarize"), {}, "", shards)
    assert asked == [[0, 1, 2]] + [[1]] * (min(rounds, 4) - 1)
    assert failed == (rounds > 4)
    error = capsys.readouterr().err
    assert f"{6 if rounds == 2 else 4} documents done, 0 failed" in error
    assert ("shard 1 is left out: a.txt cannot be read. Once all nodes can read it" in error) == (rounds > 4)


def test_inputs_that_cannot_be_cut_are_named_and_the_others_read(save, documents, capsys, monkeypatch):
    monkeypatch.setattr("led_model.cli.ray_engine._connected", lambda *_: nullcontext())
    seen = []
    monkeypatch.setattr("led_model.cli.ray_engine._run", lambda *given: seen.append(given[-1]) or 0)
    Path("docs/bad.parquet").write_bytes(b"PAR1 and no more")
    Path("docs/blank.jsonl").write_text("\n \n\n")
    flags = ["--model", save(), "--engine", "ray"]
    assert led("summarize", "docs", *flags, "--output", "out") == 3
    error = capsys.readouterr().err
    assert "docs/bad.parquet cannot be read (" in error
    assert "docs/blank.jsonl holds no document" in error
    assert len(seen[0]) == 1
    Path("docs/out").mkdir()
    Path("docs/out/a.jsonl").write_text('{"text": "a"}')
    assert led("summarize", "docs/out/a.jsonl", *flags, "--output", "docs/out") == 1
    assert led("summarize", "docs/out/*.jsonl", *flags, "--output", "docs/out", "--dry-run") == 3
    assert "all inputs lie below --output docs/out itself; give others." in capsys.readouterr().err
