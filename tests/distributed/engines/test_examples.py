"""The examples with several processes, run as their first lines say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.rank_cases import TORCHRUN

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", ["distributed.py", "pipeline.py"])
def test_two_processes_print_a_loss_that_falls(name: str):
    assert f"torchrun --nproc-per-node 2 examples/{name}" in (EXAMPLES / name).read_text()
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss'?:? ([0-9.]+)", done.stdout)]
    assert len(losses) >= 4 and losses[-1] < 0.95 * losses[0], done.stdout
