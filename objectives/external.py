"""A loss that the model computed itself, such as the balance loss of a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nitp_ops.engine.base import Context, LatentPart, LatentTerm
from nitp_ops.engine.registry import register
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams


@register("external")
@dataclass(frozen=True, kw_only=True)
class External(LatentTerm):
    """``weight * SUM / COUNT`` of a loss that the model computed itself: it shares weights,
    schedules, counts and logs.

    `Streams.external` brings ``{name: (SUM, COUNT)}`` or ``{name: SUM}``. A sum alone counts 1, so
    that it is averaged over the microbatches of a window (and its ranks).
    `CompositeObjective.count` runs before SUM exists: it takes COUNT from a pair with any SUM, and
    1 where the name is missing.

    Under a weight of zero SUM gets a gradient of exact zeros; what the model computed before it is
    the model's own.

    Args:
        stream: the name in `Streams.external`; the label where not given.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, Streams, build
        >>> objective = build("balance: 0.01*external", model=ModelInfo(hidden_size=2, vocab_size=4, num_layers=1))
        >>> ids, balance = torch.ones(1, 3, dtype=torch.int64), torch.tensor(1.5, requires_grad=True)
        >>> out = objective(Streams(token_ids=ids, external={"balance": balance}))
        >>> round(out.loss.item(), 4), out.metrics.compute()["balance/loss"]
        (0.015, 1.5)

    Source: meant for losses like the balance loss of Switch Transformers, arXiv 2101.03961.
    """

    stream: str | None = None

    def key(self) -> str:
        """The name in `Streams.external`."""
        return self.stream or self.label or self.name

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        return frozenset({Need("external", name=self.key())})

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        if self.key() not in streams.external_pairs:
            return {"": torch.ones((), dtype=torch.int64, device=streams.device)}
        return {"": streams.external_pairs[self.key()][1]}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart]:
        total, _ = streams.external_pairs[self.key()]
        return {"": context.part(total)}

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        return {
            "rows": f"external[{self.key()}]: as many as the model counts, 1 a microbatch "
            "where it counts none"
        }
