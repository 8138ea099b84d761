"""`python -m benchmarks.gpu.page`: the measured part of docs/gpu.md, the model beside every
measurement.

Figures come from the JSON files of GPUs in benchmarks/results and from `roofline`; what no file has
is "not measured".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import OPS, Sizes
from benchmarks.implementations import NAMES
from benchmarks.measure import roofline
from benchmarks.report.environment import ROOT, machine_line
from benchmarks.report.storage import RESULTS, read, write
from benchmarks.report.tables import markdown
from benchmarks.suites import overhead, row_kernels, training_step

from .short import order

PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- measured: python -m benchmarks.gpu.page -->", "<!-- end of what was measured -->"
NOT_MEASURED, CANNOT_RUN = "not measured", "x"
#: Columns that stand there whether or not somebody has run.
ALWAYS = ("ours",)
Document = dict[str, Any]
Row = list[str]


def documents(folder: Path = RESULTS) -> list[tuple[Path, Document]]:
    """The results of GPUs that are kept.

    Raises:
        DamagedResults: a file is damaged, or is of a dry run.
    """
    found = [(path, read(path)) for path in sorted(folder.glob("*/*.json"))]
    return [(path, document) for path, document in found if "gpu" in document["machine"]]


def cases(op: str, document: Document) -> Iterator[Sizes]:
    """The sizes of an op's cases, and what else these results have of it."""
    known = list(OPS[op].cuda.values())
    yield from known
    yield from (
        case["sizes"]
        for case in document["cases"]
        if case["op"] == op and case["sizes"] not in known
    )


def rows_of(document: Document, op: str, sizes: Sizes, dtype: str = "bfloat16") -> dict[str, Any]:
    """Implementation -> what is known of it in one case."""
    wanted = op, sizes, dtype
    return next(
        (c["rows"] for c in document["cases"] if (c["op"], c["sizes"], c["dtype"]) == wanted), {}
    )


def cell(rows: dict[str, Any], name: str, key: str = "times_floor") -> str:
    """The ratio of one implementation in one case."""
    row = rows.get(name, {})
    return (
        CANNOT_RUN
        if "skipped" in row
        else f"{row[key]['median']:.2f}"
        if key in row
        else NOT_MEASURED
    )


def words(sizes: Sizes) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def gemm_bound(document: Document, rates: roofline.Rates) -> str:
    """Time over GEMM time: the model's, and that of everybody who ran."""
    wanted = [
        (op, sizes)
        for op in ("implicit_token_loss", "linear_cross_entropy")
        for sizes in cases(op, document)
    ]
    ran = {
        name
        for op, sizes in wanted
        for name, row in rows_of(document, op, sizes).items()
        if "times_floor" in row
    }
    names = [name for name in NAMES if name in ALWAYS or name in ran]
    lines: list[Row] = []
    for op, sizes in wanted:
        rows, model = rows_of(document, op, sizes), roofline.cost(op, sizes).ratio(rates)
        chunks = str(roofline.chunks_of(op, sizes))
        lines.append(
            [f"`{op}`", words(sizes), chunks, f"{model:.2f}", *(cell(rows, name) for name in names)]
        )
    return markdown(["op", "case", "chunks", "model", *names], lines)


def both_losses(document: Document, rates: roofline.Rates) -> str:
    """NTP + NITP over NTP."""
    lines: list[Row] = []
    for sizes in overhead.CASES:
        rows, model = rows_of(document, overhead.NAME, sizes), roofline.overhead_ratio(sizes, rates)
        cells = (cell(rows, name, "over_ntp") for name in overhead.NAMES)
        lines.append([words(sizes), f"{overhead.prediction(sizes):.3f}", f"{model:.3f}", *cells])
    return markdown(["case", "by FLOPs", "model", *overhead.NAMES], lines)


def memory_bound(document: Document) -> str:
    """Row kernels over a copy of their bytes."""
    lines: list[Row] = []
    for kernel, sizes in row_kernels.KERNELS.items():
        for size in sizes:
            rows = rows_of(document, kernel, size)
            cells = (cell(rows, name) for name in row_kernels.NAMES)
            lines.append(
                [f"`{kernel}`", words(size), f"{roofline.ROW_KERNELS.get(kernel, 1.0):.2f}", *cells]
            )
    return markdown(["row kernel", "case", "model", *row_kernels.NAMES], lines)


def training(document: Document) -> str:
    """One whole training step by each objective."""
    records = [each for each in document.get("records", []) if each["op"] == "training_step"]
    found = {each["implementation"]: each for each in records}
    lines: list[Row] = []
    for objective, what in training_step.OBJECTIVES.items():
        row = found.get(objective, {})
        if "tokens_per_s" in row:
            cells = [
                f"{row['tokens_per_s']:.0f}",
                f"{row['peak_gib']:.1f}",
                f"{row['ntp_loss']:.4f}",
            ]
        else:
            cells = [CANNOT_RUN if "skipped" in row else NOT_MEASURED] * 3
        lines.append([objective, what, *cells])
    return markdown(["objective", "what it is", "tokens / s", "peak GiB", "NTP loss"], lines)


def chunk_rows(document: Document, rates: roofline.Rates) -> str:
    """The cross-entropy by rows of a chunk: the model's time over GEMM time, and that of ours."""
    kept = [each for each in document.get("records", []) if each["op"] == "chunk_rows"]
    found = {(each["case"], each["implementation"]): each for each in kept}
    lines: list[Row] = []
    for sizes in order.CHUNKED:
        case = "x".join(str(size) for size in sizes.values())
        for rows in order.CHUNK_ROWS:
            model = roofline.cost("linear_cross_entropy", sizes, -(-sizes["N"] // int(rows))).ratio(
                rates
            )
            row = found.get((case, rows), {})
            lines.append([words(sizes), rows, f"{model:.2f}", cell({"ours": row}, "ours")])
    return markdown(["case", "rows", "model", "ours"], lines)


def reasons(document: Document) -> list[str]:
    """Why somebody has an x: a line for each reason."""
    found: dict[str, None] = {}
    for case in document["cases"]:
        found |= {
            f"* {name}: {row['skipped']}": None
            for name, row in case["rows"].items()
            if "skipped" in row
        }
    records = document.get("records", [])
    found |= {
        f"* {each['implementation']}: {each['skipped']}": None
        for each in records
        if "skipped" in each
    }
    return [f"{CANNOT_RUN} stands for what could not run:", "", *found, ""] if found else []


def part(document: Document) -> list[str]:
    """The tables of one document."""
    measured = roofline.measured_rates(document)
    rates = measured or roofline.H200
    return [
        f"Model of {'this GPU, measured' if measured else 'an H200, taken'}: {rates}.",
        "",
        "Forward and backward, bfloat16, time over GEMM time:",
        "",
        gemm_bound(document, rates),
        "",
        "NTP + NITP over NTP:",
        "",
        both_losses(document, rates),
        "",
        "`linear_cross_entropy` by rows of a chunk, bfloat16, time over GEMM time:",
        "",
        chunk_rows(document, rates),
        "",
        "Row kernels, bfloat16, time over a copy of the same bytes:",
        "",
        memory_bound(document),
        "",
        "One training step of a Qwen2-0.5B shape (`benchmarks/suites/training_step.py`), context "
        "8192,",
        "bfloat16, AdamW:",
        "",
        training(document),
        "",
        *reasons(document),
    ]


def section(found: list[tuple[Path, Document]]) -> str:
    """The text between the markers."""
    if not found:
        return "\n".join(
            ["No results of a GPU are kept yet.", "", *part({"machine": {}, "cases": []})]
        ).rstrip()
    lines: list[str] = []
    for path, document in found:
        stages = [
            f"{name} {'green' if stage['code'] == 0 else 'red'}"
            for name, stage in document["stages"].items()
        ]
        link = (
            f"[the JSON](../{path.relative_to(ROOT)})" if path.is_relative_to(ROOT) else path.name
        )
        heading = f"{machine_line(document['machine'])}; {link}{'; ' if stages else ''}{', '.join(stages)}."
        lines += [heading, "", *part(document)]
    return "\n".join(lines).rstrip()


def written(text: str, found: list[tuple[Path, Document]]) -> str:
    """The page with this section between its markers."""
    new = f"{BEGIN}\n{section(found)}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: new, text, flags=re.DOTALL)


def main() -> int:
    """Write it; 1 where results are damaged or fake."""
    try:
        write(PAGE, written(PAGE.read_text(), documents()))
    except OSError as error:
        print(f"benchmarks.gpu.page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
