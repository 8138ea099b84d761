"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from nitp_ops.objectives import registry

ROOT = Path(__file__).parents[1]
SKIPPED = {"__main__", "_C"}


def modules() -> list[str]:
    """Every Python module of the package that holds an example."""
    found = []
    for folder, package in (("nitp_ops", "nitp_ops"), ("objectives", "nitp_ops.objectives")):
        for path in sorted((ROOT / folder).glob("*.py")):
            if ">>> " in path.read_text() and path.stem not in SKIPPED:
                found.append(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return found


@pytest.mark.parametrize("name", modules())
def test_its_examples_print_what_they_say(name, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # an example registers an objective
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, optionflags=options)
    assert result.attempted > 0 and result.failed == 0


def test_the_readmes_example_runs(capsys):
    text = (ROOT / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "nitp/skill" in capsys.readouterr().out
