"""How a short run goes on: what fits into the time that is left, what is kept already, one JSON
after every piece."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import run_report
from benchmarks.measure.cpu import FLOOR
from benchmarks.measure.isolated import Isolated, one_line
from benchmarks.report import storage

from .kinds import Bench, Document, Piece

#: Of the budget, for the table at the end and for processes that end late.
RESERVE = 4.0
#: With less than this left, which no piece fits into, what is skipped is counted.
TOLD = 3.0


class Runner:
    """One call. scale: the seconds of a GPU that one second here stands for, 1 but in a dry run."""

    def __init__(
        self,
        info: dict[str, Any],
        out: Path,
        processes: dict[str, Isolated],
        deadline: float,
        scale: float = 1.0,
        *,
        fake: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.scale, self.clock = storage.results_path(info, out), scale, clock
        self.empty: Document = {
            "machine": info,
            "stages": {},
            "cases": [],
            **({"fake": True} if fake else {}),
        }
        self.bench = Bench(processes, deadline - RESERVE / scale, self._kept(info))
        # of a tree that has no commit nobody knows what it was then: its results are added to, and
        # measured again
        self.resumes = not any(
            word in info["commit"] for word in ("dirty", "unknown", "uncommitted")
        )
        self.given_up: dict[str, str] = {}
        self.broken: list[str] = []

    def _kept(self, info: dict[str, Any]) -> Document:
        """What earlier calls on this machine and commit left under --out, or brought back to the
        results.

        Raises:
            ValueError: it is of another machine.
        """
        whole = self.empty
        for path in dict.fromkeys([storage.results_path(info), self.path]):
            whole = run_report.beside_kept(path, whole)
        return whole

    def run(self, pieces: Iterable[Piece]) -> int:
        """Every piece that fits, in their order; 1 where something of ours failed, 2 where none
        fits."""
        late: list[tuple[Piece, float]] = []
        ran = 0
        for piece in pieces:
            left = piece.left(self.bench.document if self.resumes else self.empty)
            if left and piece.unavailable:
                print(f"{piece.name}: skipped, {piece.unavailable}", flush=True)
            if not left or piece.unavailable:
                continue
            left = self._not_given_up(piece, left)
            needed = piece.seconds * len(left) / len(piece.names)
            if left and needed > self._remaining():
                late.append((piece, needed))
                if self._remaining() >= TOLD:
                    print(
                        f"{piece.name}: skipped, takes {needed:.0f} s, {self._remaining():.0f} s "
                        "are left",
                        flush=True,
                    )
            elif left:
                ran += 1
                self._measure(piece, left)
        return self._end(late, ran)

    def _remaining(self) -> float:
        """In seconds of a GPU."""
        return max(0.0, (self.bench.deadline - self.clock()) * self.scale)

    def _not_given_up(self, piece: Piece, left: list[str]) -> list[str]:
        for name in (name for name in left if name in self.given_up):
            print(f"{piece.name}: skipped, {name} {self.given_up[name]}", flush=True)
        return [name for name in left if name not in self.given_up]

    def _measure(self, piece: Piece, left: list[str]) -> None:
        start = self.clock()
        try:
            found = piece.run(left, self.bench)
            storage.as_json(found)
        # whatever it is: one piece is lost, and the others have the time that is left
        except Exception as error:
            self.broken.append(piece.name)
            print(f"{piece.name}: {one_line(error)}", flush=True)
            return
        seconds = (self.clock() - start) * self.scale
        if self.clock() >= self.bench.deadline - 0.05:  # who had no time left has not failed
            found = without_the_stopped(found)
        self.given_up |= stopped(found)
        document = {**self.empty, **found}
        self.bench.document = run_report.merged(self.bench.document, document)
        try:
            self.bench.document = run_report.keep(self.path, self.bench.document)
        except (OSError, ValueError) as error:  # a full disk, say: the rest is shown at least
            self.broken.append("keeping the results")
            print(f"not kept: {error}", flush=True)
        print(f"\n{piece.name}: {seconds:.1f} s of {piece.seconds:.0f}", flush=True)
        if document.get("fake"):
            return
        for case in found["cases"]:
            print(run_report.shown(case), flush=True)
        for record in found.get("records", []):
            print(
                "  " + ", ".join(f"{key} {shown(value)}" for key, value in record.items()),
                flush=True,
            )

    def _end(self, late: list[tuple[Piece, float]], ran: int) -> int:
        document = self.bench.document
        if late and not ran:
            least = min(needed for _, needed in late)
            print(
                "benchmarks/gpu.sh: the budget is too short: no piece takes less than "
                f"{least:.0f} s",
                file=sys.stderr,
            )
        if late:
            first, needed = late[0]
            print(
                f"\n{len(late)} pieces are left for the next call, first {first.name}: "
                f"{needed:.0f} s",
                flush=True,
            )
        if document.get("fake"):
            print(f"\ndry run: {ran} pieces")
        else:
            print(f"\n{run_report.summary(document)}")
        kept = (
            "not all is kept" if "keeping the results" in self.broken else f"written to {self.path}"
        )
        print(kept if ran else "nothing new was measured", flush=True)
        red = [name for name, stage in document["stages"].items() if stage["code"]]
        lost = [
            case["op"] for case in document["cases"] if "skipped" in case["rows"].get("ours", {})
        ]
        for name in dict.fromkeys([*red, *lost, *self.broken]):
            print(f"benchmarks/gpu.sh: {name} failed, see above", file=sys.stderr)
        return 2 if late and not ran else int(bool(red or lost or self.broken))


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stopped(found: Document) -> dict[str, str]:
    """Who hung in these rows and records, and what is said of it."""
    rows = [pair for case in found["cases"] for pair in case["rows"].items()]
    rows += [(record["implementation"], record) for record in found.get("records", [])]
    return {
        name: row["skipped"] for name, row in rows if row.get("skipped", "").startswith("stopped")
    }


def without_the_stopped(found: Document) -> Document:
    """Leaves out what the end of the budget stopped."""
    cases = []
    for case in found["cases"]:
        rows = {name: row for name, row in case["rows"].items() if "skipped" not in row}
        cases += [{**case, "rows": rows}] if set(rows) - {FLOOR} else []
    records = [each for each in found.get("records", []) if "skipped" not in each]
    stages = {name: stage for name, stage in found["stages"].items() if stage["code"] != 124}
    return {"stages": stages, "cases": cases, **({"records": records} if records else {})}
