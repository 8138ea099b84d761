"""Chunks of rows: how many, how large, and access to them without copying a whole activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Default workspace on CPU. Over 32 MiB glibc gives blocks back after each call, and the page faults of a fresh
#: block make an elementwise kernel 2-4 x slower.
CPU_WORKSPACE_BYTES = 32 * 2**20
#: Default rows of a chunk at least: every chunk reads and writes the whole weight gradient. At 1024 x 896 x 151936 in
#: float32 chunks of 55 rows (32 MiB) took 3.3 times the GEMMs, chunks of 512 rows 1.05 times (docs/decisions/0007).
LEAST_ROWS = 512


def rows_per_chunk(rows: int, row_bytes: int, chunk_bytes: int | None, weights: int) -> int:
    """Rows that fit into `chunk_bytes` (at least one), evened out so that the last chunk is not a sliver.

    By default a workspace may also be as large as the float32 sum of the weight gradient (`weights` numbers) that its
    chunks share: beyond that a smaller one saves little memory, and in bfloat16 a single chunk needs no sum at all."""
    default = max(CPU_WORKSPACE_BYTES, LEAST_ROWS * row_bytes, 4 * weights)
    most = max(1, (default if chunk_bytes is None else chunk_bytes) // max(1, row_bytes))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


class Rows:
    """A tensor [..., d] read as rows [N, d]: views where strides allow, else copies of one chunk at a time."""

    def __init__(self, tensor: Tensor):
        self.shape = tensor.shape[:-1]
        self.count, self.width = self.shape.numel(), tensor.shape[-1]
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


def whole_or_chunk(*tensors: Rows) -> int:
    """Rows a call for an elementwise kernel: all at once where it can read them in place, else 8 MiB of copies."""
    in_place = all(rows.flat and (rows.width < 2 or rows.tensor.stride(-1) == 1) for rows in tensors)
    count, width = tensors[0].count, tensors[0].width
    return max(1, count if in_place else 2**20 // max(1, width))


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

    ATen has no bf16 x bf16 -> float32 GEMM on CPU: there a chunk's product rounds to bf16 before it is added to the
    float32 sum, one block of rows at a time. A single chunk needs no sum at all."""

    BLOCK_BYTES = 16 * 2**20

    def __init__(self, shape: tuple[int, ...], gemm_dtype: torch.dtype, like: Tensor, chunks: int):
        self.like, self.empty = like, True
        self.rounds_once = chunks <= 1 or gemm_dtype in (torch.float32, torch.float64)
        dtype = gemm_dtype if self.rounds_once else torch.float32
        self.sum = torch.empty(shape, dtype=dtype, device=like.device)

    def add(self, a: Tensor, b: Tensor) -> None:
        if not self.rounds_once:
            self._add_rounded(a, b)
        elif self.empty:
            torch.mm(a.t(), b, out=self.sum)
        else:
            self.sum.addmm_(a.t(), b)
        self.empty = False

    def _add_rounded(self, a: Tensor, b: Tensor) -> None:
        height, width = self.sum.shape
        rows = min(height, max(1, self.BLOCK_BYTES // max(1, width * a.element_size())))
        block = b.new_empty((rows, width))
        for first in range(0, height, rows):
            into = self.sum[first : first + rows]
            product = torch.mm(a[:, first : first + rows].t(), b, out=block[: into.shape[0]])
            if self.empty:
                into.copy_(product)
            else:
                torch.ops.nitp_ops.accumulate_rows_(into, product)

    def result(self) -> Tensor:
        return (self.sum.zero_() if self.empty else self.sum).to(self.like.dtype)
