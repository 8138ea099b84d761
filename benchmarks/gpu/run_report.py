"""What a GPU run shows and keeps: its machine, its tables, one JSON that every stage adds to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import OPS
from benchmarks.implementations import NAMES
from benchmarks.measure.cpu import FLOOR
from benchmarks.measure.isolated import one_line
from benchmarks.report import environment
from benchmarks.report.environment import machine_line
from benchmarks.report.printed import case_table, case_title
from benchmarks.report.storage import RESULTS, read, results_path, write_json
from benchmarks.report.tables import plain
from benchmarks.suites import overhead, row_kernels


def tests_are_green(known_commit: str | None, out: Path) -> bool:
    """Whether the stage `test` of this machine and commit, clean, is kept under `out` and was
    green."""
    info = environment.gpu_machine(known_commit)
    path = results_path(info, out)
    kept = read(path) if path.exists() else {}
    clean = "dirty" not in info["commit"]
    return (
        clean
        and same_machine(kept.get("machine", {}), info)
        and kept.get("stages", {}).get("test", {}).get("code") == 0
    )


def merged(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `kept`: of the same machine and commit, a row or a record measured again or a
    stage run again replaces the last.

    Raises:
        ValueError: they are of different machines or commits, one of them is fake, or lacks what
            results have.
    """
    try:
        return _joined(kept, new)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"these are no results of a GPU: {one_line(error)}") from error


def _joined(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if not same_machine(kept["machine"], new["machine"]):
        raise ValueError(
            f"results of {machine_line(kept['machine'])} and of {machine_line(new['machine'])} do "
            "not mix"
        )
    if kept.get("fake") != new.get("fake"):
        raise ValueError("results of a dry run and of a GPU do not mix")
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in [*kept["cases"], *new["cases"]]:
        last = cases.get(identity(case), {"rows": {}})
        cases[identity(case)] = {**last, **case, "rows": last["rows"] | case["rows"]}
    records = {
        record_identity(each): each for each in [*kept.get("records", []), *new.get("records", [])]
    }
    whole = {**kept, **new, "stages": kept["stages"] | new["stages"], "cases": list(cases.values())}
    return {**whole, **({"records": list(records.values())} if records else {})}


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether results of both belong together: drivers of one GPU tell a slightly different size of
    its memory."""
    return {**one, "memory_gib": 0} == {**other, "memory_gib": 0}


def identity(case: dict[str, Any]) -> tuple[Any, ...]:
    return case["op"], tuple(case["sizes"].items()), case["dtype"]


def record_identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """Of a measurement that has no floor and no rows: a training step, a sweep, a counter."""
    return record["op"], record["case"], record["implementation"]


def keep(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Adds `document` to the JSON at `path`, and returns all of it."""
    whole = beside_kept(path, document)
    write_json(path, whole)
    return whole


def beside_kept(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """`document` over what the JSON at `path` holds, if there is one.

    Raises:
        DamagedResults: it cannot be read, or one of both is fake.
        ValueError: see `merged`.
    """
    if not path.exists():
        return document
    try:
        return merged(read(path, document.get("fake", False)), document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shown(case: dict[str, Any]) -> str:
    """The table of one case."""
    if case["op"] != overhead.NAME:
        return f"{case_title(case)}\n{case_table(case)}"
    rows, reasons = [], []
    for name, row in case["rows"].items():
        if "skipped" in row:
            reasons.append(f"{name} skipped: {row['skipped']}")
            rows.append([name, "-", "-", "-", "-"])
            continue
        medians = [row[each]["median"] for each in ("ntp_ms", "milliseconds", "over_ntp")]
        rows.append([name, *(f"{value:.3f}" for value in medians), f"{case['prediction']:.3f}"])
    header = "", "ntp ms", "ntp + nitp ms", "ratio", "by FLOPs"
    sizes = " ".join(f"{name}={size}" for name, size in case["sizes"].items())
    return "\n".join([f"{case['op']}  {sizes}  {case['dtype']}", plain(header, rows), *reasons])


def legend(cases: list[dict[str, Any]]) -> str:
    """What the rows and columns of these cases mean."""
    ops = dict.fromkeys(case["op"] for case in cases)
    lines = [f"floor of {op}: {OPS[op].floor_name}" for op in ops if op in OPS]
    if any(op in row_kernels.KERNELS for op in ops):
        lines.append(
            "floor of a row kernel: a copy of the bytes that it must move; its share of the "
            "bandwidth is 1 / floor"
        )
    names = dict.fromkeys(name for case in cases for name in case["rows"] if name != FLOOR)
    lines += [f"{name}: {NAMES[name]}" for name in names]
    return "\n".join(
        [
            *lines,
            "floor of GEMMs: one after the other, in the same rounds; weight gradients in the "
            "faster output dtype",
            "time: between events, forward and backward, L2 cold, work queued ahead; medians of "
            "interleaved rounds",
            "peak: most bytes allocated in one step beyond those before it; error: of every row "
            "against float64",
        ]
    )


#: What the short table tells of a record.
TOLD = {
    "per_second": "per second",
    "tokens_per_s": "tokens per second",
    "peak_gib": "GiB at the peak",
}


def summary(document: dict[str, Any]) -> str:
    """The short table: a line a case with the time over the floor of everybody, a line a stage."""
    if document.get("fake"):
        raise ValueError("a dry run has no table: nothing was measured")
    cases = [case for case in document["cases"] if case["op"] != overhead.NAME]
    names = list(dict.fromkeys(name for case in cases for name in case["rows"] if name != FLOOR))
    rows = []
    for case in cases:
        sizes = "x".join(str(size) for size in case["sizes"].values())
        floor = case["rows"].get(FLOOR, {}).get("milliseconds", {}).get("median")
        cells = [_over_floor(case["rows"].get(name, {})) for name in names]
        rows.append(
            [
                f"{case['op']} {sizes} {case['dtype']}",
                "-" if floor is None else f"{floor:.3f}",
                *cells,
            ]
        )
    lines = [plain(("time / floor", "floor ms", *names), rows)] if rows else []
    for case in document["cases"]:
        if case["op"] == overhead.NAME:
            found = ", ".join(f"{name} {_ratio(row)}" for name, row in case["rows"].items())
            lines.append(
                f"ntp + nitp over ntp, d={case['sizes']['d']}: {found}; by FLOPs "
                f"{case['prediction']:.3f}"
            )
    for record in document.get("records", []):
        told = [f"{record[key]:.5g} {unit}" for key, unit in TOLD.items() if key in record]
        lines += [f"{record['op']}, {record['implementation']}: {', '.join(told)}"] if told else []
    for name, stage in document["stages"].items():
        lines.append(
            f"{name}: {'green' if stage['code'] == 0 else 'RED'} in {stage['seconds']:.0f} s, "
            f"{stage['said']}"
        )
    return "\n".join([*lines, machine_line(document["machine"])])


def _over_floor(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return "x"
    return f"{row['times_floor']['median']:.2f}" if "times_floor" in row else "-"


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['over_ntp']['median']:.3f}" if "over_ntp" in row else "x"


def main(arguments: Sequence[str] | None = None) -> int:
    """Add results that were measured elsewhere, and show them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.run_report", description=main.__doc__
    )
    parser.add_argument("folder", type=Path, help="where <device>/<commit>.json lie")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the results they are added to (default: results)"
    )
    options = parser.parse_args(arguments)
    found = sorted(options.folder.glob("*/*.json"))
    if not found:
        print(
            f"benchmarks.gpu.run_report: {options.folder} holds no <device>/<commit>.json",
            file=sys.stderr,
        )
        return 2
    try:
        for path in found:
            document = read(path)
            into = results_path(document["machine"], options.out)
            print(f"{summary(keep(into, document))}\nwritten to {into}")
    except (OSError, ValueError) as error:
        print(f"benchmarks.gpu.run_report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
