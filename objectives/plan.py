"""One pass for each head, whatever the number of terms: the plan equals the sum of its terms.

loss = sum over parts p of c_p * sum over rows i of p of token_weight_i * row_loss_i,  c_p = weight_p / COUNT_p
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nitp_ops import HeadJob, TokenStats, shared_linear_cross_entropy

from .base import HeadRows
from .heads import through_head
from .model_info import ModelInfo


@dataclass(frozen=True)
class HeadPart:
    """Rows of one part with their coefficient c_p, a 0-d tensor; `ignore_index` marks rows without a target."""

    name: str
    rows: HeadRows
    coefficient: Tensor
    ignore_index: int

    def job(self, hidden: Tensor) -> HeadJob:
        """The part as the op takes it; zero weights cost nothing there and let no NaN through."""
        rows, weight = self.rows, self.coefficient
        if rows.token_weight is not None:
            weight = weight * rows.token_weight.to(weight.dtype)
        return HeadJob(hidden, rows.labels, weight, rows.label_smoothing, rows.z_loss, rows.target_weight)

    def sums(self, stats: TokenStats) -> dict[str, Tensor]:
        """SUM (token weights included, the part's weight not) and the rows predicted right."""
        labels = self.rows.labels
        if self.rows.target_weight is not None:
            first = (labels != self.ignore_index).to(torch.uint8).argmax(-1, keepdim=True)
            labels = labels.gather(-1, first).squeeze(-1)
        counted = labels != self.ignore_index
        losses = stats.loss.double()
        if self.rows.token_weight is not None:
            weight = self.rows.token_weight
            losses = torch.where(weight == 0, 0, losses * weight)
        right = counted & (stats.prediction == labels)
        return {"loss": torch.where(counted, losses, 0).sum(), "accuracy": right.sum()}


def run(
    parts: Sequence[HeadPart], info: ModelInfo, backend: str | None
) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
    """(one loss a head, ``{part: sums}``). Parts that share a head share a pass, in declaration order.

    softcap and logit scale belong to the model, so the head alone (its matrix and its bias) makes a group.
    """
    groups: dict[int, list[HeadPart]] = {}
    for part in parts:
        groups.setdefault(id(part.rows.head), []).append(part)
    losses: list[Tensor] = []
    sums: dict[str, dict[str, Tensor]] = {}
    for group in groups.values():
        loss, stats = _pass(group, info, backend)
        losses.append(loss)
        sums |= {part.name: part.sums(own) for part, own in zip(group, stats, strict=True)}
    return losses, {part.name: sums[part.name] for part in parts}


def _pass(group: Sequence[HeadPart], info: ModelInfo, backend: str | None) -> tuple[Tensor, tuple[TokenStats, ...]]:
    def use(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[TokenStats, ...]]:
        return shared_linear_cross_entropy(
            [part.job(own) for part, own in zip(group, hidden, strict=True)],
            weight,
            bias=bias,
            ignore_index=group[0].ignore_index,
            softcap=info.softcap,
            logit_scale=info.logit_scale,
            backend=backend,
        )

    return through_head(group[0].rows.head, [part.rows.hidden for part in group], use)
