"""What stands before the chunks of a token loss and after them (csrc/formulas/labels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import checks
from ...core.devices import sum_dtype
from ...reference import working
from ..table import Sample, row_kernel

#: rows with a target, rows with a scale, first and last row with a target, first label outside [0,
#: classes)
TOTALS = 5


def _labelled(n: int, columns: int, dtype: torch.dtype) -> Sample:
    labels = torch.randint(columns, (n, 1))
    scale = torch.empty(n, dtype=working(torch.empty(0, dtype=dtype)))
    stats, picked = scale.new_empty(2, n), scale.new_empty(n, 1)
    totals, best = labels.new_empty(TOTALS), labels.new_empty(n)
    given = labels, None, None, None, scale, totals, stats, picked, best
    moved = sum(tensor.nbytes for tensor in (labels, scale, stats, picked, best))
    return Sample((*given, -100, False, columns, True, False, -1), moved)


@row_kernel(writes=("scale", "totals", "stats", "target_logit", "prediction"), sample=_labelled)
def prepare_rows_(
    labels: Tensor,
    target_weight: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    scale: Tensor,
    totals: Tensor,
    stats: Tensor,
    target_logit: Tensor,
    prediction: Tensor,
    ignore_index: int,
    negative_is_absent: bool,
    classes: int,
    mean: bool,
    needs_target_weight: bool,
    max_rows: int,
) -> None:
    """scale = row_weight / normalizer, 0 where the row has no target; with needs_target_weight,
    none with a weight. A weight of zero stays zero, whatever divides it.

    labels, target_weight, target_logit [N, K]; row_weight [N] or one number; normalizer one number;
    scale, prediction [N]. `mean` without a normalizer divides by the rows with a target, of class
    weights (one target, no other is absent) by their sum. More rows with a target than max_rows >=
    0: their scale is NaN.

    totals: `TOTALS`; where the host reads no values the first alone is written, the others are -1.
        stats, target_logit
    and prediction become those of a row that is not computed: 0, NaN, -1."""
    given = labels != ignore_index
    if negative_is_absent:
        given = given & (labels >= 0)
    present = given.any(1)
    count = present.sum(dtype=torch.int64)
    counts, needed = present, present
    if target_weight is not None:
        weight = target_weight.view(labels.shape)
        needed = ((weight != 0) & given).any(1) if needs_target_weight else present
        if not negative_is_absent:
            counts = torch.where(present, weight[:, 0], 0).to(sum_dtype(labels.device))
    scale.copy_(torch.where(needed, 1 if row_weight is None else row_weight.view(-1), 0))
    divisor = normalizer
    if normalizer is None and mean:
        total = counts.sum().to(scale.dtype)
        divisor = torch.where(total == 0, 1, total)
    if divisor is not None:
        scale.copy_(torch.where(scale == 0, 0, scale / divisor.view(())))
    if max_rows >= 0:
        scale.masked_fill_(present & (count > max_rows), float("nan"))
    totals.fill_(-1)
    totals[0] = count
    if checks.host_reads(labels.device):
        outside = given & ((labels < 0) | (labels >= classes))
        rows, places = present.nonzero().view(-1), outside.view(-1).nonzero().view(-1)
        totals[1] = (scale != 0).sum()
        totals[2:4] = rows[[0, -1]] if len(rows) else -1
        totals[4] = places[0] if len(places) else -1
    stats.fill_(float("nan"))
    stats[0] = 0
    target_logit.fill_(float("nan"))
    prediction.fill_(-1)


def _computed(n: int, columns: int, dtype: torch.dtype) -> Sample:
    work = working(torch.empty(0, dtype=dtype))
    stats, scale = torch.rand(2, n, dtype=work), torch.rand(n, dtype=work)
    return Sample((stats, scale, torch.empty((), dtype=torch.float64)), 2 * scale.nbytes)


@row_kernel(writes=("loss",), sample=_computed)
def finish_rows_(stats: Tensor, scale: Tensor, loss: Tensor) -> None:
    """loss = sum of scale * stats[0], one number in `sum_dtype`; a scale of zero adds nothing."""
    loss.copy_(torch.where(scale == 0, 0, stats[0] * scale).sum(dtype=loss.dtype))
