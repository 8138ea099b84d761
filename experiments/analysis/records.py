"""Finished measurements as JSON lines: what is there is not measured again."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.console.failure import BadInput
from experiments.train.checkpoint import read_table, write_whole
from experiments.train.options import Options

from .arms import Arm
from .results import Result

CHECKSUM = "sha256"


class Records:
    """A file of JSON lines: the settings that all lines share, then a line for each finished
    measurement.

    A last line that a crash cut short is dropped. NaN and infinity are written as null and read as
    NaN. Each line ends with a checksum of what stands before it.

    Raises:
        BadInput: the file was written with other settings, or a line is damaged or no record.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            stored, *self.lines = self._read() or [{"settings": settings}]
            _refuse_other_settings(path, stored.get("settings", {}), settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(map(_line, [{"settings": settings}, *self.lines])).encode())

    def add(self, **record: Any) -> None:
        """Append a line and put it on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(record)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The line with these values."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def _read(self) -> list[dict[str, Any]]:
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        return [
            self._parsed(number, line) for number, line in enumerate(whole.splitlines(), start=1)
        ]

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            # lines of an earlier version have none
            if record.pop(CHECKSUM, None) in (_checksum(record), None):
                return record
            reason = "its checksum does not match"
        except (ValueError, TypeError, AttributeError):
            reason = "not a record"
        if number == 1:
            raise BadInput(
                f"{self.path}: not a file of records (line 1: {reason}); choose another --out"
            )
        raise BadInput(
            f"{self.path}: line {number} is damaged ({reason}); remove it to measure that once more"
        )


def result_record(result: Result) -> dict[str, Any]:
    """What a record keeps of a finished run; its curves stay in their own files."""
    return {"numbers": result.numbers, "batches": result.batches, "sample": result.sample}


def result_of(record: dict[str, Any], arm: Arm, options: Options) -> Result:
    """The run that a record describes."""
    numbers = {
        name: math.nan if value is None else value for name, value in record["numbers"].items()
    }
    folder = arm.run_folder(options.of_seed(record["seed"]))
    steps, looks = read_table(folder / "steps.csv"), read_table(folder / "validation.csv")
    return Result(arm, record["seed"], numbers, record["batches"], steps, looks, record["sample"])


def _refuse_other_settings(path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    for name in [*settings, *stored]:
        if (before := stored.get(name, "absent")) != (now := settings.get(name, "absent")):
            raise BadInput(
                f"{path}: measured with {name} {before}, this run has {name} {now}; "
                "choose another --out"
            )


def _line(record: dict[str, Any]) -> str:
    strict = _strict(record)
    return json.dumps({**strict, CHECKSUM: _checksum(strict)}, allow_nan=False) + "\n"


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, allow_nan=False).encode()).hexdigest()[:16]


def _strict(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
