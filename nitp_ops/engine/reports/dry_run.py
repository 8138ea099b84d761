"""Which streams and modules an objective uses and how often: its forward pass on a model of width
8, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nitp_ops.engine.base import HeadTerm
from nitp_ops.engine.composite import build
from nitp_ops.engine.parsing import SpecLike
from nitp_ops.engine.streams.context_parallel import SequenceShard
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import reads
from nitp_ops.engine.streams.streams import Streams

_WIDTH, _VOCABULARY, _LENGTH = 8, 16, 64


@dataclass
class Uses:
    """What one microbatch does.

    Attributes:
        parts: of the counts. head_parts: those against the model's head.
        numbers, vectors: in the metrics, 0-d sums and sums of width d.
        calls: of head, embed and each term's module, by the name of the module. sets: of rows that
            the head reads.
        shifts: of the targets that are hidden states, in the order of their exchange.
    """

    parts: int = 0
    head_parts: int = 0
    numbers: int = 0
    vectors: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    sets: int = 0
    shifts: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Recording(SequenceShard):
    """All of the sequence; records what other ranks would be sent."""

    shifts: list[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", ((0, self.length),))  # whatever process group there is

    def following(self, rows: Tensor, k: int) -> Tensor:
        self.shifts.append(k)
        return torch.zeros_like(rows)


class _Still(nn.Module):
    """Stands for a block of the model, which has the model's width."""

    def __init__(self, context_parallel: bool) -> None:
        super().__init__()
        self.context_parallel, self.weight = context_parallel, nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return hidden * self.weight


def dry_run(spec: SpecLike, info: ModelInfo, *, sharded: bool) -> Uses:
    """Count what a spec uses; sharded: as where other ranks hold the rest of the sequence.

    Raises:
        ValueError: sharded, and a term can not run on a part of the sequence.
    """
    small = replace(info, hidden_size=_WIDTH, vocab_size=_VOCABULARY, dtype=torch.float32)
    if info.block_factory is not None:
        with torch.device("meta"):
            attends_elsewhere = getattr(info.block_factory(), "context_parallel", False)
        small = replace(small, block_factory=lambda: _Still(attends_elsewhere))
    objective, uses = build(spec, model=small), Uses()
    head, embed = nn.Linear(_WIDTH, _VOCABULARY, bias=False), nn.Embedding(_VOCABULARY, _WIDTH)
    for name, module in {"head": head, "embed": embed, **dict(objective.terms.items())}.items():
        module.register_forward_pre_hook(_counting(name, uses))
    hidden = torch.ones(1, _LENGTH, _WIDTH)
    external = [need.name for need in objective.requires if need.name is not None]
    streams = Streams(
        token_ids=torch.ones(1, _LENGTH, dtype=torch.int64),
        last_hidden=hidden,
        last_residual=hidden,
        hidden_states=dict.fromkeys(range(info.num_layers), hidden),
        head=head,
        embed=embed,
        external={name: torch.zeros(()) for name in external},
        shard=_Recording(length=_LENGTH, shifts=uses.shifts) if sharded else None,
    )
    with torch.no_grad():
        sums = objective(streams, step=0).metrics.sums
    uses.parts = len(sums)
    shared = [
        str(t.label)
        for t in objective.spec.terms
        if isinstance(t, HeadTerm) and reads(t.requires(small), "head")
    ]
    uses.head_parts = sum(name.partition("/")[0] in shared for name in sums)
    for own in sums.values():
        uses.numbers += sum(x.dim() == 0 for x in own.values())
        uses.vectors += sum(x.dim() == 1 for x in own.values())
    uses.shifts = [k for k in uses.shifts if k]
    return uses


def _counting(name: str, uses: Uses) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        uses.calls[name] += 1
        uses.sets += len(arguments) if name == "head" else 0

    return count
