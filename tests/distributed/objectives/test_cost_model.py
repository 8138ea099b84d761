"""What `estimate_cost` says is, to the byte, what four gloo processes hand to their collectives, for
every objective."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nitp_ops.engine.reports.cost_model import Mesh, estimate_cost
from nitp_ops.engine.reports.dry_run import dry_run
from nitp_ops.objectives import SequenceShard, Streams, build
from tests.support.engine_cases import LENGTH, SPECS, packed_batch, start
from tests.support.objectives_cases import INFO, Batch

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
KINDS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather"}
TABLE = 12 * 6 * 8  # bytes of the head or the embedding, padded to a multiple of four rows
KINDS["_reduce_scatter_base_"] = "reduce-scatter"


class Traffic(TorchDispatchMode):
    """Bytes of the largest tensors that collectives take or give, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # (what comes out, what goes in, ...): of an all-gather the first, of a reduce-scatter
            # the second is whole
            kind = KINDS[func.__name__.partition(".")[0]]
            whole = args[1] if kind == "reduce-scatter" else args[0]
            tensors = [x for x in tree_leaves(whole) if isinstance(x, Tensor)]
            self.bytes[kind] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


class Bare(nn.Module):
    """What an objective reads, without a trunk; hidden states are given."""

    def __init__(self, spec: str, batch: Batch) -> None:
        super().__init__()
        self.embed, self.head = (
            copy.deepcopy(batch.embed),
            nn.Linear(6, 11, bias=False, dtype=torch.float64),
        )
        self.objective = build(spec, model=INFO)

    def streams(self, batch: Batch, shard: SequenceShard | None) -> Streams:
        def here(x: Tensor) -> Tensor:
            return (x if shard is None else shard.take(x)).detach().requires_grad_()

        states = {k: here(x) for k, x in batch.states.items()}
        hidden = {
            "last_hidden": here(batch.hidden),
            "last_residual": here(batch.residual),
            "hidden_states": states,
        }
        return batch.streams(head=self.head, embed=self.embed, shard=shard, **hidden)

    def forward(self, batch: Batch, shard: SequenceShard | None, counts):
        return self.objective(self.streams(batch, shard), counts=counts)


def measured(spec: str, batch: Batch, mesh: Mesh) -> dict[str, Counter[str]]:
    """What really goes through torch.distributed, by occasion."""
    shape = init_device_mesh("cpu", (mesh.dp, mesh.cp), mesh_dim_names=("dp", "cp"))
    shard = (
        SequenceShard(length=LENGTH, layout="zigzag", group=shape.get_group("cp"))
        if mesh.cp > 1
        else None
    )
    model, flat = Bare(spec, batch), init_device_mesh("cpu", (4,))
    for owner in (model.head, model.embed, *model.objective.terms.values(), model):
        fully_shard(owner, mesh=flat)
    found = {name: Traffic() for name in ("window", "microbatch", "report")}
    with found["window"]:
        counts = model.objective.count(model.streams(batch, shard)).all_reduce()
    with found["microbatch"]:
        out = model(batch, shard, counts)
        out.loss.backward()
    with found["report"]:
        out.metrics.all_reduce()
    return {name: traffic.bytes for name, traffic in found.items()}


def worker(rank: int) -> None:
    batch = packed_batch().part(slice(0, 2))
    specs = [
        *SPECS.values(),
        "ntp + nitp(projector=linear, shift=2) + same: 0.5*nitp(shift=0) + top",
    ]
    compared = 0
    for mesh in (Mesh(dp=4), Mesh(dp=2, cp=2)):
        for spec in specs:
            tokens = batch.ids.numel() // mesh.cp
            try:
                cost = estimate_cost(spec, INFO, mesh, tokens=tokens, sequences=len(batch.ids))
            except ValueError as error:
                assert mesh.cp > 1 and "shard of the sequence" in str(error)
                continue
            said = {name: Counter() for name in ("window", "microbatch", "report")}
            for each in cost.traffic:
                said[each.every][each.collective] += each.bytes
            real = measured(spec, batch, mesh)
            again = sum(
                count - 1 for count in dry_run(spec, INFO, sharded=mesh.cp > 1).calls.values()
            )
            if again and real != said:  # the backward of a module's second call may find it whole
                gathered = [found["microbatch"].pop("all-gather") for found in (real, said)]
                saved = gathered[1] - gathered[0]
                assert 0 < saved <= again * TABLE and saved % TABLE == 0, (
                    f"{mesh}: {spec}: {gathered}"
                )
            assert real == said, f"{mesh}: {spec}: sent {real}, foretold {said}"
            compared += 1
    assert compared > len(specs) * 3 // 2


def test_the_bytes_that_are_foretold_are_sent(tmp_path: Path):
    start(worker, 4, tmp_path)
