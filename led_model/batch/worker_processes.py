"""Runs a task over many documents in several processes, of which each has a device and a model of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from threading import Lock, RLock, Thread, local
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from led_model.batch.ahead import ReadAhead
from led_model.batch.documents import Document
from led_model.batch.loading import TaskSpec
from led_model.batch.portions import Portions, to_the_end
from led_model.batch.scheduling import Outcome, in_turn, run_documents
from led_model.batch.tasks import Work
from led_model.terminal import is_quiet, log, quiet, relay

Message: TypeAlias = tuple[str, Any]  # what it is about, and what it says

_LEAD = 2048  # documents that may be done, and wait, before an earlier one is
_POLL = 0.1  # seconds between two looks at a source from which nothing has come
_FAREWELL = 10.0  # seconds for a process to end by itself
_DEATHS = 3  # so many processes may die in a row before one has loaded its model


class ProcessDied(RuntimeError):
    """Says that the process that read a document died, and again when it read that document alone."""


@dataclass
class Processes:
    """Runs a task in processes that read documents in portions, and replaces those that die.

    A document that a dead process had in hand is read once more, by itself, and is reported if its process dies again:
    the portion's other documents are not lost with it. The processes end with the parent, however that ends.

    Args:
        spec: the task; its device is overruled.
        devices: of each process.
        threads: of the processor, for each process.
        limits: arguments of :func:`run_documents`: ``batch_tokens`` and ``batch_size``.
    """

    spec: TaskSpec
    devices: Sequence[str]
    threads: int
    limits: dict[str, Any]
    _workers: list[_Worker] = field(init=False, default_factory=list)
    _past: list[Work] = field(init=False, default_factory=list)  # of processes that died
    _deaths: int = field(init=False, default=0)  # since a process has loaded its model
    _said: set[str] = field(init=False, default_factory=set)  # by processes while they load their models

    def run(
        self, documents: Iterable[Document | Outcome], *, in_order: bool = False
    ) -> Generator[Outcome, None, None]:
        """Yields what becomes of each document, as :func:`run_documents` does; closing it ends the processes.

        Raises:
            ChildProcessError: when processes die while they load the model.
            BaseException: what iterating over ``documents`` or loading the model raises.
        """
        with ReadAhead(to_the_end(documents), lambda item: item, Portions.share) as ahead, self._started():
            portions = Portions(ahead, len(self.devices))
            numbered = self._outcomes(portions, _LEAD if in_order else None)
            for _, outcome in in_turn(numbered) if in_order else numbered:
                yield outcome

    @property
    def work(self) -> Work:
        """Returns what all processes have read and written, in seconds of all of them at once."""
        works = [*self._past, *(worker.work for worker in self._workers)]
        count = len(self.devices)
        return Work(
            sum(work.read_tokens for work in works),
            sum(work.padded_tokens for work in works),
            sum(work.read_seconds for work in works) / count,
            sum(work.written_tokens for work in works),
            sum(work.written_seconds for work in works) / count,
        )

    @contextmanager
    def _started(self) -> Generator[None, None, None]:
        self._workers = []
        try:
            for device in self.devices:
                self._workers.append(self._start(device))
            yield
        except BaseException:
            for worker in self._workers:
                worker.end()
            raise
        for worker in self._workers:
            worker.dismiss()

    def _start(self, device: str) -> _Worker:
        here, there = multiprocessing.Pipe()
        spec = dataclasses.replace(self.spec, device=device)
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(there, spec, self.threads, self.limits, is_quiet()), daemon=True
        )
        with _interrupts_held_back():
            process.start()
        there.close()  # or the end of the process would not be noticed
        return _Worker(device, process, here)

    def _outcomes(self, portions: Portions, lead: int | None) -> Iterator[tuple[int, Outcome]]:
        """Yields outcomes with the numbers of their documents.

        With a ``lead`` no document is dealt out that is so much later than one that a process still has.
        """
        while True:
            is_more_there = portions.fill()
            yield from portions.passed()
            for worker in self._workers:
                oldest = min((number for other in self._workers for number in other.has), default=None)
                before = None if lead is None or oldest is None else oldest + lead
                if worker.is_idle and (portion := portions.take(before)) is not None:
                    worker.give(portion)
            if portions.is_finished and all(w.is_idle or not w.is_loaded for w in self._workers):
                portions.check()
                return
            patience = None if portions.is_read else 0 if is_more_there else _POLL
            connections = {worker.connection: worker for worker in self._workers}
            for connection in wait(list(connections), patience):
                worker = connections[connection]  # pyrefly: ignore[bad-index]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    yield from self._replace(worker, portions)
                    continue
                yield from self._heard(worker, message, portions)

    def _heard(self, worker: _Worker, message: Message, portions: Portions) -> Iterator[tuple[int, Outcome]]:
        kind, what = message
        if kind == "outcome":
            number, result, about = what
            yield number, Outcome(worker.has.pop(number), result, about)
        elif kind == "loaded":
            worker.is_loaded = worker.is_idle = True
            self._deaths = 0
            portions.set_size(what, **self.limits)
        elif kind == "done":
            worker.work, worker.is_idle = what, True
        elif kind == "said":
            # What loading the model has to say is the same in most processes, of which any may be the first.
            if worker.is_loaded:
                relay(what)
            elif what not in self._said:
                self._said.add(what)
                relay(what)
        else:
            error, trace = what
            raise error from RuntimeError(f"in the process of {worker.device}:\n{trace}")

    def _replace(self, worker: _Worker, portions: Portions) -> Iterator[tuple[int, Outcome]]:
        """Starts a process in the place of one that died, and yields the outcomes of documents it was tried with."""
        worker.end()
        if not worker.is_loaded:
            self._deaths += 1
        if self._deaths == _DEATHS:
            raise ChildProcessError(
                f"{_DEATHS} processes died while they loaded the model, the last one {worker.fate}; memory may not "
                f"suffice for {len(self.devices)} models: give --devices of fewer."
            )
        given_up = portions.give_back(worker.has)
        for number, document in given_up:
            error = ProcessDied(
                f"{document.name}: the process that read it died, and died again when it read that alone "
                f"({worker.fate}); memory may not suffice for it, or the text makes it crash: leave it out."
            )
            yield number, Outcome(document, error, {})
        fate = f"the process of {worker.device} was {worker.fate} and is replaced"
        again = len(worker.has) - len(given_up)
        what = "document is read again" if again == 1 else "documents are read again, each by itself"
        log(f"{fate}; {again} {what}." if again else f"{fate}.")
        self._past.append(worker.work)
        self._workers[self._workers.index(worker)] = self._start(worker.device)


@dataclass(eq=False)
class _Worker:
    """Holds what the parent knows of a process; ``has`` are the documents of its portion that have no outcome yet."""

    device: str
    process: multiprocessing.process.BaseProcess
    connection: Connection
    is_loaded: bool = False
    is_idle: bool = False
    has: dict[int, Document] = field(default_factory=dict)
    work: Work = field(default_factory=Work)

    def give(self, portion: dict[int, Document]) -> None:
        self.has, self.is_idle = portion, False
        with contextlib.suppress(OSError):  # it is dead, which shows when it is listened to
            self.connection.send(list(portion.items()))

    def end(self) -> None:
        """Ends the process at once; it holds nothing that would have to be saved."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def dismiss(self) -> None:
        """Lets the process, which has nothing to do, end by itself, and ends it if it does not."""
        self.connection.close()
        self.process.join(_FAREWELL)
        self.end()

    @property
    def fate(self) -> str:
        """Returns how a process that is no more came to its end."""
        code = self.process.exitcode or 0
        return f"ended by signal {-code}" if code < 0 else f"ended with status {code}"


class _Voice(io.TextIOBase):
    """Sends messages to the parent, and also, line by line, what is written into this as into a file."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Any] = deque()  # pickled messages
        self._lock = Lock()  # a thread that reads documents has messages, too
        self._begun = local()  # the line that a thread has begun to write

    def send(self, kind: str, what: Any) -> None:
        """Sends a message, after those before it.

        It waits for no lock: what is written while a message is pickled or sent, as a warning may be, by the same
        thread, is sent after that one.
        """
        self._waiting.append(ForkingPickler.dumps((kind, what)))
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._connection.send_bytes(self._waiting.popleft())
            finally:
                self._lock.release()

    def write(self, text: str) -> int:
        *lines, self._begun.line = (getattr(self._begun, "line", "") + text).split("\n")
        for line in lines:
            self.send("said", line)
        return len(text)


def _serve(
    connection: Connection, spec: TaskSpec, threads: int, limits: dict[str, Any], wants_quiet: bool
) -> None:
    """Loads the model, and reads one portion after another, in a process of its own."""
    Thread(target=_end_with_parent, daemon=True).start()
    # Its own is shared by processes, and would be left behind where this one is killed.
    tqdm.set_lock(RLock())
    voice = _Voice(connection)
    sys.stderr = voice  # what is said appears above the parent's bar
    torch.set_num_threads(threads)
    try:
        with quiet(wants_quiet):
            task = spec.load()
            voice.send("loaded", task.reader.limit)
            while True:
                portion: list[tuple[int, Document]] = connection.recv()
                number_of = {id(document): number for number, document in portion}
                documents = [document for _, document in portion]
                for document, result, about in run_documents(task, documents, **limits):
                    if isinstance(result, Exception):
                        result = _portable(result)
                    voice.send("outcome", (number_of[id(document)], result, about))
                voice.send("done", task.work)
    except EOFError:  # nobody is there any more
        return
    except BaseException as error:
        voice.send("failed", (_portable(error), traceback.format_exc()))


def _end_with_parent() -> None:
    """Waits for the parent's end, however it comes, and ends this process even in the middle of its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """Returns an error that the parent can be sent: itself, or what it says."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def _interrupts_held_back() -> Generator[None, None, None]:
    """Lets a process that is started within the block ignore Ctrl-C, which the terminal sends to all; it is ended."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
