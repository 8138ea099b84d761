"""`python -m benchmarks --case memory`: peak memory of the cross-entropy of a real head, on the
CPU.

Forward and backward in bfloat16. Peak: the most bytes resident in the second step of a fresh
process above those before it, which hold the inputs; the gradients that a step returns are
included. One process runs at a time. `python -m benchmarks.suites.memory` writes docs/memory.md
from the newest results kept.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS, Sizes, heading
from benchmarks.implementations import NAMES
from benchmarks.measure import cpu, isolated, process_memory
from benchmarks.measure.gemm_times import in_child
from benchmarks.report import environment, storage, tables
from benchmarks.report.storage import newest

from . import gate

OP, DTYPE = OPS["linear_cross_entropy"], torch.bfloat16
WAYS = ("eager", "eager-float32", "compile", "torch", "ours")
CASES: dict[str, Sizes] = {"Llama-3's vocabulary": {"N": 4096, "d": 2048, "V": 128256}}
QUICK: dict[str, Sizes] = {"toy": {"N": 64, "d": 32, "V": 1024}}
PAGE = environment.ROOT / "docs" / "memory.md"


def measure_case(name: str, sizes: Sizes, threads: int) -> dict[str, Any]:
    """One row for each of `WAYS`, {"skipped": reason} where one cannot run or the machine is too
    small."""
    reason, rows = cpu.lacking(OP, sizes, DTYPE, process_memory.available_bytes()), {}
    for way in WAYS:
        try:
            task = partial(cpu.peak_memory, OP, sizes, DTYPE, way)
            rows[way] = {"skipped": reason} if reason else in_child(task, threads)
        except isolated.MeasurementError as error:
            rows[way] = {"skipped": str(error)}
        print(f"{way}: {_cells(rows[way])[0]} MiB", flush=True)
    return heading(OP, name, sizes, DTYPE) | {"rows": rows}


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    """Peak, and what of it is no gradient."""
    if "skipped" in row:
        return "not measured", "not measured"
    return (
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{(row['peak_bytes'] - row['gradient_bytes']) / 2**20:.0f}",
    )


def table(case: dict[str, Any]) -> str:
    """A line for each implementation, the reasons of those who could not run below it."""
    rows = [[name, NAMES[name], *_cells(row)] for name, row in case["rows"].items()]
    reasons = [
        f"* {name}: {row['skipped']}" for name, row in case["rows"].items() if "skipped" in row
    ]
    return "\n".join(
        [tables.markdown(["", "what it is", "peak MiB", "beyond the gradients"], rows), *reasons]
    )


def page(document: dict[str, Any], source: str) -> str:
    """docs/memory.md from one JSON."""
    lines = [
        "# Peak memory of a real head",
        "",
        "Written by `python -m benchmarks.suites.memory` from results that `python -m benchmarks "
        "--case memory --save`",
        "kept; nothing here is typed by hand. Forward and backward; the most bytes resident in "
        "the second step of a",
        "fresh process above those before it (which hold the inputs), the gradients that a step "
        "returns included.",
        f"Machine: {environment.machine_line(document['machine'])}. [The JSON]({source}).",
    ]
    for case in document["cases"]:
        sizes = ", ".join(f"{key} = {size}" for key, size in case["sizes"].items())
        lines += ["", f"## {case['name']}: {sizes}, {case['dtype']}", "", table(case)]
    return "\n".join([*lines, ""])


def run(options: argparse.Namespace) -> int:
    """Measure, print, write; 1 when ours could not be measured or its tests are red."""
    if options.csv or options.markdown or options.html:
        print("benchmarks: --case memory writes --json and --save", file=sys.stderr)
        return 2
    if options.quick and options.save:
        print(
            "benchmarks: --case memory: --save keeps real sizes only, leave out --quick",
            file=sys.stderr,
        )
        return 2
    info = environment.machine(options.threads)
    print(environment.machine_line(info), flush=True)
    if gate.refused([OP.name]):
        return 1
    chosen = QUICK if options.quick else CASES
    cases = [measure_case(name, sizes, options.threads) for name, sizes in chosen.items()]
    print("\n".join(["", *map(table, cases)]))
    document = {"machine": info, "quick": options.quick, "study": "memory", "cases": cases}
    for path in (
        options.json,
        storage.results_path(info, kind="-memory") if options.save else None,
    ):
        if path:
            storage.write_json(path, document)
            print(f"written to {path}")
    return int(any("skipped" in case["rows"]["ours"] for case in cases))


def main(out: Path = PAGE) -> int:
    """Write the page; 1 when no results are kept."""
    path = newest("-memory")
    if path is None:
        print(
            "benchmarks.suites.memory: no results, run `python -m benchmarks --case memory --save`",
            file=sys.stderr,
        )
        return 1
    storage.write(out, page(storage.read(path), f"../{path.relative_to(environment.ROOT)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
