"""Tables as plain cells, so that the terminal, the page and the document show the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from experiments.analysis.arms import Arm
from experiments.analysis.fused_head import HeadCost
from experiments.analysis.probing import LINEAR, MAJORITY, NEAREST, OFFSETS
from experiments.analysis.results import Measure, Outcome
from experiments.analysis.statistics import deviation, mean

WIDE = 4
"""From more arms than this on, each is a row."""


@dataclass(frozen=True)
class Grid:
    """A title, a header, rows of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column: every cell is a number, or a dash for want of one."""
        columns = zip(*self.rows, strict=True)
        return [all(cell.lstrip("+-")[:1] in "0123456789" for cell in column) for column in columns]

    def transposed(self) -> Grid:
        """Rows as columns; the corner stays."""
        header, *rows = ([*line] for line in zip(self.header, *self.rows, strict=True))
        return Grid(self.title, header, rows)

    def for_terminal(self) -> Table:
        """As rich prints it."""
        table = Table(box=box.SIMPLE_HEAD, title=self.title, title_justify="left")
        for heading, right in zip(self.header, self.numeric, strict=True):
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        table.columns[0].no_wrap = True
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [self.header, ["---:" if right else "---" for right in self.numeric], *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(map(_cell, line))} |" for line in lines)])


Arms = Sequence[Sequence[Outcome]]
"""The outcomes of each arm, a seed each."""


def by_arm(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """Outcomes of one arm together, arms in the order in which they first came, seeds rising."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.arm.name, []).append(outcome)
    return [sorted(group, key=lambda outcome: outcome.seed) for group in found.values()]


def spelled(values: Sequence[float], form: str) -> str:
    """``mean ± standard deviation`` over seeds; the number alone where all agree; "-" for NaN."""
    if math.isnan(centre := mean(values)):
        return "-"
    return f"{centre:{form}}" if len(set(values)) == 1 else f"{centre:{form}} ± {deviation(values):{form}}"


def cell(measure: Measure, group: Sequence[Outcome]) -> str:
    """What a measure says about an arm, one number for each latent term."""
    parts = zip(*(measure.values(outcome) for outcome in group), strict=True)
    return ", ".join(spelled(values, measure.form) for values in parts) or "-"


def results(arms: Arms, measures: Sequence[Measure], *, wide: bool = False) -> Grid:
    """The measures of each arm: a column an arm where they are few, else (or if `wide`) a row."""
    rows = [[group[0].arm.name, *(cell(measure, group) for measure in measures)] for group in arms]
    grid = Grid(f"held-out text, after the last step{seeds(arms)}", ["", *(m.title for m in measures)], rows)
    return grid if wide or len(arms) > WIDE else grid.transposed()


def plan(arms: Sequence[Arm]) -> Grid:
    """What each arm is for."""
    rows = [[a.name, a.expression, a.tests or "-", "-" if a.paper is None else f"{a.paper:.2f}"] for a in arms]
    return Grid("arms", ["", "objective", "what it tests", "paper's score, not measured here"], rows)


def probes(arms: Arms, *, wide: bool = False) -> Grid:
    """The accuracy of both probes at each offset, the majority class first: columns where arms are few, else rows."""

    def row(name: str, key: str, group: Sequence[Outcome]) -> list[str]:
        accuracies = ([outcome.numbers[f"{key}/{offset}"] for outcome in group] for offset in OFFSETS)
        return [name, *(spelled(values, ".3f") for values in accuracies)]

    # The text decides the majority class, not the seed: one outcome tells it.
    rows = [row("most frequent token", MAJORITY, arms[0][:1])]
    for name, key in (("linear", LINEAR), ("nearest neighbours", NEAREST)):
        rows += [row(f"{group[0].arm.name}: {name}", key, group) for group in arms]
    title = f"accuracy of probes for x[t+j] on the frozen last hidden state{seeds(arms)}"
    grid = Grid(title, ["", *(f"j = {offset}" for offset in OFFSETS)], rows)
    return grid if wide or len(arms) > WIDE else grid.transposed()


def seeds(arms: Arms) -> str:
    """What the cells hold when there is more than one seed."""
    most = max(map(len, arms))
    return f", mean ± standard deviation over {most} seeds" if most > 1 else ""


def head_grid(costs: Sequence[HeadCost]) -> Grid:
    """Eager and fused side by side."""
    one = costs[0]
    title = f"output head, forward and backward, {one.rows} rows, d = {one.dim}, V = {one.vocab:,}, {one.dtype}"
    rows = [[c.implementation, f"{c.peak_bytes / 2**20:,.0f}", f"{c.seconds:.2f}", f"{c.loss:.4f}"] for c in costs]
    return Grid(title, ["", "peak memory, MiB", "seconds", "loss"], rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
