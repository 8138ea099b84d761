"""`python -m benchmarks.readme`: writes README's table of numbers from the committed results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from .report import RESULTS, ROOT, machine_line

README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: python -m benchmarks.readme -->", "<!-- end of numbers -->"
COLUMNS = ("ours", "eager", "compile")


def section(path: Path) -> str:
    """The text between the markers, from one JSON of a quick run."""
    document = json.loads(path.read_text())
    lines = [
        f"Forward and backward, `python -m benchmarks --quick` on {machine_line(document['machine'])}:",
        "time against the floor (the op's library GEMMs at the same shapes, or a copy of the same bytes) and peak",
        "extra memory of a fresh process, gradients included. Every row, with spreads and errors:",
        f"[the JSON]({path.relative_to(ROOT)}).",
        "",
        "| op | shape | dtype | ours | eager | torch.compile | ours, MiB | eager, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(case) for case in document["cases"]),
    ]
    slower = [case for case in document["cases"] if case["rows"]["ours"]["times_eager"]["median"] > 1]
    slow = "; ".join(
        f"{case['op']} in {case['dtype']} ({case['rows']['ours']['times_eager']['median']:.2f})" for case in slower
    )
    return "\n".join([*lines, "", f"Slower than eager: {slow or 'none'}."])


def _line(case: dict[str, Any]) -> str:
    rows = case["rows"]
    shape = " ".join(f"{name}={size}" for name, size in case["sizes"].items())
    times = [f"{rows[name]['times_floor']['median']:.2f}" for name in COLUMNS]
    memory = [f"{rows[name]['peak_bytes'] / 2**20:.0f}" for name in ("ours", "eager")]
    return f"| {case['op']} | {shape} | {case['dtype']} | {' | '.join([*times, *memory])} |"


def written(text: str, path: Path) -> str:
    """`text` with the section of `path` between its markers."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", f"{BEGIN}\n{section(path)}\n{END}", text, flags=re.DOTALL)


def quick_results() -> list[Path]:
    return sorted(RESULTS.glob("*/*-quick.json"))


def main() -> int:
    found = quick_results()
    if len(found) != 1:
        print(f"benchmarks.readme: {len(found)} quick results under {RESULTS}, expected one", file=sys.stderr)
        return 1
    README.write_text(written(README.read_text(), found[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
