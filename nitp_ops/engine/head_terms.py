"""Parts of head terms as the op takes them: one part a job, or several parts on the same rows of
logits.

Parts that read the same hidden states with the same smoothing e and z-loss c share rows: row i has
a target of each such part p, S_i is the sum of their coefficients c_p, a_p = c_p / S_i, and the sum
of their losses in row i is

S_i [(1 - e) sum_p a_p (lse - z_p) + e (lse - mean z) + c lse^2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nitp_ops import CrossEntropyTerm, TokenStats
from nitp_ops.core.devices import for_sums, sum_dtype

from .base import HeadRows

Sums: TypeAlias = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class HeadPart:
    """Rows of one part with their coefficient c_p, a 0-d tensor; `ignore_index` marks rows without
    a target.

    term: the label of its term where that term's weight may be zero, else None. A part that may be
        silent shares rows
    with parts of its own term only: its presence must not change how the others are cut into chunks
    and rounded.
    """

    name: str
    rows: HeadRows
    coefficient: Tensor
    ignore_index: int
    term: str | None

    def joins(self, other: HeadPart) -> bool:
        """Whether both can share rows. Token weights can not: where their signs differ S_i may
        vanish."""
        mine, theirs = self.rows, other.rows
        weights = [
            w
            for rows in (mine, theirs)
            for w in (rows.token_weight, rows.target_weight, rows.class_weight)
        ]
        plain = all(w is None for w in weights)
        alike = (mine.label_smoothing, mine.z_loss) == (theirs.label_smoothing, theirs.z_loss)
        return mine.hidden is theirs.hidden and self.term == other.term and plain and alike

    def job(self, hidden: Tensor) -> CrossEntropyTerm:
        """The part as the op takes it; zero weights cost nothing there and let no NaN through."""
        rows, weight = self.rows, self.coefficient
        if rows.token_weight is not None:
            weight = weight * rows.token_weight.to(weight.dtype)
        labels = (
            rows.labels if rows.target_weight is None else _several(rows.labels, self.ignore_index)
        )
        targets, classes = rows.target_weight, rows.class_weight
        return CrossEntropyTerm(
            hidden,
            labels,
            token_weight=weight,
            target_weight=targets,
            class_weight=classes,
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
        return {
            self.name: {
                "loss": losses.sum(dtype=sum_dtype(losses.device)),
                "accuracy": right.count_nonzero(),
            }
        }


class Together(NamedTuple):
    """Several parts on the same rows; what they share is that of the first."""

    parts: list[HeadPart]

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def rows(self) -> HeadRows:
        return self.parts[0].rows

    def job(self, hidden: Tensor) -> CrossEntropyTerm:
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
        losses = (1 - self.rows.label_smoothing) * (
            stats.log_sum_exp.unsqueeze(-1) - stats.target_logit
        )
        if self.rows.label_smoothing or self.rows.z_loss:
            left = stats.loss - (shares * losses.masked_fill(shares == 0, 0)).sum(-1)
            losses = losses + left.unsqueeze(-1)
        found = {}
        for part, own in zip(self.parts, losses.unbind(-1), strict=True):
            counted = part.rows.labels != part.ignore_index
            found |= part.sums(stats._replace(loss=own.masked_fill(~counted, 0)))
        return found

    def _targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """(labels, a_p): [B, T, parts], S: [B, T]. Silent parts get even shares, so that they are
        measured too."""
        labels = torch.stack([part.rows.labels for part in self.parts], dim=-1)
        coefficients = torch.stack([part.coefficient for part in self.parts])
        present = labels != self.parts[0].ignore_index
        loud = torch.where(coefficients.any(), coefficients, 1)
        shares = torch.where(present, loud, 0)
        shares = shares / torch.where(present.any(-1), shares.sum(-1), 1).unsqueeze(-1)
        return labels, shares, torch.where(present, coefficients, 0).sum(-1)


def _several(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels [B, T, K] in which a negative label is an error, as it is alone: the op would take it
    for absent."""
    return labels.masked_fill((labels < 0) & (labels != ignore_index), torch.iinfo(torch.int64).max)


def rows_of(group: Sequence[HeadPart]) -> list[HeadPart | Together]:
    """The parts, joined where they share rows, in declaration order."""
    found: list[list[HeadPart]] = []
    for part in group:
        home = next((own for own in found if own[0].joins(part)), None)
        found.append([part]) if home is None else home.append(part)
    return [own[0] if len(own) == 1 else Together(own) for own in found]
