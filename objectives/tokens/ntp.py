"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from nitp_ops.engine.base import Context, HeadRows
from nitp_ops.engine.registry import register
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.streams.targets import token_targets
from nitp_ops.engine.token_term import TokenTerm


@register("ntp")
@dataclass(frozen=True, kw_only=True)
class NTP(TokenTerm):
    """``(1 - e) (lse - z[x_{t+1}]) + e (lse - mean_v z_v) + c lse^2`` over V_1, with ``lse = log
    sum_v exp(z_v)``.

    z are the model's logits (its bias, logit scale and softcap included). Streams.token_weight
    multiplies a row's loss and leaves the count alone. With ``class_weight=true`` so does
    Streams.class_weight u, and the row's loss is ``(1 - e) u[x_{t+1}] (lse - z[x_{t+1}]) + e mean_v
    u_v (lse - z_v) + c lse^2``, as in PyTorch; unlike there COUNT stays the number of rows: it is
    an integer that is known before the forward pass.

    Args:
        label_smoothing: e, in [0, 1]. z_loss: c, >= 0. class_weight: whether Streams.class_weight
            applies.

    Example:
        >>> from nitp_ops.objectives import parse
        >>> parse("ntp(z_loss=1e-4)").terms[0]
        NTP(label='ntp', weight=1.0, denominator='own', label_smoothing=0.0, z_loss=0.0001,
        class_weight=False)

    Source: z-loss as in PaLM, arXiv 2204.02311.
    """

    class_weight: bool = False

    def max_offset(self) -> int:
        return 1

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        own = {Need("class_weight")} if self.class_weight else set()
        return frozenset({Need("token_ids"), Need("last_hidden"), Need("head"), *own})

    def predicted(self) -> frozenset[int]:
        return frozenset({1})

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": token_targets(streams, 1) != streams.ignore_index}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        assert streams.last_hidden is not None
        rows = self.against(streams, streams.last_hidden, 1)
        return {"": replace(rows, class_weight=streams.class_weight) if self.class_weight else rows}

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        head = 6 * info.vocab_size * info.hidden_size
        return {"rows": "h_t against token t+1", "training FLOPs per token": f"{head:,} (6 V d)"}
