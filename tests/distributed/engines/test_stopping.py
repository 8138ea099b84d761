"""A rank that dies or hangs in the middle of a window: the others stop soon, and say what they
waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.rank_cases import TORCHRUN

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
SCRIPT = Path(__file__).parent / "stopping_rank.py"
LIMIT = 90  # seconds, of which a busy machine takes most to import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("how", ["exits", "hangs"])
def test_the_other_rank_says_which_collective_failed(how: str):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(SCRIPT), how]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **address, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        error = ranks[0].communicate(timeout=LIMIT)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[0].returncode == 1
    last = [line for line in error.splitlines() if "RuntimeError: objective" in line]
    assert len(last) == 1, error
    assert (
        "the collective for counts failed: a rank of 2 stopped or did not call it (this is rank 0)"
        in last[0]
    )


def test_torchrun_stops_the_others_and_names_the_rank():
    command = [sys.executable, *TORCHRUN, str(SCRIPT)]
    begin = time.monotonic()
    done = subprocess.run([*command, "exits"], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0 and time.monotonic() - begin < LIMIT
    assert "exitcode  : 3" in done.stderr and "local_rank: 1" in done.stderr


def test_ranks_that_do_not_stop_end_well():
    command = [sys.executable, *TORCHRUN, str(SCRIPT)]
    done = subprocess.run([*command, "goes on"], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
