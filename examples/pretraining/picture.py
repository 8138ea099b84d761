"""One picture of a comparison: what each run did to held-out text, to its hidden states, to the clock."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .checkpoint import write_whole
from .fused_head import HeadCost
from .report import Outcome

SMOOTH = 20
"""Steps in the running median of the step time."""


def draw(path: Path, outcomes: list[Outcome], costs: list[HeadCost]) -> None:
    """Write the curves as PNG.

    Raises:
        OSError: the disk refused; an older picture is intact.
    """
    matplotlib.use("Agg")
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for index, outcome in enumerate(outcomes):
        _curves(axes, outcome, f"C{index}")
    titles = {
        "held-out cross-entropy": "nats a byte",
        "held-out implicit-token loss and floor (dashed)": "1 - cos",
        "effective rank, last hidden state": "exp(entropy of spectrum)",
        "mean pairwise cosine, last hidden state": "cos",
        f"step time (median of {SMOOTH})": "ms",
    }
    for axis, (title, unit) in zip(axes, titles.items(), strict=False):
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[4].set_ylim(bottom=0)
    if axes[1].has_data():
        axes[1].legend()
    _head(axes[5], costs)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    write_whole(path, buffer.getvalue())


def _curves(axes: list[Axes], outcome: Outcome, color: str) -> None:
    looks = outcome.looks
    steps = [int(row["step"]) for row in looks]

    def plot(axis: Axes, column: str, label: str, style: str = "-") -> None:
        axis.plot(steps, [float(row[column]) for row in looks], style, color=color, label=label)

    plot(axes[0], "cross_entropy", outcome.name)
    for label in outcome.final.latent:
        plot(axes[1], f"{label}/loss", f"{outcome.name}: {label}")
        plot(axes[1], f"{label}/floor", "constant predictor", "--")
    plot(axes[2], "effective_rank", outcome.name)
    plot(axes[3], "mean_pairwise_cosine", outcome.name)
    seconds = [float(row["seconds"]) for row in outcome.steps]
    smooth = [statistics.median(seconds[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(seconds))]
    axes[4].plot([int(row["step"]) for row in outcome.steps], [1e3 * s for s in smooth], color=color)


def _head(axis: Axes, costs: list[HeadCost]) -> None:
    if not costs:
        axis.set_axis_off()
        return
    axis.bar([cost.implementation for cost in costs], [cost.peak_bytes / 2**20 for cost in costs], width=0.5)
    for index, cost in enumerate(costs):
        axis.annotate(f"{cost.seconds:.2f} s", (index, cost.peak_bytes / 2**20), ha="center", va="bottom")
    axis.set(title=f"output head, V = {costs[0].vocab:,}", ylabel="peak memory, MiB")
    axis.margins(y=0.15)
