"""One HTML page of a run. Needs jinja2, matplotlib."""

from __future__ import annotations

from typing import Any

from . import environment, pages, plots, printed, records
from .tables import Table


def render(document: dict[str, Any]) -> str:
    """The page."""
    from markupsafe import Markup

    cases = document["cases"]
    return pages.render(
        "run.html",
        title=f"nitp_ops against others: {len(cases)} cases",
        facts=[
            ("machine", environment.machine_line(document["machine"])),
            ("measured", document["machine"].get("date", "at an unknown time")),
            ("run", "quick, small sizes" if document.get("quick") else "full sizes"),
        ],
        chart=Markup(plots.bars(document)),
        cases=[
            {
                "table": _table(name, rows),
                "notes": [f"{row['implementation']}: {row['note']}" for row in rows if row["note"]],
            }
            for name, rows in records.grouped(document).items()
        ],
        legend=printed.legend(cases).splitlines(),
        verdicts=printed.against_eager(cases),
    )


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    title = " ".join([f"{name}.", *records.work(rows[0])[:1]])
    return Table(title, records.HEADER, list(map(records.shown, rows)))
