"""Import arrows run down, files stay small, and names say what they hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"examples": 4, "experiments": 4, "benchmarks": 4, "nitp_ops/integrations": 4, "objectives": 3, "nitp_ops": 2}
FLOORS |= {f"nitp_ops/{name}": 1 for name in ("rows.py", "_kernels.py", "_library.py", "torch_rows", "triton")}
FLOORS |= {f"nitp_ops/{name}": 0 for name in ("_check.py", "_devices.py", "reference.py")}
LAZY = {("nitp_ops/__init__.py", "objectives"), ("nitp_ops/__main__.py", "objectives")}  # resolved on first use
PYTHON = [path for name in sorted({key.split("/")[0] for key in FLOORS}) for path in (ROOT / name).rglob("*.py")]
NATIVE = [path for path in ROOT.glob("csrc/**/*.*") if path.suffix != ".pyc"]


def floor(path: str) -> int:
    return FLOORS[max((key for key in FLOORS if path == key or path.startswith(key + "/")), key=len)]


def imports(path: Path) -> list[str]:
    """The files and folders of this repository that a file imports."""
    package, found = path.relative_to(ROOT).parent, []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = Path(*package.parts[: len(package.parts) + 1 - node.level]) if node.level else Path()
            module = base.joinpath(*(node.module or "").split("."))
            found += [module / alias.name if (ROOT / module).is_dir() else module for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [Path(*alias.name.split(".")) for alias in node.names]
    names = [str(module).replace("nitp_ops/objectives", "objectives") for module in found]
    return [f"{n}.py" if (ROOT / f"{n}.py").exists() else n for n in names if (ROOT / n.split("/")[0]).is_dir()]


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_runs_up(path):
    here = str(path.relative_to(ROOT))
    for target in imports(path):
        assert floor(target) <= floor(here) or (here, target) in LAZY, f"{here} imports {target}, which stands above it"


def test_the_reference_imports_only_torch():
    modules = re.findall(r"^(?:from|import) (\w+)", (ROOT / "nitp_ops/reference.py").read_text(), re.M)
    assert set(modules) == {"__future__", "collections", "typing", "torch"}


def test_files_stay_small_and_none_is_a_drawer():
    for path in [*PYTHON, *NATIVE, *(ROOT / "tests").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= (60 if path == Path(__file__) else 300), path
        assert path.stem not in ("utils", "common", "helpers"), path
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60
