"""The labels of a token loss before its chunks, and the loss of its rows after them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_rows, check_values, launch, working

_OP = "prepare_rows_"
_READERS, _ADDERS = 256, 4096


@triton.jit
def _read(
    labels, target_weight, row_weight, scale, stats, target_logit, prediction, rows, targets,
    fields, stats_stride, weight_stride, ignore_index, NEGATIVE_IS_ABSENT: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scale and values of each row; its prediction says to `_count` whether it has a target."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    nan = tl.full([BLOCK], float("nan"), A)
    present = row < 0
    needed = row < 0
    for k in range(targets):
        at = row * targets + k
        label = tl.load(labels + at, mask=inside, other=ignore_index)
        given = label != ignore_index
        if NEGATIVE_IS_ABSENT:
            given = given & (label >= 0)
        present = present | given
        weighs = given
        if NEEDS_WEIGHT:
            weighs = given & (tl.load(target_weight + at, mask=inside, other=0.0) != 0)
        needed = needed | weighs
        tl.store(target_logit + at, nan, mask=inside)
    weight = tl.full([BLOCK], 1.0, A)
    if row_weight is not None:
        weight = tl.load(row_weight + row * weight_stride, mask=inside, other=0.0)
    tl.store(scale + row, tl.where(needed, weight, 0.0), mask=inside)
    tl.store(prediction + row, tl.where(present, 0, -1).to(tl.int64), mask=inside)
    tl.store(stats + row, tl.zeros([BLOCK], A), mask=inside)
    for field in range(1, fields):
        tl.store(stats + field * stats_stride + row, nan, mask=inside)


@triton.jit
def _count(
    target_weight, normalizer, scale, totals, prediction, rows, max_rows, MEAN: tl.constexpr,
    BY_CLASS: tl.constexpr, OTHERS: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By one program: the same order of additions on every device."""
    lane = tl.arange(0, BLOCK)
    present = tl.zeros([BLOCK], tl.int64)
    count = tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        row = (first + lane).to(tl.int64)
        has = tl.load(prediction + row, mask=row < rows, other=-1) >= 0
        present += has.to(tl.int64)
        if BY_CLASS:
            count += tl.load(target_weight + row, mask=has, other=0.0).to(tl.float64)
    of_rows = tl.sum(present)
    divisor = tl.full((), 1.0, A)
    if normalizer is not None:
        divisor = tl.load(normalizer)
    elif MEAN:
        divisor = (tl.sum(count) if BY_CLASS else of_rows).to(A)
        divisor = tl.where(divisor == 0, 1.0, divisor).to(A)
    too_many = (max_rows >= 0) & (of_rows > max_rows)
    for first in range(0, rows, BLOCK):
        row = (first + lane).to(tl.int64)
        inside = row < rows
        has = tl.load(prediction + row, mask=inside, other=-1) >= 0
        weight = tl.load(scale + row, mask=inside, other=0.0)
        by = tl.where(weight == 0, 0.0, weight / divisor)
        tl.store(scale + row, tl.where(too_many & has, float("nan"), by), mask=inside)
        tl.store(prediction + row, tl.full([BLOCK], -1, tl.int64), mask=inside)
    place = tl.arange(0, 8)
    tl.store(totals + place, tl.where(place == 0, of_rows, -1), mask=place <= OTHERS)


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
    """scale [N], the count in totals [5], and values of rows that are not computed, from labels [N,
    K].

    row_weight: one number, or one per row. normalizer: one number, else with `mean` what the rows
        with a target count.
    classes is for devices whose host reads values."""
    dtype, work = working(scale)
    if labels.dim() != 2:
        raise ValueError(f"{_OP}: labels has shape {tuple(labels.shape)}, expected (rows, targets)")
    (rows, targets), fields = labels.shape, 3 if stats.shape[0] == 3 else 2
    one_weight = row_weight is not None and row_weight.numel() == 1
    check_values(_OP, "scale", scale, labels, rows, dtype)
    check_values(_OP, "labels", labels, labels, rows * targets)
    check_values(_OP, "target_weight", target_weight, labels, rows * targets, dtype)
    check_values(_OP, "row_weight", row_weight, labels, 1 if one_weight else rows, dtype)
    check_values(_OP, "normalizer", normalizer, labels, 1, dtype)
    check_values(_OP, "totals", totals, labels, 5)
    check_values(_OP, "target_logit", target_logit, labels, rows * targets, dtype)
    check_values(_OP, "prediction", prediction, labels, rows)
    check_rows(_OP, "stats", stats, labels, (fields, rows), (dtype,))
    launch(
        _read, (triton.cdiv(rows, _READERS),), labels,
        labels, target_weight, row_weight, scale, stats, target_logit, prediction, rows, targets,
        fields, stats.stride(0), 0 if one_weight else 1, ignore_index,
        NEGATIVE_IS_ABSENT=negative_is_absent,
        NEEDS_WEIGHT=needs_target_weight and target_weight is not None, A=work, BLOCK=_READERS,
        num_warps=8,
    )  # fmt: skip
    launch(
        _count, (1,), labels,
        target_weight, normalizer, scale, totals, prediction, rows, max_rows, MEAN=mean,
        BY_CLASS=target_weight is not None and not negative_is_absent, OTHERS=4, A=work,
        BLOCK=_ADDERS, num_warps=16,
    )  # fmt: skip


@triton.jit
def _add(losses, scale, loss, rows, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, rows, BLOCK):
        row = (first + lane).to(tl.int64)
        inside = row < rows
        by = tl.load(scale + row, mask=inside, other=0.0)
        total += tl.where(by == 0, 0.0, tl.load(losses + row, mask=inside, other=0.0) * by).to(
            tl.float64
        )
    tl.store(loss, tl.sum(total))


def finish_rows_(stats: Tensor, scale: Tensor, loss: Tensor) -> None:
    """loss = sum of scale [N] * stats[0], one float64; a scale of zero adds nothing."""
    dtype, _ = working(stats)
    rows = stats.shape[1]
    check_rows("finish_rows_", "stats", stats, stats, stats.shape, (dtype,))
    check_values("finish_rows_", "scale", scale, stats, rows, dtype)
    check_values("finish_rows_", "loss", loss, stats, 1, torch.float64)
    launch(_add, (1,), stats, stats, scale, loss, rows, BLOCK=_ADDERS, num_warps=16)
