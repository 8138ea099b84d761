"""`python -m benchmarks`: run the ops' tests, then measure; red tests print no numbers.

python -m benchmarks --quick                 every op against everybody, under two minutes on two idle cores
python -m benchmarks --case Llama-3-8B       one model's head        (--list names them all)
python -m benchmarks --quick --base main     this checkout against a revision, two processes in turns
python -m benchmarks --case scaling --save   how time and memory grow
python -m benchmarks --case host             what a call costs the host, in microseconds
python -m benchmarks plot                    draws docs/plots and docs/growth.md from the results kept
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from nitp_ops.kernels import select

from .cases import OPS
from .gpu import cuda_run, run_report
from .implementations import NAMES
from .measure import children
from .model_shapes import HEADS
from .report import environment, plots, storage
from .suites import against_base, cpu_run
from .suites.gate import pytest_failure

#: Cases that bring their own measurement: name -> module of `suites` with `run(options) -> int`.
EXTRA = {"host": "host", "memory": "memory", "scaling": "scaling", "trainer": "trainer"}
#: Options that a GPU run does not have.
CPU_ONLY = ("quick", "save", "malloc", "base", "case", "csv", "markdown", "html")
CASES = list(dict.fromkeys([name for op in OPS.values() for name in (*op.quick, *op.full)]))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line; bad options are one line and exit code 2."""
    result = _Parser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add(
        "command",
        nargs="?",
        choices=("measure", "plot"),
        default="measure",
        help="what to do (default measure)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default cpu)")
    add("--quick", action="store_true", help="cpu: small sizes and few rounds, under two minutes")
    add(
        "--list",
        action="store_true",
        help="print the cases with their sizes and sources, and measure nothing",
    )
    add(
        "--case",
        action="append",
        choices=[*CASES, *EXTRA],
        metavar="NAME",
        help="only this case (repeatable)",
    )
    add("--op", action="append", choices=cuda_run.SUBJECTS, help="only this op (repeatable)")
    add(
        "--dtype",
        action="append",
        choices=list(cpu_run.DTYPES),
        help="only this dtype (repeatable)",
    )
    add(
        "--implementation",
        action="append",
        choices=list(NAMES),
        help="only this implementation (repeatable)",
    )
    add("--threads", type=int, default=2, help="cpu: torch threads (default 2)")
    malloc = "cpu: glibc's settings, or freed blocks kept (default: both; with --quick: default)"
    add("--malloc", choices=[*children.MALLOC, "both"], help=malloc)
    add(
        "--base",
        metavar="REV",
        help="cpu: measure ours at this revision too, in turns with this checkout",
    )
    for kind, what in cpu_run.WRITERS.items():
        add(f"--{kind}", type=Path, metavar="PATH", help=f"write the results to PATH as {what[0]}")
    add(
        "--save",
        action="store_true",
        help="cpu: also write them to benchmarks/results/<device>/<commit>[-quick].json",
    )
    add(
        "--out",
        type=Path,
        default=storage.RESULTS,
        help="cuda: add them to OUT/<device>/<commit>.json",
    )
    add("--commit", help="cuda: the commit of a tree that came without its history")
    add(
        "--minutes",
        type=float,
        default=9.0,
        help="cuda: give up the rest after this time (default 9)",
    )
    return result


def listing() -> str:
    """Every case of a CPU run: its sizes, and where those of a head are published."""
    lines = []
    for op in OPS.values():
        lines.append(f"{op.name} (floor: {op.floor_name})")
        for name, sizes in {
            **op.full,
            **{f"{name} --quick": sizes for name, sizes in op.quick.items()},
        }.items():
            written = " ".join(f"{key}={size}" for key, size in sizes.items())
            lines.append(
                f"  {name:24} {written:40} {HEADS[name].source if name in HEADS else ''}".rstrip()
            )
    return "\n".join([*lines, "cases of their own: " + ", ".join(EXTRA)])


def run_cuda(options: argparse.Namespace) -> int:
    """The same on a GPU, after the values of every op there, or benchmarks/gpu.sh's stage `test` of
    this commit."""
    if not run_report.tests_are_green(options.commit, options.out):
        reason = pytest_failure([environment.ROOT / "tests/gpu/test_values.py"])
        if reason:
            print(f"benchmarks: the tests on CUDA are red, no numbers: {reason}", file=sys.stderr)
            return 1
    print("the values on CUDA are green", flush=True)
    return cuda_run.run(options)


def check(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, or None."""
    for kind in cpu_run.WRITERS:
        path = getattr(options, kind)
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            return f"--{kind} is {path}, expected a file in an existing folder"
    extra = [name for name in options.case or () if name in EXTRA]
    if extra and (len(options.case) > 1 or options.base):
        return f"--case {extra[0]} stands alone"
    if options.device == "cuda":
        only_cpu = [word for word in CPU_ONLY if getattr(options, word)]
        if only_cpu:
            return f"--{only_cpu[0]} is for --device cpu"
        if not torch.cuda.is_available():
            return "--device cuda: torch sees no GPU (torch.cuda.is_available() is False)"
        return None
    only_cuda = [name for name in options.op or () if name not in OPS]
    if only_cuda:
        return f"{only_cuda[0]} is measured with --device cuda only"
    if select.load_error and not (options.list or options.command or options.implementation):
        return f"there are no compiled kernels to measure: {select.load_error}"
    if not sys.platform.startswith("linux"):
        return "needs Linux: it forks its measurements and reads /proc for their memory"
    if options.threads < 1:
        return f"--threads is {options.threads}, expected at least 1"
    if options.save and (options.op or options.dtype or options.implementation or options.base):
        return "--save keeps whole runs only: leave out --op, --dtype, --implementation, --base, or use --json"
    if options.save and options.case and not extra:
        return "--save keeps whole runs only: leave out --case, or use --json"
    return None


class Stopped(KeyboardInterrupt):
    """A signal that ends a program as Ctrl-C does: children and temporary folders go with it."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside the context SIGTERM and SIGHUP raise Stopped, unless they are ignored, as under nohup."""

    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heeded = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check what can be checked before minutes are spent, run."""
    command = parser()
    options = command.parse_args(arguments)
    wrong = check(options)
    if wrong:
        command.error(wrong)
    try:
        with stoppable():
            return _run(options)
    except KeyboardInterrupt as error:
        print("benchmarks: interrupted, nothing written", file=sys.stderr)
        return 128 + (error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
    except OSError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.list:
        print(listing())
        return 0
    if options.command == "plot":
        return plots.main()
    if options.device == "cuda":
        return run_cuda(options)
    for name in options.case or ():
        if name in EXTRA:
            return importlib.import_module(f".suites.{EXTRA[name]}", __package__).run(options)
    return against_base.run_against(options) if options.base else cpu_run.run(options)


if __name__ == "__main__":
    sys.exit(main())
