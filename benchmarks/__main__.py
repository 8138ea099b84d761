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

from . import cuda, cuda_run, measure, report
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
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default cpu)")
    result.add_argument("--quick", action="store_true", help="cpu: small sizes and few rounds, under two minutes")
    result.add_argument("--op", action="append", choices=cuda_run.SUBJECTS, help="only this op (repeatable)")
    result.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    result.add_argument(
        "--implementation",
        action="append",
        choices=list(dict.fromkeys((*NAMES, *cuda.NAMES))),
        help="only this implementation (repeatable)",
    )
    result.add_argument("--threads", type=int, default=2, help="cpu: torch threads (default 2)")
    result.add_argument(
        "--malloc",
        choices=[*measure.MALLOC, "both"],
        help="cpu: glibc's settings, or freed blocks kept (default: both; with --quick: default)",
    )
    result.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH (cuda: instead)")
    result.add_argument(
        "--save", action="store_true", help="cpu: also write them to benchmarks/results/<device>/<commit>.json"
    )
    result.add_argument(
        "--out",
        type=Path,
        default=report.RESULTS,
        help="cuda: add them to OUT/<device>/<commit>.json (default: results)",
    )
    result.add_argument("--commit", help="cuda: the commit of a tree that came without its history")
    result.add_argument("--minutes", type=float, default=9.0, help="cuda: give up the rest after this time (default 9)")
    return result


def failed_tests(ops: Sequence[str]) -> str | None:
    """Run the ops' tests on CPU; None when they are green, else what went wrong."""
    files: set[Path] = set()
    for op in ops:
        own = set((report.ROOT / "tests").glob(f"test_*{op}*.py"))
        if not own:
            return f"no tests/test_*{op}*.py"
        files |= own
    return pytest_failure(sorted(files))


def pytest_failure(files: Sequence[Path]) -> str | None:
    """None when these tests are green, else how pytest ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
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


def run_cuda(options: argparse.Namespace) -> int:
    """The same on a GPU, after the values of every op there (the rest of its tests: benchmarks/gpu.sh test)."""
    reason = pytest_failure([report.ROOT / "tests/test_gpu_values.py"])
    if reason:
        print(f"benchmarks: the tests on CUDA are red, no numbers: {reason}", file=sys.stderr)
        return 1
    print("the values on CUDA are green", flush=True)
    return cuda_run.run(options)


def check(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, or None."""
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        return f"--json is {options.json}, expected a file in an existing folder"
    if options.device == "cuda":
        if options.quick or options.save or options.malloc:
            return "--quick, --save and --malloc are for --device cpu"
        if not torch.cuda.is_available():
            return "--device cuda: torch sees no GPU (torch.cuda.is_available() is False)"
        return None
    only_cuda = [name for name in options.op or () if name not in OPS]
    only_cuda += [name for name in options.implementation or () if name not in NAMES]
    if only_cuda:
        return f"{only_cuda[0]} is measured with --device cuda only"
    if not sys.platform.startswith("linux"):
        return "needs Linux: it forks its measurements and reads /proc for their memory"
    if options.threads < 1:
        return f"--threads is {options.threads}, expected at least 1"
    if options.save and (options.quick or options.op or options.dtype or options.implementation):
        return "--save keeps full runs only: leave out --quick, --op, --dtype, --implementation, or use --json"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check what can be checked before minutes are spent, run."""
    command = parser()
    options = command.parse_args(arguments)
    wrong = check(options)
    if wrong:
        command.error(wrong)
    try:
        return run_cuda(options) if options.device == "cuda" else run(options)
    except KeyboardInterrupt:
        print("benchmarks: interrupted, nothing written", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
