"""The gradient of a weight: a sum of GEMMs over chunks, or one GEMM in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gemm, library
from .chunking import workspace

#: A float32 sum that is rounded at the end consists of parts of so many bytes or more, each freed
#: once it is rounded: glibc maps blocks over 32 MiB one by one.
_PART_BYTES = 40 * 2**20


class WeightGradient:
    """Sum over chunks of a^T b, in float32 (float64 for float64), rounded once to `dtype`.

    On CUDA, and where GEMMs on CPU are this library's own, the GEMM itself adds to the float32 sum.
    ATen has no bfloat16 x bfloat16 -> float32 GEMM on CPU: elsewhere a chunk's GEMM rounds to
    bfloat16 before it is added, one block of rows at a time. A single chunk needs no float32 sum,
    nor do two on CPU: the second GEMM is added to the first before its own rounding."""

    def __init__(self, shape: torch.Size, policy: gemm.GemmPolicy, dtype: torch.dtype, chunks: int):
        self.dtype, self.empty, self.shape = dtype, True, shape
        device, gemm_dtype = policy.device, policy.dtype
        on_cpu = device.type == "cpu"
        few = chunks <= (2 if on_cpu else 1)
        same = gemm_dtype not in gemm.NARROW or (dtype == gemm_dtype and few)
        self.in_gemm = same or gemm.writes_float32(device, gemm_dtype)
        sum_dtype = gemm_dtype if same else torch.float32
        self.block_rows = gemm.block_rows(shape[1], gemm_dtype, device.type)
        parts = 1
        if on_cpu and sum_dtype != dtype:
            parts = max(1, 4 * shape.numel() // _PART_BYTES)
        rows = -(-max(1, shape[0]) // (parts * self.block_rows)) * self.block_rows
        heights = [min(rows, shape[0] - first) for first in range(0, max(1, shape[0]), rows)]
        self.sums = [workspace((height, shape[1]), sum_dtype, device) for height in heights]

    def add(self, a: Tensor, b: Tensor) -> None:
        first = 0
        for part in self.sums:
            of_part = a[:, first : first + len(part)].t()
            if self.in_gemm:
                gemm.matmul(of_part, b, part, add=not self.empty)
            else:
                self._add_rounded(of_part, b, part)
            first += len(part)
        self.empty = False

    def _add_rounded(self, a: Tensor, b: Tensor, sum_: Tensor) -> None:
        block = b.new_empty((min(self.block_rows, len(sum_)), self.shape[1]))
        sums = sum_.split(self.block_rows)
        for of_block, into in zip(a.split(self.block_rows), sums, strict=True):
            rounded = gemm.matmul(of_block, b, block[: len(into)])
            if self.empty:
                into.copy_(rounded)
            elif into.device.type == "cpu" and library.load_error is None:
                torch.ops.nitp_ops.accumulate_rows_(into, rounded)
            else:
                into += rounded

    def result(self) -> Tensor:
        """The gradient; the sum is gone."""
        if self.empty:
            for part in self.sums:
                part.zero_()
        if len(self.sums) == 1:
            return self.sums.pop().to(self.dtype)
        gradient, end = self.sums[0].new_empty(self.shape, dtype=self.dtype), self.shape[0]
        while self.sums:
            part = self.sums.pop()
            gradient[end - len(part) : end] = part
            end -= len(part)
        return gradient


class WeightGemm:
    """buffer += a^T b, in the backward pass: the gradient of the weight is never written, read and
    added."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.operands: tuple[Tensor, Tensor] | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        assert self.operands is None, "several chunks need a sum"
        self.operands = a, b

    def result(self) -> WeightGemm:
        return self

    def run(self, upstream: Tensor | None, kernels: Any) -> None:
        """With b times the upstream gradient (None: one); an upstream of zero adds nothing, not
        even a NaN."""
        if self.operands is None:
            return
        a, b = self.operands
        if upstream is not None:
            # one costs nothing, zero leaves no NaN
            kernels.scale_rows_(a, (upstream != 0).to(self.buffer.dtype), a)
            b = torch.where(upstream == 0, 0, b * upstream).to(b.dtype)
        gemm.matmul(a.t(), b, self.buffer, add=True)
