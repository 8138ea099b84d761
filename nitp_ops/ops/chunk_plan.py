"""explain: what a chunked op will do, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import checks
from ..core.chunking import row_stride, rows_per_chunk
from ..core.gemm import pad_to_alignment
from .implicit_token import chunk_rows

_OP = "explain"


@dataclass(frozen=True)
class ChunkPlan:
    """The plan of one call, forward and backward.

    terms: sets of rows; rows of each; chunk_rows: rows per chunk; chunks of all terms;
    workspace_bytes: the reused buffers of one chunk; accumulator_bytes: the float32 sum of weight
    gradients that are returned in a narrower dtype, 0 where none is needed; flops: of all GEMMs,
    two per multiply-add."""

    op: str
    rows: int
    chunk_rows: int
    chunks: int
    workspace_bytes: int
    accumulator_bytes: int
    flops: int
    terms: int = 1

    @property
    def peak_bytes(self) -> int:
        """Extra memory at the peak, beside the inputs and the gradients that are returned."""
        return self.workspace_bytes + self.accumulator_bytes

    def __str__(self) -> str:
        rows = f"{self.terms} x {self.rows}" if self.terms > 1 else f"{self.rows}"
        return (
            f"{self.op}: {rows} rows in {self.chunks} chunks of {self.chunk_rows}, workspace "
            f"{self.workspace_bytes / 2**20:.1f} MiB, accumulators "
            f"{self.accumulator_bytes / 2**20:.1f} MiB, {self.flops / 1e9:.2f} GFLOP"
        )


def explain(
    op: str,
    *,
    rows: int,
    width: int,
    vocabulary: int | None = None,
    inner: int | None = None,
    out_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    chunk_bytes: int | None = None,
    device: torch.device | str = "cpu",
    terms: int = 1,
) -> ChunkPlan:
    """The chunk plan of `linear_cross_entropy` or `implicit_token_loss` with gradients for every
    input.

    Weights in the GEMMs' dtype and no gradient buffers: a copy that autocast makes, the float32
    gradient that waits for a buffer or for float16, come on top; so does what a GEMM on CPU packs
    of its operands, up to 6.4 MiB a thread and 4 MiB for all.

    linear_cross_entropy: ``6 N d V`` FLOPs (three GEMMs). implicit_token_loss with a SwiGLU
    projector: ``6 N (2 d m + m D)`` (nine GEMMs), ``72 d^2`` a row for ``m = 4d, D = d``.

    Args:
        op: "linear_cross_entropy" or "implicit_token_loss".
        rows: N, the rows that count.
        width: d.
        vocabulary: V, for linear_cross_entropy.
        inner, out_width: m and D for implicit_token_loss; None: 4 d and d.
        dtype: of the GEMMs. On a CPU without fast GEMMs of it (float16 everywhere, bfloat16 on
            Intel's without AVX-512) they run in float32: ask for that; the float32 sum of a
            narrower gradient comes on top.
        chunk_bytes: as given to the op.
        device: where the tensors are; the default chunks of a GPU are larger.
        terms: sets of N rows that share one pass (`grouped_linear_cross_entropy`); for
            linear_cross_entropy.

    Returns:
        A `ChunkPlan`; printed, it is one line.

    Raises:
        TypeError, ValueError: an unknown op, or a size that is missing or not a positive integer.

    Example:
        >>> import nitp_ops
        >>> nitp_ops.explain("implicit_token_loss", rows=1, width=1280).flops == 72 * 1280**2
        True
    """
    checks.one_of(_OP, "op", op, ("linear_cross_entropy", "implicit_token_loss"))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{_OP}: dtype is {dtype!r}, expected a torch.dtype")
    if dtype not in checks.FLOATS:
        raise TypeError(
            f"{_OP}: dtype is {checks.name_of(dtype)}, expected a floating point dtype of the ops"
        )
    if chunk_bytes is not None:
        checks.integer(_OP, "chunk_bytes", chunk_bytes, least=1)
    checks.integer(_OP, "rows", rows, least=0)
    place = torch.device(device).type
    checks.integer(_OP, "width", width, least=1)
    # of a gradient before its upstream (`pending_dtype`)
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize
    if op == "linear_cross_entropy":
        vocabulary = checks.integer(_OP, "vocabulary", vocabulary, least=1)
        checks.integer(_OP, "terms", terms, least=1)
        row_bytes, weights = row_stride(vocabulary, place) * dtype.itemsize, vocabulary * width
        longest = rows if terms > 1 else None
        # a GPU's terms are cut one by one
        cuts, together = (1, terms * rows) if place == "cpu" else (terms, rows)
        sizes = row_bytes, chunk_bytes, weights
        step = rows_per_chunk(together, *sizes, longest=longest, device=place, itemsize=itemsize)
    else:
        if terms != 1:
            raise ValueError(
                f"{_OP}: terms is {terms}, expected 1 (implicit_token_loss has a pass of its own)"
            )
        inner = 4 * width if inner is None else checks.integer(_OP, "inner", inner, least=1)
        out_width = (
            width if out_width is None else checks.integer(_OP, "out_width", out_width, least=1)
        )
        row_bytes = chunk_rows.row_bytes(width, inner, out_width, dtype)
        weights, cuts, together = 2 * inner * width + out_width * inner, 1, rows
        sizes = width, inner, out_width, dtype, chunk_bytes, weights, itemsize
        step = chunk_rows.latent_rows(rows, *sizes, device=place)
    # chunks whose sum needs no buffer beside the returned gradient
    few = 2 if place == "cpu" else 1
    chunks = cuts * -(-together // step)
    rounded = dtype.itemsize < 4 and chunks > few
    rows_of_workspace = pad_to_alignment(min(together, step), torch.device(device), dtype)
    return ChunkPlan(
        op=op,
        rows=rows,
        chunk_rows=step,
        chunks=chunks,
        workspace_bytes=rows_of_workspace * row_bytes,
        accumulator_bytes=4 * weights if rounded else 0,
        flops=6 * terms * rows * weights,
        terms=terms,
    )
