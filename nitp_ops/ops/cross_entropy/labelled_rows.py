"""The rows of one term as the row kernels take them, with the weight of each and what their labels
say of all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...core import checks
from ...core.chunking import Selection, select_rows
from ...core.devices import sum_dtype
from ...kernels.torch_rows.prepare import TOTALS
from .stats import RowValues
from .term import CrossEntropyTerm, labels_inside


class FlatRows(NamedTuple):
    """labels and target_weight [N, K]; smoothing_weight [V]: the class weights of the smoothing
    term, target_weight holds them for the rest."""

    labels: Tensor
    target_weight: Tensor | None
    smoothing_weight: Tensor | None
    needs_target_weight: bool


class Totals(NamedTuple):
    """What the host may read of a term: rows with a target, rows whose scale is not zero, first and
    last with a target; -1 each where it may not."""

    present: int = -1
    active: int = -1
    first: int = -1
    last: int = -1


def flat_rows(term: CrossEntropyTerm, ignore_index: int) -> FlatRows:
    work, count = reference.working(term.hidden), term.leading.numel()
    labels = term.labels.reshape(count, term.labels.shape[-1] if term.several else 1).contiguous()
    target_weight = smoothing_weight = None
    smooth = term.class_weight is not None and term.label_smoothing > 0
    if term.target_weight is not None:
        target_weight = term.target_weight.to(work).reshape(labels.shape).contiguous()
    elif term.class_weight is not None:
        of_class = term.class_weight.to(work).contiguous()
        target_weight = of_class[
            labels.where(labels != ignore_index, 0).clamp(0, of_class.shape[0] - 1)
        ]
        smoothing_weight = of_class if smooth else None
    # a row whose targets all weigh nothing must be inactive, not multiplied by zero
    needed = target_weight is not None and term.needs_target_weight
    return FlatRows(labels, target_weight, smoothing_weight, needed)


def row_weight(term: CrossEntropyTerm) -> Tensor | None:
    """One number, or one per row."""
    weight = term.token_weight
    if weight is None:
        return None
    weight = weight.to(reference.working(term.hidden))
    return weight if weight.numel() == 1 else weight.expand(term.leading).reshape(-1).contiguous()


def prepare(
    kernels: Any, op: str, term: CrossEntropyTerm, rows: FlatRows, ignore_index: int,
    vocabulary: int, *, mean: bool, normalizer: Tensor | None, scale: Tensor, values: RowValues,
    prefix: str = "",
) -> Totals:  # fmt: skip
    """Writes the scale of each row [N] and the values of a row that is not computed; refuses labels
    outside [0, V)."""
    reads = checks.host_reads(rows.labels.device)
    totals = rows.labels.new_empty(TOTALS)
    kernels.prepare_rows_(
        rows.labels, rows.target_weight, row_weight(term), normalizer, scale, totals, values.stats,
        values.target_logit, values.prediction, ignore_index, term.several, vocabulary, mean,
        rows.needs_target_weight, -1 if reads or term.max_rows is None else term.max_rows,
    )  # fmt: skip
    if not reads:
        return Totals()
    present, active, first, last, outside = totals.tolist()
    if outside >= 0:
        labels_inside(op, term, ignore_index, vocabulary, prefix)
    if term.max_rows is not None and present > term.max_rows:
        raise ValueError(
            f"{op}: {prefix}max_rows is {term.max_rows}, expected at least {present}, the rows "
            "that count"
        )
    return Totals(present, active, first, last)


def summed(kernels: Any, stats: Tensor, scale: Tensor) -> Tensor:
    """0-d: sum of scale * stats[0] in `sum_dtype`."""
    loss = torch.empty((), dtype=sum_dtype(scale.device), device=scale.device)
    kernels.finish_rows_(stats, scale, loss)
    return loss


def selection(
    rows: FlatRows, totals: Totals, ignore_index: int, max_rows: int | None, several: bool
) -> Selection:
    """The rows that are computed."""
    count = rows.labels.shape[0]
    if totals.present in (0, count):
        return Selection.range(0, totals.present, count)
    if totals.present > 0 and totals.last + 1 - totals.first == totals.present:
        return Selection.range(totals.first, totals.last + 1, count)
    if totals.present < 0 and (max_rows is None or max_rows >= count):
        return Selection.range(0, count, count)
    given = rows.labels != ignore_index
    return select_rows((given & (rows.labels >= 0) if several else given).any(1), max_rows)
