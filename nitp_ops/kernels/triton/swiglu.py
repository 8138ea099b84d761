"""SwiGLU over rows (csrc/formulas/swiglu.h): y = g s u, dy/dg = u s (1 + g (1 - s)), dy/du = g s, s
= sigmoid(g)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, check_rows, launch, size_of, working

_MOST = 1024


@triton.jit
def _sigmoid(x):
    # without overflow on either side
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _forward(
    gate, up, out, columns, gate_stride, up_stride, out_stride, A: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(A)
    u = tl.load(up + row * up_stride + column, mask=inside).to(A)
    tl.store(out + row * out_stride + column, g * _sigmoid(g) * u, mask=inside)


@triton.jit
def _backward(
    gate, up, upstream, d_gate, d_up, columns, gate_stride, up_stride, upstream_stride,
    d_gate_stride, d_up_stride, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(A)
    u = tl.load(up + row * up_stride + column, mask=inside).to(A)
    dy = tl.load(upstream + row * upstream_stride + column, mask=inside).to(A)
    s = _sigmoid(g)
    tl.store(d_gate + row * d_gate_stride + column, dy * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(d_up + row * d_up_stride + column, dy * g * s, mask=inside)


def swiglu_rows(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up over rows [N, m] of one dtype, rounded once."""
    rows, columns = size_of("swiglu_rows", "gate", gate)
    for argument, tensor in (("up", up), ("out", out)):
        check_rows("swiglu_rows", argument, tensor, gate, gate.shape, (gate.dtype,))
    strides = (t.stride(0) for t in (gate, up, out))
    meta = blocks(columns, _MOST, a_thread=8)
    grid = rows, triton.cdiv(columns, meta["BLOCK"])
    launch(_forward, grid, gate, gate, up, out, columns, *strides, A=working(gate)[1], **meta)


def swiglu_rows_backward_(
    gate: Tensor,
    up: Tensor,
    upstream: Tensor,
    d_gate: Tensor | None = None,
    d_up: Tensor | None = None,
) -> None:
    """The gradients of `upstream` through swiglu, over gate and up themselves where no place for
    them is given."""
    op = "swiglu_rows_backward_"
    rows, columns = size_of(op, "gate", gate)
    d_gate, d_up = gate if d_gate is None else d_gate, up if d_up is None else d_up
    tensors = {"gate": gate, "up": up, "upstream": upstream, "d_gate": d_gate, "d_up": d_up}
    for argument, tensor in tensors.items():
        check_rows(op, argument, tensor, gate, gate.shape, (gate.dtype,))
    strides = (t.stride(0) for t in tensors.values())
    meta = blocks(columns, _MOST, a_thread=8)
    grid = rows, triton.cdiv(columns, meta["BLOCK"])
    launch(_backward, grid, gate, *tensors.values(), columns, *strides, A=working(gate)[1], **meta)
