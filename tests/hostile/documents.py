"""Documents, outputs and arguments of ``led`` that are none, each with the status that the command must end with.

Files that were there before must be as they were, except those that a case says it changes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path

import torch

from led_model import (
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
)
from led_model.cli.parser import main
from tests.hostile.processes import Trial, in_process
from tests.model.small import small_config

DONE, FAILED, WRONG_ARGUMENTS, SOME_FAILED = 0, 1, 2, 3
MODEL = "--model ../model --max-new-tokens 2"
OURS = '{"led": "summarize", "id": "a.txt", "source": "a.txt", "summary": "x"'
FOREIGN = '{"id":1,"text":"only copy"}'

Prepare = Callable[[], object]  # in the directory of the case


@dataclass(frozen=True)
class Case:
    """Runs ``led`` with ``arguments``, after ``files`` were written and ``prepare`` was called where it runs.

    ``inside`` is called in its process. ``status`` -1: any that a sentence goes with.
    """

    arguments: str
    status: int
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Prepare | None = None
    inside: Prepare | None = None
    stdin: str | None = None  # a file
    changes: frozenset[str] = frozenset()
    extra: tuple[str, ...] = ()  # arguments that no shell would split
    is_silent: bool = False  # for want of a stream that could be read
    says: str = ""

    @property
    def name(self) -> str:
        how = " ".join(_name(call) for call in (self.prepare, self.inside) if call)
        content = "".join(f" {name}={value[:40]!r}" for name, value in self.files.items())
        where = f" < {self.stdin}" if self.stdin else ""
        extra = (ascii(argument)[:60] for argument in self.extra)
        return " ".join(filter(None, [self.arguments, *extra, how])) + content + where


def _name(call: Prepare) -> str:
    return f"{call.func.__name__}{call.args}" if isinstance(call, partial) else call.__name__


def make_checkpoints(scratch: Path) -> None:
    """Makes small models with a tokenizer of single characters: ``model``, ``classifier`` and ``qa``."""
    characters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *_bytes_as_characters()]
    for name, model_class in (
        ("model", LEDForConditionalGeneration),
        ("classifier", LEDForSequenceClassification),
        ("qa", LEDForQuestionAnswering),
    ):
        torch.manual_seed(0)
        directory = scratch / name
        model_class(LEDConfig(**small_config(0, vocab_size=300))).save_pretrained(directory)
        (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(characters)}))
        (directory / "merges.txt").write_text("#version: 0.2\n")


def _bytes_as_characters() -> list[str]:
    """Returns the character for each byte in GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]


def cases() -> Iterator[Case]:
    yield from _documents()
    yield from _lines()
    yield from _outputs()
    yield from _arguments()


def _documents() -> Iterator[Case]:
    for content in (
        b"", b" \n\t ", b"\x00" * 100, b"%PDF-1.7 text", b"PK\x03\x04 text", b"\x1f\x8b text", b"{\\rtf1 text}",
        b"\xff\xfe\x00\xd8", b"\xe4\xf6\xfc", b"caf\xe9", b"text \x80", b"\xd0\xcf\x11\xe0 text", b"\xff\xfe",
    ):  # fmt: skip
        yield Case(f"summarize a.txt {MODEL}", SOME_FAILED, {"a.txt": content})
    for content in (
        "text".encode("utf-16"),
        b"\xef\xbb\xbftext",
        b"a\r\nb",
        "naïve 漢字 😀\n".encode(),
        b"</s><s><pad>",
    ):
        yield Case(f"summarize a.txt {MODEL}", DONE, {"a.txt": content})
    yield Case(f"summarize a.txt {MODEL}", SOME_FAILED, {"a.txt": "word " * 100})
    for long in ("truncate", "chunk", "condense"):
        yield Case(f"summarize a.txt {MODEL} --long {long}", DONE, {"a.txt": "word " * 100})
        yield Case(f"summarize a.txt {MODEL} --long {long}", DONE, {"a.txt": "w" * 500})
    for long in ("error", "truncate"):
        yield Case(
            f"summarize big.txt {MODEL} --long {long}", (DONE, SOME_FAILED)[long == "error"], prepare=_large
        )
        yield Case(f"summarize big.txt {MODEL} --long {long}", SOME_FAILED, prepare=_huge)
    for source in ("/dev/zero", "/dev/urandom", "/dev/full", "/proc/self/mem", "/proc/self/exe", "pipe"):
        status = SOME_FAILED
        yield Case(f"summarize {source} {MODEL}", status, prepare=_endless_pipe if source == "pipe" else None)
        yield Case(f"summarize {source} {MODEL} --dry-run", status,
                   prepare=_endless_pipe if source == "pipe" else None)  # fmt: skip
        yield Case(f"summarize {source} a.txt {MODEL}", status, {"a.txt": "text"}, says='"summary"',
                   prepare=_endless_pipe if source == "pipe" else None)  # fmt: skip
        if source != "pipe":
            yield Case(f"summarize - {MODEL}", status, stdin=source)
            yield Case(f"summarize --jsonl - {MODEL}", status, stdin=source)
    for extra in ("", "--jsonl", "--output out.jsonl", "--dry-run"):
        yield Case(f"summarize pipe a.txt {MODEL} {extra}", SOME_FAILED, {"a.txt": "text"}, _idle_pipe)
    for beginning in ("", '{"text": "x"}\n'):
        for line in ("\n", "y\n", '{"body": 1}\n'):
            status = SOME_FAILED
            yield Case(f"summarize many.jsonl {MODEL}", status, prepare=partial(_repeat, beginning, line))
    for character in ("w", "w ", "é", "😀", "\\u00e9", "\\ud83d\\ude00"):
        yield Case(
            f"summarize long.jsonl {MODEL}", SOME_FAILED, prepare=partial(_long_line, character, 2**24)
        )
        yield Case(f"summarize long.jsonl {MODEL} --long truncate --format jsonl", DONE, says="summary",
                   prepare=partial(_long_line, character, 2**21))  # fmt: skip
    yield Case(f"summarize long.jsonl {MODEL}", SOME_FAILED, prepare=partial(_long_line, "[],", 2**23))
    yield Case(f"summarize /dev/null {MODEL}", SOME_FAILED)
    yield Case(f"summarize - {MODEL}", SOME_FAILED, stdin="/dev/null")
    yield Case(f"summarize nowhere.txt a.txt {MODEL}", SOME_FAILED, {"a.txt": "text"}, says='"summary"')
    yield Case(f"summarize a.txt b.txt {MODEL}", SOME_FAILED, {"a.txt": "text"}, _unreadable)
    yield Case(f"summarize a.txt link.txt {MODEL}", SOME_FAILED, {"a.txt": "text"}, _circular_link)
    yield Case(
        f"summarize . {MODEL}", SOME_FAILED, {"a.txt": "text"}, _circular_link, says="link.txt leads to no"
    )
    yield Case(f"summarize . {MODEL}", SOME_FAILED)
    yield Case(f"summarize *.nothing {MODEL}", SOME_FAILED)
    yield Case(f"summarize [ {MODEL}", SOME_FAILED)
    yield Case(f"summarize {MODEL}", SOME_FAILED, extra=("a\0b",))
    yield Case(f"summarize {MODEL}", SOME_FAILED, extra=("",))
    yield Case(f"summarize {MODEL}", SOME_FAILED, extra=("x" * 5000,))
    yield Case(f"summarize {MODEL}", SOME_FAILED, extra=("\udcff.txt",))
    yield Case(f"summarize . {MODEL}", DONE, prepare=_names_of_any_bytes)
    yield Case(f"summarize sparse.txt {MODEL}", SOME_FAILED, prepare=_sparse)
    yield Case(f"summarize a.txt nowhere.txt --join {MODEL}", SOME_FAILED, {"a.txt": "text"})
    yield Case(f"summarize a.txt b.txt --join {MODEL}", DONE, {"a.txt": "text", "b.txt": "text"})


def _lines() -> Iterator[Case]:
    deep = "[" * 100_000 + "]" * 100_000
    for line in (
        "", "null", "3", '"text"', "[]", "{}", "{", '{"text": 3}', '{"text": ""}', '{"text": " "}', '{"text": []}',
        '{"text": [1]}', '{"text": [""]}', '{"text": null}', '{"text": {"text": "x"}}', '{"text": "\\ud800"}', deep,
        '{"text": "x", "id": "\\udc00"}', '{"text": "x", "id": []}', '{"text": "x", "id": 1.5}', '{"Text": "x"}',
        '{"text": "x", "id": true}', '{"text": "x", "id": {}}', '{"text": ' + deep + "}", "not JSON", "\x00",
        '{"text": "x", "id": ' + "9" * 5000 + "}", '{"text": "x"} {"text": "y"}', "\xff", '{"id": "a7"}',
    ):  # fmt: skip
        other = '{"id": "other", "text": "other"}'
        status = DONE if line == "" else SOME_FAILED
        yield Case(
            f"summarize a.jsonl {MODEL} --format jsonl",
            status,
            {"a.jsonl": f"{line}\n{other}".encode("latin-1")},
            says="other",
        )
        yield Case(
            f"summarize a.jsonl {MODEL} --output out.jsonl",
            status,
            {"a.jsonl": f"{line}\n{other}".encode("latin-1")},
        )
    for line in (
        '{"text": "x", "id": null}', '{"text": "x", "id": 10000000000000000000000}', '{"text": "x", "id": ""}',
        '{"text": "\\u0000", "id": "\\u0000"}', '{"text": "x", "text": "y"}', '{"text": "x", "id": NaN}',
    ):  # fmt: skip
        status = SOME_FAILED if "NaN" in line else DONE
        yield Case(f"summarize a.jsonl {MODEL}", status, {"a.jsonl": line})
    same = '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}'
    yield Case(f"summarize a.jsonl {MODEL}", SOME_FAILED, {"a.jsonl": same})
    yield Case(
        f"summarize a.jsonl b.txt {MODEL}", SOME_FAILED, {"b.txt": "text"}, _one_long_line, says="b.txt"
    )


def _outputs() -> Iterator[Case]:
    text = {"a.txt": "text"}
    for content in (
        FOREIGN, f"{FOREIGN}\n", "{", '{"led": "my own notes"', '{"led": "summarize"}', '{"led": "summarize", "id": 1}',
        f"{OURS}}}", f"{OURS}}}\n", "\n", "text", "text\n", b"\x00" * 9, b"\xff\xfe", "[" * 100_000, f"{OURS}, ",
        "3", "null", f"{FOREIGN}\n{OURS}", f"{OURS}\n{FOREIGN}\n", '{"led": "', '{"led": "summarize", "x": 1',
        f"{OURS}, \"made_by\": 3}}", OURS.replace("summarize", "translate"), "\ufeff" + OURS, f"{OURS}\r\n",
    ):  # fmt: skip
        torn = content in ("{", '{"led": "', f"{OURS}, ")  # of ours, as far as it goes
        outcome = {"status": DONE, "changes": frozenset({"out.jsonl"})} if torn else {"status": FAILED}
        yield Case(
            f"summarize a.txt {MODEL} --output out.jsonl", files=text | {"out.jsonl": content}, **outcome
        )
        yield Case(
            "summarize a.txt --model ./nowhere --output out.jsonl", FAILED, text | {"out.jsonl": content}
        )
        yield Case("summarize a.txt --model ./nowhere --output out.jsonl --overwrite", FAILED,
                   text | {"out.jsonl": content})  # fmt: skip
    same = {"a.jsonl": '{"text": "x"}\n'}
    for output in ("a.jsonl", "./a.jsonl", "../case/a.jsonl", "link.jsonl", "hard.jsonl"):
        for source in ("a.jsonl", "*.jsonl", "."):
            for overwrite in ("", " --overwrite"):
                yield Case(f"summarize {source} {MODEL} --output {output}{overwrite}", FAILED, same, _links)
    yield Case(f"summarize a.txt {MODEL} --output out.jsonl --overwrite", FAILED, prepare=_hard_link,
               files={"a.txt": "text"})  # fmt: skip
    yield Case(f"summarize a.txt {MODEL} --output sparse.txt", FAILED, text, _sparse)
    yield Case(f"summarize a.txt {MODEL} --output sparse.txt --overwrite", FAILED, text, _sparse)
    yield Case(f"summarize a.txt {MODEL} --output link.txt", FAILED, text, _circular_link)
    yield Case(f"summarize a.txt {MODEL} --output out.jsonl", FAILED, text, inside=_print_into_output)
    for output in (
        "/dev/full", "/dev/null", "/dev/stdout", "/dev/zero", "-", ".", "..", "pipe", "nowhere/out.jsonl", "a.txt/out",
        "/proc/self/mem", "/proc/version", "/", "dangling/out.jsonl",
    ):  # fmt: skip
        yield Case(f"summarize a.txt {MODEL} --output {output}", FAILED, text, _idle_pipe)
    for name in ("", "a\0b", "x" * 300, "x/" * 3000, "\udcff/out.jsonl"):
        yield Case(f"summarize a.txt {MODEL}", FAILED, text, extra=("--output", name))
    changed = frozenset({"out.jsonl"})
    yield Case(f"summarize a.txt {MODEL}", DONE, text, extra=("--output", "\udcff.jsonl"))
    yield Case(f"summarize a.txt {MODEL} --output out.jsonl", DONE, text | {"out.jsonl": ""}, changes=changed)
    yield Case(
        f"summarize a.txt {MODEL} --output out.jsonl --overwrite", FAILED, text | {"out.jsonl": FOREIGN}
    )
    yield Case(f"summarize a.txt {MODEL} --output out.jsonl", FAILED, text, inside=_no_room, says="out.jsonl")
    yield Case(f"summarize a.txt {MODEL} --output out.jsonl", FAILED, text, _read_only)
    for model in ("classifier", "qa"):
        command = f"summarize a.txt --model ../{model} --output out.jsonl"
        yield Case(command, FAILED, text | {"out.jsonl": f"{OURS}, "})


def _arguments() -> Iterator[Case]:
    text = {"a.txt": "text"}
    numbers = ("-1", "1.5", "1e308", "nan", "inf", "-inf", "four", "", " ", "٣", "0x10", "9" * 40, "9" * 5000)
    for flag in (
        "--max-new-tokens", "--min-new-tokens", "--num-beams", "--length-penalty", "--no-repeat-ngram-size",
        "--threads", "--batch-size", "--batch-tokens", "--shard", "--global-tokens", "--temperature",
        "--top-k", "--top-p", "--seed",
    ):  # fmt: skip
        for value in numbers:
            yield Case("summarize a.txt --model ../model", -1, text, extra=(f"{flag}={value}",))
    for flag in ("--device", "--dtype", "--long", "--format", "--revision", "--text-field", "--model"):
        for value in (
            "",
            "xpu",
            "meta",
            "mps",
            "cuda",
            "cuda:99",
            "cpu:7",
            "\0",
            "\udcff",
            "x" * 5000,
            "💥",
            "-",
            ".",
        ):
            yield Case(
                "summarize a.txt --model ../model --max-new-tokens 2", -1, text, extra=(f"{flag}={value}",)
            )
    for question in ("", " ", "\0", "\udcff", "why? " * 200, "w" * 2**20, "</s>", "\n", "💥"):
        for model in ("model", "qa"):
            yield Case(f"answer a.txt --model ../{model}", -1, text, extra=("--question", question))
    for close in (_no_stdin, _no_stdout, _no_stderr, _no_streams, _full_stdout, _full_stderr, _broken_stdout):
        loses = close in (_no_stdout, _no_streams, _full_stdout, _broken_stdout)
        silent = close in (_no_stderr, _no_streams, _full_stderr, _broken_stdout)
        status = FAILED if loses else DONE
        yield Case(f"summarize a.txt {MODEL}", status, text, inside=close, is_silent=silent)
        yield Case(f"summarize a.txt {MODEL} --output out.jsonl", DONE, text, inside=close, is_silent=silent)
        yield Case(f"summarize nowhere a.txt {MODEL} --output out.jsonl", SOME_FAILED, text, inside=close,
                   is_silent=silent)  # fmt: skip
    yield Case(f"summarize - a.txt {MODEL}", SOME_FAILED, text, inside=_no_stdin)
    yield Case("classify a.txt --model ../classifier", DONE, text)
    yield Case("classify a.txt --model ../model", FAILED, text)
    yield Case("answer --question x a.txt --model ../classifier", FAILED, text)
    yield Case("summarize a.txt --model a.txt", FAILED, text)
    yield Case("summarize a.txt --model .", FAILED, text)
    yield Case("summarize", WRONG_ARGUMENTS)
    yield Case("", WRONG_ARGUMENTS)
    yield Case("translate a.txt", WRONG_ARGUMENTS)
    yield Case("summarize a.txt --nonsense", WRONG_ARGUMENTS, text)
    yield Case(f"summarize a.txt {MODEL} --num-beams 2 --do-sample --top-p 0.5", DONE, text)
    yield Case(f"summarize a.txt {MODEL} --top-p 0.5", FAILED, text)
    yield Case(f"summarize a.txt {MODEL} --min-new-tokens 3", FAILED, text)


def _large() -> None:
    """Makes as large a text as may be, of one byte a character but for one of four, which makes all of them such."""
    Path("big.txt").write_bytes("😀".encode() + b"w " * (2**24 - 2))


def _huge() -> None:
    with open("big.txt", "wb") as file:
        for _ in range(300):
            file.write(b"w" * 2**20)


def _one_long_line() -> None:
    with open("a.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(300):
            file.write(b"w" * 2**20)
        file.write(b'"}\n')


def _sparse() -> None:
    with open("sparse.txt", "wb") as file:
        file.truncate(10 * 2**30)


def _repeat(beginning: str, line: str) -> None:
    with open("many.jsonl", "w") as file:
        file.write(beginning)
        for _ in range(64):
            file.write(line * (2**20 // len(line)))


def _long_line(character: str, count: int) -> None:
    is_list = character.startswith("[")
    with open("long.jsonl", "wb") as file:
        file.write(b'{"text": [' if is_list else b'{"text": "')
        file.write(character.encode() * count)
        file.write(b"1]}" if is_list else b'"}')


def _hard_link() -> None:
    Path("out.jsonl").hardlink_to("a.txt")


def _print_into_output() -> None:
    os.dup2(os.open("out.jsonl", os.O_WRONLY | os.O_CREAT), 1)


def _no_stdin() -> None:
    os.close(0)
    sys.stdin = None


def _no_stdout() -> None:
    os.close(1)
    sys.stdout = None


def _no_stderr() -> None:
    os.close(2)
    sys.stderr = None


def _no_streams() -> None:
    _no_stdin(), _no_stdout(), _no_stderr()


def _full_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _full_stderr() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def _broken_stdout() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def _endless_pipe() -> None:
    """Makes a pipe whose writer goes on until its reader is gone."""
    os.mkfifo("pipe")
    if os.fork() == 0:
        try:
            with open("pipe", "wb", buffering=0) as pipe:
                while True:
                    pipe.write(b"words " * 2**10)
        finally:
            os._exit(0)


def _idle_pipe() -> None:
    os.mkfifo("pipe")
    Path("dangling").symlink_to("nowhere")


def _unreadable() -> None:
    Path("b.txt").mkdir()
    os.chmod("b.txt", 0)


def _circular_link() -> None:
    Path("link.txt").symlink_to("link.txt")
    Path("loop").symlink_to(".")


def _links() -> None:
    Path("link.jsonl").symlink_to("a.jsonl")
    Path("hard.jsonl").hardlink_to("a.jsonl")


def _names_of_any_bytes() -> None:
    for name in (b"a\n.txt", b"\xff.txt", b"\x1b[31m.txt", b" .txt", b"-.txt", b"'\".txt"):
        Path(os.fsdecode(name)).write_text("text")


def _no_room() -> None:
    """Files cannot grow past 100 bytes, which is an error where the signal is ignored, as Python does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def _read_only() -> None:
    Path("out.jsonl").mkdir()


def _contents() -> dict[str, bytes]:
    """Returns by name the contents of every regular file of some size."""
    found = {}
    for path in Path(".").rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size < 2**21:
            found[str(path)] = path.read_bytes()
    return found


def run(case: Case, scratch: Path) -> tuple[str, str | None]:
    """Tells how it ended, and what is wrong with that."""
    directory = scratch / "case"
    directory.mkdir()
    before = Path.cwd()
    os.chdir(directory)
    try:
        for name, content in case.files.items():
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        if case.prepare:
            case.prepare()
        contents = _contents()

        def command() -> int:
            if case.inside:
                case.inside()
            return main([*case.arguments.split(), *case.extra])

        ended = in_process(command, None if case.stdin is None else Path(case.stdin))
        fault = ended.fault if case.is_silent else ended.fault_of_command
        after = _contents()
        lost = {name for name, content in contents.items() if after.get(name) != content} - case.changes
        if fault is None and case.status >= 0 and ended.status != case.status:
            fault = f"status {ended.status}, not {case.status}: {ended.out[-300:]} {ended.err[-500:]}"
        if fault is None and case.says not in ended.out + ended.err:
            fault = f"does not say {case.says!r}: {ended.out[-300:]} {ended.err[-300:]}"
        if fault is None and lost:
            fault = f"changed {lost}"
        return f"status {ended.status}", fault
    finally:
        os.chdir(before)
        shutil.rmtree(directory)


def prepare(scratch: Path) -> None:
    """Makes the checkpoints, and runs a command here, whose imports are then not each process's."""
    make_checkpoints(scratch)
    (scratch / "words.txt").write_text("a few words")
    command = [
        "summarize",
        str(scratch / "words.txt"),
        "--model",
        str(scratch / "model"),
        "--max-new-tokens",
        "2",
    ]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        if main(command):
            raise RuntimeError("the good checkpoint cannot be opened")


def trials(scratch: Path) -> Iterator[Trial]:
    prepare(scratch)
    for case in cases():
        yield case.name, partial(run, case, scratch)
