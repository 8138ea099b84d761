"""`--base REV`: ours at another revision and here, one process each, in turns.

The revision is checked out into a temporary git worktree. Its compiled library is built there, or
copied from here if csrc/, setup.py and pyproject.toml are the same in both. Either process is this
checkout's `worker` and cases; only the package `nitp_ops` that it imports differs. A round is a
step of one and a step of the other, and every other round begins with the other; the ratio of a
round lets a drift of the machine cancel.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cases import heading
from benchmarks.measure import timing
from benchmarks.measure.worker import Worker
from benchmarks.report import environment, storage, tables

from . import cpu_run, gate

ROUNDS, QUICK_ROUNDS = 30, 12
NAMES = ("base", "here")
#: What the compiled library is made of.
BUILT_FROM = ("csrc", "setup.py", "pyproject.toml")
HEADER = (
    "",
    "base ms",
    "here ms",
    "here / base",
    "quartiles",
    "base MiB",
    "here MiB",
    "bits",
    "verdict",
)


class BaseError(OSError):
    """The revision cannot be measured; the message is one line."""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=environment.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BaseError(
            f"git {' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
        )
    return done.stdout.strip()


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder that holds the package `nitp_ops` of the revision, with its compiled library;
    removed afterwards.

    Raises:
        BaseError: no such revision, or it does not build.
    """
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="nitp_ops_base_") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            _library(tree, commit)
            path = Path(folder) / "path"
            path.mkdir()
            (path / "nitp_ops").symlink_to(tree / "nitp_ops")
            yield path
        finally:
            git("worktree", "remove", "--force", str(tree))


def _library(tree: Path, commit: str) -> None:
    libraries = list((environment.ROOT / "nitp_ops").glob("*.so"))
    if libraries and not git("diff", "--name-only", commit, "--", *BUILT_FROM):
        for library in libraries:
            shutil.copy2(library, tree / "nitp_ops")
        return
    print("base: builds the library of the revision", flush=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    if done.returncode or not list((tree / "nitp_ops").glob("*.so")):
        raise BaseError(
            f"{commit[:12]} does not build: "
            f"{(done.stderr.strip().splitlines() or ['no library'])[-1]}"
        )


def compared(workers: dict[str, Worker], case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A row a revision: milliseconds, peak memory; the ratio within rounds, and whether the results
    have equal bits."""
    found = {name: worker.prepare(case) for name, worker in workers.items()}
    times = timing.interleave(
        {name: worker.step for name, worker in workers.items()},
        lambda: None,
        rounds=rounds,
        seconds=60.0,
        clock=_Clock(workers),
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        rows[name] = {
            "milliseconds": timing.quartiles([1e3 * value for value in values]),
            "rounds": len(values),
        }
        rows[name] |= {"peak_bytes": workers[name].peak()}
    ratio = timing.ratios(times["here"], times["base"])
    same = found["base"]["bits"] == found["here"]["bits"]
    return {**case, "rows": rows, "here_over_base": ratio, "same_bits": same}


class _Clock:
    """Reads the seconds that the workers themselves have spent in steps: the pipe between us is no
    part of them."""

    def __init__(self, workers: dict[str, Worker]) -> None:
        self.workers = workers

    def __call__(self) -> float:
        return sum(worker.seconds for worker in self.workers.values())


def verdict(ratio: dict[str, float]) -> str:
    """Whether the middle half of the rounds lies on one side of 1."""
    if ratio["q75"] < 1:
        return "faster"
    return "slower" if ratio["q25"] > 1 else "no difference"


def table(cases: list[dict[str, Any]]) -> str:
    """A line a case."""
    lines = []
    for case in cases:
        ratio, rows = case["here_over_base"], [case["rows"][name] for name in NAMES]
        sizes = " ".join(f"{key}={size}" for key, size in case["sizes"].items())
        milliseconds = [f"{row['milliseconds']['median']:.3g}" for row in rows]
        memory = [f"{row['peak_bytes'] / 2**20:.0f}" for row in rows]
        spread = f"{ratio['q25']:.3f}-{ratio['q75']:.3f}"
        bits = "equal" if case["same_bits"] else "differ"
        where = f"{case['op']} {sizes} {case['dtype']}"
        lines.append(
            [where, *milliseconds, f"{ratio['median']:.3f}", spread, *memory, bits, verdict(ratio)]
        )
    return tables.plain(HEADER, lines)


def run_cases(options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """Every selected case, base and here in turns."""
    here = environment.ROOT
    cases = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker([folder, here], options.threads))
            for name, folder in zip(NAMES, (path, here), strict=True)
        }
        for op, name, sizes in cpu_run.selected(options):
            for dtype in options.dtype or cpu_run.DTYPES:
                case = heading(op, name, sizes, cpu_run.DTYPES[dtype])
                cases.append(compared(workers, case, QUICK_ROUNDS if options.quick else ROUNDS))
                print(f"\n{table(cases[-1:])}", flush=True)
    return cases


def run_base(options: argparse.Namespace) -> dict[str, Any]:
    """The document of a comparison."""
    info = environment.machine(options.threads)
    with checkout(options.base) as path:
        cases = run_cases(options, path)
    info["base"] = git("rev-parse", "--short=12", options.base)
    return {"machine": info, "quick": options.quick, "cases": cases}


def run_against(options: argparse.Namespace) -> int:
    """Measure and print; 1 when tests are red."""
    ops = list(dict.fromkeys(op.name for op, _, _ in cpu_run.selected(options)))
    if gate.refused(ops):
        return 1
    document = run_base(options)
    print(
        f"\n{table(document['cases'])}\n\nhere / base: median and quartiles of the ratio within "
        "a round"
    )
    print(f"{environment.machine_line(document['machine'])}, base {document['machine']['base']}")
    if options.json:
        storage.write_json(options.json, document)
        print(f"written to {options.json}")
    return 0
