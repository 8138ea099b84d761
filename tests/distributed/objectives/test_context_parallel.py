"""Four gloo processes share sequences: loss and gradients are those of one process, or the term
says why not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nitp_ops.objectives import SequenceShard, build
from tests.support.engine_cases import (
    LENGTH,
    SPECS,
    Model,
    packed_batch,
    same,
    same_metrics,
    start,
    whole,
)
from tests.support.objectives_cases import INFO, Batch

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
LAYOUTS = ("contiguous", "zigzag")


class _Gather(torch.autograd.Function):
    """[B, T/p, d] of every rank in the order of the sequence, [B, T, d]; gradients are summed where
    they belong to."""

    @staticmethod
    def forward(ctx, part: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard, whole = shard, part.new_zeros(len(part), LENGTH, part.shape[-1])
        begin = 0
        for first, last in shard.spans:
            whole[:, first:last] = part[:, begin : begin + last - first]
            begin += last - first
        dist.all_reduce(whole, group=shard.group)
        return whole

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        whole = gradients[0].clone()
        dist.all_reduce(whole, group=ctx.shard.group)
        return ctx.shard.take(whole), None


class Attention(nn.Module):
    """One head of causal attention that finds the keys of the other ranks by itself, in the way
    that ModelInfo says."""

    context_parallel = True
    # of the running step; an engine keeps it in a context of its own
    shard: SequenceShard | None = None

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(
            INFO.hidden_size, 3 * INFO.hidden_size, bias=False, dtype=torch.float64
        )

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.matrix(hidden).chunk(3, dim=-1)
        shard = Attention.shard
        if shard is not None:
            key, value = _Gather.apply(key, shard), _Gather.apply(value, shard)  # type: ignore[assignment]
        causal = torch.ones(1, LENGTH, LENGTH).tril().bool()
        seen = (
            mask.squeeze(1) if mask is not None else causal if shard is None else shard.take(causal)
        )
        scores = (query @ key.mT / math.sqrt(INFO.hidden_size)).masked_fill(~seen, -torch.inf)
        return hidden + F.softmax(scores, dim=-1) @ value


BLOCKS = replace(INFO, block_factory=Attention)
VARIANTS = {
    "two ahead": "ntp + nitp(shift=2, target_norm=rms) + next_embedding",
    "same place": "nitp(shift=0, stop_gradient=false, distance=mse) + nextlat(kl_weight=0)",
    "residual heads": "ntp + mtp_parallel(offsets=[3, 5, 7, 9], heads=residual) + top(window=5)",
}


def shared_by(cp: int, layout: str) -> tuple[slice, SequenceShard, dist.ProcessGroup]:
    """(this rank's rows, its part of their sequences, all ranks) of a (4 / cp) x cp mesh."""
    mesh = init_device_mesh("cpu", (4 // cp, cp), mesh_dim_names=("dp", "cp"))
    rows = 4 * cp // 4
    dp = mesh.get_local_rank("dp")
    shard = SequenceShard(length=LENGTH, layout=layout, group=mesh.get_group("cp"))  # type: ignore[arg-type]
    return slice(rows * dp, rows * dp + rows), shard, mesh["dp", "cp"]._flatten("dp_cp").get_group()


def summed(
    spec: str, batch: Batch, info, rows: slice, shard: SequenceShard, group: dist.ProcessGroup
) -> None:
    """The plain way: every rank's gradients, added."""
    expected, gradients = whole(spec, batch, info)
    model, part = Model(spec, batch, info), batch.part(rows)
    Attention.shard = shard
    counts = model.count(part, shard).all_reduce(group)
    out = model(part, shard, counts=counts, gradient_reduction="sum")
    out.loss.backward()
    Attention.shard = None
    same_metrics(out, expected, spec)
    for name, parameter in model.named_parameters():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(mine)
        same(mine, gradients.get(name, torch.zeros_like(mine)), f"{spec}: {name}")


def sharded_too(batch: Batch, rows: slice, shard: SequenceShard) -> None:
    """FSDP2 over data x context parallel ranks, a window of microbatches of one row each."""
    spec = SPECS["all at once"]
    _, gradients = whole(spec, batch, BLOCKS)
    model = Model(spec, batch, BLOCKS)
    mesh = init_device_mesh("cpu", (4,))
    for owner in (model.head, *model.objective.terms.values(), model):
        fully_shard(owner, mesh=mesh)
    window = [batch.part(slice(row, row + 1)) for row in range(rows.start, rows.stop)]
    counts = model.count(window[0], shard)
    for part in window[1:]:
        counts = counts + model.count(part, shard)
    counts = counts.all_reduce()
    Attention.shard = shard
    for part in window:
        model(part, shard, counts=counts).loss.backward()
    Attention.shard = None
    for name, expected in gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        same(gradient.full_tensor(), expected, f"FSDP2 x context parallel: {name}")  # type: ignore[attr-defined]


def refused(spec: str, batch: Batch, shard: SequenceShard) -> list[str]:
    """The reasons that keep a spec from running on a shard, by what `count` raises before anything
    runs."""
    objective = build(spec, model=INFO)
    own = dict(objective.terms.items())
    reasons = [
        r for t in objective.spec.terms for r in t.shard_problems(INFO, own.get(str(t.label)))
    ]
    if reasons:
        with pytest.raises(ValueError, match="a shard of the sequence") as caught:
            Model(spec, batch).count(batch, shard)
        assert all(reason in str(caught.value) for reason in reasons)
    return reasons


def worker(rank: int) -> None:
    batch = packed_batch()
    for layout in LAYOUTS:
        for cp in (2, 4):
            rows, shard, group = shared_by(cp, layout)
            plain = {name: refused(spec, batch.part(rows), shard) for name, spec in SPECS.items()}
            exact = [SPECS[name] for name, reasons in plain.items() if not reasons]
            assert (
                len(exact) > len(SPECS) // 2
                and SPECS["nitp"] in exact
                and SPECS["nextlat"] in exact
            )
            for spec in [*exact, *VARIANTS.values()]:
                summed(spec, batch, INFO, rows, shard, group)
            blocks = [SPECS[name] for name, why in plain.items() if why and "its blocks" in why[0]]
            assert SPECS["mtp_sequential"] in blocks
            for spec in blocks:  # a block that finds the other keys makes them exact
                summed(spec, batch, BLOCKS, rows, shard, group)
            sharded_too(batch, rows, shard)
    labels_that_are_shifted(batch)
    too_far(batch)


def labels_that_are_shifted(batch: Batch) -> None:
    """Over the whole row, and inside each document, which may end on another rank; then one
    document a row."""
    rows, shard, group = shared_by(4, "zigzag")
    shifted = torch.cat([batch.ids[:, 1:], batch.ids[:, :1]], dim=1)
    labels = {"shift_labels": shifted, "token_weight": batch.hidden[..., 0].detach().abs()}
    for layout in ("stream", "document"):
        batch.extra = {**labels, "label_layout": layout}
        summed(SPECS["all at once"], batch, BLOCKS, rows, shard, group)
    batch.documents = None
    for spec in (SPECS["all at once"], VARIANTS["residual heads"]):
        summed(spec, batch, BLOCKS, rows, shard, group)


def too_far(batch: Batch) -> None:
    _, shard, _ = shared_by(4, "zigzag")
    with pytest.raises(ValueError, match="shift is 3, expected at most the 2 rows of a chunk"):
        Model("nitp(shift=3)", batch)(batch, shard)


def test_sequences_shared_by_ranks_train_as_whole_ones(tmp_path: Path):
    start(worker, 4, tmp_path)
