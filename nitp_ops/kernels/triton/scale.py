"""out = rows * factor, a number on the device: in place one touches nothing; zero writes zeros."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, check_rows, check_values, launch, size_of, working

_MOST = 1024


@triton.jit
def _scale(
    rows,
    factor,
    out,
    columns,
    stride,
    out_stride,
    IN_PLACE: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor)
    if not IN_PLACE or by != 1:
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        scaled = tl.load(rows + row * stride + column, mask=inside).to(A) * by
        tl.store(out + row * out_stride + column, tl.where(by == 0, 0.0, scaled), mask=inside)


def scale_rows_(rows: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """out = rows [N, D] * factor, one number in the working precision, rounded once; by zero a NaN
    becomes zero too.

    out: None for the rows themselves, or of their dtype, or float16 beside float32."""
    count, columns = size_of("scale_rows_", "rows", rows)
    dtype, work = working(rows)
    check_values("scale_rows_", "factor", factor, rows, 1, dtype)
    into = rows if out is None else out
    allowed = (rows.dtype, torch.float16) if rows.dtype == torch.float32 else (rows.dtype,)
    check_rows("scale_rows_", "out", into, rows, rows.shape, allowed)
    meta = blocks(columns, _MOST, a_thread=8)
    grid = count, triton.cdiv(columns, meta["BLOCK"])
    strides = rows.stride(0), into.stride(0)
    in_place = into.data_ptr() == rows.data_ptr()
    launch(
        _scale, grid, rows, rows, factor, into, columns, *strides, IN_PLACE=in_place, A=work, **meta
    )
