"""A small float64 model for tests with several processes, what one process computes with it, and
how ranks start."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from nitp_ops.objectives import Counts, ModelInfo, Output, SequenceShard, Streams, available, build
from tests.support.objectives_cases import INFO, Batch, make_batch

LENGTH = 16
SPECS = {name: f"main: ntp + extra: 0.7*{name}" for name in available()}
SPECS["all at once"] = (
    "ntp + 0.8*nitp + mtp_shared + 0.5*top + mtp_parallel(offsets=[4]) + mtp_sequential + fsp_bow"
)
SPECS["all at once"] += (
    " + early: 0.5*nitp(target_layer=0, denominator=main, mask=document+label) + nextlat"
)


def packed_batch() -> Batch:
    """Four rows of packed documents, of which the last is padding alone: a rank that holds it has
    no target."""
    batch = make_batch(batch=4, length=LENGTH)
    ends = torch.tensor([[3, 9, 16], [5, 6, 12], [1, 2, 11], [0, 0, 0]])
    place = torch.arange(LENGTH)
    batch.documents = (place >= ends.unsqueeze(-1)).sum(1).masked_fill(place >= ends[:, 2:], -1)
    batch.extra = {"target_mask": place.expand(4, LENGTH) % 7 != 4}
    return batch


class Model(nn.Module):
    """An embedding, five layers that look at one position each, a norm, a head and an objective."""

    def __init__(self, spec: str, batch: Batch, info: ModelInfo = INFO) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        width = info.hidden_size
        self.layers = nn.ModuleList(
            nn.Linear(width, width, dtype=torch.float64) for _ in range(info.num_layers)
        )
        self.norm = nn.RMSNorm(width, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        self.embed, self.head = copy.deepcopy(batch.embed), copy.deepcopy(batch.head)
        self.objective = build(spec, model=info)

    def forward(
        self, batch: Batch, shard: SequenceShard | None = None, **options: object
    ) -> Output:
        mine = batch.ids if shard is None else shard.take(batch.ids)
        x = self.embed(mine)
        x = x + (batch.hidden if shard is None else shard.take(batch.hidden)).detach().to(x.dtype)
        states = {0: x}
        for k, layer in enumerate(self.layers, start=1):
            states[k] = x = x + layer(x).tanh()
        documents = (
            batch.documents
            if shard is None or batch.documents is None
            else shard.take(batch.documents)
        )
        real = torch.ones_like(mine, dtype=torch.bool) if documents is None else documents >= 0
        penalty = x[real].square().sum(), real.sum()
        streams = batch.streams(
            last_hidden=self.norm(x),
            last_residual=x,
            hidden_states=states,
            head=self.head,
            embed=self.embed,
            external={"external": penalty, "extra": penalty},
            shard=shard,
        )
        return self.objective(streams, **options)

    def count(self, batch: Batch, shard: SequenceShard | None = None) -> Counts:
        """Before any forward pass: tokens, documents and masks alone."""
        documents = (
            batch.documents
            if shard is None or batch.documents is None
            else shard.take(batch.documents)
        )
        real = torch.tensor(batch.ids.numel()) if documents is None else (documents >= 0).sum()
        pair = torch.zeros(()), real
        external = {"external": pair, "extra": pair}
        tokens = {"token_ids": batch.ids, "document_ids": batch.documents, **batch.extra}
        return self.objective.count(Streams(**tokens, external=external, shard=shard))  # type: ignore[arg-type]


def whole(
    spec: str, batch: Batch, info: ModelInfo = INFO
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, gradients) of one process that sees everything."""
    model = Model(spec, batch, info)
    out = model(batch)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.any() for gradient in gradients.values())
    return out.metrics.compute(), gradients


def same(mine: Tensor, expected: Tensor, what: str, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        mine, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def same_metrics(out: Output, expected: dict[str, float], what: str) -> None:
    """Their sum over all ranks says what one process says."""
    found = out.metrics.all_reduce().compute()
    assert found.keys() == expected.keys()
    mine, theirs = (
        torch.tensor(list(numbers.values()), dtype=torch.float64) for numbers in (found, expected)
    )
    torch.testing.assert_close(
        mine,
        theirs,
        rtol=1e-12,
        atol=1e-12,
        equal_nan=True,
        msg=lambda text: f"{what}: {found}: {text}",
    )


def start(worker: Callable[..., None], ranks: int, folder: Path, *arguments: object) -> None:
    """Run ``worker(rank, *arguments)`` on gloo processes; a failure of one is raised here, the
    others are stopped."""
    spawn(_enter, args=(worker, ranks, str(folder), arguments), nprocs=ranks)


def _enter(
    rank: int, worker: Callable[..., None], ranks: int, folder: str, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    # DeepSpeed reads them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    store = f"file://{folder}/store-{ranks}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    worker(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
