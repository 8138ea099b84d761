"""Chunks of rows: how many, how large, and access to them without copying a whole activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Default workspace on CPU. Over 32 MiB glibc gives blocks back after each call, and the page faults of a fresh
#: block make an elementwise kernel 2-4 x slower.
CPU_WORKSPACE_BYTES = 32 * 2**20

#: Bytes of a chunk that is copied and then overwritten in place: the kernel must find the copy in the cache.
CACHED_BYTES = 2**20


def rows_per_chunk(rows: int, row_bytes: int, chunk_bytes: int | None) -> int:
    """Rows that fit into `chunk_bytes` (at least one), evened out so that the last chunk is not a sliver."""
    budget = CPU_WORKSPACE_BYTES if chunk_bytes is None else chunk_bytes
    most = max(1, budget // max(1, row_bytes))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


class Rows:
    """A tensor [..., d] read as rows [N, d]: views where strides allow, else copies of one chunk at a time."""

    def __init__(self, tensor: Tensor):
        self.shape = tensor.shape[:-1]
        self.count = self.shape.numel()
        try:
            self.tensor, self.flat = tensor.view(self.count, tensor.shape[-1]), True
        except RuntimeError:
            self.tensor, self.flat = tensor, False

    def take(self, rows: Tensor | slice) -> Tensor:
        """The rows of one chunk: [n, d]."""
        if not self.flat:
            index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            return self.tensor[torch.unravel_index(index, self.shape)]
        return self.tensor[rows] if isinstance(rows, slice) else self.tensor.index_select(0, rows)

    def dense(self, rows: Tensor | slice) -> Tensor:
        """`take` with a dense last axis, which the row kernels need; copies (a chunk) only where it is not."""
        part = self.take(rows)
        return part if part.shape[-1] < 2 or part.stride(-1) == 1 else part.contiguous()


def chunks(selected: Tensor | None, count: int, step: int) -> Iterator[tuple[slice, Tensor | slice]]:
    """Yields (place among the selected rows, the rows themselves); selected=None: all `count` rows."""
    total = count if selected is None else selected.numel()
    for first in range(0, total, step):
        place = slice(first, min(first + step, total))
        yield place, place if selected is None else selected[place]


def select(keep: Tensor) -> Tensor | None:
    """Indices of the kept rows, in order; None when all are kept, so that nothing need be gathered."""
    indices = keep.nonzero().squeeze(1)
    return None if indices.numel() == keep.numel() else indices


def place(out: Tensor, dim: int, rows: Tensor | slice, values: Tensor) -> None:
    """out[rows along dim] = values, cast to out's dtype."""
    if isinstance(rows, slice):
        out.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
    else:
        out.index_copy_(dim, rows, values.to(out.dtype))


class WeightGradient:
    """Sum over chunks of a^T b, in float32 (float64 for float64), rounded once at the end.

    ATen has no bf16 x bf16 -> float32 GEMM on CPU: there a chunk's product rounds to bf16 and is added to the float32
    sum block by block, so that the product never leaves the cache."""

    BLOCK_ELEMENTS = 2**20

    def __init__(self, shape: tuple[int, ...], gemm_dtype: torch.dtype, like: Tensor):
        self.out_dtype = like.dtype
        dtype = torch.float64 if gemm_dtype == torch.float64 else torch.float32
        self.sum = torch.zeros(shape, dtype=dtype, device=like.device)

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.dtype == self.sum.dtype:
            self.sum.addmm_(a.t(), b)
            return
        step = max(1, self.BLOCK_ELEMENTS // max(1, self.sum.shape[1]))
        for first in range(0, self.sum.shape[0], step):
            block = slice(first, first + step)
            self.sum[block] += torch.mm(a[:, block].t(), b).to(self.sum.dtype)

    def result(self) -> Tensor:
        return self.sum.to(self.out_dtype)
