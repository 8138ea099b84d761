"""`python -m benchmarks.report.readme`: writes README's table of numbers from the quick results
that were kept last."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.implementations import NAMES

from .environment import ROOT, machine_line
from .figures import picture
from .plots import FOLDER
from .storage import newest, read, write
from .tables import markdown

README = ROOT / "README.md"
BEGIN, END = "<!-- numbers: python -m benchmarks.report.readme -->", "<!-- end of numbers -->"
ALWAYS = ("ours", "eager", "compile")


def section(path: Path) -> str:
    """The text between the markers, from one JSON of a quick run."""
    document = read(path)
    cases = document["cases"]
    ran = {name for case in cases for name, row in case["rows"].items() if "times_floor" in row}
    names = [
        name for name in NAMES if name in ALWAYS or (name in ran and not name.startswith("ours"))
    ]
    lines = [
        "Forward and backward, `python -m benchmarks --quick` on "
        f"{machine_line(document['machine'])}:",
        "time against the floor (the op's library GEMMs at the same shapes, or a copy of the same "
        "bytes) and peak",
        "extra memory of a fresh process, gradients included. Every row, with spreads, errors and "
        "the reasons of those",
        f"who cannot run there: [the JSON]({path.relative_to(ROOT)}).",
        "",
        markdown(
            ["op", "case", "dtype", *names, "ours, MiB", "eager, MiB"],
            [_line(case, names) for case in cases],
        ),
    ]
    losing = []
    for name in names[1:]:
        pairs = [(case, _time(case, "ours"), _time(case, name)) for case in cases]
        slower = [
            (case, ours / other)
            for case, ours, other in pairs
            if ours and other and round(ours / other, 2) > 1
        ]
        listed = "; ".join(
            f"{case['op']} in {case['dtype']} ({ratio:.2f})" for case, ratio in slower
        )
        losing.append(f"* Slower than {name}: {listed or 'none'}.")
    return "\n".join([*lines, "", *losing, *_growth()])


def _growth() -> list[str]:
    """The figure of growth, where results are kept that it is drawn from."""
    if newest("-scaling") is None:
        return []
    drawn = picture(f"docs/{FOLDER}/time", "time against the size of the problem")
    return [
        "",
        "How time and memory grow, errors against chunks, the roofline: [growth](docs/growth.md).",
        "",
        drawn,
    ]


def _time(case: dict[str, Any], name: str) -> float | None:
    return case["rows"].get(name, {}).get("times_floor", {}).get("median")


def _line(case: dict[str, Any], names: list[str]) -> list[str]:
    shape = " ".join(f"{name}={size}" for name, size in case["sizes"].items())
    times = [_time(case, name) for name in names]
    memory = [case["rows"][name].get("peak_bytes") for name in ("ours", "eager")]
    return [
        case["op"],
        f"{case.get('name', '')} {shape}".strip(),
        case["dtype"],
        *("-" if each is None else f"{each:.2f}" for each in times),
        *("-" if each is None else f"{each / 2**20:.0f}" for each in memory),
    ]


def written(text: str, path: Path) -> str:
    """`text` with the section of `path` between its markers."""
    new = f"{BEGIN}\n{section(path)}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: new, text, flags=re.DOTALL)


def main() -> int:
    """Write the table; 1 where no quick results are kept, or where they are damaged."""
    try:
        path = newest("-quick")
        if path is not None:
            write(README, written(README.read_text(), path))
            return 0
        reason = "no quick results are kept, run `python -m benchmarks --quick --save`"
    except OSError as error:
        reason = str(error)
    print(f"benchmarks.report.readme: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
