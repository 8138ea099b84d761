"""FSDP2: several processes train as one would, with ntp + nitp on sequences of unequal length.

    torchrun --nproc-per-node 2 examples/distributed.py

Three things make it exact. Counts are those of the whole window, summed over ranks in one
collective. The head is read inside its own call, so its FSDP2 group gathers it and reduces its
gradient. The objective, with its projector, is a part of the model that `fully_shard` wraps.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nitp_ops.objectives import Counts, ModelInfo, Output, Streams, build

INFO = ModelInfo(hidden_size=32, vocab_size=97, num_layers=4)
ACCUMULATE, SEQUENCES, LENGTH = 2, 4, 24


class Block(nn.Module):
    """``x + W tanh(V x)`` over the mean of all earlier positions and this one: what stands here for
    attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(1, x.shape[1] + 1).unsqueeze(-1)
        return x + self.leave(self.enter(torch.cat([x, x.cumsum(1) / place], dim=-1)).tanh())


class Model(nn.Module):
    """A small language model whose forward pass ends in its objective."""

    def __init__(self) -> None:
        super().__init__()
        width = INFO.hidden_size
        self.embed = nn.Embedding(INFO.vocab_size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(INFO.num_layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, INFO.vocab_size, bias=False)
        self.objective = build("ntp + 0.8*nitp(target_layer=0.2)", model=INFO)

    def forward(self, token_ids: Tensor, attention_mask: Tensor, counts: Counts) -> Output:
        states = {0: self.embed(token_ids)}
        for k, block in enumerate(self.blocks):
            states[k + 1] = block(states[k])
        streams = Streams(
            token_ids=token_ids,
            attention_mask=attention_mask,
            last_hidden=self.norm(states[INFO.num_layers]),
            hidden_states=states,
            head=self.head,
        )
        return self.objective(streams, counts=counts)


def window(step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """(token_ids, attention_mask) of each microbatch: arithmetic progressions of unequal length."""
    draw = torch.Generator().manual_seed(1000 * rank + step)
    found = []
    for _ in range(ACCUMULATE):
        first, stride = (
            torch.randint(1, high, (SEQUENCES, 1), generator=draw) for high in (INFO.vocab_size, 9)
        )
        ids = (first + stride * torch.arange(LENGTH)) % INFO.vocab_size
        lengths = torch.randint(2, LENGTH + 1, (SEQUENCES, 1), generator=draw)
        found.append((ids, (torch.arange(LENGTH) < lengths).long()))
    return found


def main() -> None:
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # the same initial weights on every rank
    model = Model()
    for owner in (*model.blocks, [model.norm, model.head], *model.objective.terms.values(), model):
        fully_shard(owner, mesh=mesh)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        batches = window(step, rank)
        counts = [
            model.objective.count(Streams(token_ids=ids, attention_mask=mask))
            for ids, mask in batches
        ]
        whole = (counts[0] + counts[1]).all_reduce()
        measured = None
        for ids, mask in batches:
            out = model(ids, mask, whole)
            # FSDP2 averages over ranks, which the objective has already made up for
            out.loss.backward()
            measured = out.metrics if measured is None else measured + out.metrics
        optimizer.step()
        optimizer.zero_grad()
        assert measured is not None
        if step % 10 == 9:
            found = measured.all_reduce().compute()
            if rank == 0:
                shown = {
                    name: round(found[name], 4)
                    for name in ("loss", "ntp/loss", "nitp/loss", "nitp/skill")
                }
                print(f"step {step + 1}: {shown}, {found['ntp/count']} targets")
    # gloo's threads drop the last tensors here, not while the interpreter shuts down
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
