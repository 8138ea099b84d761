"""Two gloo processes as pipeline stages: the tapped state travels detached, gradients are those of
one process."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from nitp_ops.objectives import Streams
from tests.support.engine_cases import same, start

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
EXAMPLE = Path(__file__).parents[3] / "examples/pipeline.py"


def example():
    """examples/pipeline.py as a module, in float64."""
    spec = importlib.util.spec_from_file_location("pipeline", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["pipeline"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.INFO = replace(module.INFO, dtype=torch.float64)  # type: ignore[attr-defined]
    return module


def worker(rank: int) -> None:
    pipeline = example()
    ids = torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(1))
    first, last = pipeline.make_stages()
    counts = last.objective.count(Streams(token_ids=ids))
    whole = last.loss(last(*first(ids)), ids, counts)
    whole.backward()
    assert all(p.grad is not None and p.grad.any() for p in last.objective.parameters())
    for schedule_of in (ScheduleGPipe, Schedule1F1B):
        stages = pipeline.make_stages()
        stage = PipelineStage(stages[rank], rank, 2, torch.device("cpu"))

        def loss(outputs, target, owner=stages[1]):
            return owner.loss(outputs, target, counts)

        losses: list[torch.Tensor] = []
        schedule = schedule_of(stage, n_microbatches=4, loss_fn=loss, scale_grads=False)
        schedule.step(*((ids,) if rank == 0 else ()), target=ids, losses=losses)
        if rank == 1:
            same(torch.stack(losses).sum(), whole, "loss")
        for (name, mine), theirs in zip(
            stages[rank].named_parameters(), (first, last)[rank].parameters(), strict=True
        ):
            assert mine.grad is not None and theirs.grad is not None
            same(mine.grad, theirs.grad, f"{schedule_of.__name__}: stage {rank}: {name}")


def test_a_tapped_state_that_crosses_stages_trains_as_in_one_process(tmp_path: Path):
    start(worker, 2, tmp_path)
