"""Two gloo processes: counts, losses, gradients and metrics are those of the whole batch."""

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

from nitp_ops.objectives import Streams, Window, build
from tests.support.objectives_cases import INFO, Batch, make_batch

pytestmark = pytest.mark.ranks

SPEC = "ntp + 0.8*nitp + early: 0.5*nitp(target_layer=0, denominator=main, mask=document+label)"
SPEC += " + 0.3*nextlat + fsp_bow(tau=3) + 0.1*external"
COUNTS = {"ntp": 9, "nitp": 9, "early": 9, "nextlat": 9, "fsp_bow": 7, "external": 12}
RANKS = 2


def uneven_batch() -> Batch:
    """Rank 0 holds 9 targets, rank 1 holds none."""
    batch = make_batch(batch=4)
    batch.documents = torch.where(torch.arange(7) < torch.tensor([[4], [7], [1], [0]]), 0, -1)
    return batch


class Model(nn.Module):
    """Two linear layers, a head and an objective: what a training step calls as one module."""

    def __init__(self, spec: str, head: nn.Linear):
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.lower, self.upper = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        self.head = copy.deepcopy(head)
        self.objective = build(spec, model=INFO)

    def forward(self, part: Batch, **options: object):
        states = {0: part.hidden.detach(), 1: self.lower(part.hidden.detach())}
        hidden = self.upper(states[1])
        streams = part.streams(last_hidden=hidden, hidden_states=states, head=self.head)
        return self.objective(streams, **options)


def whole_gradients(spec: str, **options: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    batch = uneven_batch()
    model = Model(spec, batch.head)
    out = model(batch, **options)
    out.loss.backward()
    return {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }, out.metrics.compute()


def same(mine: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        mine, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}"
    )


def reduced_counts_and_metrics(part: Batch) -> None:
    model = Model(SPEC, part.head)
    counts = model.objective.count(part.streams()).all_reduce()
    assert {name: n.item() for name, n in counts.items()} == COUNTS
    assert counts.group_size == RANKS
    window = Window(counts=counts, gradient_reduction="sum", group=dist.group.WORLD)
    summed = model(part, window=window)
    loss = summed.loss.detach().clone()
    dist.all_reduce(loss)
    expected_gradients, expected = whole_gradients(SPEC)
    assert loss.item() == pytest.approx(expected["loss"])
    assert summed.metrics.all_reduce().compute() == pytest.approx(expected, nan_ok=True)
    summed.loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected_gradients:
            assert parameter.grad is not None, f"{name} has no gradient on rank {dist.get_rank()}"
            dist.all_reduce(parameter.grad)
            same(parameter.grad, expected_gradients[name], name)


def data_parallel(part: Batch, spec: str, **options: object) -> None:
    model = DistributedDataParallel(Model(spec, part.head))
    counts = model.module.objective.count(part.streams()).all_reduce()
    model(part, counts=counts, gradient_reduction="mean", **options).loss.backward()
    for name, expected in whole_gradients(spec, **options)[0].items():
        parameter = model.module.get_parameter(name)
        assert parameter.grad is not None
        same(parameter.grad, expected, name)


def fully_sharded(part: Batch) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = Model(SPEC, part.head)
    fully_shard(model.head, mesh=mesh)
    for projector in model.objective.terms.values():
        fully_shard(projector, mesh=mesh)
    fully_shard(model, mesh=mesh)
    counts = model.objective.count(part.streams()).all_reduce()
    model(part, counts=counts, gradient_reduction="mean").loss.backward()
    for name, expected in whole_gradients(SPEC)[0].items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        same(gradient.full_tensor(), expected, name)  # type: ignore[attr-defined]


def a_sharded_weight_is_refused(part: Batch) -> None:
    head = copy.deepcopy(part.head)
    fully_shard(head, mesh=init_device_mesh("cpu", (RANKS,)))
    assert isinstance(head.weight, Tensor)
    for wrong in (head.weight, head.weight.full_tensor()):  # type: ignore[attr-defined]
        streams = Streams(token_ids=part.ids, last_hidden=part.hidden.detach(), head=wrong)
        with pytest.raises((TypeError, ValueError), match="head"):
            build("ntp", model=INFO)(streams)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    part = uneven_batch().part(slice(2 * rank, 2 * rank + 2))
    reduced_counts_and_metrics(part)
    data_parallel(part, SPEC)
    data_parallel(part, "ntp + schedule(to=1, begin=5)*nitp", step=3)
    fully_sharded(part)
    a_sharded_weight_is_refused(part)
    dist.barrier()  # no rank closes the connections of the other's last collective
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_ranks_train_like_one_process_though_one_has_no_target(tmp_path: Path):
    spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
