"""Pipeline parallel: the tapped state travels to the last stage as an output of its own.

    torchrun --nproc-per-node 2 examples/pipeline.py

nitp compares the last hidden state with that of a lower block, which an earlier stage computes. So
each stage hands on (residual stream, tapped state); the tapped state is detached where it is
tapped, so no gradient travels back for it. The objective, with its projector, is part of the last
stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from nitp_ops.objectives import CompositeObjective, Counts, ModelInfo, Streams, build

INFO = ModelInfo(hidden_size=16, vocab_size=64, num_layers=4)
TAP = 1  # blocks before the target of nitp


class Block(nn.Module):
    """``x + W tanh(V x)``: what stands here for a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = (
            nn.Linear(16, 32, dtype=INFO.dtype),
            nn.Linear(32, 16, dtype=INFO.dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.enter(x).tanh())


class FirstStage(nn.Module):
    """Token ids to (x, s): the residual stream, and its state after `TAP` blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(64, 16, dtype=INFO.dtype), nn.ModuleList(blocks)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = tapped = self.embed(token_ids)
        for k, block in enumerate(self.blocks, start=1):
            x = block(x)
            if k == TAP:
                tapped = x.detach()
        return x, tapped


class LastStage(nn.Module):
    """(x, s) to (h, s): the final hidden state. It owns the head and the objective, which `loss`
    reads."""

    def __init__(self, blocks: Sequence[nn.Module], objective: CompositeObjective) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(blocks), nn.RMSNorm(16, dtype=INFO.dtype)
        self.head, self.objective = nn.Linear(16, 64, bias=False, dtype=INFO.dtype), objective

    def forward(self, x: Tensor, tapped: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        return self.norm(x), tapped

    def loss(self, outputs: tuple[Tensor, Tensor], token_ids: Tensor, counts: Counts) -> Tensor:
        hidden, tapped = outputs
        streams = Streams(
            token_ids=token_ids, last_hidden=hidden, hidden_states={TAP: tapped}, head=self.head
        )
        return self.objective(streams, counts=counts).loss


def make_stages() -> tuple[FirstStage, LastStage]:
    torch.manual_seed(0)
    objective = build(f"ntp + 0.8*nitp(target_layer={TAP})", model=INFO)
    return FirstStage([Block(), Block()]), LastStage([Block(), Block()], objective)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    first, last = make_stages()
    mine = (first, last)[rank]
    stage = PipelineStage(mine, rank, 2, torch.device("cpu"))
    ids = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))
    # counts are those of all microbatches: their losses add up, so the schedule must not scale
    # gradients
    counts = last.objective.count(Streams(token_ids=ids))
    schedule = Schedule1F1B(
        stage,
        n_microbatches=4,
        loss_fn=lambda out, target: last.loss(out, target, counts),
        scale_grads=False,
    )
    optimizer = torch.optim.AdamW(mine.parameters(), lr=3e-3)
    for number in range(5):
        optimizer.zero_grad()
        losses: list[Tensor] = []
        schedule.step(*((ids,) if rank == 0 else ()), target=ids, losses=losses)
        optimizer.step()
        if losses:
            print(f"step {number}: loss {torch.stack(losses).sum().item():.4f}")
    # gloo's threads drop the last tensors here, not while the interpreter shuts down
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
