"""The rows of every term of a call: what goes into their chunks and what comes out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...core.chunking import Rows, clear, rows_of, scatter_rows_
from ..gradients import pending_dtype
from .labelled_rows import Totals, flat_rows, prepare, selection
from .stats import RowValues
from .term import CrossEntropyTerm, Unembedding


class TermRows:
    """The rows of one term: hidden states, labels, scale [N], values, and the gradient of the
    hidden states."""

    def __init__(
        self,
        term: CrossEntropyTerm,
        unembedding: Unembedding,
        scale: Tensor,
        values: RowValues,
        wanted: bool,
    ) -> None:
        self.term, self.scale, self.values = term, scale, values
        self.rows = flat_rows(term, unembedding.ignore_index)
        self.hidden = Rows(term.hidden)
        self.d_hidden: Tensor | None = None
        if wanted:
            dtype = pending_dtype(term.hidden, term.hidden_grad_out)
            self.d_hidden = torch.empty(term.hidden.shape, dtype=dtype, device=term.hidden.device)
        self.d_rows: Tensor | None = None
        if self.d_hidden is not None:
            self.d_rows = self.d_hidden.view(self.hidden.count, self.hidden.width)
        self.totals = Totals()
        self.selected: Tensor | slice = slice(0, 0)

    def select(self, unembedding: Unembedding) -> None:
        """Selects the rows that are computed; the gradient of the others is zero."""
        term = self.term
        self.selected, rest = selection(
            self.rows, self.totals, unembedding.ignore_index, term.max_rows, term.several
        )
        if self.d_rows is not None:
            for part in rest:
                clear(self.d_rows, part)

    @property
    def may_be_active(self) -> bool:
        """Whether a row has a scale that is not zero, or may have one."""
        return self.totals.active != 0

    @property
    def all_active(self) -> bool:
        """Whether every computed row has a scale other than zero, as far as the host can read."""
        return 0 <= self.totals.present == self.totals.active

    def values_of(self, part: Tensor | slice) -> RowValues:
        """The values of one chunk, uninitialised: a view, or a buffer for `scatter_`."""
        stats, prediction, target_logit = self.values
        if isinstance(part, slice):
            if part.stop - part.start == prediction.shape[0]:
                return self.values
            return RowValues(stats[:, part], prediction[part], target_logit[part])
        count, targets = len(part), target_logit.shape[1]
        return RowValues(
            stats.new_empty(len(stats), count),
            prediction.new_empty(count),
            stats.new_empty(count, targets),
        )

    def scatter_(self, part: Tensor | slice, values: RowValues) -> None:
        """Writes the values of a chunk back, unless they are a view."""
        if isinstance(part, slice):
            return
        scatter_rows_(self.values.stats, 1, part, values.stats)
        scatter_rows_(self.values.prediction, 0, part, values.prediction)
        scatter_rows_(self.values.target_logit, 0, part, values.target_logit)

    def labels_of(self, part: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Labels and target weights of one chunk."""
        weight = self.rows.target_weight
        return rows_of(self.rows.labels, part), None if weight is None else rows_of(weight, part)


class AllRows(NamedTuple):
    """scale, values: of all terms, one after the other."""

    of_terms: list[TermRows]
    scale: Tensor
    values: RowValues


def term_rows(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, call: Any, kernels: Any
) -> AllRows:
    """Reads the labels of all terms."""
    weight, op = unembedding.weight, unembedding.op
    work, device = reference.working(weight), weight.device
    counts = [term.leading.numel() for term in terms]
    rows, targets = sum(counts), sum(term.labels.numel() for term in terms)
    scale = torch.empty(rows, dtype=work, device=device)
    stats = scale.new_empty((3 if call.entropy else 2, rows))
    values = RowValues(stats, terms[0].labels.new_empty(rows), scale.new_empty(targets))
    mean, found, row, target = (
        call.reduction == "mean" and call.normalizer is None,
        list[TermRows](),
        0,
        0,
    )
    for index, (term, count) in enumerate(zip(terms, counts, strict=True)):
        last, last_target = row + count, target + term.labels.numel()
        own = values, scale
        if len(terms) > 1:
            part = slice(row, last)
            own = (
                RowValues(
                    stats[:, part], values.prediction[part], values.target_logit[target:last_target]
                ),
                scale[part],
            )
        of_term, of_scale = own
        of_term = of_term._replace(
            target_logit=of_term.target_logit.view(count, -1 if count else 1)
        )
        each = TermRows(term, unembedding, of_scale, of_term, call.want_hidden[index])
        each.totals = prepare(
            kernels, op, term, each.rows, unembedding.ignore_index, unembedding.vocabulary,
            mean=mean, normalizer=call.normalizer, scale=of_scale, values=of_term,
            prefix=f"terms[{index}]." if call.grouped else "",
        )  # fmt: skip
        each.select(unembedding)
        found.append(each)
        row, target = last, last_target
    return AllRows(found, scale, values)


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
