"""No numbers from an op whose tests are red."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import environment


def refused(ops: Sequence[str]) -> bool:
    """Run the ops' tests, say how they ended; True when they are red."""
    names = ", ".join(ops)
    reason = failed_tests(ops)
    if reason:
        print(f"benchmarks: the tests of {names} are red, no numbers: {reason}", file=sys.stderr)
        return True
    print(f"the tests of {names} are green", flush=True)
    return False


def failed_tests(ops: Sequence[str]) -> str | None:
    """Run the ops' tests on CPU; None when they are green, else what went wrong."""
    files: set[Path] = set()
    for op in ops:
        own = set((environment.ROOT / "tests/ops").rglob(f"test_*{op}*.py"))
        if not own:
            return f"no tests/ops/**/test_*{op}*.py"
        files |= own
    return pytest_failure(sorted(files))


def pytest_failure(files: Sequence[Path]) -> str | None:
    """None when these tests are green, else how pytest ended."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *map(str, files),
    ]
    run = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    return f"pytest ended with code {run.returncode}\n{run.stdout[-3000:]}{run.stderr[-1000:]}".rstrip()
