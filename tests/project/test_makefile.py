"""make uses an active environment as it is: its torch stays, its path may hold spaces."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tests.packaging.package_cases as cases
from tests.packaging.package_cases import environment, run

pytestmark = pytest.mark.package
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return cases.sources(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def active(tmp_path_factory) -> Path:
    """An environment with torch, of its own path."""
    folder = tmp_path_factory.mktemp("active") / "an environment"
    environment(folder, "torch", "nitp_ops[benchmarks]")
    return folder


def make(environment: Path, clone: Path, *words: str):
    path = f"{environment / 'bin'}:{cases.os.environ['PATH']}"
    return run("make", *words, cwd=clone, check=False, VIRTUAL_ENV=str(environment), PATH=path)


def test_no_target_names_a_torch_to_install(active, clone):
    words = (
        "install",
        "lint",
        "test",
        "test-programs",
        "test-trainers",
        "test-ranks",
        "test-package",
        "wheels",
    )
    told = make(active, clone, "-n", *words)
    # the copy in build/layers takes no dependency at all
    installs = [
        line
        for line in told.stdout.splitlines()
        if "pip install" in line
        and "--no-deps --no-build-isolation --target build/layers" not in line
    ]
    assert told.returncode == 0 and not told.stderr and len(installs) == 3
    assert all(re.search(r"--constraint build/installed-\d+\.torch ", line) for line in installs)
    assert not [
        line for line in installs if re.search(r"\btorch\b[=<> ]", line.replace(".torch ", ""))
    ]


def test_the_constraint_is_the_torch_that_is_there(active, clone):
    told = run(active / "bin/python", ROOT / "csrc/tools/installed_torch.py", cwd=clone).stdout
    assert told == f"torch=={cases.metadata.version('torch')}\n"


def test_an_environment_whose_torch_is_too_old_is_left_alone_with_one_line(tmp_path, clone):
    environment(tmp_path / "old env")
    site = next((tmp_path / "old env").glob("lib/python*/site-packages"))
    for name, content in (
        ("torch/__init__.py", ""),
        ("torch-2.9.1.dist-info/METADATA", "Name: torch\nVersion: 2.9.1\n"),
    ):
        (site / name).parent.mkdir()
        (site / name).write_text(content)
    told = make(tmp_path / "old env", clone, "doctor")
    (line,) = (line for line in told.stderr.splitlines() if not line.startswith("make: ***"))
    assert told.returncode != 0 and "pip" not in told.stdout
    assert line.startswith(
        f"make: {tmp_path / 'old env'} is active and has torch 2.9.1, nitp_ops needs torch >= 2.11"
    )


def test_a_target_runs_the_environments_python_in_a_path_with_spaces(active, clone):
    (stamp,) = re.findall(r"build/installed-\d+", make(active, clone, "-n", "doctor").stdout)[:1]
    (clone / stamp).parent.mkdir(exist_ok=True)
    (clone / stamp).touch()
    told = make(active, clone, "doctor")
    assert f'"{active}/bin/python" -m nitp_ops doctor' in told.stdout
    assert "this is the source tree at" in told.stdout + told.stderr
    (clone / stamp).unlink()


def test_what_the_benchmarks_extra_brings_runs_the_tests_before_the_numbers(active, clone):
    command = (
        active / "bin/python",
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    )
    told = run(*command, "tests/ops/test_alignment_and_swiglu.py", cwd=clone, check=False)
    assert "ModuleNotFoundError" not in told.stdout + told.stderr
    run(active / "bin/python", "-m", "benchmarks", "--list", cwd=clone)
