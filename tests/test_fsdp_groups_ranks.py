"""Two gloo ranks under FSDP2, whatever its groups are: an attached model takes the steps of one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist
from engine_cases import start
from fsdp_groups_cases import (
    CHECKPOINTING,
    EVERY_READER,
    GROUPINGS,
    RANKS,
    Grouping,
    Tapped,
    Values,
    attached,
    cut,
    rows,
    same_steps,
    steps,
    tapped,
    tiny_llama,
)

import nitp_ops

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]


@cache
def alone(tied: bool, spec: str) -> list[Values]:
    """One process that sees all rows."""
    model = tiny_llama(tied)
    nitp_ops.attach(model, spec)
    return steps(model, attached(model, rows()))


def compare(grouping: Grouping, spec: str, checkpointing: str, rank: int, through_tap: bool) -> None:
    model, batch = tiny_llama(grouping.tied), rows(slice(rank, rank + 1))
    CHECKPOINTING[checkpointing](model)
    if through_tap:
        root = Tapped(model, spec)
        loss = tapped(root, batch)
    else:
        root = model
        nitp_ops.attach(model, spec)
        loss = attached(model, batch)
    cut(root, model, grouping)
    what = f"{grouping.name}, reshard {grouping.reshard}, {spec}, checkpointing {checkpointing}, tap {through_tap}"
    same_steps(steps(root, loss), alone(grouping.tied, spec), what)


def worker(rank: int) -> None:
    for grouping in GROUPINGS:
        for spec in ("ntp", "nitp(target_layer=1)", EVERY_READER):  # the head read once, never, by all kinds of terms
            compare(grouping, spec, "none", rank, through_tap=False)
        compare(grouping, EVERY_READER, "none", rank, through_tap=True)
        if "norm" in grouping.name:
            for checkpointing in CHECKPOINTING:
                compare(grouping, "ntp + 0.3*mtp_sequential", checkpointing, rank, through_tap=False)


def test_an_attached_model_trains_in_every_group_as_on_one_process(tmp_path: Path):
    start(worker, RANKS, tmp_path)
