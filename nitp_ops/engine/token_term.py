"""What the head terms against single tokens share: smoothing, z-loss and the rows of one offset."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import HeadRows, HeadTerm
from .spec.validation import MOST_AHEAD, number_problem
from .streams.model_info import ModelInfo
from .streams.needs import Need
from .streams.streams import Streams
from .streams.targets import target_weights, token_targets


@dataclass(frozen=True, kw_only=True)
class TokenTerm(HeadTerm):
    """``(1 - e) (lse - z[x_{t+k}]) + e (lse - mean_v z_v) + c lse^2`` with the model's own head.

    Args:
        label_smoothing: e, in [0, 1]. z_loss: c, >= 0.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def penalties(self) -> tuple[float, float]:
        return self.label_smoothing, self.z_loss

    def problems(self) -> list[str]:
        found = [
            number_problem("label_smoothing", self.label_smoothing, 0),
            number_problem("z_loss", self.z_loss, 0),
        ]
        if self.label_smoothing > 1:
            found.append(f"label_smoothing is {self.label_smoothing}, expected a number in [0, 1]")
        return [problem for problem in found if problem]

    def predicted(self) -> frozenset[int]:
        """The k of the tokens x_{t+k} that the term predicts from last_hidden at t alone."""
        return frozenset()

    def against(self, streams: Streams, hidden: Tensor, k: int) -> HeadRows:
        """Rows ``hidden[t]`` against x_{t+k}, over V_k."""
        assert streams.head is not None
        return HeadRows(
            hidden=hidden,
            labels=token_targets(streams, k),
            head=streams.head,
            token_weight=target_weights(streams, k),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )


@dataclass(frozen=True, kw_only=True)
class OffsetTerm(TokenTerm):
    """Tokens x_{t+k} of several offsets k, predicted from last_hidden at t; a part for each."""

    offsets: tuple[int, ...]

    def max_offset(self) -> int:
        return max(self.offsets)

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        return frozenset({Need("token_ids"), Need("last_hidden"), Need("head")})

    def predicted(self) -> frozenset[int]:
        return frozenset(self.offsets)

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return valid_offsets(streams, self.offsets)


def valid_offsets(streams: Streams, offsets: tuple[int, ...]) -> dict[str, Tensor]:
    """V_k of each offset k, as parts named by it."""
    return {str(k): token_targets(streams, k) != streams.ignore_index for k in offsets}


def offset_problems(offsets: tuple[int, ...], most: int) -> list[str]:
    """One line if the offsets are none, more than `most`, outside [1, MOST_AHEAD], or not distinct."""
    if len(offsets) > most:
        return [f"offsets holds {len(offsets)} integers, expected at most {most}"]
    if (
        offsets
        and min(offsets) >= 1
        and max(offsets) <= MOST_AHEAD
        and len(set(offsets)) == len(offsets)
    ):
        return []
    return [f"offsets is {list(offsets)}, expected distinct integers in [1, {MOST_AHEAD}]"]


def ahead(offsets: tuple[int, ...]) -> str:
    """``t+2, t+3``"""
    return ", ".join(f"t+{k}" for k in offsets)
