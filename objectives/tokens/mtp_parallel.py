"""Several future tokens by parallel heads: a transformer block each, one shared unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.base import Context, HeadRows, Objective
from nitp_ops.engine.drafting.drafters import ParallelDrafter
from nitp_ops.engine.modules.blocks import (
    KeyValues,
    attention_mask,
    factory_problems,
    make_block,
    whole_sequence_problems,
    without_padding,
)
from nitp_ops.engine.modules.module_call import Sealed
from nitp_ops.engine.modules.parameters import redraw, seeded
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.validation import MOST_HEADS
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.token_term import OffsetTerm, TokenTerm, ahead, offset_problems


@register("mtp_parallel")
@dataclass(frozen=True, kw_only=True)
class MTPParallel(OffsetTerm):
    """``sum_i SUM_i / COUNT_i`` of ``CE(W f_i(h)_t, x_{t+i})`` over V_i, each f_i a head of its
    own.

    f_i reads last_hidden h, W is the model's head. The unembedding is read once for all heads and
    for every other term of the model's head. An offset that another term already predicts from the
    same hidden states with the same head is
    refused: beside ntp take 2 and more; the paper's own form is ``mtp_parallel(offsets=[1, 2, 3,
        4])`` without ntp.

    Args:
        offsets: the i, distinct and >= 1, at most 64 of them.
        heads: "block", one transformer block each (`ModelInfo.block_factory`, else a plain one:
            RMSNorm, causal attention inside the document, SwiGLU); "residual", ``h + silu(W_i h)``
            with W_i zero at first: with offsets (1, 3, 5, 7) that is L-MTP, arXiv 2505.17505.
        The options of `TokenTerm`, as in ntp.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, build
        >>> info = ModelInfo(hidden_size=8, vocab_size=32, num_layers=4)
        >>> objective = build("ntp + mtp_parallel(offsets=[3], heads=residual)", model=info)
        >>> {name: tuple(p.shape) for name, p in objective.named_parameters()}
        {'terms.mtp_parallel.heads.0.weight': (8, 8)}

    Source: arXiv 2404.19737.
    """

    offsets: tuple[int, ...] = (2, 3, 4)
    heads: Literal["block", "residual"] = "block"

    def problems(self) -> list[str]:
        return [*super().problems(), *offset_problems(self.offsets, MOST_HEADS)]

    def conflicts(self, others: Sequence[Objective]) -> list[str]:
        return [
            f"offset {k} is predicted from last_hidden by {other.label} too, expected offsets of "
            "its own"
            for other in others
            if isinstance(other, TokenTerm)
            for k in sorted(self.predicted() & other.predicted())
        ]

    def model_problems(self, info: ModelInfo) -> list[str]:
        return factory_problems(info) if self.heads == "block" else []

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module:
        return ParallelHeads(self.heads, len(self.offsets), info, seed)

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return whole_sequence_problems(module)

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        assert streams.last_hidden is not None and context.module is not None
        trunk = streams.last_hidden
        if self.heads == "block":
            trunk = without_padding(trunk, streams)
        # no position looks at another: zeros wherever no head has a target, before anything is
        # applied to them
        else:
            counted = torch.stack([*self.valid(streams).values()]).any(0)
            trunk = trunk.masked_fill(~counted.unsqueeze(-1), 0)
        hidden = context.module(trunk, attention_mask(streams))
        return {
            str(k): self.against(streams, f, k) for k, f in zip(self.offsets, hidden, strict=True)
        }

    def drafter(self, module: nn.Module | None, info: ModelInfo) -> ParallelDrafter | None:
        assert isinstance(module, ParallelHeads)
        if max(self.offsets) == 1:
            return None
        heads: list[Any] = list(module.heads)  # type: ignore[arg-type]
        return ParallelDrafter(heads, self.offsets, info)

    def own_states(self) -> int:
        return len(self.offsets)

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        with torch.device("meta"):
            own = sum(parameter.numel() for parameter in self.make_module(info, 0).parameters())
        head = len(self.offsets) * info.vocab_size * info.hidden_size
        attention = " and attention" if self.heads == "block" else ""
        return {
            "rows": f"{self.heads} heads on h_t against tokens {ahead(self.offsets)}",
            "parameters added": f"{own:,}, dropped after training",
            "training FLOPs per token": f"{6 * (head + own):,} (6 V d per head, 6 per "
            f"parameter){attention}",
        }


class Residual(nn.Module):
    """``h + silu(W h)``, W zero at first: the head starts as the identity, and learns, for silu'(0)
    = 1/2."""

    incremental = context_parallel = True  # no position looks at another

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(info.hidden_size, info.hidden_size, dtype=info.dtype)
        )

    def forward(self, hidden: Tensor, mask: Tensor | None, past: KeyValues | None = None) -> Tensor:
        return hidden + F.silu(F.linear(hidden, self.weight))


class ParallelHeads(Sealed):
    """``[f_1(h), f_2(h), ...]``, with initial values that depend on the seed alone."""

    def __init__(
        self, kind: Literal["block", "residual"], count: int, info: ModelInfo, seed: int
    ) -> None:
        super().__init__()
        self.kind, self.count, self.info, self.seed = kind, count, info, seed
        self.heads = seeded(self._make, seed)

    def _make(self) -> nn.ModuleList:
        make = make_block if self.kind == "block" else Residual
        return nn.ModuleList(make(self.info) for _ in range(self.count))

    def reset_parameters(self) -> None:
        """Draw the initial values anew, always the same ones; on the meta device nothing happens."""
        redraw(self.heads, self._make, self.seed)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> list[Tensor]:
        dtype = next(self.parameters()).dtype
        # cast for each head: where hidden is wider, that is where their gradients add up
        return [head(hidden.to(dtype), mask) for head in self.heads]  # type: ignore[union-attr]
