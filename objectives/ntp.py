"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .base import Context, HeadRows
from .model_info import ModelInfo
from .registry import register
from .shift import token_targets
from .streams import Streams
from .token_term import TokenTerm


@register("ntp")
@dataclass(frozen=True, kw_only=True)
class NTP(TokenTerm):
    """``(1 - e) (lse - z[x_{t+1}]) + e (lse - mean_v z_v) + c lse^2`` over V_1, with ``lse = log sum_v exp(z_v)``.

    z are the model's logits (its bias, logit scale and softcap included). Streams.token_weight multiplies a row's loss
    and leaves the count alone.

    Args:
        label_smoothing: e, in [0, 1]. z_loss: c, >= 0.

    Example:
        >>> from nitp_ops.objectives import parse
        >>> parse("ntp(z_loss=1e-4)").terms[0]
        NTP(label='ntp', weight=1.0, denominator='own', label_smoothing=0.0, z_loss=0.0001)

    Source: z-loss as in PaLM, arXiv 2204.02311.
    """

    def requires(self, info: ModelInfo) -> frozenset[str]:
        return frozenset({"token_ids", "last_hidden", "head"})

    def predicted(self) -> frozenset[int]:
        return frozenset({1})

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": token_targets(streams, 1) != streams.ignore_index}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        assert streams.last_hidden is not None
        return {"": self.against(streams, streams.last_hidden, 1)}

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        head = 6 * info.vocab_size * info.hidden_size
        return {"rows": "h_t against token t+1", "training FLOPs a token": f"{head:,} (6 V d)"}
