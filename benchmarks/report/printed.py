"""What a run prints: a table a case, what its rows and columns mean, ours against eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import OPS
from benchmarks.implementations import NAMES
from benchmarks.measure.children import MALLOC
from benchmarks.measure.cpu import ERROR_WORDS, FLOOR

from .tables import Table, plain

HEADER = (
    "",
    "forward ms",
    "backward",
    "both",
    "quartiles",
    "x floor",
    "x eager",
    "rounds",
    "peak MiB",
    "error",
)


def case_title(case: dict[str, Any]) -> str:
    """One line that says what the rows below it measured."""
    sizes = " ".join(f"{name}={size}" for name, size in case["sizes"].items())
    gradients = next(
        (row["gradient_bytes"] for row in case["rows"].values() if "gradient_bytes" in row), 0
    )
    malloc = f"malloc {case['malloc']}  " if "malloc" in case else ""
    name = f"{case['name']}  " if case.get("name") else ""
    work = f"{case['flops'] / 1e9:.1f} GFLOP, " if case.get("flops") else ""
    work += (
        f"at least {case['least_bytes'] / 2**20:.0f} MiB moved, " if "least_bytes" in case else ""
    )
    where = f"{case['op']}  {name}{sizes}  {case['dtype']}  {malloc}"
    return f"{where}({work}gradients: {gradients / 2**20:.0f} MiB of each peak)"


def case_table(case: dict[str, Any]) -> str:
    """The floor and every implementation of one case; what was skipped keeps its row and says why."""
    rows, reasons = [], []
    for name, row in case["rows"].items():
        label = "floor" if name == FLOOR else name
        if "skipped" in row:
            reasons.append(f"{label} skipped: {row['skipped']}")
            rows.append([label, *["-"] * (len(HEADER) - 1)])
            continue
        if "peak_failed" in row:
            reasons.append(f"{label}, peak memory: {row['peak_failed']}")
        rows.append([label, *_cells(row)])
    return "\n".join([plain(HEADER, rows), *reasons])


def _cells(row: dict[str, Any]) -> Iterator[str]:
    time = row["milliseconds"]
    for key in ("forward_ms", "backward_ms", "milliseconds"):
        value = row[key]["median"] if key in row else None
        yield "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
    yield f"{time['q25']:.3g}-{time['q75']:.3g}"
    yield f"{row['times_floor']['median']:.2f}"
    yield f"{row['times_eager']['median']:.2f}" if "times_eager" in row else "-"
    yield str(row["rounds"])
    yield f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-"
    yield f"{max(row['error'].values()):.1e}" if "error" in row else "-"


def legend(cases: list[dict[str, Any]]) -> str:
    """What the columns and rows mean, for the ops and settings that were measured."""
    rows = max(op.error_rows for op in OPS.values())
    lines = [
        f"floor of {op}: {OPS[op].floor_name}" for op in dict.fromkeys(case["op"] for case in cases)
    ]
    shown = dict.fromkeys(name for case in cases for name in case["rows"] if name != FLOOR)
    # a file may hold names of before
    lines += [f"{name}: {NAMES[name]}" for name in shown if name in NAMES]
    lines += [
        f"malloc {name}: {MALLOC[name]}" for name in dict.fromkeys(case["malloc"] for case in cases)
    ]
    lines += [
        "forward is that of training: ours (and PyTorch's own, Liger-Kernel) form a scalar loss's "
        "gradients in it",
        "both: forward and backward; ratios: of both, median over rounds of the ratio within a "
        "round",
        "peak: most bytes resident in the second step of a fresh process, above those before it "
        "(malloc default)",
        "error: largest |x - x64| / |x64| of value and gradients against float64, on at most "
        f"{rows} rows and {ERROR_WORDS} words",
    ]
    return "\n".join(lines)


def against_eager(cases: list[dict[str, Any]]) -> Table:
    """Time and memory of ours beside eager's, where both were measured, each with a verdict."""
    rows = []
    for case in cases:
        ours, eager = case["rows"].get("ours", {}), case["rows"].get("eager", {})
        if "milliseconds" not in ours or "milliseconds" not in eager:
            continue
        ratio, memory = ours["times_eager"]["median"], ["-", "-", "-"]
        if "peak_bytes" in ours and "peak_bytes" in eager:
            peaks = ours["peak_bytes"] / 2**20, eager["peak_bytes"] / 2**20
            # The kernel counts resident pages to about 0.25 MiB; less than 1 MiB is no difference.
            larger = "larger" if peaks[0] > peaks[1] + 1 else "not larger"
            memory = [*(f"{peak:.0f}" for peak in peaks), larger]
        where = case_title(case).split("  (")[0]
        rows.append([where, f"{ratio:.2f}", "slower" if ratio > 1 else "not slower", *memory])
    header = ["", "time / eager", "verdict", "peak MiB", "eager's", "verdict"]
    return Table("ours against eager", header, rows)
