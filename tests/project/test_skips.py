"""No test is left out in silence: what is skipped fails, unless the list allows it, and the list is
kept small."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.support.allowed_skips import ALLOWED, Allowed
from tests.support.skips import allowed

ROOT = Path(__file__).parents[2]
MODULES = {
    "test_whole.py": 'import pytest\npytest.importorskip("no_such_package")\ndef test_a(): pass',
    "test_marked.py": "import pytest\npytestmark = [pytest.mark.trainers]\n"
    'pytest.skip("not today", allow_module_level=True)\ndef test_a(): pass',
    "experiments/test_stops.py": 'import pytest\ndef test_a(): pytest.skip("this user may not '
    'mount a file system")',
    "test_one_by_one.py": """
import pytest

@pytest.mark.skip(reason="a mark")
def test_mark(): pass

@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.skipif(True, reason="a parameter"))])
def test_parameter(x): pass

@pytest.mark.parametrize("x", [])
def test_nothing(x): pass

def test_body(): pytest.skip("the body")

@pytest.fixture
def fixture(): pytest.importorskip("no_such_package")

def test_fixture(fixture): pass

@pytest.mark.xfail(reason="a bug")
def test_expected_to_fail(): assert False

@pytest.mark.xfail(reason="a bug")
def test_passes_all_the_same(): pass

def test_gives_up(): pytest.xfail("given up")
""",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with skips of every kind and the plugin."""
    (tmp_path / "tests/experiments").mkdir(parents=True)
    for name, text in MODULES.items():
        (tmp_path / "tests" / name).write_text(text)
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.support.skips import *"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = trainers: of a package\n")
    return tmp_path


def run(project: Path, *options: str) -> tuple[int, dict[str, str]]:
    """Exit code, and {test or module that failed: the reason shown}."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        *options,
    ]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    line = (
        r"^tests/(\S+): skipped, and tests/support/allowed_skips.py does not allow it here: (.+)$"
    )
    found = re.findall(line, done.stdout, re.MULTILINE)
    assert "1 skipped: this user may not mount a file system" in done.stdout, (
        done.stdout + done.stderr
    )
    return done.returncode, dict(found)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [(("-m", "trainers or not trainers"), True), (("-m", "not trainers", "-n", "1"), False)],
    ids=["alone", "xdist, and not the marked module"],
)
def test_every_skip_that_is_not_on_the_list_fails(project, options, chosen):
    code, failed = run(project, *options, "--continue-on-collection-errors")
    one = "test_one_by_one.py::test_"
    assert code == 1
    assert failed == ({"test_marked.py": "not today"} if chosen else {}) | {
        "test_whole.py": "could not import 'no_such_package': No module named 'no_such_package'",
        f"{one}mark": "a mark",
        f"{one}parameter[2]": "a parameter",
        f"{one}nothing[NOTSET]": "got empty parameter set for (x)",
        f"{one}body": "the body",
        f"{one}fixture": "could not import 'no_such_package': No module named 'no_such_package'",
        f"{one}expected_to_fail": "xfail: a bug",
        f"{one}passes_all_the_same": "xfail: a bug",
        f"{one}gives_up": "xfail: given up",
    }


def test_an_entry_holds_for_its_tests_its_reason_and_its_machines():
    entry = Allowed("tests/gpu/*", "needs a GPU.*", True)
    assert allowed("tests/gpu/test_rows.py::test_a", "needs a GPU: none", [entry])
    assert not allowed("tests/objectives/tokens/test_top.py::test_a", "needs a GPU: none", [entry])
    assert not allowed("tests/gpu/test_rows.py::test_a", "who needs a GPU?", [entry])
    assert not allowed(
        "tests/gpu/test_rows.py::test_a", "needs a GPU: none", [entry._replace(here=False)]
    )


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: entry.reason)
def test_an_entry_names_tests_that_exist_and_a_reason_that_one_of_them_gives(entry):
    files = [
        f
        for f in (ROOT / "tests").rglob("*.py")
        if fnmatchcase(f"{f.relative_to(ROOT)}::test", entry.tests.removesuffix(".py") + "*")
    ]
    assert files
    texts = [
        f.read_text()
        for f in [*files, ROOT / "tests/gpu/gpu_cases.py", ROOT / "tests/support/processor.py"]
    ]
    given = [
        re.sub(r"\{.*?\}", "avx2", r)
        for text in texts
        for r in re.findall(r'(?:skip\(|reason=)f?"(.+?)"', text)
    ]
    given += [
        f"could not import '{name}': "
        for text in texts
        for name in re.findall(r'importorskip\("(.+?)"', text)
    ]
    assert any(re.fullmatch(entry.reason, reason) for reason in given)
