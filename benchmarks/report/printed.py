"""What is shown and kept: the machine line, one table an op, the sentences that follow from it, the JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS
from benchmarks.implementations import NAMES
from benchmarks.measure.cpu import ERROR_WORDS, FLOOR, MALLOC
from nitp_ops.core.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class DamagedResults(OSError):
    """A file of results cannot be read; the message is one line."""


def machine(threads: int) -> dict[str, Any]:
    """CPU, instruction set, cores, threads, torch, commit."""
    return {
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def commit() -> str:
    """HEAD's first twelve digits, "-dirty" behind them where tracked files differ."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "--verify", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    if not head:
        return "uncommitted"
    return f"{head}-dirty" if changed else head


def machine_line(info: dict[str, Any]) -> str:
    """The line that heads every output."""
    if "gpu" in info:
        return (
            f"{info['gpu']} ({info['multiprocessors']} multiprocessors, {info['memory_gib']:.0f} GiB), "
            f"torch {info['torch']}, CUDA {info['cuda']}, Triton {info['triton']}, commit {info['commit']}"
        )
    return (
        f"{info['cpu']} ({info['instruction_set']}), {info['cores']} cores, {info['threads']} threads, "
        f"torch {info['torch']}, commit {info['commit']}"
    )


def results_path(info: dict[str, Any], folder: Path = RESULTS, kind: str = "") -> Path:
    """folder/<device>/<commit>.json; `kind` ("-quick", "-scaling") stands behind the commit."""
    name = info["gpu"] if "gpu" in info else f"{info['cpu']} {info['cores']} cores"
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / device / f"{info['commit']}{kind}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write the results."""
    write(path, as_json(document))


def as_json(document: dict[str, Any]) -> str:
    """The results as they are kept."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text; nobody ever sees half a file, and a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def read(path: Path, fake: bool = False) -> dict[str, Any]:
    """Results that were kept; `fake` ones, of a dry run, only for who asks for them.

    Raises:
        DamagedResults: the file holds no results.
    """
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and "machine" in document:
            if document.get("fake", False) != fake:
                raise DamagedResults(f"{path}: {'no dry run' if fake else 'a dry run, nothing was measured'}")
            return document
        reason = "no object with a machine"
    except ValueError as error:
        reason = str(error)
    raise DamagedResults(f"{path}: not readable results ({reason}); restore or remove it")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; a bar inside a cell is escaped."""
    lines = [list(header), ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text, columns padded; the first column to the left, numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def padded(line: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join([padded(lines[0]), "  ".join("-" * width for width in widths), *map(padded, lines[1:])])


HEADER = ("", "forward ms", "backward", "both", "quartiles", "x floor", "x eager", "rounds", "peak MiB", "error")


def case_title(case: dict[str, Any]) -> str:
    """One line that says what the rows below it measured."""
    sizes = " ".join(f"{name}={size}" for name, size in case["sizes"].items())
    gradients = next((row["gradient_bytes"] for row in case["rows"].values() if "gradient_bytes" in row), 0)
    malloc = f"malloc {case['malloc']}  " if "malloc" in case else ""
    name = f"{case['name']}  " if case.get("name") else ""
    work = f"{case['flops'] / 1e9:.1f} GFLOP, " if case.get("flops") else ""
    work += f"at least {case['least_bytes'] / 2**20:.0f} MiB moved, " if "least_bytes" in case else ""
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
    return "\n".join([table(HEADER, rows), *reasons])


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
    lines = [f"floor of {op}: {OPS[op].floor_name}" for op in dict.fromkeys(case["op"] for case in cases)]
    shown = dict.fromkeys(name for case in cases for name in case["rows"] if name != FLOOR)
    lines += [f"{name}: {NAMES[name]}" for name in shown if name in NAMES]  # a file may hold names of before
    lines += [f"malloc {name}: {MALLOC[name]}" for name in dict.fromkeys(case["malloc"] for case in cases)]
    lines += [
        "forward is that of training: ours (and PyTorch's own, Liger-Kernel) form a scalar loss's gradients in it",
        "both: forward and backward; ratios: of both, median over rounds of the ratio within a round",
        "peak: most bytes resident in the second step of a fresh process, above those before it (malloc default)",
        f"error: largest |x - x64| / |x64| of value and gradients against float64, on at most {rows} rows and "
        f"{ERROR_WORDS} words",
    ]
    return "\n".join(lines)


def verdict(cases: list[dict[str, Any]]) -> str:
    """Where ours needs more time or more memory than eager, from the numbers."""
    slower, larger, compared = [], [], 0
    for case in cases:
        ours, eager = case["rows"].get("ours", {}), case["rows"].get("eager", {})
        where = case_title(case).split("  (")[0]
        if "milliseconds" in ours and "milliseconds" in eager:
            compared += 1
            ratio = ours["times_eager"]["median"]
            if ratio > 1:
                slower.append(f"  {where}: {ratio:.2f} x")
        if "peak_bytes" in ours and "peak_bytes" in eager:
            peaks = ours["peak_bytes"] / 2**20, eager["peak_bytes"] / 2**20
            # The kernel counts resident pages to about 0.25 MiB; less than 1 MiB is no difference.
            if peaks[0] > peaks[1] + 1:
                larger.append(f"  {where}: {peaks[0]:.0f} against {peaks[1]:.0f} MiB")
    if not compared:
        return "ours and eager were not both measured"
    lines = [f"slower than eager: {len(slower)} of {compared} cases", *slower]
    return "\n".join([*lines, f"larger than eager: {len(larger)} of {compared} cases", *dict.fromkeys(larger)])
