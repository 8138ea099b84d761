"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from nitp_ops.engine import registry

ROOT = Path(__file__).parents[2]
SKIPPED = {"__main__"}
NEED_PACKAGES = ("trainers",)  # the folders whose modules import a trainer


def modules() -> list[str]:
    """Every Python module of the package that holds an example."""
    found = []
    for folder, package in (("nitp_ops", ()), ("objectives", ("nitp_ops",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (
                path.parent.name not in NEED_PACKAGES
                and ">>> " in path.read_text()
                and path.stem not in SKIPPED
            ):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(package + parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules())
def test_its_examples_print_what_they_say(name, monkeypatch):
    # an example registers an objective
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, optionflags=options)
    assert result.attempted > 0 and result.failed == 0


def test_the_readmes_example_runs(capsys):
    text = (ROOT / "README.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    assert "nitp/skill" in capsys.readouterr().out
