"""`python -m benchmarks.gpu.stages STAGE...`: what benchmarks/gpu.sh runs once the package is
built.

Every stage stays inside ten minutes, adds a line to the JSON of this GPU and commit, and shows the
short table last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import environment
from benchmarks.report.environment import ROOT
from benchmarks.report.storage import RESULTS, results_path
from benchmarks.suites import overhead, row_kernels

from . import run_report

#: Of a stage, a minute short of the ten.
SECONDS = 540
SUBJECTS = {
    "bench-rows": (*row_kernels.KERNELS, "swiglu", "alignment"),
    "bench-token": ("linear_cross_entropy",),
    "bench-latent": ("implicit_token_loss", overhead.NAME),
}
STAGES = ("build", "test", "sanitize", "large", *SUBJECTS)


class Step(NamedTuple):
    """One process of a stage, and what it adds to the environment."""

    command: list[str]
    environment: dict[str, str] = {}  # noqa: RUF012


def steps(stage: str, out: Path, commit: str | None) -> list[Step]:
    """The processes of one stage; the first red one ends it."""
    if stage == "build":
        return [python("-m", "nitp_ops", "env"), python("-m", "nitp_ops", "doctor")]
    if stage in ("test", "large"):
        tests = [
            str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/gpu").glob("test_*.py"))
        ]
        if stage == "large":  # one after the other: a test takes up to 30 GB
            return [python("-m", "pytest", "-m", "gpu and large", *tests)]
        return [python("-m", "pytest", "-n", "8", "-m", "gpu and not large", *tests)]
    if stage == "sanitize":
        return [
            *(sanitized("memcheck", backend, "--ops") for backend in ("native", "triton")),
            *(sanitized("racecheck", backend) for backend in ("native", "triton")),
        ]
    chosen = [word for subject in SUBJECTS[stage] for word in ("--op", subject)]
    known = ["--commit", commit] if commit else []
    minutes = f"{(SECONDS - 60) / 60:g}"
    return [
        python(
            "-m",
            "benchmarks",
            "--device",
            "cuda",
            "--out",
            str(out),
            "--minutes",
            minutes,
            *known,
            *chosen,
        )
    ]


def python(*arguments: str) -> Step:
    return Step([sys.executable, *arguments])


def sanitized(tool: str, backend: str, *options: str) -> Step:
    # API errors that the caller expects and handles (PyTorch asks, for one, whether a symbol
    # exists) are no findings
    watched = [
        "--report-api-errors",
        "no",
        "--target-processes",
        "application-only",
        "--error-exitcode",
        "9",
    ]
    script = [sys.executable, "-m", "benchmarks.gpu.sanitize", "--backend", backend, *options]
    return Step(
        ["compute-sanitizer", "--tool", tool, *watched, *script],
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def run(steps: Sequence[Step], allowed: float = SECONDS) -> tuple[int, float, str]:
    """(exit code, seconds, what the last process said) of one stage; its output is passed on line
    by line."""
    start, said, code = time.monotonic(), [], 0
    for step in steps:
        if shutil.which(step.command[0]) is None:
            return 1, time.monotonic() - start, f"{step.command[0]} is not on the PATH"
        print(f"+ {' '.join(step.command)}", flush=True)
        code, line = _passed_on(step, start + allowed - time.monotonic())
        said.append(line)
        if code:
            break
    return code, time.monotonic() - start, "; ".join(dict.fromkeys(said))


def _passed_on(step: Step, seconds: float) -> tuple[int, str]:
    """(exit code, the line that says how it ended) of one process, which is killed after `seconds`."""
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | step.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children can be ended with it
    )
    assert process.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(min(max(0.0, seconds), threading.TIMEOUT_MAX), stop)
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
        code = process.wait()
    except BaseException:  # who waits is interrupted, or has nobody to pass the lines on to
        _end(process)
        raise
    finally:
        timer.cancel()
    if late.is_set():
        return 124, f"stopped after {seconds:.0f} s"
    return code, verdict(lines)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill it and its children."""
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGKILL)


def verdict(lines: list[str]) -> str:
    """The line that says how a process ended: a sanitizer's count of errors, else its last one."""
    counted = [
        line.lstrip("= ")
        for line in lines
        if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
    ]
    spoken = counted or [line for line in lines if line]
    return spoken[-1].strip("= ") if spoken else "no output"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    result.add_argument(
        "stage", choices=(*STAGES, "all"), nargs="+", help="what to run, in this order"
    )
    result.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder of <device>/<commit>.json (default: results)",
    )
    result.add_argument("--commit", help="the commit of a tree that came without its history")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 1 when one is red."""
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu.sh: torch sees no GPU (torch.cuda.is_available() is False)",
            file=sys.stderr,
        )
        return 2
    out = options.out.resolve()
    info = environment.gpu_machine(options.commit)
    whole = {"machine": info, "stages": {}, "cases": []}
    codes = []
    for stage in STAGES if "all" in options.stage else options.stage:
        code, seconds, said = run(steps(stage, out, options.commit))
        codes.append(code)
        record = {"code": code, "seconds": seconds, "said": said}
        whole = run_report.keep(
            results_path(info, out), {"machine": info, "stages": {stage: record}, "cases": []}
        )
    print(f"\n{run_report.summary(whole)}")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
