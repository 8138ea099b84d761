"""SwiGLU over rows and its gradient (csrc/formulas/swiglu.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import working
from ..table import Sample, row_kernel
from .blocks import blocks, normal, wide


def _forward(n: int, columns: int, dtype: torch.dtype) -> Sample:
    gate, up, out = (normal(n, columns, dtype) for _ in range(3))
    return Sample((gate, up, out), 3 * gate.nbytes)


def _backward(n: int, columns: int, dtype: torch.dtype) -> Sample:
    gate, up, upstream, d_gate, d_up = (normal(n, columns, dtype) for _ in range(5))
    return Sample((gate, up, upstream, d_gate, d_up), 5 * gate.nbytes)


@row_kernel(writes=("out",), sample=_forward)
def swiglu_rows(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """out = g sigmoid(g) u."""
    work = working(gate)
    for part in blocks(gate):
        g, u = wide(gate[part], work), wide(up[part], work)
        out[part] = (g * g.sigmoid() * u).to(out.dtype)


@row_kernel(writes=("gate", "up", "d_gate", "d_up"), sample=_backward)
def swiglu_rows_backward_(
    gate: Tensor,
    up: Tensor,
    upstream: Tensor,
    d_gate: Tensor | None = None,
    d_up: Tensor | None = None,
) -> None:
    """d_gate = upstream u s (1 + g (1 - s)), d_up = upstream g s with s = sigmoid(g); None: in
    place."""
    work = working(gate)
    d_gate, d_up = gate if d_gate is None else d_gate, up if d_up is None else d_up
    for part in blocks(gate):
        g, u = wide(gate[part], work), wide(up[part], work)
        s = g.sigmoid()
        scaled = wide(upstream[part], work) * s
        # both before a store: g and u may be views
        of_gate, of_up = scaled * u * (1 + g * (1 - s)), scaled * g
        d_gate[part] = of_gate.to(d_gate.dtype)
        d_up[part] = of_up.to(d_up.dtype)
