"""Blocks of rows: only one exists in float32 at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Numbers of one block: its few temporaries together stay small beside a chunk of logits.
BLOCK = 2**20


def blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, rows.shape[1]))
    return (slice(first, first + step) for first in range(0, len(rows), step))


def wide(rows: Tensor, work: torch.dtype) -> Tensor:
    """Dense, so that strides do not change what vectorised operations round."""
    return rows.to(work).contiguous()


def normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Standard normal rows for a sample of a call."""
    return torch.randn(rows, columns).to(dtype)
