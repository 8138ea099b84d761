"""Chunks of rows: which, how many, how large, and access to them without copying a whole
activation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, library

#: Default workspace on CPU: small ones stay in the last-level cache and in memory that glibc keeps.
LEAST_BYTES = 32 * 2**20
#: Every chunk reads and writes the whole weight gradient, so a workspace may be as large as that in
#: float32, up to:
MOST_BYTES = 120 * 2**20
#: ... or this many rows of a large vocabulary, up to twice the bytes (docs/decisions/0007,
#: docs/numerics.md).
ENOUGH_ROWS = 512
#: Several terms share a pass to save memory: their chunk is at most this share of the gradient, or
#: has so many rows.
SHARED_PART, ENOUGH_SHARED_ROWS = 0.6, 448
#: Default on a GPU: so many rows, whatever the width (reading and writing the sum of the weight
#: gradient takes a share of its GEMM that goes by the rows alone), and for a projector at least so
#: many bytes (docs/decisions/0014).
ROWS_ON_GPU, PROJECTOR_BYTES_ON_GPU = 8192, 1280 * 2**20
#: Copies of logits that the row kernels cannot read in place, on a GPU.
COPY_BYTES_ON_GPU = 512 * 2**20
#: glibc maps larger blocks one by one.
_MAPPED_BYTES = 32 * 2**20
#: Rows of a chunk are a multiple of so many, which the GEMMs of libraries are fastest at.
EVEN_ROWS = 8
#: Numbers of one load, 16 bytes in bfloat16, and of the lines of 128 bytes that other rows of
#: logits are padded to.
_LOAD, _ALIGNED = 8, 64


def rows_per_chunk(
    rows: int,
    row_bytes: int,
    chunk_bytes: int | None,
    weights: int,
    least: int = LEAST_BYTES,
    *,
    longest: int | None = None,
    device: str = "cpu",
    itemsize: int = 4,
) -> int:
    """Rows that fit into `chunk_bytes` (at least one), evened out so that the last chunk is not a
    sliver.

    weights: numbers in the weight gradient that the chunks share. least: bytes of the smallest
    default. longest: rows of the longest term, where there are several. itemsize: of a number of
    the GEMMs, or of the gradient where that is wider. Chunks of several rows have a multiple of 8,
    which the GEMMs of a CPU are fastest at."""
    if device == "cpu":
        share, enough = (1.0, ENOUGH_ROWS) if longest is None else (SHARED_PART, ENOUGH_SHARED_ROWS)
        of_gradient = min(int(share * 4 * weights), MOST_BYTES)
        of_rows = min(enough * row_bytes, 2 * MOST_BYTES)
        default = max(of_gradient, of_rows)
        if longest is not None:  # no more than a call for that term would need
            default = min(default, -(-longest // EVEN_ROWS) * EVEN_ROWS * row_bytes)
        default = max(least, default)
    else:
        default = max(least, ROWS_ON_GPU * row_bytes)
        whole = -(-rows // EVEN_ROWS) * EVEN_ROWS * row_bytes
        spared = max(0, 4 - itemsize) * weights
        # one chunk needs no float32 sum of a narrow gradient; with it, the largest chunk would take
        # as much
        if longest is None and default < whole <= default + spared:
            default = whole
    most = max(1, (default if chunk_bytes is None else chunk_bytes) // max(1, row_bytes))
    even = EVEN_ROWS if most >= EVEN_ROWS else 1
    chunks = max(1, -(-rows // (most // even * even)))
    return max(1, min(rows, -(-rows // (chunks * even)) * even))


def row_stride(columns: int, device: str) -> int:
    """Numbers from one row of logits to the next: V, or on CUDA, where V is no multiple of 8, the
    next multiple of 64. A GEMM over rows that do not begin at 16 bytes cannot load them 16 bytes at
    a time."""
    if device != "cuda" or columns % _LOAD == 0:
        return columns
    return -(-columns // _ALIGNED) * _ALIGNED


def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that will be written as a whole: on CPU the pages of a block that glibc maps afresh
    come at once."""
    block = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and block.nbytes > _MAPPED_BYTES and library.load_error is None:
        torch.ops.nitp_ops.populate_(block)
    return block


def rows_of(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """tensor[rows]; the tensor itself where these are all."""
    if not isinstance(rows, slice):
        return tensor.index_select(0, rows)
    return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]


class Rows:
    """A tensor [..., d] read as rows [N, d]: views where strides allow, else copies of one chunk at
    a time."""

    def __init__(self, tensor: Tensor):
        self.shape = tensor.shape[:-1]
        self.count, self.width = self.shape.numel(), tensor.shape[-1]
        try:
            self.tensor, self.flat = tensor.view(self.count, tensor.shape[-1]), True
        except RuntimeError:
            self.tensor, self.flat = tensor, False

    def of_chunk(self, rows: Tensor | slice) -> Tensor:
        """The rows of one chunk: [n, d]."""
        if self.flat:
            return rows_of(self.tensor, rows)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.tensor.device)
        return self.tensor[torch.unravel_index(rows, self.shape)]

    def dense(self, rows: Tensor | slice) -> Tensor:
        """`of_chunk` with a dense last axis, which the row kernels need: copies (a chunk) only
        where it is not."""
        part = self.of_chunk(rows)
        return part if part.shape[-1] < 2 or part.stride(-1) == 1 else part.contiguous()


def whole_or_chunk(*tensors: Rows) -> int:
    """Rows a call for an elementwise kernel: all at once where it can read them in place, else 8
    MiB of copies."""
    in_place = all(
        rows.flat and (rows.width < 2 or rows.tensor.stride(-1) == 1) for rows in tensors
    )
    count, width = tensors[0].count, tensors[0].width
    return max(1, count if in_place else 2**20 // max(1, width))


class Selection(NamedTuple):
    """The rows that are computed, in order, and those that are not: slices where they lie together,
    so that nothing need be gathered, else indices."""

    rows: Tensor | slice
    rest: tuple[Tensor | slice, ...]

    @classmethod
    def range(cls, first: int, last: int, count: int) -> Selection:
        """The rows [first, last) of `count`."""
        rest = (slice(0, first), slice(last, count))
        return cls(slice(first, last), tuple(part for part in rest if part.stop > part.start))


def select_rows(keep: Tensor, max_rows: int | None = None) -> Selection:
    """The kept rows. Where the host must not read `keep`: the first `max_rows` of all rows, kept
    ones first; without it, every row."""
    total = keep.numel()
    if not checks.host_reads(keep.device):
        if max_rows is None or max_rows >= total:
            return Selection.range(0, total, total)
        order = keep.to(torch.uint8).argsort(descending=True, stable=True)
        return Selection(order[:max_rows], (order[max_rows:],))
    indices = keep.nonzero().squeeze(1)
    count = indices.numel()
    if count in (0, total):
        return Selection.range(0, count, total)
    first, last = indices[[0, -1]].tolist()
    if last - first == count - 1:
        return Selection.range(first, last + 1, total)
    return Selection(indices, (keep.logical_not().nonzero().squeeze(1),))


def length_of(rows: Tensor | slice) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def chunks(selected: Tensor | slice, step: int) -> Iterator[Tensor | slice]:
    """The selected rows, at most `step` at a time."""
    for (part,) in packed([selected], step):
        yield part.rows


class RowRange(NamedTuple):
    """Rows of one term in a chunk."""

    term: int
    rows: Tensor | slice


def packed(
    selected: Sequence[Tensor | slice], step: int, terms: Sequence[int] | None = None
) -> Iterator[list[RowRange]]:
    """The selected rows of each term, one term after the other, at most `step` of them a chunk."""
    chunk, left = list[RowRange](), step
    for term in range(len(selected)) if terms is None else terms:
        rows, first = selected[term], 0
        while first < length_of(rows):
            last = min(first + left, length_of(rows))
            chunk.append(RowRange(term, _between(rows, first, last)))
            left -= last - first
            first = last
            if left == 0:
                yield chunk
                chunk, left = [], step
    if chunk:
        yield chunk


def _between(rows: Tensor | slice, first: int, last: int) -> Tensor | slice:
    if isinstance(rows, slice):
        return slice(rows.start + first, rows.start + last)
    return rows[first:last]


def with_zeros(chunk: Tensor, rows: int) -> Tensor:
    """The chunk [n, d], followed by zeros where it has less than `rows` rows."""
    if len(chunk) == rows:
        return chunk
    return torch.constant_pad_nd(chunk, (0, 0, 0, rows - len(chunk)))


def clear(out: Tensor, rows: Tensor | slice) -> None:
    """out[rows] = 0."""
    if isinstance(rows, slice):
        out[rows].zero_()
    else:
        out.index_fill_(0, rows, 0)


def scatter_rows_(out: Tensor, dim: int, rows: Tensor | slice, values: Tensor) -> None:
    """out[rows along dim] = values, cast to out's dtype."""
    if isinstance(rows, slice):
        out.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
    else:
        out.index_copy_(dim, rows, values.to(out.dtype))
