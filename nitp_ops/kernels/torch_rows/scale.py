"""Rows times a number of the device."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...reference import working
from ..table import Sample, row_kernel
from .blocks import blocks, normal


def _sample(n: int, columns: int, dtype: torch.dtype) -> Sample:
    kept = normal(n, columns, dtype)
    rows, factor = kept.clone(), torch.full((1,), 0.37, dtype=working(kept))
    return Sample((rows, factor), 2 * rows.nbytes, partial(rows.copy_, kept))


@row_kernel(writes=("rows", "out"), sample=_sample)
def scale_rows_(rows: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """out = rows * factor, one number; None: in place; zero leaves no NaN."""
    out = rows if out is None else out
    for part in blocks(rows):
        scaled = rows[part].to(factor.dtype) * factor
        out[part] = torch.where(factor == 0, 0, scaled).to(out.dtype)
