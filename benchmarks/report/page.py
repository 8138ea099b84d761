"""One self-contained HTML page of a run: opens from the disk, loads nothing, runs nothing. Needs jinja2, matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import plots, printed, records

#: The stylesheet and the table are those of the report of a training run.
TEMPLATES = (Path(__file__).parent, printed.ROOT / "experiments" / "report")


def render(document: dict[str, Any]) -> str:
    """The page; text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    cases = document["cases"]
    return environment.get_template("page.html").render(
        title=f"nitp_ops against others: {len(cases)} cases",
        facts=[
            ("machine", printed.machine_line(document["machine"])),
            ("measured", document["machine"].get("date", "at an unknown time")),
            ("run", "quick, small sizes" if document.get("quick") else "full sizes"),
        ],
        chart=Markup(plots.bars(document)),
        cases=[
            {
                "grid": {
                    "title": " ".join([f"{name}.", *records.work(rows[0])[:1]]),
                    "header": records.HEADER,
                    "rows": list(map(records.shown, rows)),
                    "numeric": [False] + [True] * (len(records.HEADER) - 1),
                },
                "notes": [f"{row['implementation']}: {row['note']}" for row in rows if row["note"]],
            }
            for name, rows in records.grouped(document).items()
        ],
        legend=printed.legend(cases).splitlines(),
        verdict=printed.verdict(cases),
    )
