"""GEMMs: in which dtype, and by which library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, library
from .chunking import EVEN_ROWS, rows_of

#: A block of a weight that is cast, or of a GEMM that is summed, at a time: it stays in the
#: second-level cache.
BLOCK_BYTES = 2 * 2**20
#: The same on a GPU, which needs large GEMMs to be busy.
BLOCK_BYTES_ON_GPU = 128 * 2**20
#: A GEMM that writes fewer numbers has less than two tiles of 128 x 256 for each multiprocessor of
#: a large GPU, which a split of its sum would keep busy.
SPLIT_NUMBERS = 2**23
#: Dtypes narrower than the arithmetic on them.
NARROW = (torch.bfloat16, torch.float16)
#: A GEMM by a library takes up to 1.3 times as long where its rows are no multiple of 8, to 1.06
#: where they are many and no multiple of 16; a bfloat16 weight gradient up to 1.15 times: there the
#: rest goes apart (docs/log.md).
ALIGNED_ROWS, _MANY_ROWS = 16, 2048
#: Where a GEMM writes columns of a wider matrix; on MPS it left them unwritten (pytorch issue
#: 104832).
_STRIDED_OUT = frozenset({"cpu", "cuda"})
#: Found at import: torch 2.11 cannot trace the query.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)


def gemm_dtype(op: str, weight: Tensor, logits_dtype: torch.dtype | str = "auto") -> torch.dtype:
    """The autocast dtype where autocast is on (it leaves float64 alone), else the weight's; or
    `logits_dtype`.

    On CPU float16 runs in float32, and so does bfloat16 where the processor has no GEMM of it
    (decision 0010)."""
    device, dtype = weight.device.type, weight.dtype
    if logits_dtype != "auto" and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"{op}: logits_dtype is {logits_dtype!r}, expected 'auto' or a torch.dtype")
    if device in _AUTOCAST and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        if dtype not in checks.FLOATS:
            raise TypeError(
                f"{op}: autocast is {checks.name_of(dtype)}, expected bfloat16 or float16 (or no "
                "autocast)"
            )
    if logits_dtype != "auto":
        allowed = {dtype, torch.promote_types(dtype, torch.float32)}
        if logits_dtype not in allowed:
            names = ["'auto'", *sorted(f"torch.{checks.name_of(each)}" for each in allowed)]
            raise ValueError(
                f"{op}: logits_dtype is {logits_dtype}, expected {' or '.join(names)} (the GEMM is "
                f"{dtype})"
            )
        assert isinstance(logits_dtype, torch.dtype)
        dtype = logits_dtype
    return torch.float32 if device == "cpu" and dtype in _WITHOUT_GEMM else dtype


def operand_dtype(
    device: str, weight: torch.dtype, hidden: Sequence[torch.dtype], logits: torch.dtype
) -> torch.dtype:
    """In which dtype the GEMMs take their operands, where `logits` is the requested dtype of the
    logits.

    On CUDA a GEMM of narrow operands can write float32: the logits of widened operands at the speed
    of narrow ones. Elsewhere, and beside float32 hidden states, which must not be rounded, the
    operands are as wide as the logits."""
    narrow = device == "cuda" and weight in NARROW and all(each == weight for each in hidden)
    return weight if narrow and logits == torch.float32 else logits


def sums_in_float32(device: str, dtype: torch.dtype, numbers: int) -> bool:
    """Whether a GEMM that writes so many numbers of `dtype` goes through float32: it may split its
    sum, and cuBLAS adds the parts in the dtype of the result unless a global setting forbids it
    (docs/decisions/0037)."""
    return device == "cuda" and dtype in NARROW and numbers < SPLIT_NUMBERS


def has_native_gemm(device: str, dtype: torch.dtype) -> bool:
    """Whether this library multiplies such numbers itself: on CPUs with AVX2 or AVX-512 that MKL is
    not made for."""
    return device == "cpu" and dtype in (torch.float32, torch.bfloat16) and library.has_gemm()


def torch_has_bfloat16() -> bool:
    """Whether torch.mm has a fast GEMM of bfloat16 numbers on CPU; one without oneDNN is taken to
    have its own.

    Where oneDNN has none torch.mm multiplies one by one: dh took 120 times as long as in float32
    (AMD EPYC, AVX2)."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


#: Dtypes that no library multiplies fast on CPU.
_WITHOUT_GEMM = frozenset(
    {torch.float16}
    if has_native_gemm("cpu", torch.bfloat16) or torch_has_bfloat16()
    else {torch.float16, torch.bfloat16}
)


def pad_to_alignment(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """As many rows as a GEMM on `device` should have: up to 15 more, or none where GEMMs are our
    own."""
    if device.type != "cpu" or rows < EVEN_ROWS or has_native_gemm(device.type, dtype):
        return rows
    multiple = EVEN_ROWS if rows < _MANY_ROWS else 2 * EVEN_ROWS
    return -(-rows // multiple) * multiple


def writes_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GEMM of bfloat16 or float16 numbers can write, and add, unrounded float32."""
    return dtype in NARROW and (device.type == "cuda" or has_native_gemm(device.type, dtype))


class GemmPolicy(NamedTuple):
    """How the GEMMs of one call run, decided once.

    dtype: of the operands. logits: of the logits, never narrower. out_dtype: what a GEMM can write,
    float32 where that spares narrow numbers a rounding."""

    device: torch.device
    dtype: torch.dtype
    logits: torch.dtype
    out_dtype: torch.dtype

    @classmethod
    def of(
        cls, device: torch.device, dtype: torch.dtype, logits: torch.dtype | None = None
    ) -> GemmPolicy:
        out = torch.float32 if writes_float32(device, dtype) else dtype
        return cls(device, dtype, dtype if logits is None else logits, out)

    @property
    def logit_bytes(self) -> int:
        """Of the workspace per logit: its own, and those of a gradient that is rounded for the
        GEMMs."""
        return self.logits.itemsize + (0 if self.logits == self.dtype else self.dtype.itemsize)

    def pad(self, rows: int) -> int:
        """As many rows as the GEMMs should have."""
        return pad_to_alignment(rows, self.device, self.dtype)

    def gemm_out_view(self, out: Tensor | None, rows: Tensor | slice) -> Tensor | None:
        """The rows of `out` as a view that a GEMM can write into, or None: use `scatter_rows_`."""
        if out is None or not isinstance(rows, slice):
            return None
        if out.dtype not in (self.dtype, self.out_dtype):
            return None
        return rows_of(out, rows)


def gemm_policy(
    op: str, weight: Tensor, hidden: Sequence[Tensor], logits_dtype: torch.dtype | str
) -> GemmPolicy:
    """Of hidden states against the unembedding `weight`."""
    logits = operands = gemm_dtype(op, weight, logits_dtype)
    if logits_dtype == torch.float32:  # and not autocast's dtype, which is that of the operands too
        operands = operand_dtype(
            weight.device.type, weight.dtype, [x.dtype for x in hidden], logits
        )
    return GemmPolicy.of(weight.device, operands, logits)


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a b, or out += a b: by this library, else by torch."""
    device, dtype = a.device.type, a.dtype
    if out.dtype == dtype and sums_in_float32(device, dtype, out.numel()):
        wide = out.float() if add else torch.empty_like(out, dtype=torch.float32)
        return out.copy_(matmul(a, b, wide, add=add))
    if has_native_gemm(device, dtype):
        if 0 in a.shape or 0 in b.shape:
            return out if add else out.zero_()
        torch.ops.nitp_ops.gemm_(out, _dense(a), _dense(b), add)
        return out
    if out.dtype != dtype:
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    whole = a.shape[0] // ALIGNED_ROWS * ALIGNED_ROWS
    if device == "cpu" and dtype in NARROW and _MANY_ROWS <= whole < a.shape[0]:
        matmul(a[:whole], b, out[:whole], add=add)
        matmul(a[whole:], b, out[whole:], add=add)
        return out
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def _dense(matrix: Tensor) -> Tensor:
    """With dense rows or dense columns."""
    return matrix if 1 in matrix.stride() or 1 in matrix.shape else matrix.contiguous()


def block_rows(columns: int, dtype: torch.dtype, device: str) -> int:
    """Rows of a weight that are handled at a time."""
    size = BLOCK_BYTES if device == "cpu" else BLOCK_BYTES_ON_GPU
    fitting = size // max(1, columns * dtype.itemsize)
    return max(ALIGNED_ROWS, fitting // ALIGNED_ROWS * ALIGNED_ROWS)


class Weight:
    """A weight [m, k] in the dtype of the GEMMs.

    A narrower one is widened one block of rows at a time, which costs a GEMM of n rows 1 / n; a
    wider one is copied once, as autocast does."""

    def __init__(self, matrix: Tensor, policy: GemmPolicy):
        dtype = self.dtype = policy.dtype
        widened = dtype != matrix.dtype and torch.promote_types(matrix.dtype, dtype) == dtype
        self.matrix = matrix if widened else matrix.to(dtype)
        self.blocks: list[slice] = []
        if not widened:
            return
        rows = block_rows(matrix.shape[1], dtype, matrix.device.type)
        firsts = range(0, max(1, matrix.shape[0]), rows)
        self.blocks = [slice(first, first + rows) for first in firsts]

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """out = x W^T."""
        if not self.blocks:
            _into(x, self.matrix.t(), out)
        for block in self.blocks:
            _into(x, self.matrix[block].to(self.dtype).t(), out[:, block])
        return out

    def grad_input(self, upstream: Tensor, out: Tensor) -> Tensor:
        """out = upstream W."""
        if not self.blocks:
            return matmul(upstream, self.matrix, out)
        for place, block in enumerate(self.blocks):
            matmul(upstream[:, block], self.matrix[block].to(self.dtype), out, add=place > 0)
        return out


def _into(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, where `out` may be columns of a wider matrix."""
    if out.device.type in _STRIDED_OUT or out.is_contiguous():
        matmul(a, b, out)
    else:
        out.copy_(matmul(a, b, torch.empty_like(out, memory_format=torch.contiguous_format)))
