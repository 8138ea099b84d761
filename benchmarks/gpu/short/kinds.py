"""The three kinds of pieces of a short run: rows of a case, records, processes that are green or
red."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu import cuda_run, run_report, stages
from benchmarks.measure.cpu import FLOOR
from benchmarks.measure.isolated import Isolated, MeasurementError, Task

Document = dict[str, Any]
#: Seconds without a sign of life after which a name is given up.
PATIENCE = 60.0
#: How the reason of a row begins whose implementation was not there: another call may bring it.
ABSENT = ("ImportError", "ModuleNotFoundError", "BackendError")


@dataclass
class Bench:
    """What pieces run with: processes by name, when they must have ended (`time.monotonic`), what
    is kept so far."""

    processes: dict[str, Isolated]
    deadline: float
    document: Document = field(default_factory=dict)

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def still_open(names: tuple[str, ...], kept: Mapping[str, Any]) -> list[str]:
    """The names of which nothing is kept but that they were not there."""
    return [
        name
        for name in names
        if name not in kept or kept[name].get("skipped", "").startswith(ABSENT)
    ]


class Piece(Protocol):
    """What takes how many seconds on a GPU, and yields what; `unavailable`: why no process is
    asked."""

    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def unavailable(self) -> str | None: ...
    def left(self, document: Document) -> list[str]: ...
    def run(self, left: list[str], bench: Bench) -> Document: ...


@dataclass(frozen=True)
class Rows:
    """Rows of one case, by implementations that share a process."""

    case: cuda_run.Case
    seconds: float
    process: str = "ours"
    unavailable: str | None = None

    @property
    def name(self) -> str:
        sizes = "x".join(str(size) for size in self.case.sizes.values())
        who = "ours and torch's" if self.process == "ours" else ", ".join(self.case.names)
        return f"{self.case.op} {sizes} {self.case.dtype} ({who})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.case.names)

    def kept(self, document: Document) -> dict[str, Any]:
        """The rows of this case so far."""
        here = self.case.op, tuple(self.case.sizes.items()), self.case.dtype
        return next(
            (case["rows"] for case in document["cases"] if run_report.identity(case) == here), {}
        )

    def left(self, document: Document) -> list[str]:
        return still_open(self.names, self.kept(document))

    def run(self, left: list[str], bench: Bench) -> Document:
        case = cuda_run.measured(
            self.case, left, {}, bench.deadline, bench.processes[self.process], PATIENCE
        )
        rows, floor = case["rows"], case["rows"].get(FLOOR, {})
        # of another process than the one that is kept: the row's own
        if FLOOR in self.kept(bench.document):
            rows.pop(FLOOR, None)
            for row in rows.values():
                row |= {"floor_ms": floor["milliseconds"]} if "milliseconds" in row else {}
        return {"stages": {}, "cases": [case] if rows else []}


@dataclass(frozen=True)
class Records:
    """What has no floor: one record an implementation. task(at, names) -> {name: what is known of
    it}."""

    op: str
    case: str
    names: tuple[str, ...]
    seconds: float
    task: Task
    unavailable: str | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.case} ({', '.join(self.names)})"

    def left(self, document: Document) -> list[str]:
        records = document.get("records", [])
        found = {
            each["implementation"]: each
            for each in records
            if (each["op"], each["case"]) == (self.op, self.case)
        }
        return still_open(self.names, found)

    def run(self, left: list[str], bench: Bench) -> Document:
        try:
            found, reasons = bench.processes["ours"].run(
                self.task, left, patience=PATIENCE, deadline=bench.deadline
            )
        except MeasurementError as error:
            found, reasons = {}, dict.fromkeys(left, str(error))
        found |= {name: {"skipped": reason} for name, reason in reasons.items()}
        records = [
            {**row, "op": self.op, "case": self.case, "implementation": name}
            for name, row in found.items()
        ]
        return {"stages": {}, "cases": [], "records": records}


@dataclass(frozen=True)
class Stage:
    """Processes, green or red. beside: (process, task, names) that run while they do, and may fail;
    the tasks get the path `stop`, where a file is made when they should end."""

    name: str
    seconds: float
    steps: tuple[stages.Step, ...]
    beside: tuple[tuple[str, Callable[..., Any], tuple[str, ...]], ...] = ()
    unavailable: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def left(self, document: Document) -> list[str]:
        return [] if document["stages"].get(self.name, {}).get("code") == 0 else [self.name]

    def run(self, left: list[str], bench: Bench) -> Document:
        with tempfile.TemporaryDirectory() as folder:
            stop = Path(folder) / "stop"

            def warm(process: str, task: Callable[..., Any], names: tuple[str, ...]) -> None:
                try:
                    given = partial(task, stop=stop)
                    bench.processes[process].run(
                        given, names, patience=PATIENCE, deadline=bench.deadline
                    )
                except MeasurementError as error:
                    print(f"{self.name}, beside it: {error}", flush=True)

            threads = [
                threading.Thread(target=warm, args=each, daemon=True) for each in self.beside
            ]
            for thread in threads:
                thread.start()
            code, seconds, said = stages.run(self.steps, bench.left())
            stop.touch()
            for thread in threads:
                thread.join()
        return {
            "stages": {self.name: {"code": code, "seconds": seconds, "said": said}},
            "cases": [],
        }
