"""sum += addend, in float32: what a GEMM that rounds its product to bfloat16 leaves to be done."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, check_rows, launch, size_of

_MOST = 1024


@triton.jit
def _accumulate(sum, addend, columns, sum_stride, addend_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    into = sum + row * sum_stride + column
    more = tl.load(addend + row * addend_stride + column, mask=inside).to(tl.float32)
    tl.store(into, tl.load(into, mask=inside) + more, mask=inside)


def accumulate_rows_(sum: Tensor, addend: Tensor) -> None:
    """sum += addend over rows: float32 and bfloat16 [N, D]."""
    rows, columns = size_of("accumulate_rows_", "sum", sum, (torch.float32,))
    check_rows("accumulate_rows_", "addend", addend, sum, sum.shape, (torch.bfloat16,))
    meta = blocks(columns, _MOST, a_thread=8)
    grid = rows, triton.cdiv(columns, meta["BLOCK"])
    launch(_accumulate, grid, sum, sum, addend, columns, sum.stride(0), addend.stride(0), **meta)
