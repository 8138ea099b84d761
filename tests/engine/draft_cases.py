"""A small model with a cache, one that reads its whole sequence, and what they decode greedily."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nitp_ops.engine.modules.blocks import Block
from nitp_ops.objectives import CompositeObjective, ModelInfo, Streams, build

INFO = ModelInfo(
    hidden_size=8, vocab_size=5, num_layers=1, dtype=torch.float64, initializer_range=0.5
)


SPECS = (
    "ntp + mtp_shared",
    "ntp + mtp_parallel",
    "mtp_parallel(offsets=[1, 3, 5, 7], heads=residual)",
    "mtp_parallel(offsets=[4, 1])",
    "ntp + mtp_sequential",
    "ntp + mtp_sequential(depth=3)",
    "ntp + mtp_sequential(depth=3, source=last_residual)",
)


class Model(nn.Module):
    """One causal block over embeddings, in float64, of a seed."""

    def __init__(self, seed: int, info: ModelInfo = INFO, bias: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(info.vocab_size, info.hidden_size, dtype=info.dtype)
            self.block = Block(info)
            self.head = nn.Linear(info.hidden_size, info.vocab_size, bias=bias, dtype=info.dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Streams:
        residual = self.block(self.embed(ids), None)
        last = nn.functional.rms_norm(residual, residual.shape[-1:])
        return Streams(
            token_ids=ids,
            last_hidden=last,
            last_residual=residual,
            head=self.head,
            embed=self.embed,
        )


@dataclass
class Whole:
    """A trunk without a cache: the model reads the whole sequence again."""

    model: Model
    ids: Tensor | None = None
    calls: int = 0

    def extend(self, token_ids: Tensor) -> Streams:
        self.calls += 1
        self.ids = token_ids if self.ids is None else torch.cat([self.ids, token_ids], dim=1)
        streams, new = self.model(self.ids), token_ids.shape[1]
        assert streams.last_hidden is not None and streams.last_residual is not None
        last, residual = streams.last_hidden[:, -new:], streams.last_residual[:, -new:]
        return Streams(
            token_ids=token_ids,
            last_hidden=last,
            last_residual=residual,
            head=streams.head,
            embed=streams.embed,
        )

    def cut(self, length: int) -> None:
        assert self.ids is not None and length <= self.ids.shape[1]
        self.ids = self.ids[:, :length]


def greedy(model: Model, prompt: Tensor, new: int, stop: int | None = None) -> Tensor:
    """One token at a time, by the definition."""
    ids = prompt
    for _ in range(new):
        streams = model(ids)
        assert streams.last_hidden is not None
        ids = torch.cat([ids, model.head(streams.last_hidden[:, -1:]).argmax(-1)], dim=1)
        if int(ids[0, -1]) == stop:
            break
    return ids


def objective(spec: str, seed: int = 0, info: ModelInfo = INFO) -> CompositeObjective:
    return build(spec, model=info, seed=seed).double()
