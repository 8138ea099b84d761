"""Parts of head terms as the terms of one cross-entropy: each part alone, or several parts on the
same rows of logits.

Parts that read the same hidden states with the same smoothing e and z-loss c share rows: row i has
a target of each such part p, S_i is the sum of their coefficients c_p, a_p = c_p / S_i, and the sum
of their losses in row i is

    S_i [(1 - e) sum_p a_p (lse - z_p) + e (lse - mean z) + c lse^2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nitp_ops import CrossEntropyTerm, TokenStats
from nitp_ops.core.devices import for_sums, sum_dtype
from nitp_ops.engine.base import HeadRows, HeadTerm

from .weighting import always_active, part_name

Sums: TypeAlias = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class HeadTermPart:
    """Rows of one part of a head term with their coefficient c_p, a 0-d tensor.

    Attributes:
        ignore_index: marks rows without a target.
        term: the label of its term where that term's weight may be zero, else None. A part that may
            be inactive shares rows with parts of its own term only: its presence must not change
            how the others are cut into chunks and rounded.
    """

    name: str
    rows: HeadRows
    coefficient: Tensor
    ignore_index: int
    term: str | None

    def shares_rows_with(self, other: HeadTermPart) -> bool:
        """Whether both can share rows. Token weights can not: where their signs differ S_i may
        vanish."""
        mine, theirs = self.rows, other.rows
        if mine.hidden is not theirs.hidden or _is_weighted(mine) or _is_weighted(theirs):
            return False
        same_smoothing = mine.label_smoothing == theirs.label_smoothing
        same_z_loss = mine.z_loss == theirs.z_loss
        return self.term == other.term and same_smoothing and same_z_loss

    def cross_entropy_term(self, hidden: Tensor) -> CrossEntropyTerm:
        """Zero weights cost nothing in the op and let no NaN through."""
        rows, weight = self.rows, self.coefficient
        if rows.token_weight is not None:
            weight = weight * rows.token_weight.to(weight.dtype)
        labels = rows.labels
        if rows.target_weight is not None:
            labels = _several(labels, self.ignore_index)
        return CrossEntropyTerm(
            hidden,
            labels,
            token_weight=weight,
            target_weight=rows.target_weight,
            class_weight=rows.class_weight,
            label_smoothing=rows.label_smoothing,
            z_loss=rows.z_loss,
        )

    def sums(self, stats: TokenStats) -> Sums:
        """SUM (token weights included, the part's weight not) and the rows whose first target is
        predicted."""
        labels, losses = self.rows.labels, stats.loss
        if self.rows.target_weight is not None:
            first = (labels != self.ignore_index).to(torch.uint8).argmax(-1, keepdim=True)
            labels = labels.gather(-1, first).squeeze(-1)
        if self.rows.token_weight is not None:
            weight, absent = self.rows.token_weight, labels == self.ignore_index
            weighted = for_sums(losses) * weight
            losses = torch.where((weight == 0) | absent, 0, weighted)
        right = stats.prediction == labels  # an absent row predicts -1
        if self.ignore_index == -1:
            right &= labels != -1
        loss = losses.sum(dtype=sum_dtype(losses.device))
        return {self.name: {"loss": loss, "accuracy": right.count_nonzero()}}


class SharedRows(NamedTuple):
    """Several parts on the same rows; what they share is that of the first."""

    parts: list[HeadTermPart]

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def rows(self) -> HeadRows:
        return self.parts[0].rows

    def cross_entropy_term(self, hidden: Tensor) -> CrossEntropyTerm:
        labels, shares, weight = self._targets()
        labels = _several(labels, self.parts[0].ignore_index)
        return CrossEntropyTerm(
            hidden,
            labels,
            token_weight=weight,
            target_weight=shares,
            label_smoothing=self.rows.label_smoothing,
            z_loss=self.rows.z_loss,
        )

    def sums(self, stats: TokenStats) -> Sums:
        """The row loss of part p is ``(1 - e) (lse - z_p)`` and what is left of the row's loss
        without its targets."""
        _, shares, _ = self._targets()
        target_losses = stats.log_sum_exp.unsqueeze(-1) - stats.target_logit
        losses = (1 - self.rows.label_smoothing) * target_losses
        if self.rows.label_smoothing or self.rows.z_loss:
            left = stats.loss - (shares * losses.masked_fill(shares == 0, 0)).sum(-1)
            losses = losses + left.unsqueeze(-1)
        found = {}
        for part, own in zip(self.parts, losses.unbind(-1), strict=True):
            counted = part.rows.labels != part.ignore_index
            found |= part.sums(stats._replace(loss=own.masked_fill(~counted, 0)))
        return found

    def _targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """(labels, a_p): [B, T, parts], S: [B, T]. Where all parts are inactive they get even
        shares, so that they are measured too."""
        labels = torch.stack([part.rows.labels for part in self.parts], dim=-1)
        coefficients = torch.stack([part.coefficient for part in self.parts])
        present = labels != self.parts[0].ignore_index
        active = torch.where(coefficients.any(), coefficients, 1)
        shares = torch.where(present, active, 0)
        shares = shares / torch.where(present.any(-1), shares.sum(-1), 1).unsqueeze(-1)
        return labels, shares, torch.where(present, coefficients, 0).sum(-1)


def head_term_parts(
    term: HeadTerm,
    rows: Mapping[str, HeadRows],
    coefficients: Mapping[str, Tensor],
    ignore_index: int,
) -> list[HeadTermPart]:
    """The parts of a term from their rows and coefficients by key."""
    alone = None if always_active(term) else str(term.label)
    return [
        HeadTermPart(part_name(term, key), own, coefficients[key], ignore_index, alone)
        for key, own in rows.items()
    ]


def row_sets(parts: Sequence[HeadTermPart]) -> list[HeadTermPart | SharedRows]:
    """The parts, joined where they share rows, in declaration order."""
    found: list[list[HeadTermPart]] = []
    for part in parts:
        for shared in found:
            if shared[0].shares_rows_with(part):
                shared.append(part)
                break
        else:
            found.append([part])
    return [shared[0] if len(shared) == 1 else SharedRows(shared) for shared in found]


def _is_weighted(rows: HeadRows) -> bool:
    weights = (rows.token_weight, rows.target_weight, rows.class_weight)
    return any(weight is not None for weight in weights)


def _several(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels [B, T, K] in which a negative label is an error, as it is alone: the op would take it
    for absent."""
    negative = (labels < 0) & (labels != ignore_index)
    return labels.masked_fill(negative, torch.iinfo(torch.int64).max)
