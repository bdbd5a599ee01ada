"""Runs a command over documents in actors of Ray, on one machine or a cluster, for ``--engine ray``.

Ray Data's ``map_batches`` deals out shards of the inputs, not texts: each actor reads its shard from the shared file
system, and writes what becomes of it into a file that gets its name when it is complete. What is lost with an actor, a
node or the command itself is what has been done of the shards in hand, and nothing can be there twice. A sink for
blocks, behind actors that pass texts on, could not say which blocks an earlier run had written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import time
from argparse import Namespace
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from led_kernels.extras import install_extra
from led_model.batch.documents import Source
from led_model.batch.input_shards import SHARD_ROWS, Sources, cut_shards, is_parquet
from led_model.cli.commands import DONE, INTERRUPTED, SOME_FAILED, check_revision, find_documents
from led_model.cli.loading import batch_limits, made_by, task_spec
from led_model.cli.output_directory import OutputDirectory
from led_model.cli.shard_runner import TRIES, Job, Report, ShardRunner
from led_model.terminal import is_quiet, log, log_error, no_bars, quiet, seconds

_THREADS = 4  # of an actor on processors, unless another number is asked for
_OBJECT_STORE = 2**28  # bytes of a local Ray, which holds no texts


def run_on_ray(args: Namespace) -> int:
    """Runs ``args.command`` over all documents that ``args`` names; returns the exit status."""
    with ExitStack() as stack:
        stack.enter_context(quiet(args.quiet))
        sources, shards, problems = find_shards(args)
        ray = _import_ray()
        check_revision(args)
        made = made_by(args)
        plan = _plan(args, made, sources)
        directory = stack.enter_context(OutputDirectory(args.output, plan, args.overwrite))
        for problem in problems:
            log_error(problem, f"led {args.command}")
        earlier = {number for number in range(len(shards)) if directory.holds(number)}
        left = {number: shard for number, shard in enumerate(shards) if number not in earlier}
        before = sum(len(directory.shard(number).count()[1]) for number in earlier)
        if earlier:
            how_many = f"{len(earlier):,} of {len(shards):,} shards"
            log(f"{args.output} holds {how_many} already; these are left out.")
        if before:
            log_error(
                f"{before:,} documents of these have no result; the files errors-*.jsonl in {args.output} say why.",
                f"led {args.command}",
            )
        failed = len(problems) + before
        if not left:
            return SOME_FAILED if failed else DONE
        try:
            stack.enter_context(_connected(ray, args))
            run = directory.begin()  # not before there is something to write with
            failed += _run(ray, args, made, run, left)
        except KeyboardInterrupt:
            there = sum(directory.holds(number) for number in range(len(shards)))
            log_error(
                f"interrupted; {args.output} holds {there:,} of {len(shards):,} shards. Give the same command again "
                "to go on with the others.",
                f"led {args.command}",
            )
            return INTERRUPTED
        except ray.exceptions.RayError as error:
            first, *_ = str(error).strip().splitlines()
            raise OSError(
                f"Ray failed ({first}); see that all nodes have this package and the files. {args.output} keeps the "
                "shards that are complete: give the same command again."
            ) from error
        return SOME_FAILED if failed else DONE


def find_shards(args: Namespace) -> tuple[list[Source], list[Sources], list[str]]:
    """Returns the files that ``args`` names, the shards that they are cut into, and a sentence on each without any.

    Raises:
        ValueError: for flags and inputs that are not for this engine.
    """
    _check(args)
    found, problems = find_documents(args)
    own = os.path.join(os.path.realpath(args.output), "")
    files = [source for source in found if isinstance(source, Source)]
    sources = [source for source in files if not os.path.realpath(source.path).startswith(own)]
    if files and not sources:
        problems.append(f"all inputs lie below --output {args.output} itself; give others.")
    shards, more = _cut(sources, args.shard_rows)
    return sources, shards, [*problems, *more]


def _check(args: Namespace) -> None:
    """Checks that the flags are for many documents, in files, whose results are kept.

    Raises:
        ValueError: when they are not.
    """
    if args.output is None:
        raise ValueError("--engine ray writes many files; give it a directory by --output.")
    for name in ("join", "shard", "format"):
        if getattr(args, name):
            raise ValueError(f"--{name} is not for --engine ray; leave one of the two out.")
    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device {args.device} names one device, and Ray chooses that; give cpu or cuda, or leave it out."
        )


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray ({error}): {install_extra('ray')}.") from None
    return ray


def _cut(sources: Sequence[Source], rows: int | None) -> tuple[list[Sources], list[str]]:
    """Returns the shards, and a sentence on each file that has no document or cannot be read.

    Raises:
        ValueError: when a file cannot be read as often as is needed.
    """
    shards: list[Sources] = []
    problems: list[str] = []
    for source in sources:
        if not source.is_file:
            raise ValueError(f"{source.name} is no file, and --engine ray reads files; save it as one.")
        if not is_parquet(source) and not source.is_jsonl:
            continue
        try:
            found = list(cut_shards([source], rows))
        except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            problems.append(f"{source.name} cannot be read ({reason}); mend it, or leave it out.")
            continue
        shards += found
        if not found:
            problems.append(f"{source.name} holds no document; give rows, or JSON objects, one a line.")
    texts = [source for source in sources if not source.is_jsonl and not is_parquet(source)]
    return shards + list(cut_shards(texts, rows)), problems


def _plan(args: Namespace, made: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """Returns what the shards, and the results in them, depend on."""
    inputs = []
    for source in sources:
        status = os.stat(source.path)
        inputs.append([source.name, status.st_size, status.st_mtime_ns])
    plan = made | {"--shard-rows": args.shard_rows or SHARD_ROWS, "--text-field": args.text_field}
    return plan | {"--question": getattr(args, "question", None), "inputs": inputs}


@contextmanager
def _connected(ray: Any, args: Namespace) -> Generator[None, None, None]:
    """Connects to a cluster, or starts a Ray of its own on this machine, which ends with the block."""
    address = args.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    own = {"object_store_memory": _OBJECT_STORE, "include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it there is a warning
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=not is_quiet(), **own)
    except ConnectionError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"there is no Ray at {address} ({reason}); check --ray-address.") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def _run(ray: Any, args: Namespace, made: dict[str, Any], run: str, shards: dict[int, Sources]) -> int:
    """Makes the shards that are not there yet, and returns how many documents, or whole shards, have failed."""
    start = time.perf_counter()
    done = failed = lost = read = written = count = 0
    with tqdm(total=len(shards), desc="shards", leave=False, disable=no_bars()) as bar:
        for tries_left in reversed(range(TRIES)):
            actors_now, reports = _reports(ray, args, made, run, shards)
            count, unread = max(count, actors_now), {}
            for report in reports:
                if report.error is not None:
                    if report.trace is not None:
                        raise RuntimeError(f"in an actor of Ray:\n{report.trace}")
                    raise ValueError(report.error)
                if report.unread is not None and tries_left:
                    unread[report.number] = shards[report.number]  # another node may be able to
                    continue
                problems = report.failed
                if report.is_lost or report.unread is not None:
                    problems = [_fate(report, shards[report.number])]
                    lost += 1
                for problem in problems:
                    log_error(problem, f"led {args.command}")
                done, failed = done + report.done, failed + len(report.failed)
                read, written = read + report.read_tokens, written + report.written_tokens
                bar.update()
            if not (shards := unread):
                break
    took = time.perf_counter() - start
    what = f"read {read:,} tokens" + f" and wrote {written:,}" * bool(written)
    actors = f"{count} actor{'s' * (count != 1)}"
    speed = f"{(read + written) / took:,.0f} tokens/s"
    log(f"{done:,} documents done, {failed:,} failed; {actors} {what} in {seconds(took)} ({speed}).")
    return failed + lost


def _fate(report: Report, sources: Sources) -> str:
    """Returns a sentence on why a shard is left out."""
    if report.unread is not None:
        return (
            f"shard {report.number} is left out: {report.unread} Once all nodes can read it, give the same command "
            "again."
        )
    names = " and ".join(sorted({source.name for source in sources})[:2])
    return (
        f"shard {report.number} ({names}) is left out, as its actors died {TRIES} times; memory may not suffice, or a "
        "text makes them crash. Read these inputs without --engine, which tells the document."
    )


def _reports(
    ray: Any, args: Namespace, made: dict[str, Any], run: str, shards: dict[int, Sources]
) -> tuple[int, Iterator[Report]]:
    """Returns how many actors there are, and an iterator over what they report of shards as these are done."""
    count, share = _actors(ray, args)
    count = min(count, len(shards))
    job = Job(
        spec=dataclasses.replace(task_spec(args), device="cuda" if "num_gpus" in share else "cpu"),
        limits=batch_limits(args),
        threads=int(share["num_cpus"]),
        made_by=made,
        output=os.path.realpath(args.output),
        run=run,
        directory=os.getcwd(),
        is_quiet=is_quiet(),
    )
    rows = [{"number": number, "sources": pickle.dumps(sources)} for number, sources in shards.items()]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4096)).map_batches(
        ShardRunner,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
        **share,
    )
    batches = dataset.iter_batches(batch_size=None, prefetch_batches=0)
    return count, (Report(**json.loads(text)) for batch in batches for text in batch["report"])


def _actors(ray: Any, args: Namespace) -> tuple[int, dict[str, int]]:
    """Returns how many actors the cluster has room for, and what each takes of it: a GPU, or some processors.

    Where a node has several processors, one is left to read and to Ray itself: with actors on all of them it may stall.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if args.device == "cuda" and not gpus:
        raise ValueError("--device is cuda and Ray knows no GPU; leave it out.")
    if gpus and args.device != "cpu":
        count, share = gpus, {"num_gpus": 1, "num_cpus": args.threads or 1}
    else:
        free = [max(1, int(node.get("CPU", 0)) - 1) for node in nodes if node.get("CPU", 0) >= 1]
        if not free:
            raise ValueError(
                "Ray has neither a GPU nor a processor free for an actor; start it with --num-cpus."
            )
        threads = min(args.threads or _THREADS, *free)
        if args.threads is not None and threads < args.threads:
            log(f"--threads is {args.threads} and a node has {threads} to give, which all actors take.")
        count, share = sum(there // threads for there in free), {"num_cpus": threads}
    return min(count, args.devices or count), share
