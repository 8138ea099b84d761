"""The tables of a comparison: arms, results, probes, the output head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import rich.table
from rich import box

from benchmarks.report.tables import Table
from experiments.analysis.arms import Arm
from experiments.analysis.fused_head import HeadCost
from experiments.analysis.probing import LINEAR, MAJORITY, NEAREST, OFFSETS
from experiments.analysis.results import Measure, Result
from experiments.analysis.statistics import deviation, mean

WIDE = 4
"""From more arms than this on, each is a row."""


Arms = Sequence[Sequence[Result]]
"""The results of each arm, a seed each."""


def for_terminal(table: Table) -> rich.table.Table:
    """As rich prints it."""
    shown = rich.table.Table(box=box.SIMPLE_HEAD, title=table.title, title_justify="left")
    for heading, right in zip(table.header, table.numeric, strict=True):
        shown.add_column(heading, justify="right" if right else "left", overflow="fold")
    shown.columns[0].no_wrap = True
    for row in table.rows:
        shown.add_row(*row)
    return shown


def by_arm(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one arm together, arms in the order in which they first came, seeds rising."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.arm.name, []).append(result)
    return [sorted(group, key=lambda result: result.seed) for group in found.values()]


def formatted(values: Sequence[float], form: str) -> str:
    """``mean ± standard deviation`` over seeds; the number alone where all agree; "-" for NaN."""
    if math.isnan(centre := mean(values)):
        return "-"
    return (
        f"{centre:{form}}"
        if len(set(values)) == 1
        else f"{centre:{form}} ± {deviation(values):{form}}"
    )


def cell(measure: Measure, group: Sequence[Result]) -> str:
    """What a measure says about an arm, one number for each latent term."""
    parts = zip(*(measure.values(result) for result in group), strict=True)
    return ", ".join(formatted(values, measure.form) for values in parts) or "-"


def measured(arms: Arms, measures: Sequence[Measure], *, wide: bool = False) -> Table:
    """The measures of each arm: a column an arm where they are few, else (or if `wide`) a row."""
    rows = [[group[0].arm.name, *(cell(measure, group) for measure in measures)] for group in arms]
    table = Table(
        f"held-out text, after the last step{seeds(arms)}", ["", *(m.title for m in measures)], rows
    )
    return table if wide or len(arms) > WIDE else table.transposed()


def plan(arms: Sequence[Arm]) -> Table:
    """What each arm is for."""
    rows = [
        [a.name, a.expression, a.tests or "-", "-" if a.paper is None else f"{a.paper:.2f}"]
        for a in arms
    ]
    return Table(
        "arms", ["", "objective", "what it tests", "paper's score, not measured here"], rows
    )


def probes(arms: Arms, *, wide: bool = False) -> Table:
    """The accuracy of both probes at each offset, the majority class first: columns where arms are
    few, else rows."""

    def row(name: str, key: str, group: Sequence[Result]) -> list[str]:
        accuracies = ([result.numbers[f"{key}/{offset}"] for result in group] for offset in OFFSETS)
        return [name, *(formatted(values, ".3f") for values in accuracies)]

    # The text decides the majority class, not the seed: one result tells it.
    rows = [row("most frequent token", MAJORITY, arms[0][:1])]
    for name, key in (("linear", LINEAR), ("nearest neighbours", NEAREST)):
        rows += [row(f"{group[0].arm.name}: {name}", key, group) for group in arms]
    title = f"accuracy of probes for x[t+j] on the frozen last hidden state{seeds(arms)}"
    table = Table(title, ["", *(f"j = {offset}" for offset in OFFSETS)], rows)
    return table if wide or len(arms) > WIDE else table.transposed()


def seeds(arms: Arms) -> str:
    """What the cells hold when there is more than one seed."""
    most = max(map(len, arms))
    return f", mean ± standard deviation over {most} seeds" if most > 1 else ""


def head_table(costs: Sequence[HeadCost]) -> Table:
    """Eager and fused side by side."""
    one = costs[0]
    title = f"output head, forward and backward, {one.rows} rows, d = {one.dim}, V = {one.vocab:,}, {one.dtype}"
    rows = [
        [
            cost.implementation,
            f"{cost.peak_bytes / 2**20:,.0f}",
            f"{cost.peak_bytes / one.peak_bytes:.2f}",
            f"{cost.seconds:.2f}",
            f"{cost.seconds / one.seconds:.2f}",
            f"{cost.loss:.4f}",
        ]
        for cost in costs
    ]
    header = [
        "",
        "peak memory, MiB",
        f"/ {one.implementation}",
        "seconds",
        f"/ {one.implementation}",
        "loss",
    ]
    return Table(title, header, rows)
