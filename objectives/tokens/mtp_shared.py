"""Several future tokens from the logits of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nitp_ops.engine.base import Context, HeadRows
from nitp_ops.engine.drafting.drafters import SharedDrafter
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.validation import number_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.token_term import OffsetTerm, ahead, offset_problems

#: Each is a part with a count, a loss and an accuracy of its own.
_MOST_OFFSETS = 256


@register("mtp_shared")
@dataclass(frozen=True, kw_only=True)
class MTPShared(OffsetTerm):
    """``sum_k w_k SUM_k / COUNT_k`` of ``CE(z_t, x_{t+k})`` over V_k: one row of logits against
    several tokens.

    No parameter. z are the model's logits, computed once for all offsets, and once together with an
    ntp of the same smoothing and z-loss. The gradient on a row of logits is ``S softmax(z) - sum_k
    w_k onehot(x_{t+k})`` over the targets that the row has, S the sum of their w_k (each divided by
    its count); equal tokens add. Each offset is a part of its own with its count, loss and
    accuracy. Smoothing and z-loss belong to each of the terms, so they count S times.

    Streams.token_weight multiplies each target's loss; every offset then takes a pass of its own
    over the logits.

    Args:
        offsets: the k, distinct and >= 1, at most 256 of them. weights: one w_k > 0 for each
            offset; 1 where not given.
        The options of `TokenTerm`, as in ntp.

    Example:
        >>> from nitp_ops.objectives import parse
        >>> parse("ntp + 0.5*mtp_shared(offsets=[2, 3], weights=[1, 0.5])").terms[1].weights
        (1, 0.5)

    Source: the targets of arXiv 2404.19737 without its heads.
    """

    offsets: tuple[int, ...] = (2, 3)
    weights: tuple[float, ...] | None = None

    def problems(self) -> list[str]:
        found = [*super().problems(), *offset_problems(self.offsets, _MOST_OFFSETS)]
        weights = self.weights or ()
        if self.weights is not None and len(weights) != len(self.offsets):
            found.append(
                f"weights is {list(weights)}, expected {len(self.offsets)} numbers, one "
                "for each offset"
            )
        found += [
            problem
            for w in weights
            if (problem := number_problem("weights", w, 0, inclusive=False))
        ]
        return found

    def part_weight(self, part: str) -> float:
        return 1.0 if self.weights is None else float(self.weights[self.offsets.index(int(part))])

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        assert streams.last_hidden is not None
        return {str(k): self.against(streams, streams.last_hidden, k) for k in self.offsets}

    def drafter(self, module: nn.Module | None, info: ModelInfo) -> SharedDrafter | None:
        return SharedDrafter(self.offsets, info) if max(self.offsets) > 1 else None

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        head = 6 * info.vocab_size * info.hidden_size
        return {
            "rows": f"h_t against tokens {ahead(self.offsets)}",
            "parameters added": "0",
            "training FLOPs per token": f"{head:,} (6 V d) for all offsets; none of its own beside "
            "an equal ntp",
        }
