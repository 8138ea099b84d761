"""What docs/*.md and README.md name exists: code that can be read, imports, methods, files,
targets, links."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# the log tells of what was
PAGES = [page for page in PAGES if page.name != "log.md"]


def name_of(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere_inside_the_repository(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else page.parent / path
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
            }, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_targets_that_it_names_exist(page: Path):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for path in set(
        re.findall(r"`((?:examples|tests|benchmarks|nitp_ops|csrc)/[\w./]+\.\w+)`", text)
    ):
        assert (ROOT / path).exists(), path
    for target in set(re.findall(r"`make ([\w-]+)`", text)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_its_python_can_be_read(page: Path):
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL
    ):
        if ">>> " not in block:
            ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_it_names_of_this_package_is_there(page: Path):
    """``nitp_ops.x.y`` in backticks, and ``from nitp_ops.x import y`` in code; of trainers only
    where they are."""
    text = page.read_text()
    named = set(re.findall(r"`(nitp_ops(?:\.\w+)+)", text))
    for module, names in re.findall(
        r"^from (nitp_ops[\w.]*) import ([\w, "
        r"]+)",
        text,
        flags=re.MULTILINE,
    ):
        named |= {f"{module}.{name.strip()}" for name in names.split(",")}
    for name in sorted(named):
        path, _, last = name.rpartition(".")
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            assert not str(error.name).startswith("nitp_ops"), name
            continue
        assert hasattr(module, last) or importlib.util.find_spec(name), name
