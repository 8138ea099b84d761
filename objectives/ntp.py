"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import Context, HeadRows, HeadTerm
from .model_info import ModelInfo
from .registry import register
from .schema import number_problem
from .shift import target_weights, token_targets
from .streams import Streams


@register("ntp")
@dataclass(frozen=True, kw_only=True)
class NTP(HeadTerm):
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

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def problems(self) -> list[str]:
        found = [
            number_problem("label_smoothing", self.label_smoothing, 0),
            number_problem("z_loss", self.z_loss, 0),
        ]
        if self.label_smoothing > 1:
            found.append(f"label_smoothing is {self.label_smoothing}, expected a number in [0, 1]")
        return [problem for problem in found if problem]

    def requires(self, info: ModelInfo) -> frozenset[str]:
        return frozenset({"token_ids", "last_hidden", "head"})

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": token_targets(streams, 1) != streams.ignore_index}

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        assert streams.last_hidden is not None and streams.head is not None
        return {
            "": HeadRows(
                hidden=streams.last_hidden,
                labels=token_targets(streams, 1),
                head=streams.head,
                token_weight=target_weights(streams, 1),
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
            )
        }

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        head = 6 * info.vocab_size * info.hidden_size
        return {"rows": "h_t against token t+1", "training FLOPs a token": f"{head:,} (6 V d)"}
