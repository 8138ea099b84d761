"""The gradient of rows whose maximum and sum of exponentials are known (SoftmaxGradient of
csrc/formulas/cross_entropy.h).

One program a row, one pass; the targets are written with their block, so that no element is stored
twice.
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

_OP = "cross_entropy_gradient_rows_"
_BYTES = 16384  # of one block in the working precision, as in cross_entropy.py


@triton.jit
def _rows(
    logits, labels, target_scale, target_logit, bias, class_weight, grad_coeffs, columns, targets,
    logits_stride: tl.int64, grad_coeffs_stride: tl.int64, softcap: tl.float64,
    logit_scale: tl.float64, CAPPED: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    softcap, logit_scale = tl.full((), softcap, A), tl.full((), logit_scale, A)
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    lane = tl.arange(0, BLOCK)
    maximum = tl.load(grad_coeffs + row)
    softmax_coeff = tl.load(grad_coeffs + grad_coeffs_stride + row)
    uniform_coeff = tl.load(grad_coeffs + 2 * grad_coeffs_stride + row)
    active = (softmax_coeff != 0) | (uniform_coeff != 0)
    for first in range(0, columns, BLOCK):
        column = first + lane
        inside = column < columns
        z = tl.zeros([BLOCK], A)
        g = tl.zeros([BLOCK], A)
        if active:  # else zeros, not 0 * exp: a NaN under a zero weight stays out
            z = read_logits(logits, bias, column, inside, logit_scale, softcap, CAPPED, A)
            g = softmax_coeff * tl.exp(z - maximum)
            if class_weight is not None:
                g -= uniform_coeff * tl.load(class_weight + column, mask=inside, other=0.0)
            else:
                g -= uniform_coeff
        for k in range(targets):
            at = row * targets + k
            label = tl.load(labels + at)
            scale = tl.load(target_scale + at)
            if (label >= first) & (label < first + BLOCK) & (scale != 0):
                z = tl.where(column == label, tl.load(target_logit + at), z)
                g -= tl.where(column == label, scale, 0.0)
        if CAPPED:
            ratio = z / softcap
            g *= logit_scale * (1 - ratio * ratio)
        else:
            g *= logit_scale
        tl.store(logits + column, g, mask=inside)


def cross_entropy_gradient_rows_(
    logits: Tensor,
    labels: Tensor,
    target_scale: Tensor,
    target_logit: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    grad_coeffs: Tensor,
    softcap: float,
    logit_scale: float,
) -> None:
    """The gradient of each row over its logits.

    logits [N, V]; labels, target_scale, target_logit [N, K]; bias, class_weight [V];
    grad_coeffs [3, N]."""
    rows, columns = size_of(_OP, "logits", logits)
    dtype, work = working(logits)
    if labels.dim() != 2:
        raise ValueError(f"{_OP}: labels has shape {tuple(labels.shape)}, expected (rows, targets)")
    targets = labels.shape[1]
    check_values(_OP, "labels", labels, logits, rows * targets)
    check_values(_OP, "target_scale", target_scale, logits, rows * targets, dtype)
    check_values(_OP, "target_logit", target_logit, logits, rows * targets, dtype)
    check_values(_OP, "bias", bias, logits, columns, dtype)
    check_values(_OP, "class_weight", class_weight, logits, columns, dtype)
    check_rows(_OP, "grad_coeffs", grad_coeffs, logits, (3, rows), (dtype,))
    if columns == 0:
        return
    launch(
        _rows, (rows,), logits,
        logits, labels, target_scale, target_logit, bias, class_weight, grad_coeffs, columns,
        targets, logits.stride(0), grad_coeffs.stride(0), softcap, logit_scale, CAPPED=softcap > 0,
        A=work, **blocks(columns, _BYTES // dtype.itemsize, a_thread=64 // dtype.itemsize),
    )  # fmt: skip
