"""Short runs for tests: a clock that is moved by hand, processes that only note what they are asked."""

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import cuda_run
from benchmarks.gpu.short import dry_run, timed_run
from benchmarks.measure.isolated import Isolated
from benchmarks.report import storage

ROOT = Path(__file__).resolve().parents[3]


INFO = dry_run.machine("abc")


def nothing(*_, **__):
    return {}


class Clock:
    """Seconds that pass where somebody says so."""

    now = 0.0

    def __call__(self):
        return self.now


class Fake(Isolated):
    """Runs no task: `seconds` pass, names of `hang` do not answer, and what ran is noted."""

    def __init__(self, clock, seconds, hang=()):
        super().__init__()
        self.clock, self.seconds, self.hang, self.asked = clock, seconds, hang, []

    def run(self, task, names, *, patience, deadline):
        del task, patience, deadline
        self.clock.now += self.seconds
        self.asked.append(list(names))
        row = {"milliseconds": {"median": 1.0, "q25": 1.0, "q75": 1.0}}
        found = {name: dict(row) for name in names if name not in self.hang}
        floor = {"milliseconds": {"median": self.clock.now, "q25": 1.0, "q75": 1.0}}
        return {"floor": floor, **found}, {
            name: "stopped: no answer within 60 s" for name in names if name in self.hang
        }


def case(size, names=("ours", "eager")):
    return cuda_run.Case("swiglu", {"N": size, "m": 3}, "bfloat16", list(names), nothing)


def runner(tmp_path, budget, clock, seconds, hang=(), info=INFO):
    processes = {name: Fake(clock, seconds, hang) for name in ("ours", "peers")}
    made = timed_run.Runner(
        info, tmp_path, dict(processes), budget + timed_run.RESERVE, fake=True, clock=clock
    )
    return made, processes


def kept(tmp_path):
    return storage.read(storage.results_path(INFO, tmp_path), fake=True)


def dry(tmp_path, budget, **options):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.short",
        "--dry-run",
        "--bundle-mib",
        "9",
        "--commit",
        "abc",
    ]
    return subprocess.Popen(
        [*command, "--budget-s", str(budget), "--out", str(tmp_path)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )
