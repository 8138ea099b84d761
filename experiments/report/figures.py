"""One figure of a comparison: what each run did to held-out text, to its hidden states, to the
clock."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.figures import INK, STYLE, inline
from experiments.analysis.fused_head import HeadCost
from experiments.analysis.results import COSINE, CROSS_ENTROPY, RANK, Result, difference, pairs
from experiments.analysis.statistics import shown_as
from experiments.train.checkpoint import write_whole

from .table import WIDE, Arms

SMOOTH = 20
"""Steps in the running median of the step time."""
POINTS = 400
"""The most points of a curve: a long run needs no more."""
COLOURS = dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
)


def draw(path: Path, arms: Arms, costs: Sequence[HeadCost]) -> str:
    """Write the curves as PNG; return them as an SVG element, its text and frames in the colour of
    the page's text.

    Raises:
        OSError: the disk refused; an older figure is intact.
    """
    with matplotlib.rc_context({**STYLE, **COLOURS, "legend.framealpha": 0.0}):
        figure, png = _figure(arms, costs), io.BytesIO()
        figure.savefig(png, dpi=110, format="png")
        element = inline(figure)
    write_whole(path, png.getvalue())
    return element


def differences(path: Path, arms: Arms) -> None:
    """Write, as PNG, what each arm differs by from the first, and how far seeds differ in it.

    Raises:
        OSError: the disk refused; an older figure is intact.
    """
    first, *others = arms
    names = [group[0].arm.name for group in others]
    figure = Figure(figsize=(13, 1.5 + 0.3 * len(others)), layout="constrained")
    for axis, measure in zip(
        figure.subplots(1, 3, sharey=True), (CROSS_ENTROPY, RANK, COSINE), strict=True
    ):
        for place, group in enumerate(others):
            if not (paired := pairs(first, group)):
                continue
            found = difference(measure, paired)
            axis.errorbar(
                found.mean,
                place,
                xerr=0 if math.isnan(found.half_width) else found.half_width,
                fmt="oC0",
            )
        axis.axvline(0, color="gray", linewidth=1)
        axis.set(xlabel=measure.title, yticks=range(len(names)), yticklabels=names)
        axis.grid(alpha=0.3)
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        f'difference from "{first[0].arm.name}", paired by seed, ± {shown_as(min(map(len, arms)))}'
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    write_whole(path, buffer.getvalue())


def _figure(arms: Arms, costs: Sequence[HeadCost]) -> Figure:
    figure = Figure(figsize=(13, 7))
    # By hand: a layout engine takes longer than the drawing.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.07, top=0.95, wspace=0.22, hspace=0.28)
    axes = figure.subplots(2, 3).ravel()
    for index, group in enumerate(arms):
        color = (
            f"C{index}"
            if len(arms) <= 10
            else matplotlib.colormaps["turbo"](index / (len(arms) - 1))
        )
        for result in group:
            _curves(axes, result, color, first=result is group[0])
    titles = {
        "held-out cross-entropy": "nats a byte",
        "held-out cosine terms, constant predictor dashed": "1 - cos",
        "effective rank, last hidden state": "exp(entropy of spectrum)",
        "mean pairwise cosine, last hidden state": "cos",
        f"step time (median of {SMOOTH})": "ms",
    }
    for axis, (title, unit) in zip(axes, titles.items(), strict=False):
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.grid(alpha=0.3)
    axes[4].set_ylim(bottom=0)
    if len(arms) > WIDE:  # the legend takes the last place
        axes[5].set_axis_off()
        axes[5].legend(
            *axes[0].get_legend_handles_labels(), loc="center", ncols=2, fontsize="small"
        )
        return figure
    for axis in axes[:2]:
        if axis.has_data():
            axis.legend()
    _head(axes[5], costs)
    return figure


def _curves(axes: Sequence[Axes], result: Result, color: object, first: bool) -> None:
    looks = _thinned(result.looks)
    steps = [int(row["step"]) for row in looks]

    def plot(axis: Axes, column: str, label: str, style: str = "-") -> None:
        values = [float(row.get(column, "nan")) for row in looks]
        if any(map(math.isfinite, values)):
            axis.plot(steps, values, style, color=color, label=label if first else None)

    plot(axes[0], "cross_entropy", result.arm.name)
    for label in result.labels:
        if not any(
            math.isfinite(float(row.get(f"{label}/constant_predictor_loss", "nan")))
            for row in looks
        ):
            continue  # another distance has another unit
        plot(axes[1], f"{label}/loss", f"{result.arm.name}: {label}")
        plot(axes[1], f"{label}/constant_predictor_loss", "constant predictor", "--")
    plot(axes[2], "effective_rank", result.arm.name)
    plot(axes[3], "mean_pairwise_cosine", result.arm.name)
    seconds = [float(row["seconds"]) for row in result.steps]
    smooth = [
        (i, 1e3 * statistics.median(seconds[max(0, i - SMOOTH + 1) : i + 1]))
        for i in range(len(seconds))
    ]
    if smooth:
        axes[4].plot(*zip(*_thinned(smooth), strict=True), color=color)


def _thinned(points: list) -> list:
    """At most about POINTS of them, evenly spaced, the last one among them."""
    return points[:: -max(1, len(points) // POINTS)][::-1]


def _head(axis: Axes, costs: Sequence[HeadCost]) -> None:
    if not costs:
        axis.set_axis_off()
        return
    axis.bar(
        [cost.implementation for cost in costs],
        [cost.peak_bytes / 2**20 for cost in costs],
        width=0.5,
    )
    for index, cost in enumerate(costs):
        axis.annotate(
            f"{cost.seconds:.2f} s", (index, cost.peak_bytes / 2**20), ha="center", va="bottom"
        )
    axis.set(title=f"output head, V = {costs[0].vocab:,}", ylabel="peak memory, MiB")
    axis.margins(y=0.15)
