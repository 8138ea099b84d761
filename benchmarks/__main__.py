"""`python -m benchmarks`: run the ops' tests, then measure; red tests print no numbers."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import measure, report
from .cases import OPS, Op, Sizes
from .implementations import NAMES, names_for

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Effort:
    """Rounds at most, and seconds after which an implementation leaves the rounds."""

    rounds: int
    seconds: float


QUICK, FULL = Effort(rounds=30, seconds=0.6), Effort(rounds=50, seconds=15.0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line; bad options are one line and exit code 2."""
    result = _Parser(prog="python -m benchmarks", description=__doc__)
    result.add_argument("--quick", action="store_true", help="small sizes and few rounds: under two minutes")
    result.add_argument("--op", action="append", choices=list(OPS), help="only this op (repeatable)")
    result.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    result.add_argument(
        "--implementation", action="append", choices=list(NAMES), help="only this implementation (repeatable)"
    )
    result.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    result.add_argument(
        "--malloc",
        choices=[*measure.MALLOC, "both"],
        help="glibc's settings, or freed blocks kept (default: both; with --quick: default)",
    )
    result.add_argument("--json", type=Path, metavar="PATH", help="also write the results to PATH")
    result.add_argument(
        "--save", action="store_true", help="also write them to benchmarks/results/<device>/<commit>.json"
    )
    return result


def failed_tests(ops: Sequence[str]) -> str | None:
    """Run the ops' tests; None when they are green, else what went wrong."""
    files: set[Path] = set()
    for op in ops:
        own = set((report.ROOT / "tests").glob(f"test_*{op}*.py"))
        if not own:
            return f"no tests/test_*{op}*.py"
        files |= own
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, sorted(files))]
    run = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    return f"pytest ended with code {run.returncode}\n{run.stdout[-3000:]}{run.stderr[-1000:]}".rstrip()


def measure_case(
    op: Op, sizes: Sizes, dtype: str, names: list[str], threads: int, mallocs: Sequence[str], effort: Effort
) -> list[dict[str, Any]]:
    """One case a malloc setting; peak memory and errors do not depend on it and are measured once."""

    def child(task: partial[Any], malloc: str = "default") -> Any:
        def configured() -> Any:
            measure.configure(threads, malloc)
            return task()

        return measure.in_child(configured)

    where = (op, sizes, DTYPES[dtype])
    extra: dict[str, dict[str, Any]] = {name: {} for name in names}
    checked = [name for name in names if name != "compile"]
    try:
        for name, error in child(partial(measure.errors, *where, checked)).items():
            extra[name]["error"] = error
    except measure.MeasurementError as error:
        print(f"{op.name}, error against float64: {error}", file=sys.stderr)
    for name in names:
        try:
            extra[name] |= child(partial(measure.peak_memory, *where, name))
        except measure.MeasurementError as error:
            extra[name]["peak_failed"] = str(error)
    cases = []
    for malloc in mallocs:
        timing = partial(measure.time_case, *where, names, rounds=effort.rounds, seconds=effort.seconds)
        try:
            rows = child(timing, malloc)
        except measure.MeasurementError as error:
            rows = {name: {"skipped": str(error)} for name in names}
        for name in names:
            rows[name] |= extra[name]
        cases.append({"op": op.name, "sizes": sizes, "dtype": dtype, "malloc": malloc, "rows": rows})
    return cases


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 when tests are red or ours could not be measured."""
    info = report.machine(options.threads)
    print(report.machine_line(info), flush=True)
    ops = options.op or list(OPS)
    reason = failed_tests(ops)
    if reason:
        print(f"benchmarks: the tests of {', '.join(ops)} are red, no numbers: {reason}", file=sys.stderr)
        return 1
    print(f"the tests of {', '.join(ops)} are green", flush=True)

    malloc = options.malloc or ("default" if options.quick else "both")
    mallocs = list(measure.MALLOC) if malloc == "both" else [malloc]
    effort = QUICK if options.quick else FULL
    cases: list[dict[str, Any]] = []
    for op in map(OPS.__getitem__, ops):
        names = [name for name in names_for(op.name, options.quick) if name in (options.implementation or NAMES)]
        for sizes in op.quick if options.quick else op.full:
            for dtype in options.dtype or DTYPES:
                done = measure_case(op, sizes, dtype, names, options.threads, mallocs, effort)
                for case in done:
                    print(f"\n{report.case_title(case)}\n{report.case_table(case)}", flush=True)
                cases += done
    print(f"\n{report.legend(cases)}\n\n{report.verdict(cases)}\n{report.machine_line(info)}")

    document = {"machine": info, "quick": options.quick, "cases": cases}
    for path in (options.json, report.results_path(info) if options.save else None):
        if path:
            report.write_json(path, document)
            print(f"written to {path}")
    return int(any("skipped" in case["rows"].get("ours", {}) for case in cases))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check what can be checked before minutes are spent, run."""
    command = parser()
    options = command.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        command.error("needs Linux: it forks its measurements and reads /proc for their memory")
    if options.threads < 1:
        command.error(f"--threads is {options.threads}, expected at least 1")
    if options.save and (options.quick or options.op or options.dtype or options.implementation):
        command.error("--save keeps full runs only: leave out --quick, --op, --dtype, --implementation, or use --json")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        command.error(f"--json is {options.json}, expected a file in an existing folder")
    try:
        return run(options)
    except KeyboardInterrupt:
        print("benchmarks: interrupted, nothing written", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
