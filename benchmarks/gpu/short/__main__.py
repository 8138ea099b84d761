"""`benchmarks/gpu.sh short`: what is worth most first, within a budget of seconds, kept after every
case.

Every piece says what it takes on a GPU. One that does not fit into what is left is skipped, and so
is one whose results are kept already: a second call goes on where the first ended, and begins with
what did not fit.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gpu.bundle import carried, unpack
from benchmarks.measure.isolated import Isolated, MeasurementError

ROOT = Path(__file__).resolve().parents[3]
#: Of ours and torch's, of peers, and of the one that changes torch.
PROCESSES = ("ours", "peers", "unsloth")
#: What a dry run's second stands for.
DRY_SECONDS = 100.0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="benchmarks/gpu.sh short", description=__doc__)
    add = result.add_argument
    add(
        "--budget-s",
        type=unpack.amount,
        required=True,
        help="seconds that this call may take, from its start",
    )
    add(
        "--bundle-mib",
        type=unpack.amount,
        required=True,
        help="most MiB that a part of a bundle may have",
    )
    add("--bundle", type=Path, help="folder with a part that `benchmarks/gpu.sh bundle` made")
    add(
        "--out",
        type=Path,
        default=ROOT / "benchmarks/results",
        help="folder of <GPU>/<commit>.json",
    )
    add("--commit", help="the commit of a tree that came without its history")
    add(
        "--dry-run",
        action="store_true",
        help="without a GPU: the same order over cases that only wait, 100 times faster",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where something of ours failed, 2 where nothing could be measured, 130 where
    somebody ended it."""
    start = time.monotonic()
    options = parser().parse_args(arguments)
    try:
        with carried.importable(ROOT), ExitStack() as stack:
            stack.callback(
                signal.signal,
                signal.SIGTERM,
                signal.signal(signal.SIGTERM, signal.default_int_handler),
            )
            processes = {name: stack.enter_context(Isolated()) for name in PROCESSES}
            _begin(options, processes["ours"])
            return _run(options, processes, start)
    except (MeasurementError, ImportError, OSError, ValueError) as error:
        print(f"benchmarks/gpu.sh: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks/gpu.sh: stopped; what was measured until now is kept", file=sys.stderr)
        return 130


def _begin(options: argparse.Namespace, ours: Isolated) -> None:
    """Unpack a part of a bundle, for this process and those that it starts; torch is imported
    meanwhile in another."""
    part = None
    try:
        if options.bundle:
            part = unpack.checked(options.bundle, options.bundle_mib)
            print(f"bundle: {unpack.library(part, ROOT)}", flush=True)
    except (OSError, ValueError) as error:
        print(f"bundle: {error}", flush=True)
    # a folder that is not there is never looked at again
    (ROOT / unpack.SITE).mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT / unpack.SITE)]
    if not options.dry_run:
        ours.start()
    try:
        if part:
            print(f"bundle: {unpack.wheels(part, ROOT)}", flush=True)
    except OSError as error:
        print(f"bundle: {error}", flush=True)
    folders = unpack.search_path(ROOT / unpack.SITE)  # also of what an earlier call has unpacked
    sys.path[:1] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def _run(options: argparse.Namespace, processes: dict[str, Isolated], start: float) -> int:
    from . import device, dry_run, order, timed_run  # and torch

    scale = DRY_SECONDS if options.dry_run else 1.0
    if options.dry_run:
        dry_run.ready(*processes.values())
        start = time.monotonic()  # nothing starts a hundred times faster
    deadline = start + options.budget_s / scale
    if options.dry_run:
        info, pieces = dry_run.machine(options.commit), dry_run.pieces(scale)
    else:
        info = device.about(processes["ours"], options.commit, ROOT, deadline)
        pieces = order.pieces(info["capability"])
    runner = timed_run.Runner(
        info, options.out.resolve(), processes, deadline, scale, fake=options.dry_run
    )
    return runner.run(pieces)


if __name__ == "__main__":
    sys.exit(main())
