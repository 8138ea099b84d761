"""Two gloo processes: head terms with parameters of their own train as in one process, sharded or
replicated."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from nitp_ops.objectives import build
from tests.distributed.objectives.test_objectives import RANKS, same, uneven_batch
from tests.support.objectives_cases import INFO, Batch

pytestmark = pytest.mark.ranks

SPEC = "ntp + mtp_shared + 0.5*top + mtp_parallel(offsets=[4]) + mtp_sequential(depth=2)"


class Model(nn.Module):
    """An embedding, a trunk of one layer, a head and an objective."""

    def __init__(self, part: Batch):
        super().__init__()
        self.trunk = nn.Linear(6, 6, dtype=torch.float64)
        for parameter in self.trunk.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view(
                parameter.shape
            )
        self.embed, self.head = copy.deepcopy(part.embed), copy.deepcopy(part.head)
        self.objective = build(SPEC, model=INFO)

    def forward(self, part: Batch, **options: object):
        hidden = self.trunk(self.embed(part.ids) + part.hidden.detach())
        return self.objective(
            part.streams(last_hidden=hidden, head=self.head, embed=self.embed), **options
        )


def whole_gradients() -> dict[str, Tensor]:
    batch = uneven_batch()
    model = Model(batch)
    model(batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def replicated(part: Batch) -> None:
    model = DistributedDataParallel(Model(part))
    counts = model.module.objective.count(part.streams()).all_reduce()
    model(part, counts=counts).loss.backward()
    for name, expected in whole_gradients().items():
        gradient = model.module.get_parameter(name).grad
        assert gradient is not None
        same(gradient, expected, name)


def sharded(part: Batch) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = Model(part)
    for owner in (model.head, model.embed, *model.objective.terms.values(), model):
        fully_shard(owner, mesh=mesh)
    counts = model.objective.count(part.streams()).all_reduce()
    model(part, counts=counts).loss.backward()
    for name, expected in whole_gradients().items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        same(gradient.full_tensor(), expected, name)  # type: ignore[attr-defined]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    part = uneven_batch().part(slice(2 * rank, 2 * rank + 2))
    replicated(part)
    sharded(part)
    dist.barrier()  # no rank closes the connections of the other's last collective
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_own_heads_and_blocks_train_on_two_ranks_as_on_one(tmp_path: Path):
    spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
