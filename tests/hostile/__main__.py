"""``python -m tests.hostile KIND``: tries hostile checkpoints, documents, outputs or calls, and names what ends badly.

Each runs in a process of its own and must end within 5 s of the processor and 1 GiB of memory, by working or in one
sentence, without a traceback or a signal. The exit status is 0 when all do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("checkpoints", "documents", "outputs", "calls"))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case")
    parser.add_argument("--only", metavar="TEXT", help="only cases in whose name this is")
    parser.add_argument("--cases", type=int, default=2000, help="number of calls; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the calls; default: 0")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads, which a fork would not have
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is all processes', and one that was killed would hold it for ever
    ends: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        if args.kind == "calls":  # where the sanitizers run them there is no model
            from tests.hostile import calls

            trials = calls.trials(args.cases, args.seed)
        else:
            from tests.hostile import checkpoints, documents, outputs

            modules = {"checkpoints": checkpoints, "documents": documents, "outputs": outputs}
            trials = modules[args.kind].trials(Path(scratch))
        for number, (name, run) in enumerate(trials):
            if number % args.every or (args.only and args.only not in name):
                continue
            end, fault = run()
            ends[end] += 1
            if fault:
                faults += 1
                print(f"{name}: {fault}", flush=True)
    print(", ".join(f"{end}: {count}" for end, count in sorted(ends.items())))
    print(f"{sum(ends.values())} cases, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
