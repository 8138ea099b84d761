"""For every launcher: checks of its arguments, working precision, block size, the launch
itself.

Nothing here reads a value of a tensor, so no launch waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ...core import checks

_WORKING = {torch.float32: tl.float32, torch.float64: tl.float64}


def working(*tensors: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The precision of row arithmetic, float64 if any tensor is float64, else float32, as torch and
    Triton name it."""
    dtype = reference.working(*tensors)
    return dtype, _WORKING[dtype]


def size_of(
    op: str, argument: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = checks.FLOATS
) -> tuple[int, int]:
    """(rows, columns) of the argument that the others are measured by."""
    if tensor.dim() != 2:
        raise ValueError(
            f"{op}: {argument} has shape {tuple(tensor.shape)}, expected (rows, columns)"
        )
    check_rows(op, argument, tensor, tensor, tensor.shape, dtypes)
    return tensor.shape[0], tensor.shape[1]


def check_rows(
    op: str,
    argument: str,
    tensor: Tensor,
    like: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> None:
    """Rows at any distance from each other, each of them dense."""
    checks.has_shape(op, argument, tensor, shape)
    checks.has_dtype(op, argument, tensor, dtypes)
    checks.same_device(op, argument, tensor, "the first argument", like)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {argument} has strides {tensor.stride()}, expected a dense last axis"
        )


def check_values(
    op: str,
    argument: str,
    tensor: Tensor | None,
    like: Tensor,
    size: int,
    dtype: torch.dtype = torch.int64,
) -> None:
    """`size` dense values of any shape, or None."""
    if tensor is None:
        return
    checks.has_dtype(op, argument, tensor, (dtype,))
    checks.same_device(op, argument, tensor, "the first argument", like)
    if tensor.numel() != size or not tensor.is_contiguous():
        got = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"{op}: {argument} has {got}, expected {size} dense values")


def blocks(columns: int, most: int, a_thread: int = 16, warps: int = 8) -> dict[str, int]:
    """BLOCK columns a step (one warp's worth at least: no two threads hold one element) and the
    warps that share it."""
    block = min(max(triton.next_power_of_2(columns), 32), most)
    return {"BLOCK": block, "num_warps": max(1, min(warps, block // (32 * a_thread)))}


def launch(
    kernel: Any, grid: tuple[int, ...], device: Tensor, *arguments: Any, **meta: Any
) -> None:
    """On the device of the tensor `device`, which need not be the current one; nothing where the
    grid is empty."""
    if 0 in grid:
        return
    with torch.cuda.device_of(device):
        # said, because Triton's own default changes from yes to no (3.10)
        kernel[grid](*arguments, enable_fp_fusion=True, **meta)
