"""Four gloo processes under DDP, FSDP2 and HSDP: every objective trains as in one process,
accumulation included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nitp_ops.objectives import Counts, Streams, build
from tests.support.engine_cases import SPECS, Model, packed_batch, same, same_metrics, start, whole
from tests.support.objectives_cases import INFO, Batch

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
RANKS = 4


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def data_parallel(model: Model, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)  # raises where a parameter gets no gradient


def root_only(model: Model, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def head_apart(model: Model, mesh: DeviceMesh, reshard: bool = True) -> nn.Module:
    fully_shard(model.head, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def head_that_stays(model: Model, mesh: DeviceMesh) -> nn.Module:
    return head_apart(model, mesh, reshard=False)


def norm_and_head(model: Model, mesh: DeviceMesh) -> nn.Module:
    fully_shard([model.norm, model.head], mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def everything_apart(model: Model, mesh: DeviceMesh) -> nn.Module:
    """As trainers do: embedding, each layer, [norm, head], each term's own parameters, the rest."""
    for owner in (
        model.embed,
        *model.layers,
        [model.norm, model.head],
        *model.objective.terms.values(),
    ):
        fully_shard(owner, mesh=mesh)  # type: ignore[arg-type]
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def objective_apart(model: Model, mesh: DeviceMesh) -> nn.Module:
    """The objective's parameters as one group."""
    if any(True for _ in model.objective.parameters()):
        fully_shard(model.objective, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


ENGINES: list[tuple[Callable[[Model, DeviceMesh], nn.Module], tuple[int, ...]]] = [
    (data_parallel, (4,)),
    (root_only, (4,)),
    (head_apart, (4,)),
    (head_that_stays, (4,)),
    (norm_and_head, (4,)),
    (objective_apart, (4,)),
    (everything_apart, (4,)),
    (everything_apart, (2, 2)),  # HSDP: two replicas of two shards
]


def step(
    engine: Callable[..., nn.Module], shape: tuple[int, ...], spec: str, batch: Batch, rank: int
) -> None:
    what = f"{engine.__name__} {shape}: {spec}"
    expected, gradients = whole(spec, twice(batch))
    model = Model(spec, batch)
    wrapped = engine(model, mesh_of(shape))
    parts = [batch.part(slice(rank, rank + 1)), batch.part(slice(RANKS - 1 - rank, RANKS - rank))]
    counts = (model.count(parts[0]) + model.count(parts[1])).all_reduce()
    assert counts.group_size == RANKS
    total = None
    for part in parts:
        out = wrapped(part, counts=counts)
        out.loss.backward()
        total = out.metrics if total is None else total + out.metrics
    assert total is not None
    same_metrics(out._replace(metrics=total), expected, what)
    for name, own in gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, f"{what}: {name} has no gradient"
        same(
            gradient.full_tensor() if isinstance(gradient, DTensor) else gradient,
            own,
            f"{what}: {name}",
        )


def twice(batch: Batch) -> Batch:
    """What all ranks see in a window: every row two times."""
    return batch.part(torch.arange(RANKS).repeat(2))  # type: ignore[arg-type]


def the_trap_beside_it(batch: Batch, rank: int) -> None:
    """A head in its own group that is read by `full_tensor()`: the loss is right, the gradient is
    not; ours is."""

    class Bare(nn.Module):
        def __init__(self, trapped: bool) -> None:
            super().__init__()
            inner = Model("ntp", batch)
            self.norm, self.head, self.objective, self.trapped = (
                inner.norm,
                inner.head,
                inner.objective,
                trapped,
            )

        def forward(self, part: Batch, counts: Counts) -> Tensor:
            h, ids = self.norm(part.hidden.detach()), part.ids
            if not self.trapped:
                streams = Streams(token_ids=ids, last_hidden=h, head=self.head)
                return self.objective(streams, counts=counts).loss
            logits = F.linear(h, self.head.weight.full_tensor(), self.head.bias.full_tensor())  # type: ignore[operator]
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            return RANKS * loss / counts["ntp"]

    alone = Bare(trapped=False)
    expected = alone(batch, alone.objective.count(Streams(token_ids=batch.ids)))
    expected.backward()
    right = alone.head.weight.grad
    assert right is not None
    found = {}
    for trapped in (False, True):
        model = Bare(trapped)
        fully_shard(model.head, mesh=init_device_mesh("cpu", (RANKS,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
        part = batch.part(slice(rank, rank + 1))
        loss = model(part, model.objective.count(Streams(token_ids=part.ids)).all_reduce())
        loss.backward()
        assert isinstance(model.head.weight.grad, DTensor)
        loss = loss.detach() / RANKS
        dist.all_reduce(loss)
        found[trapped] = loss, model.head.weight.grad.full_tensor()
    for trapped in (False, True):
        same(found[trapped][0], expected.detach(), "loss")
    same(found[False][1], right, "our gradient")
    error = (found[True][1] - right).norm() / right.norm()
    assert error > 0.5, (
        f"full_tensor() gives the right gradient here too (error {error:.1e}): the trap is gone"
    )


def drawn_after_sharding(spec: str) -> None:
    """Meta device, fully_shard, to_empty, reset_parameters: the values of a plain build."""
    plain = build(spec, model=INFO)
    if not list(plain.parameters()):
        return
    for shape in ((4,), (2, 2)):
        with torch.device("meta"):
            late = build(spec, model=INFO)
        for term in late.terms.values():
            fully_shard(term, mesh=mesh_of(shape))
        fully_shard(late, mesh=mesh_of(shape))
        late.to_empty(device="cpu")
        late.reset_parameters()
        for name, parameter in plain.named_parameters():
            mine = late.get_parameter(name)
            assert isinstance(mine, DTensor) and torch.equal(mine.full_tensor(), parameter), (
                f"{spec}: {name}"
            )


def worker(rank: int) -> None:
    batch = packed_batch()
    for engine, shape in ENGINES:
        for spec in SPECS.values():
            step(engine, shape, spec, batch, rank)
    for spec in SPECS.values():
        drawn_after_sharding(spec)
    the_trap_beside_it(batch, rank)


def test_every_objective_trains_on_four_ranks_as_on_one(tmp_path: Path):
    start(worker, RANKS, tmp_path)
