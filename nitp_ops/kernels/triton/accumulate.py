"""sum += factor addend, in float32 (float64 for float64): what a GEMM that rounds its result
leaves to be done, and a gradient times its upstream into a buffer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, check_rows, check_values, launch, size_of, working

_MOST = 1024
_ADDENDS = {
    torch.float32: (torch.bfloat16, torch.float16, torch.float32),
    torch.float64: (torch.float64,),
}


@triton.jit
def _accumulate(
    sum,
    addend,
    factor,
    columns,
    sum_stride,
    addend_stride,
    BY: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor) if BY else 1.0
    if by != 0:
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        into = sum + row * sum_stride + column
        more = tl.load(addend + row * addend_stride + column, mask=inside).to(A)
        if BY:
            more = more * by
        tl.store(into, tl.load(into, mask=inside) + more, mask=inside)


def accumulate_rows_(sum: Tensor, addend: Tensor, factor: Tensor | None = None) -> None:
    """sum += factor addend over rows: float32 and a float dtype but float64 [N, D], or float64 and
    float64.

    factor: one number in the dtype of the sum, None for 1; zero adds nothing, whatever the addend
        is."""
    rows, columns = size_of("accumulate_rows_", "sum", sum, tuple(_ADDENDS))
    check_rows("accumulate_rows_", "addend", addend, sum, sum.shape, _ADDENDS[sum.dtype])
    check_values("accumulate_rows_", "factor", factor, sum, 1, sum.dtype)
    meta = blocks(columns, _MOST, a_thread=8)
    grid, strides = (rows, triton.cdiv(columns, meta["BLOCK"])), (sum.stride(0), addend.stride(0))
    given = sum, addend, sum if factor is None else factor
    launch(
        _accumulate,
        grid,
        sum,
        *given,
        columns,
        *strides,
        BY=factor is not None,
        A=working(sum)[1],
        **meta,
    )
