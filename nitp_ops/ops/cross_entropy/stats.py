"""Values of each row of a token loss: how the kernels write them, and how the caller gets them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .term import CrossEntropyTerm


class TokenStats(NamedTuple):
    """Detached per-row values shaped like the labels of one target per row; float32 (float64 for
    float64).

    loss: the row's loss before token_weight, 0 where absent. log_sum_exp, target_logit: of the
        transformed logits, NaN
    where absent (target_logit ``[..., K]`` with K targets). prediction: int64, arg-max, -1 where
    absent; of equal logits the first, of logits that only the rounding of a softcap makes equal any
    of them."""

    loss: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    target_logit: Tensor


class TokenEntropyStats(NamedTuple):
    """`TokenStats` and the entropy ``-sum_v p_v log p_v`` of each row in nats, NaN where absent."""

    loss: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    target_logit: Tensor
    entropy: Tensor


class RowValues(NamedTuple):
    """stats [2 or 3, rows]: loss, log-sum-exp and perhaps entropy; prediction [rows]; target_logit
    [rows, K]: of rows of several terms [their targets]."""

    stats: Tensor
    prediction: Tensor
    target_logit: Tensor


def stats_of(values: RowValues, terms: Sequence[CrossEntropyTerm]) -> tuple[Any, ...]:
    """`TokenStats` of each term, shaped like its rows; `TokenEntropyStats` where the entropy was
    asked for."""
    split: list[Any] = []
    row = target = 0
    for term in terms:
        shape = term.leading
        rows, targets = (
            slice(row, row + math.prod(shape)),
            slice(target, target + term.labels.numel()),
        )
        loss, lse, *entropy = (field.view(shape) for field in values.stats[:, rows])
        fields = (
            loss,
            lse,
            values.prediction[rows].view(shape),
            values.target_logit[targets].view(term.labels.shape),
        )
        split.append(TokenEntropyStats(*fields, *entropy) if entropy else TokenStats(*fields))
        row, target = rows.stop, targets.stop
    return tuple(split)
