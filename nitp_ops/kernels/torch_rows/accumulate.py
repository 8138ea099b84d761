"""A sum of rows in the working precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import working
from ..table import Sample, row_kernel
from .blocks import blocks, normal


def _sample(n: int, columns: int, dtype: torch.dtype) -> Sample:
    addend = normal(n, columns, dtype)
    total = torch.zeros(n, columns, dtype=working(addend))
    return Sample((total, addend), 2 * total.nbytes + addend.nbytes)


@row_kernel(writes=("sum",), sample=_sample)
def accumulate_rows_(sum: Tensor, addend: Tensor, factor: Tensor | None = None) -> None:
    """sum += factor addend, one number; zero adds nothing, whatever it meets."""
    if factor is None:
        sum += addend
        return
    for part in blocks(sum):
        sum[part].addcmul_(torch.where(factor == 0, 0, addend[part].to(sum.dtype)), factor)
