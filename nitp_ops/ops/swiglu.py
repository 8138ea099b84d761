"""swiglu: y = silu(g) u,  dy/dg = u s (1 + g (1 - s)),  dy/du = g s,  s = sigmoid(g)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..core import checks
from ..core.chunking import Rows, chunks, whole_or_chunk
from ..core.dispatch import needs_dispatcher, plain_function
from ..kernels import select
from .gradients import refuse_double_backward, refuse_vmap

_OP = "swiglu"


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """SwiGLU activation, fused forward and backward.

    ``y = silu(gate) * up = gate * sigmoid(gate) * up``

    Args:
        gate, up: ``[..., m]``, one shape, device and dtype (float64, float32, bfloat16 or float16).
            Strided rows are read in place. Arithmetic runs in float32 (float64 for float64) and is
            rounded once.
        backend: None (the device decides), "native", "triton", "torch" or "reference".

    Returns:
        ``[..., m]`` in the dtype of gate.

    Raises:
        TypeError: not a tensor, or an unserved or different dtype.
        ValueError: different shapes or devices, or an unknown backend.
        BackendError: the requested backend does not serve this device.

    Example:
        >>> import torch, nitp_ops
        >>> nitp_ops.swiglu(torch.zeros(2, 3), torch.ones(2, 3)).shape
        torch.Size([2, 3])

    Source: Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    checks.is_float(_OP, "gate", gate)
    checks.is_float(_OP, "up", up)
    checks.has_dtype(_OP, "up", up, (gate.dtype,))
    checks.has_dim(_OP, "gate", gate, 1, "[..., m]")
    checks.has_shape(_OP, "up", up, gate.shape, "gate's")
    checks.same_device(_OP, "up", up, "gate", gate)
    chosen = select.select_backend(_OP, gate.device, backend)
    if chosen == "reference":
        return reference.swiglu(gate, up)
    checks.plain_autograd(_OP, gate, up)
    run: Callable[..., Tensor] = _forward if needs_dispatcher((gate, up)) else _plain
    return run(gate, up, chosen)


def forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = Rows(gate), Rows(up)
    for part in chunks(slice(0, g.count), whole_or_chunk(g, u)):
        select.row_kernels(backend).swiglu_rows(
            g.dense(part), u.dense(part), out.view(g.count, gate.shape[-1])[part]
        )
    return out


_forward = torch.library.custom_op("nitp_ops::swiglu", mutates_args=())(forward)


@_forward.register_fake
def _(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def backward(gate: Tensor, up: Tensor, upstream: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    g, u, dy = Rows(gate), Rows(up), Rows(upstream)
    shape = (g.count, gate.shape[-1])
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    for part in chunks(slice(0, g.count), whole_or_chunk(g, u, dy)):
        into = d_gate.view(shape)[part], d_up.view(shape)[part]
        select.row_kernels(backend).swiglu_rows_backward_(
            g.dense(part), u.dense(part), dy.dense(part), *into
        )
    return d_gate, d_up


_backward = torch.library.custom_op("nitp_ops::swiglu_backward", mutates_args=())(backward)


@_backward.register_fake
def _(gate: Tensor, up: Tensor, upstream: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx, inputs, output) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, upstream: Tensor):
    tensors = *ctx.saved_tensors, upstream
    run: Callable[..., Any] = (
        _backward if torch.is_grad_enabled() or needs_dispatcher(tensors) else backward
    )
    return *run(*tensors, ctx.backend), None


_plain = plain_function("SwigluFunction", forward, _save, _differentiate)


_forward.register_vmap(refuse_vmap(_OP))
_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(refuse_double_backward(_OP))
