"""Files of results: where they lie, and that they are whole and not damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nitp_ops.core.files import write_whole

from .environment import ROOT

RESULTS = ROOT / "benchmarks" / "results"


class DamagedResults(OSError):
    """A file of results cannot be read; the message is one line."""


def results_path(info: dict[str, Any], folder: Path = RESULTS, kind: str = "") -> Path:
    """folder/<device>/<commit>.json; `kind` ("-quick", "-scaling") stands behind the commit."""
    name = info["gpu"] if "gpu" in info else f"{info['cpu']} {info['cores']} cores"
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / device / f"{info['commit']}{kind}.json"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write the results."""
    write(path, as_json(document))


def as_json(document: dict[str, Any]) -> str:
    """The results as they are kept."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text; nobody ever sees half a file, and a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def read(path: Path, fake: bool = False) -> dict[str, Any]:
    """Results that were kept; `fake` ones, of a dry run, only for who asks for them.

    Raises:
        DamagedResults: the file holds no results.
    """
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and "machine" in document:
            if document.get("fake", False) != fake:
                raise DamagedResults(
                    f"{path}: {'no dry run' if fake else 'a dry run, nothing was measured'}"
                )
            return document
        reason = "no object with a machine"
    except ValueError as error:
        reason = str(error)
    raise DamagedResults(f"{path}: not readable results ({reason}); restore or remove it")


def newest(kind: str) -> Path | None:
    """The kept results of this kind ("-quick", "-scaling") that were measured last."""
    found = [
        (read(path)["machine"].get("date", ""), path) for path in RESULTS.glob(f"*/*{kind}.json")
    ]
    return max(found)[1] if found else None
