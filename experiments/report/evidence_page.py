"""docs/evidence.md and its figures: every number from a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import storage
from benchmarks.report.figures import frame, picture, svg
from benchmarks.report.tables import Table
from experiments.analysis.statistics import Difference, no_verdict, shown_as

from .table import formatted

#: Text and frames, then a colour an arm.
THEMES = {
    "light": ("#1f2328", ("#57606a", "#1a7f37", "#0969da")),
    "dark": ("#e6edf3", ("#8b949e", "#3fb950", "#58a6ff")),
}
INTRODUCTION = """\
What the objectives do to the held-out loss of a small model, with equal tokens (every run takes the same batches) and
with equal time (an arm takes as many steps as fit into the training time of the baseline; the ratio of step times comes
from interleaved steps). Each run has its own whole schedule of learning rates. Written by the command below: no number
in it was typed by hand."""
READING = """\
Cross-entropy: next byte, nats, the same held-out windows in every run. ± is one standard deviation over seeds; a
difference is paired by seed (the same first weights, the same order of the data) and its ± is {spread}. Runs
this short say that the objectives train; what they do to a useful model is in their papers."""

Lines = Sequence[dict[str, Any]]


def write(path: Path, found: dict[str, list[dict[str, Any]]], facts: Sequence[str]) -> None:
    """Write the page and, beside it, the figures.

    Args:
        found: the records of the runs on each text.
        facts: command, machine, commit, time, budget, one each.

    Raises:
        OSError: the disk refused; an older page is intact.
    """
    seeds = len({run["seed"] for runs in found.values() for run in runs})
    lines = ["# Evidence", "", INTRODUCTION, "", *(f"* {fact}" for fact in facts), ""]
    lines += [READING.format(spread=shown_as(seeds)), *filter(None, [no_verdict(seeds)])]
    for place, (text, runs) in enumerate(found.items()):
        name = f"{path.stem}-{place + 1}"
        for theme, (ink, colours) in THEMES.items():
            storage.write(path.with_name(f"{name}-{theme}.svg"), _figure(runs, ink, colours))
        lines += [
            "",
            f"## {text}",
            "",
            table(runs).as_markdown(),
            "",
            picture(name, "held-out cross-entropy"),
        ]
    storage.write(path, "\n".join(lines) + "\n")


def groups(runs: Lines) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The runs of each (arm, budget), seeds rising."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda each: each["seed"]):
        found.setdefault((run["arm"], run["budget"]), []).append(run)
    return found


def difference(first: Lines, other: Lines) -> Difference:
    """In held-out cross-entropy, paired by seed."""
    pairs = [(a, b) for a in first for b in other if a["seed"] == b["seed"]]
    return Difference.between(
        [a["cross_entropy"] for a, _ in pairs], [b["cross_entropy"] for _, b in pairs]
    )


def _baseline(found: dict[tuple[str, str], Any]) -> Any:
    return next(runs for (arm, _), runs in found.items() if arm == "ntp")


def table(runs: Lines) -> Table:
    """A row an arm and budget."""
    found = groups(runs)
    base = _baseline(found)
    rows = []
    for (arm, budget), group in sorted(
        found.items(), key=lambda item: (item[0][1] == "equal time", item[0][0] != "ntp")
    ):
        less = "-" if group is base else difference(base, group).formatted(".4f")
        numbers = [
            formatted([run[key] for run in group], form)
            for key, form in (
                ("cross_entropy", ".4f"),
                ("effective_rank", ".1f"),
                ("mean_cosine", ".3f"),
            )
        ]
        seconds = formatted([run["seconds"] for run in group], ".1f")
        rows.append(
            [
                f"{arm}, {budget}",
                group[0]["expression"],
                f"{group[0]['tokens']:,}",
                seconds,
                numbers[0],
                less,
                *numbers[1:],
            ]
        )
    header = [
        "",
        "objective",
        "tokens",
        "training, s",
        "cross-entropy",
        "less ntp",
        "effective rank",
        "mean cosine",
    ]
    return Table(
        f"held-out text, {len(base)} seeds" if len(base) > 1 else "held-out text, one seed",
        header,
        rows,
    )


def _figure(runs: Lines, ink: str, colours: Sequence[str]) -> str:
    """Held-out cross-entropy against tokens (equal tokens) and against seconds of training (equal
    time), as SVG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    panels = (("equal tokens", 0, "tokens"), ("equal time", 1, "seconds of training"))
    for axis, (budget, column, label) in zip(
        figure.subplots(1, 2, sharey=True), panels, strict=True
    ):
        for run in runs:
            if run["budget"] != budget and run["arm"] != "ntp":
                continue
            points = [(point[column], point[2]) for point in run["curve"]]
            first = run["seed"] == runs[0]["seed"]
            colour = colours[arms.index(run["arm"]) % len(colours)]
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1,
                label=run["arm"] if first else None,
            )
        axis.set_title(budget, fontsize=9)
        axis.set_xlabel(label)
        frame(axis, ink)
        axis.legend(labelcolor=ink, frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("held-out nats a byte")
    return svg(figure)
