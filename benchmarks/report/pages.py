"""Self-contained HTML pages: they open from the disk, load nothing and run nothing. Needs jinja2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """The template `name` of `folder`, which may extend `base.html`.

    Args:
        name: of the file.
        folder: where it lies.
        values: what it shows; all text is escaped, as names, paths and samples are never markup.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name).render(**values)
