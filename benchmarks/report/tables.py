"""Tables as plain cells, so that a terminal, a page and a document show the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column: every cell is a number, or a dash for want of one."""
        columns = zip(*self.rows, strict=True)
        return [all(cell.lstrip("+-")[:1] in "0123456789" for cell in column) for column in columns]

    def transposed(self) -> Table:
        """Rows as columns; the corner stays."""
        header, *rows = ([*line] for line in zip(self.header, *self.rows, strict=True))
        return Table(self.title, header, rows)

    def as_markdown(self) -> str:
        """As a Markdown table under its title, numbers to the right."""
        return f"**{self.title}**\n\n{markdown(self.header, self.rows, self.numeric)}"


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[bool] | None = None
) -> str:
    """A table; a bar inside a cell is escaped, columns of numbers stand to the right."""
    ruler = ["---:" if right else "---" for right in numeric or [False] * len(header)]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], ruler, *cells[1:]])


def plain(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text, columns padded; the first column to the left, numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def padded(line: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join(
        [padded(lines[0]), "  ".join("-" * width for width in widths), *map(padded, lines[1:])]
    )
