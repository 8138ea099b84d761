"""Cross-entropy over rows of logits (csrc/formulas/cross_entropy.h).

One program per row. A row that fits into its registers is read once; of a longer one the first pass
computes every sum online, lane by lane, and the second reads it again. No store is read back.
Scalars of a row are float64: few, and differences of large numbers.
"""

# The body of a @triton.jit function is Triton's language, which only looks like Python to a type
# checker.
# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, check_rows, check_values, launch, size_of, working
from .logits import read_logits
from .softmax import LOWEST, absorb

_OP = "cross_entropy_rows_"
# of one block in the working precision, of which a thread holds 64: more spills in float64
_BYTES = 16384
# A whole row in registers, 64 bytes of a thread: of 16384 float32 numbers every variant but the
# plainest spills.
_WHOLE_BYTES = 32 * 1024


@triton.jit
def _of_whole_row(
    z, weight, inside, lane, columns, SMOOTHED: tl.constexpr, ENTROPY: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """The maximum, its first column; sums of exp(z - maximum), weight (z - maximum), weight, and
    the entropy's."""
    reached = tl.where(z > LOWEST, z, LOWEST)  # a NaN is left out here and shows in the sum
    maximum = tl.max(reached)
    best = tl.min(tl.where(reached == maximum, lane, columns))
    step = z - maximum
    e = tl.exp(step)
    shifted_logit_sum, weight_sum, entropy_sum = tl.zeros([], A), tl.zeros([], A), tl.zeros([], A)
    if SMOOTHED:
        shifted_logit_sum = tl.sum(tl.where(inside & (weight != 0), weight * step, 0.0))
        weight_sum = tl.sum(weight)
    if ENTROPY:  # a probability of zero adds nothing, however small its logit is
        entropy_sum = -tl.sum(tl.where(e > 0, e * step, 0.0))
    # beside the largest, which is 1, the others of a sure row would be lost in float32
    largest = tl.sum(tl.where(lane == best, e, 0.0)).to(tl.float64)
    others = tl.sum(tl.where(lane == best, 0.0, e)).to(tl.float64)
    exp_sum = largest + others
    shifted_logit_sum = shifted_logit_sum.to(tl.float64)
    weight_sum = weight_sum.to(tl.float64)
    entropy_sum = entropy_sum.to(tl.float64)
    return maximum, best, exp_sum, shifted_logit_sum, weight_sum, entropy_sum


@triton.jit
def _gradient(
    z, maximum, softmax_coeff, uniform_coeff, target_coeff, softcap, logit_scale, labels,
    target_weight, class_weight, column, inside, first, row, targets, ignore_index,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = softmax_coeff * tl.exp(z - maximum)
    if SMOOTHED:
        if class_weight is not None:
            g -= uniform_coeff * tl.load(class_weight + column, mask=inside, other=0.0)
        else:
            g -= uniform_coeff
    for k in range(targets):
        at = row * targets + k
        label = tl.load(labels + at)
        here = (label >= first) & (label < first + BLOCK) & (label != ignore_index)
        if here:
            w = target_coeff
            if target_weight is not None:
                w = target_coeff * tl.load(target_weight + at)
            g -= tl.where(column == label, w, 0.0)
    if CAPPED:
        ratio = z / softcap
        g *= logit_scale * (1 - ratio * ratio)
    else:
        g *= logit_scale
    return g


@triton.jit
def _rows(
    logits, labels, target_weight, bias, class_weight, row_scale, stats, target_logit, prediction,
    softmax_partials, columns, targets, logits_stride: tl.int64, stats_stride: tl.int64,
    softmax_partials_stride: tl.int64, ignore_index: tl.int64, label_smoothing: tl.float64,
    z_loss: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    NEGATIVE_IS_ABSENT: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr, WHOLE: tl.constexpr, A: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # under the interpreter a scalar is a Python number: tl.full keeps its float64 digits
    e, c = tl.full((), label_smoothing, tl.float64), tl.full((), z_loss, tl.float64)
    softcap, logit_scale = tl.full((), softcap, A), tl.full((), logit_scale, A)
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    lane = tl.arange(0, BLOCK)

    if WHOLE:
        inside = lane < columns
        z = read_logits(logits, bias, lane, inside, logit_scale, softcap, CAPPED, A)
        z = tl.where(inside, z, float("-inf"))
        weight = tl.where(inside, 1.0, 0.0).to(A)
        if class_weight is not None:  # only with smoothing
            weight = tl.load(class_weight + lane, mask=inside, other=0.0)
        maximum, best, exp_sum, shifted_logit_sum, class_weight_sum, entropy_sum = _of_whole_row(
            z, weight, inside, lane, columns, SMOOTHED, ENTROPY, A
        )
    else:
        # Of each lane: maximum, the block that holds it first, sum exp(z - maximum); with smoothing
        # the weights so far and sum weight (z - maximum); for the entropy sum exp(z - maximum)
        # (maximum - z).
        most = tl.full([BLOCK], LOWEST, A)
        found = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], A)
        lane_weight = tl.zeros([BLOCK], A)
        lane_shifted = tl.zeros([BLOCK], A)
        lane_entropy = tl.zeros([BLOCK], A)
        for first in range(0, columns, BLOCK):
            column = first + lane
            inside = column < columns
            z = read_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, A)
            z = tl.where(inside, z, float("-inf"))
            step = z - most
            if SMOOTHED:
                weight = tl.where(inside, 1.0, 0.0).to(A)
                if class_weight is not None:
                    weight = tl.load(class_weight + column, mask=inside, other=0.0)
                lane_shifted += tl.where(inside, weight * tl.minimum(step, 0.0), 0.0)
                lane_shifted -= tl.where(step > 0, lane_weight * step, 0.0)
                lane_weight += weight
            if ENTROPY:
                shrink = tl.exp(-tl.abs(step))
                lane_entropy = tl.where(step > 0, shrink * lane_entropy, lane_entropy)
                # a probability of zero adds nothing, however small its logit is
                gained = shrink * tl.where(step > 0, step * total, -step)
                lane_entropy += tl.where(shrink > 0, gained, 0.0)
            found = tl.where(step > 0, first, found)
            most, total = absorb(z, most, total)

        maximum = tl.max(most)
        best = tl.min(tl.where(most == maximum, found + lane, columns))
        fraction = tl.exp(most - maximum)
        exp_sum = tl.sum((total * fraction).to(tl.float64))
        shifted_logit_sum = tl.zeros([], tl.float64)
        class_weight_sum = tl.zeros([], tl.float64)
        if SMOOTHED:
            gap = maximum.to(tl.float64) - most.to(tl.float64)
            shifted = lane_shifted.to(tl.float64) - lane_weight.to(tl.float64) * gap
            shifted_logit_sum = tl.sum(tl.where(lane_weight == 0, 0.0, shifted))
            class_weight_sum = tl.sum(lane_weight.to(tl.float64))
        entropy_sum = tl.zeros([], tl.float64)
        if ENTROPY:
            of_row = fraction * (lane_entropy + (maximum - most) * total)
            entropy_sum = tl.sum(tl.where(fraction > 0, of_row, 0.0).to(tl.float64))
    wide_maximum, log_sum = maximum.to(tl.float64), tl.log(exp_sum)
    lse = wide_maximum + log_sum

    # The targets: S = sum_k w_k and gap = sum_k w_k (lse - z_k), from differences. A label
    # outside [0, V) weighs NaN, which poisons the loss and the gradient of its row.
    weight_sum = tl.zeros([], tl.float64)
    target_gap = tl.zeros([], tl.float64)
    present = tl.zeros([], tl.int32)
    for k in range(targets):
        at = row * targets + k
        label = tl.load(labels + at)
        absent = label == ignore_index
        if NEGATIVE_IS_ABSENT:
            absent = absent | (label < 0)
        valid = (label >= 0) & (label < columns) & (absent == 0)
        picked = read_logits(logits, bias, label, valid, logit_scale, softcap, CAPPED, A)
        picked = tl.where(valid, picked, float("nan"))
        tl.store(target_logit + at, picked)
        w = tl.full((), 1.0, A)
        if target_weight is not None:
            w = tl.load(target_weight + at)
        w = tl.where(valid, w, float("nan")).to(tl.float64)
        # a weight of zero adds nothing, even to an infinite gap
        weighed = w * (log_sum + (wide_maximum - picked.to(tl.float64)))
        target_gap += tl.where(absent | (w == 0), 0.0, weighed)
        weight_sum += tl.where(absent, 0.0, w)
        present += tl.where(absent, 0, 1)

    loss = (1 - e) * target_gap
    smooth_weight_sum = weight_sum
    if SMOOTHED:
        shifted_mean = shifted_logit_sum / columns
        if class_weight is not None:
            smooth_weight_sum = class_weight_sum / columns
            loss += e * (smooth_weight_sum * log_sum - shifted_mean)
        else:
            loss += e * smooth_weight_sum * (log_sum - shifted_mean)
    loss += tl.where(c > 0, c * lse * lse, 0.0)
    if softmax_partials is None:
        best = tl.where(present > 0, best, -1)
    tl.store(prediction + row, best.to(tl.int64))
    tl.store(stats + row, tl.where(present > 0, loss, 0.0).to(A))
    tl.store(stats + stats_stride + row, tl.where(present > 0, lse, float("nan")).to(A))
    if ENTROPY:
        entropy = log_sum + entropy_sum / exp_sum
        tl.store(stats + 2 * stats_stride + row, tl.where(present > 0, entropy, float("nan")).to(A))
    if softmax_partials is not None:  # a row of nothing but -inf keeps the finite LOWEST
        tl.store(softmax_partials + row, tl.where(maximum > LOWEST, maximum, float("-inf")))
        tl.store(softmax_partials + softmax_partials_stride + row, exp_sum.to(A))
        tl.store(softmax_partials + 2 * softmax_partials_stride + row, shifted_logit_sum.to(A))
        tl.store(softmax_partials + 3 * softmax_partials_stride + row, entropy_sum.to(A))

    if GRADIENT:
        scale = tl.full((), 1.0, tl.float64)
        if row_scale is not None:
            scale = tl.load(row_scale + row).to(tl.float64)
        active = (scale != 0) & (present > 0)
        softmax_weight = (1 - e) * weight_sum + e * smooth_weight_sum
        softmax_weight += tl.where(c > 0, 2 * c * lse, 0.0)
        softmax_coeff = (scale * softmax_weight / exp_sum).to(A)
        uniform_coeff = (scale * e / columns).to(A)
        if class_weight is None:
            uniform_coeff = (scale * e / columns * weight_sum).to(A)
        target_coeff = (scale * (1 - e)).to(A)
        tl.debug_barrier()  # the logits of the targets are read: from here on they are overwritten
        if WHOLE:
            g = tl.zeros([BLOCK], A)
            if active:  # else zeros, not 0 * gradient: a NaN under a zero weight stays out
                g = _gradient(
                    z, maximum, softmax_coeff, uniform_coeff, target_coeff, softcap, logit_scale,
                    labels, target_weight, class_weight, lane, inside, 0, row, targets,
                    ignore_index, SMOOTHED, CAPPED, BLOCK,
                )  # fmt: skip
            tl.store(logits + lane, g, mask=inside)
        else:
            for first in range(0, columns, BLOCK):
                column = first + lane
                inside = column < columns
                g = tl.zeros([BLOCK], A)
                if active:
                    z = read_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, A)
                    g = _gradient(
                        z, maximum, softmax_coeff, uniform_coeff, target_coeff, softcap,
                        logit_scale, labels, target_weight, class_weight, column, inside, first,
                        row, targets, ignore_index, SMOOTHED, CAPPED, BLOCK,
                    )  # fmt: skip
                tl.store(logits + column, g, mask=inside)


def cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    target_weight: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    stats: Tensor,
    target_logit: Tensor,
    prediction: Tensor,
    ignore_index: int,
    negative_is_absent: bool,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    gradient: bool,
    softmax_partials: Tensor | None = None,
) -> None:
    """As torch_rows: loss, log-sum-exp (and entropy) of each row of logits [N, V]; with `gradient`
    over them."""
    rows, columns = size_of(_OP, "logits", logits)
    dtype, work = working(logits)
    if labels.dim() != 2:
        raise ValueError(f"{_OP}: labels has shape {tuple(labels.shape)}, expected (rows, targets)")
    targets, fields = labels.shape[1], 3 if stats.shape[0] == 3 else 2
    if columns == 0 and rows > 0:
        raise ValueError(
            f"{_OP}: logits has shape {tuple(logits.shape)}, expected a column at least"
        )
    check_values(_OP, "labels", labels, logits, rows * targets)
    check_values(_OP, "target_weight", target_weight, logits, rows * targets, dtype)
    check_values(_OP, "bias", bias, logits, columns, dtype)
    check_values(_OP, "class_weight", class_weight, logits, columns, dtype)
    check_values(_OP, "row_scale", row_scale, logits, rows, dtype)
    check_values(_OP, "target_logit", target_logit, logits, rows * targets, dtype)
    check_values(_OP, "prediction", prediction, logits, rows)
    check_rows(_OP, "stats", stats, logits, (fields, rows), (dtype,))
    if softmax_partials is not None:
        check_rows(_OP, "softmax_partials", softmax_partials, logits, (4, rows), (dtype,))
    smoothed = label_smoothing > 0
    whole = triton.next_power_of_2(columns) * dtype.itemsize <= _WHOLE_BYTES
    size, warps = (_WHOLE_BYTES, 16) if whole else (_BYTES, 8)
    launch(
        _rows, (rows,), logits,
        logits, labels, target_weight, bias, class_weight if smoothed else None, row_scale, stats,
        target_logit, prediction, softmax_partials, columns, targets, logits.stride(0),
        stats.stride(0), 0 if softmax_partials is None else softmax_partials.stride(0),
        ignore_index, label_smoothing, z_loss, softcap, logit_scale,
        NEGATIVE_IS_ABSENT=negative_is_absent, SMOOTHED=smoothed, CAPPED=softcap > 0,
        ENTROPY=fields == 3, GRADIENT=gradient, WHOLE=whole, A=work,
        **blocks(columns, size // dtype.itemsize, 64 // dtype.itemsize, warps),
    )  # fmt: skip
