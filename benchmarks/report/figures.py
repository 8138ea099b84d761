"""Figures that are the same bytes for the same numbers, on light and dark pages. Needs matplotlib."""

from __future__ import annotations

import io
from typing import Any

#: Almost black; stands for the reader's text colour where an SVG is part of a page.
INK = "#0a0b0c"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "nitp_ops",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


def svg(figure: Any) -> str:
    """The figure as SVG."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return text.getvalue()


def inline(figure: Any) -> str:
    """The figure as an element of an HTML page, what is drawn in `INK` in the colour of the page's
    text."""
    text = svg(figure)
    return text[text.index("<svg") :].replace(INK, "currentColor")


def frame(axis: Any, ink: str) -> None:
    """Ticks, grid, title, labels and spines of a small panel in one colour."""
    axis.tick_params(colors=ink, which="both", labelsize=7)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.title.set_color(ink)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(ink)
        label.set_fontsize(8)
    for spine in axis.spines.values():
        spine.set_color(ink)


def picture(name: str, alternative: str) -> str:
    """Markdown of the figures `name`-light.svg and `name`-dark.svg: the reader's colour scheme
    chooses."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
        f'<img alt="{alternative}" src="{name}-light.svg"></picture>'
    )
