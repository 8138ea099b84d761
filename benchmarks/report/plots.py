"""`python -m benchmarks plot`: figures and docs/growth.md from the newest scaling results that were
kept.

Every figure is two SVG files, one for a light and one for a dark page. The same results give the
same bytes. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS

from . import environment, storage, tables
from .figures import INK, frame, inline, picture, svg

DOCS = environment.ROOT / "docs"
FOLDER = "plots"
#: Text and frames; then the colours of ours, eager and the peer.
THEMES = {
    "light": ("#1f2328", "#1a7f37", "#57606a", "#cf222e"),
    "dark": ("#e6edf3", "#3fb950", "#8b949e", "#ff7b72"),
}
UNITS = {"milliseconds": ("time, ms", 1.0), "extra_bytes": ("extra memory, MiB", 2.0**-20)}
PLACES = {"ours": 1, "nitp_ops": 1, "eager": 2, "torch-best": 3, "F.linear_cross_entropy": 3}


def _figure(ink: str, columns: int, height: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        frame(axis, ink)
    return figure, axes


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 times each power of ten, written out: matplotlib's labels are formulas, which
    `svg` leaves alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_locator(NullLocator())


def growth(document: dict[str, Any], key: str, colours: tuple[str, ...]) -> Any:
    """A panel an axis: time or extra memory of each against the size."""
    label, unit = UNITS[key]
    figure, axes = _figure(colours[0], len(document["sweeps"]))
    for axis, found in zip(axes, document["sweeps"], strict=True):
        for name in found["exponents"]:
            sizes = [point["size"] for point in found["points"]]
            values = [max(unit * point["rows"][name][key], 1e-3) for point in found["points"]]
            power = found["exponents"][name]["time" if key == "milliseconds" else "memory"]
            axis.loglog(
                sizes,
                values,
                marker="o",
                ms=3,
                color=colours[PLACES[name]],
                label=f"{name}: {found['axis']}^{power:.2f}",
            )
        fixed = ", ".join(f"{name} = {value}" for name, value in found["fixed"].items())
        axis.set_xlabel(f"{found['axis']}  ({fixed})")
        _plain_ticks(axis)
        axis.legend(labelcolor=colours[0], frameon=False, fontsize=7)
    axes[0].set_ylabel(f"{label}, {document['sweeps'][0]['dtype']}")
    return figure


def errors(document: dict[str, Any], colours: tuple[str, ...]) -> Any:
    """Loss, dh and dW: the error of each against the number of chunks."""
    found = document["errors"]
    figure, axes = _figure(colours[0], 3)
    for place, (axis, title) in enumerate(zip(axes, ("loss", "dh", "dW"), strict=True)):
        for name, lines in found["lines"].items():
            style = ":" if name == "eager" else "-"
            values = [line[place] for line in lines]
            axis.loglog(
                found["chunks"],
                values,
                style,
                marker="o",
                ms=3,
                color=colours[PLACES[name]],
                label=name,
            )
        axis.set_title(title, fontsize=9)
        _plain_ticks(axis)
        axis.set_xlabel("chunks")
    axes[0].set_ylabel("error against float64, bfloat16")
    axes[0].legend(labelcolor=colours[0], frameon=False, fontsize=7)
    return figure


def roofline(document: dict[str, Any], colours: tuple[str, ...]) -> Any:
    """GFLOP/s against FLOPs a byte, under the copy's bandwidth and the best GEMM's rate."""
    found = document["roofline"]
    figure, (axis,) = _figure(colours[0], 1, height=3.4)
    figure.set_figwidth(5)
    intensities = [point["intensity"] for point in found["points"]]
    knee = found["gflop_per_s"] / found["gb_per_s"]
    ends = [min(*intensities, knee), knee, max(*intensities, knee)]
    roof = [min(found["gflop_per_s"], found["gb_per_s"] * end) for end in ends]
    axis.loglog(
        ends, roof, "--", color=colours[0], linewidth=1, label="copy's bandwidth, best GEMM"
    )
    for name in found["points"][0]["gflop_per_s"]:
        rates = [point["gflop_per_s"][name] for point in found["points"]]
        axis.loglog(intensities, rates, marker="o", ms=4, color=colours[PLACES[name]], label=name)
    for point in found["points"]:
        at = point["intensity"], point["gflop_per_s"]["ours"]
        axis.annotate(
            f"N={point['N']}",
            at,
            color=colours[0],
            fontsize=6,
            xytext=(3, -9),
            textcoords="offset points",
        )
    axis.set_xlabel(f"FLOPs a byte that must move (d = {found['d']}, V = {found['V']})")
    axis.set_ylabel(f"GFLOP/s, {found['dtype']}")
    _plain_ticks(axis)
    axis.legend(labelcolor=colours[0], frameon=False, fontsize=7)
    return figure


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any], tuple[str, ...]], Any]]] = {
    "time": (
        "Time against the size of the problem",
        lambda document, c: growth(document, "milliseconds", c),
    ),
    "memory": (
        "Extra memory against the size of the problem",
        lambda document, c: growth(document, "extra_bytes", c),
    ),
    "error": ("Error against the number of chunks", errors),
    "roofline": ("Roofline", roofline),
}


def bars(document: dict[str, Any]) -> str:
    """An SVG element in the colour of the page's text: time over the floor of each implementation,
    a group a case."""
    from . import records

    groups = {
        title: [
            row
            for row in rows
            if row["times_floor"] is not None and row["implementation"] != "floor"
        ]
        for title, rows in records.grouped(document).items()
    }
    figure, (axis,) = _figure(
        INK, 1, height=0.6 + sum(0.18 * len(rows) + 0.3 for rows in groups.values())
    )
    figure.set_figwidth(11)
    place, ticks = 0.0, []
    for title, rows in groups.items():
        axis.text(0, place, title, color=INK, fontsize=8, va="center", fontweight="bold")
        for row in rows:
            place += 1
            colour = (
                THEMES["dark"][1] if row["implementation"].startswith("ours") else THEMES["dark"][2]
            )
            axis.barh(place, row["times_floor"], color=colour, height=0.8)
            axis.text(
                row["times_floor"],
                place,
                f" {row['times_floor']:.2f}",
                color=INK,
                fontsize=7,
                va="center",
            )
            ticks.append((place, row["implementation"]))
        place += 1.6
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axis.set_xlabel("time over the floor, forward and backward (1: the floor)")
    axis.invert_yaxis()
    return inline(figure)


def page(document: dict[str, Any], source: str) -> str:
    """docs/growth.md."""
    lines = [
        "# How it grows",
        "",
        f"Written by `python -m benchmarks plot` from [the JSON]({source}) of",
        "`python -m benchmarks --case scaling --save`; nothing here is typed by hand.",
        f"Machine: {environment.machine_line(document['machine'])}.",
        "",
        "Forward and backward of `linear_cross_entropy`, medians of interleaved rounds, freed "
        "memory kept.",
        "extra memory: the peak of a fresh process's second step without the gradients it returns "
        "(malloc default).",
        "heads: `ntp` and `mtp_parallel` with residual heads, one pass for all of them, or a call "
        "of eager for each.",
        f"torch-best: {PEERS['torch'].what.split(',')[0]}, "
        f"{PEERS['torch-best'].what.removeprefix('the same with ')}.",
        "",
    ]
    for name in ("time", "memory"):
        lines += [f"## {FIGURES[name][0]}", "", picture(f"{FOLDER}/{name}", FIGURES[name][0]), ""]
    rows = [
        [found["axis"], name, f"{each['time']:.2f}", f"{each['memory']:.2f}"]
        for found in document["sweeps"]
        for name, each in found["exponents"].items()
    ]
    lines += ["Fitted exponents (least squares over all sizes; 1 is linear, 0 is constant):", ""]
    lines += [tables.markdown(["axis", "who", "time", "extra memory"], rows), ""]
    for found in document["sweeps"]:
        reasons = {
            name: row["skipped"]
            for p in found["points"]
            for name, row in p["rows"].items()
            if "skipped" in row
        }
        lines += [f"* {name}, {found['axis']}: {reason}" for name, reason in reasons.items()]
        lines += _points(found)
    found = document["errors"]
    lines += [f"## {FIGURES['error'][0]}", "", picture(f"{FOLDER}/error", FIGURES["error"][0]), ""]
    lines += [
        f"Relative error (Frobenius), bfloat16, N = {found['N']}, d = {found['d']}, V = "
        f"{found['V']}.",
        "",
    ]
    rows = [
        [name, chunks, *(f"{error:.1e}" for error in line)]
        for name, each in found["lines"].items()
        for chunks, line in zip(found["chunks"], each, strict=True)
    ]
    lines += [tables.markdown(["who", "chunks", "loss", "dh", "dW"], rows), ""]
    roof = document["roofline"]
    lines += [
        f"## {FIGURES['roofline'][0]}",
        "",
        picture(f"{FOLDER}/roofline", "roofline"),
        "",
        f"A copy moves {roof['gb_per_s']:.1f} GB/s, the fastest GEMM reaches "
        f"{roof['gflop_per_s']:.0f} GFLOP/s ({roof['dtype']}).",
        "FLOPs are those of the three GEMMs, bytes those of the inputs and gradients, each once.",
        "",
    ]
    return "\n".join(lines)


def _points(found: dict[str, Any]) -> list[str]:
    names = list(found["exponents"])
    header = [found["axis"], *(f"{name}, {unit}" for name in names for unit in ("ms", "MiB"))]
    rows = []
    for point in found["points"]:
        measured = [point["rows"][name] for name in names]
        cells = [
            (f"{row['milliseconds']:.1f}", f"{row['extra_bytes'] / 2**20:.1f}") for row in measured
        ]
        rows.append([point["size"], *(text for pair in cells for text in pair)])
    return [tables.markdown(header, rows), ""]


def draw(document: dict[str, Any], source: str, docs: Path) -> list[Path]:
    """Write every figure in both themes and the page; the paths."""
    written = []
    for name, (_, make) in FIGURES.items():
        for theme, colours in THEMES.items():
            written.append(docs / FOLDER / f"{name}-{theme}.svg")
            storage.write(written[-1], svg(make(document, colours)))
    storage.write(docs / "growth.md", page(document, source))
    return [*written, docs / "growth.md"]


def main() -> int:
    """Draw from the newest results; 1 when there are none."""
    path = storage.newest("-scaling")
    if path is None:
        print(
            "benchmarks: no scaling results are kept, run `python -m benchmarks --case scaling "
            "--save`",
            file=sys.stderr,
        )
        return 1
    for written in draw(storage.read(path), f"../{path.relative_to(environment.ROOT)}", DOCS):
        print(f"written to {written.relative_to(environment.ROOT)}")
    return 0
