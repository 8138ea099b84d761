"""rows *= factor, a number on the device: one touches nothing, zero writes zeros."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, check_values, launch, size_of, working

_MOST = 1024


@triton.jit
def _scale(rows, factor, columns, stride, A: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        into = rows + tl.program_id(0).to(tl.int64) * stride + column
        scaled = tl.load(into, mask=inside).to(A) * by
        tl.store(into, tl.where(by == 0, 0.0, scaled), mask=inside)


def scale_rows_(rows: Tensor, factor: Tensor) -> None:
    """rows [N, D] *= factor, one number in the working precision, rounded once; by zero a NaN becomes zero too."""
    count, columns = size_of("scale_rows_", "rows", rows)
    dtype, work = working(rows)
    check_values("scale_rows_", "factor", factor, rows, 1, dtype)
    meta = blocks(columns, _MOST, a_thread=8)
    launch(
        _scale,
        (count, triton.cdiv(columns, meta["BLOCK"])),
        rows,
        rows,
        factor,
        columns,
        rows.stride(0),
        A=work,
        **meta,
    )
