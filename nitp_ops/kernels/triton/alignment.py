"""Alignment over pairs of rows: csrc/formulas/alignment.h holds the equations, csrc/schemas.cpp the
arguments.

One program a pair: one loop over the features for the sums, one that writes the gradients, also in
place. A row's scalars are float64: few, and their rounding would show in every feature.
"""

# The body of a @triton.jit function is Triton's language, which only looks like Python to a type
# checker.
# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core import checks
from .launch import blocks, check_rows, check_values, launch, size_of, working
from .softmax import LOWEST, absorb, join

_OP = "alignment_rows_"
_MOST = 2048
_COSINE, _MSE, _SMOOTH_L1, _KL = (tl.constexpr(number) for number in range(4))


@triton.jit
def _pair(prediction, target, column, columns, known, A: tl.constexpr):
    """The features of both sides, 0 beyond the last; NaN for those of a target row that does not
    exist (known = 0)."""
    p = tl.load(prediction + column, mask=column < columns, other=0.0).to(A)
    z = tl.load(target + column, mask=column < known, other=0.0).to(A)
    return p, z + tl.where(known < columns, float("nan"), 0.0).to(A)


@triton.jit
def _put(row, column, written, x):
    # as on CPU, float64 becomes a half precision by way of float32 (the interpreter knows no other
    # way)
    if row.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    tl.store(row + column, x, mask=column < written)


@triton.jit
def _write(d_prediction, d_target, column, written, of_prediction, of_target):
    _put(d_prediction, column, written, of_prediction)
    if d_target is not None:
        _put(d_target, column, written, of_target)


@triton.jit
def _sums(prediction, target, columns, known, by_p, by_z, A: tl.constexpr, BLOCK: tl.constexpr):
    """p.p, z.z and p.z of the rows times their factors, float64."""
    pp, zz, pz = tl.zeros([BLOCK], A), tl.zeros([BLOCK], A), tl.zeros([BLOCK], A)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        p, z = _pair(prediction, target, column, columns, known, A)
        p, z = by_p * p, by_z * z
        pp += p * p
        zz += z * z
        pz += p * z
    return tl.sum(pp).to(tl.float64), tl.sum(zz).to(tl.float64), tl.sum(pz).to(tl.float64)


@triton.jit
def _factor(square, eps, A: tl.constexpr):
    """SquareRange of csrc/formulas/alignment.h: the factor of a row whose squares would overflow or
    vanish."""
    wide: tl.constexpr = A.primitive_bitwidth == 64
    most = 2.0**800 if wide else 2.0**100
    shrink = 2.0**-640 if wide else 2.0**-80
    small = (square < 1 / most) & (eps < shrink)
    return tl.where(square > most, shrink, tl.where(small, 1 / shrink, 1.0)).to(A)


@triton.jit
def _cosine(
    prediction, target, d_prediction, d_target, columns, known, written, scale, eps, p_norm, z_norm,
    p_size, z_size, cosine, by_p, by_z, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Half the squared chord where the cosine exceeds 1/2, since 1 - c loses digits there
    (csrc/cpu/alignment.cpp)."""
    near = (cosine > 0.5) & (p_norm >= eps) & (z_norm >= eps)
    a = tl.where(p_norm < eps, 0.0, scale * cosine / (p_size * p_size)).to(A)
    b = tl.where(p_norm < eps, 0.0, -scale / (p_size * z_size)).to(A)
    c = tl.where(z_norm < eps, 0.0, scale * cosine / (z_size * z_size)).to(A)
    d = tl.where(z_norm < eps, 0.0, -scale / (p_size * z_size)).to(A)
    unit_p, unit_z = (1 / p_size).to(A), (1 / z_size).to(A)
    chord = tl.zeros([BLOCK], A)
    if (written > 0) | near:
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            p, z = _pair(prediction, target, column, columns, known, A)
            p, z = by_p * p, by_z * z
            apart = unit_p * p - unit_z * z
            chord += apart * apart
            _write(
                d_prediction,
                d_target,
                column,
                written,
                by_p * (a * p + b * z),
                by_z * (c * z + d * p),
            )
    return tl.where(near, tl.sum(chord).to(tl.float64) / 2, 1 - cosine)


@triton.jit
def _difference(
    prediction, target, d_prediction, d_target, columns, known, written, scale,
    DISTANCE: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mse and smooth_l1: a mean over features of a function of the difference."""
    factor = (scale / columns).to(A)
    total = tl.zeros([BLOCK], A)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        p, z = _pair(prediction, target, column, columns, known, A)
        apart = tl.where(inside, p - z, 0.0)
        if DISTANCE == _MSE:
            value, slope = apart * apart, 2 * apart
        else:
            size = tl.abs(apart)
            value = tl.where(size < 1, 0.5 * apart * apart, size - 0.5)
            slope = tl.where(size > 1, tl.where(apart < 0, -1.0, 1.0), apart)
        total += value
        _write(d_prediction, d_target, column, written, factor * slope, -factor * slope)
    return tl.sum(total).to(tl.float64) / columns


@triton.jit
def _kl(
    prediction, target, d_prediction, d_target, columns, known, written, scale, A: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    p_most, z_most = tl.full([BLOCK], LOWEST, A), tl.full([BLOCK], LOWEST, A)
    p_total, z_total = tl.zeros([BLOCK], A), tl.zeros([BLOCK], A)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        p, z = _pair(prediction, target, column, columns, known, A)
        p_most, p_total = absorb(tl.where(inside, p, float("-inf")), p_most, p_total)
        z_most, z_total = absorb(tl.where(inside, z, float("-inf")), z_most, z_total)
    p_max, p_sum = join(p_most, p_total)
    z_max, z_sum = join(z_most, z_total)
    offset = (tl.log(p_sum) - tl.log(z_sum)).to(A)
    over_p, over_z, scale = (1 / p_sum).to(A), (1 / z_sum).to(A), scale.to(A)
    divergence = tl.zeros([BLOCK], A)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        p, z = _pair(prediction, target, column, columns, known, A)
        log_ratio = (z - z_max) - (p - p_max) + offset  # log q_z - log q_p
        q_z = tl.exp(z - z_max) * over_z
        divergence += tl.where(inside & (q_z != 0), q_z * log_ratio, 0.0)  # 0 log 0 = 0
    kl = tl.sum(divergence)
    if written > 0:
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            p, z = _pair(prediction, target, column, columns, known, A)
            q_p, q_z = tl.exp(p - p_max) * over_p, tl.exp(z - z_max) * over_z
            of_target = tl.where(
                q_z == 0, 0.0, scale * q_z * ((z - z_max) - (p - p_max) + offset - kl)
            )
            _write(d_prediction, d_target, column, written, scale * (q_p - q_z), of_target)
    return kl.to(tl.float64)


@triton.jit
def _rows(
    prediction, target, target_rows, row_scale, stats, d_prediction, d_target, columns, targets,
    prediction_stride: tl.int64, target_stride: tl.int64, stats_stride: tl.int64,
    d_prediction_stride: tl.int64, d_target_stride: tl.int64, eps: tl.float64,
    DISTANCE: tl.constexpr, GRADIENT: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # tl.full: under the interpreter a scalar is a Python number, which keeps its float64 digits
    #     only this way
    eps = tl.full((), eps, tl.float64)
    row = tl.program_id(0).to(tl.int64)
    partner = row
    if target_rows is not None:
        partner = tl.load(target_rows + row)
    # columns to read of the target and to write of the gradients: all or none
    known = tl.where((partner >= 0) & (partner < targets), columns, 0)
    prediction += row * prediction_stride
    target += partner * target_stride
    d_prediction += row * d_prediction_stride
    if d_target is not None:
        d_target += row * d_target_stride
    scale = tl.full((), 1.0, tl.float64)
    if row_scale is not None:
        scale = tl.load(row_scale + row).to(tl.float64)
    written = 0
    if GRADIENT:
        written = tl.where(scale != 0, columns, 0)

    one = tl.full((), 1.0, A)
    pp, zz, pz = _sums(prediction, target, columns, known, one, one, A, BLOCK)
    by_p, by_z = _factor(pp, eps, A), _factor(zz, eps, A)
    if (by_p != 1) | (by_z != 1):
        pp, zz, pz = _sums(prediction, target, columns, known, by_p, by_z, A, BLOCK)
    tl.debug_barrier()  # all is read once: from here on the prediction may be overwritten
    p_norm, z_norm = tl.sqrt(pp) / by_p, tl.sqrt(zz) / by_z
    # of the rows times their factors; written so that a NaN norm stays NaN instead of turning into
    # eps
    p_size, z_size = (
        tl.where(p_norm < eps, eps * by_p, tl.sqrt(pp)),
        tl.where(z_norm < eps, eps * by_z, tl.sqrt(zz)),
    )
    cosine = pz / (p_size * z_size)
    if DISTANCE == _COSINE:
        loss = _cosine(
            prediction, target, d_prediction, d_target, columns, known, written, scale, eps, p_norm,
            z_norm, p_size, z_size, cosine, by_p, by_z, A, BLOCK,
        )  # fmt: skip
    elif DISTANCE == _KL:
        loss = _kl(
            prediction, target, d_prediction, d_target, columns, known, written, scale, A, BLOCK
        )
    else:
        loss = _difference(
            prediction, target, d_prediction, d_target, columns, known, written, scale, DISTANCE, A,
            BLOCK
        )  # fmt: skip
    if GRADIENT and scale == 0:  # not 0 * gradient: a NaN under a zero weight stays out
        zeros = tl.zeros([BLOCK], A)
        for first in range(0, columns, BLOCK):
            _write(d_prediction, d_target, first + tl.arange(0, BLOCK), columns, zeros, zeros)
    stats += row
    tl.store(stats, loss.to(A))
    tl.store(stats + stats_stride, cosine.to(A))
    tl.store(stats + 2 * stats_stride, p_norm.to(A))
    tl.store(stats + 3 * stats_stride, z_norm.to(A))


def alignment_rows_(
    prediction: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    row_scale: Tensor | None,
    stats: Tensor,
    d_prediction: Tensor | None,
    d_target: Tensor | None,
    distance: int,
    eps: float,
    gradient: bool,
) -> None:
    """Loss, cosine and both norms of each pair of rows; with `gradient`, of the prediction (in
    place where no other place is given) and of the target (where one is given).

    prediction [N, D]; target [M, D], read by target_rows [N], else row by row; distance as in
    csrc/formulas/alignment.h."""
    rows, columns = size_of(_OP, "prediction", prediction)
    dtype, work = working(prediction, target)
    into = prediction if d_prediction is None else d_prediction
    targets = rows if target_rows is None or target.dim() == 0 else target.shape[0]
    check_rows(_OP, "target", target, prediction, (targets, columns), checks.FLOATS)
    check_values(_OP, "target_rows", target_rows, prediction, rows)
    check_values(_OP, "row_scale", row_scale, prediction, rows, dtype)
    check_rows(_OP, "stats", stats, prediction, (4, rows), (dtype,))
    check_rows(_OP, "d_prediction", into, prediction, (rows, columns), (prediction.dtype,))
    if d_target is not None:
        check_rows(_OP, "d_target", d_target, prediction, (rows, columns), (target.dtype,))
    if distance not in range(4):
        raise ValueError(f"{_OP}: distance is {distance}, expected 0, 1, 2 or 3")
    launch(
        _rows, (rows,), prediction,
        prediction, target, target_rows, row_scale, stats, into, d_target, columns, targets,
        prediction.stride(0), target.stride(0), stats.stride(0), into.stride(0),
        0 if d_target is None else d_target.stride(0), eps, DISTANCE=distance, GRADIENT=gradient,
        A=work, **blocks(columns, _MOST, a_thread=8),
    )  # fmt: skip
