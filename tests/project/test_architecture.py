"""Folders and files stay small, and names say what they hold. The layers of imports:
pyproject.toml, csrc's beside."""

import importlib
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import nitp_ops

ROOT = Path(__file__).parents[2]
FOLDERS = ("csrc", "nitp_ops", "objectives", "benchmarks", "examples", "experiments", "tests")
CODE = {".py", ".cpp", ".cu", ".h", ".hpp", ".sh"}
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in CODE]
MODULES = [
    m.name for m in pkgutil.walk_packages(nitp_ops.objectives.__path__, "nitp_ops.objectives.")
]
MODULES += [m.name for m in pkgutil.walk_packages(nitp_ops.__path__, "nitp_ops.")]


def test_the_reference_imports_only_torch():
    modules = re.findall(
        r"^(?:from|import) "
        r"(\w+)",
        (ROOT / "nitp_ops/reference.py").read_text(),
        re.M,
    )
    assert set(modules) == {"__future__", "collections", "typing", "torch"}


def test_what_the_package_kernels_loads_under_another_name_imports_itself_by_dots():
    folders = [ROOT / "nitp_ops" / name for name in ("core", "kernels", "ops", "geometry")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    absolute = re.compile(r"^\s*(?:from|import) nitp_ops\b", re.M)
    assert files and not [path for path in files if absolute.search(path.read_text())]


def test_a_folder_holds_at_most_15_files_and_a_file_300_lines():
    crowded = {
        folder: n for folder, n in Counter(path.parent for path in SOURCES).items() if n > 15
    }
    assert not crowded
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) > 300]
    assert not [path for path in SOURCES if path.stem in ("utils", "common", "helpers")]
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60


def test_lines_are_short():
    python = [p for p in SOURCES if p.suffix == ".py"]
    own = [p for p in python if p.relative_to(ROOT).parts[0] in ("nitp_ops", "objectives")]
    lines = [line for path in own for line in path.read_text().splitlines() if line]
    assert sum(map(len, lines)) <= 48 * len(lines)
    assert sum(len(line) > 100 for line in lines) <= 0.01 * len(lines)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_bears_the_name_of_a_public_function_of_its_parent(name):
    """Importing it would put the module in the function's place."""
    parent, _, own = name.rpartition(".")
    package = importlib.import_module(parent)
    assert own not in set(getattr(package, "__all__", ())) - {"geometry", "layers", "reference"}


EVERY_MODULE = """
import importlib, nitp_ops
public = {name: getattr(nitp_ops, name) for name in [*nitp_ops.__all__, "attach"]}
for name in MODULES:
    importlib.import_module(name)
print([name for name, value in public.items() if getattr(nitp_ops, name) is not value])
"""


def test_importing_every_module_leaves_the_public_names_in_place():
    apart = re.compile(
        r"\.trainers\.|\.kernels\.triton|__main__|libnitp_ops"
    )  # packages, programs, no module
    names = [name for name in MODULES if not apart.search(name)]
    code = EVERY_MODULE.replace("MODULES", repr(names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout == "[]\n", done.stderr[-2000:]
