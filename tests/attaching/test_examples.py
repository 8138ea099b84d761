"""The examples of plain loops and of attach run as they stand, and learn."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, steps: int) -> list[float]:
    """The NTP losses that the example prints."""
    command = [sys.executable, str(EXAMPLES / name), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in re.findall(r"step +\d+ +ntp (\d+\.\d+)", done.stdout)]


def test_a_plain_loop_needs_three_lines_and_learns():
    losses = run("plain_loop.py", 41)
    assert 5 < losses[0] < 6.5 and losses[-1] < losses[0] - 1.5
    assert (EXAMPLES / "plain_loop.py").read_text().count("# added: ") == 3


@pytest.mark.trainers
def test_an_attached_llama_learns_and_its_export_generates():
    losses = run("attach.py", 31)
    assert 5 < losses[0] < 6.5 and losses[-1] < losses[0] - 1.5
