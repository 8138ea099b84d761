"""The examples for the Hugging Face trainers run as they stand and print a loss that falls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "trl", "accelerate", "datasets"):
    pytest.importorskip(package)
pytestmark = pytest.mark.trainers
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "name, last",
    [
        ("transformers_trainer", r"exported without the projector: [\d,]+ of [\d,]+ parameters"),
        ("trl_sft", r"the plain model on other lines: \d\.\d{4}"),
        ("accelerate_loop", r"saved and resumed at step 40"),
    ],
)
def test_the_example_runs_and_its_loss_falls(tmp_path, name, last):
    command = [sys.executable, str(EXAMPLES / "trainers" / f"{name}.py")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(last, run.stdout), run.stdout
    steps = re.findall(r"step \d+: loss (\S+)  loss/ntp (\S+)  loss/nitp (\S+)", run.stdout)
    assert len(steps) >= 3
    for loss, ntp, nitp in steps:
        assert float(loss) == pytest.approx(float(ntp) + float(nitp), abs=2e-4)
    assert float(steps[-1][1]) < float(steps[0][1]) - 0.3
