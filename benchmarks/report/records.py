"""A document of results as flat records: the same numbers as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from typing import Any

from .environment import machine_line
from .tables import markdown

#: Of a row's {"median", "q25", "q75"}: the key in the JSON -> the columns.
_SPREADS = {
    "forward_ms": ("forward_ms",),
    "backward_ms": ("backward_ms",),
    "milliseconds": ("both_ms", "both_q25_ms", "both_q75_ms"),
    "times_floor": ("times_floor",),
    "times_eager": ("times_eager",),
}
_PLAIN = ("gflop_per_s", "rounds", "peak_bytes", "gradient_bytes", "first_call_s")
COLUMNS = (
    *("op", "case", "sizes", "dtype", "malloc", "flops", "least_bytes", "implementation"),
    *(column for columns in _SPREADS.values() for column in columns),
    *_PLAIN,
    *("error", "note"),
)


def records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One a row of each case; a number that was not measured is None, and `note` says why nothing
    was."""
    return [
        _record(case, name, row) for case in document["cases"] for name, row in case["rows"].items()
    ]


def _record(case: dict[str, Any], name: str, row: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = dict.fromkeys(COLUMNS)
    record |= {
        "op": case["op"],
        "case": case.get("name", ""),
        "dtype": case["dtype"],
        "implementation": name,
    }
    record["sizes"] = " ".join(f"{key}={size}" for key, size in case["sizes"].items())
    record |= {key: case.get(key) for key in ("malloc", "flops", "least_bytes")}
    for key, columns in _SPREADS.items():
        for column, part in zip(columns, ("median", "q25", "q75"), strict=False):
            record[column] = row[key][part] if key in row else None
    record |= {key: row.get(key) for key in _PLAIN}
    record["error"] = max(row["error"].values()) if "error" in row else None
    record["note"] = row.get("skipped") or row.get("peak_failed")
    return record


def as_csv(document: dict[str, Any]) -> str:
    """Every number as the JSON has it; the first line is the machine, behind a #."""
    text = io.StringIO()
    text.write(f"# {machine_line(document['machine'])}\n")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(document))
    return text.getvalue()


_SHOWN = (
    "forward_ms",
    "backward_ms",
    "both_ms",
    "times_floor",
    "times_eager",
    "peak_bytes",
    "error",
)
HEADER = ["", "forward ms", "backward ms", "both ms", "/ floor", "/ eager", "peak MiB", "error"]


def cell(column: str, value: Any) -> str:
    """A number as the tables show it."""
    if value is None:
        return "-"
    if column.endswith("_ms"):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return {"peak_bytes": f"{value / 2**20:.0f}", "error": f"{value:.1e}"}.get(
        column, f"{value:.2f}"
    )


def title(record: dict[str, Any]) -> str:
    """The case of a record in words."""
    words = (record[key] for key in ("op", "case", "sizes", "dtype"))
    return " ".join(word for word in words if word) + (
        f", malloc {record['malloc']}" if record["malloc"] else ""
    )


def grouped(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of each case under its title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records(document):
        found.setdefault(title(record), []).append(record)
    return found


def shown(record: dict[str, Any]) -> list[str]:
    """The cells of one record below HEADER; who was skipped keeps the row."""
    return [record["implementation"], *(cell(column, record[column]) for column in _SHOWN)]


def as_markdown(document: dict[str, Any]) -> str:
    """One table a case, its FLOPs and least bytes above it, the reasons of those who could not run
    below it."""
    lines = ["# Benchmark", "", f"Machine: {machine_line(document['machine'])}.", ""]
    for name, rows in grouped(document).items():
        lines += [f"## {name}", "", *work(rows[0]), markdown(HEADER, map(shown, rows)), ""]
        lines += [f"* {row['implementation']}: {row['note']}" for row in rows if row["note"]]
        lines += [""] if lines[-1] else []
    return "\n".join(lines)


def work(record: dict[str, Any]) -> list[str]:
    """What a case must do, where its JSON says so."""
    if record["least_bytes"] is None:
        return []
    gemms = f"{record['flops'] / 1e9:.1f} GFLOP in GEMMs, " if record["flops"] else ""
    return [f"{gemms}at least {record['least_bytes'] / 2**20:.0f} MiB moved.", ""]
