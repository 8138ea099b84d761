"""Autograd of implicit_token_loss: a plain autograd.Function, and the custom op that tracing needs
around its pass.

The gradients of a scalar loss are computed in the forward pass (`chunked.py`); the backward pass
multiplies them by the upstream. Per-row losses are computed again under their upstream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...core.dispatch import needs_dispatcher
from ...core.gemm import gemm_dtype
from ...core.packing import Packing
from ..gradients import PendingGradients, pending_dtype, refuse_vmap, scaled_gradients
from .chunked import forward_and_gradients
from .inputs import Call, Pairs, Projector

_OP = "implicit_token_loss"


def latent_pass(
    pairs: Pairs, projector: Projector, *, distance: int, eps: float, chunk_bytes: int | None,
    backend: str, per_row: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, stats [4, rows]) with loss = scale * sum of the kept pairs' losses; per_row: each of
    them, [rows]."""
    hidden, (gate, up, down) = pairs.hidden, projector
    differentiate = torch.is_grad_enabled() and not per_row
    dtype = gemm_dtype(_OP, hidden if down is None else down)
    if down is None and hidden.dtype != torch.float16:
        dtype = hidden.dtype  # there is no GEMM that autocast could cast
    call = Call(
        backend=backend,
        dtype=dtype,
        distance=distance,
        eps=eps,
        chunk_bytes=chunk_bytes,
        per_row=per_row,
        want_hidden=differentiate and hidden.requires_grad,
        want_inner=differentiate and any(x is not None and x.requires_grad for x in (gate, up)),
        want_down=differentiate and down is not None and down.requires_grad,
    )
    pairs = pairs._replace(target=pairs.target.detach())
    tensors = hidden, *projector, pairs.target, pairs.keep, pairs.scale, pairs.hidden_grad_out
    if needs_dispatcher(tensors):
        loss, stats, _ = _latent_pass(*PACKING.pack(pairs, projector, call))
    else:
        loss, stats = ImplicitTokenLossFunction.apply(pairs, projector, call, hidden, *projector)
    return loss, stats.detach()


PACKING = Packing(None, Pairs, Projector, Call)


@torch.library.custom_op(
    "nitp_ops::latent_pass",
    mutates_args=(),
    schema=PACKING.schema("(Tensor loss, Tensor stats, Tensor[] gradients)"),
)
def _latent_pass(*packed):
    return tuple(forward_and_gradients(*PACKING.unpack(packed)))


@_latent_pass.register_fake
def _(*packed):
    pairs, projector, call = PACKING.unpack(packed)
    hidden, rows = pairs.hidden, pairs.keep.numel()
    work = reference.working(hidden, pairs.target)
    gradients = [
        x.new_empty(shape, dtype=pending_dtype(x, buffer))
        for x, shape, buffer in _leaves(pairs, projector, call)
    ]
    loss = hidden.new_empty((rows,) if call.per_row else (), dtype=work)
    return loss, hidden.new_empty((4, rows), dtype=work), gradients


def _leaves(
    pairs: Pairs, projector: Projector, call: Call
) -> list[tuple[Tensor, Any, Tensor | None]]:
    """(input, shape of the gradient, buffer) of what is wanted, in the order of the gradients."""
    hidden, (gate, up, down) = pairs.hidden, projector
    leaves: list[tuple[Tensor, Any, Tensor | None]] = []
    if call.want_hidden:
        leaves.append((hidden, hidden.shape, pairs.hidden_grad_out))
    if call.want_inner and gate is not None:
        both = gate.shape if up is None else (2 * gate.shape[0], gate.shape[1])
        leaves.append((gate, both, None))
    if call.want_down and down is not None:
        leaves.append((down, down.shape, None))
    return leaves


def _save(ctx, pairs: Pairs, projector: Projector, call: Call, gradients: Sequence[Tensor]) -> None:
    ctx.save_for_backward(pairs.hidden, pairs.target, pairs.keep, pairs.scale, *projector)
    ctx.set_materialize_grads(False)
    # the buffer is not saved: each backward pass writes to it, which a saved tensor forbids
    ctx.pairs = pairs._replace(hidden=None, target=None, keep=None, scale=None)
    ctx.call, ctx.pending = call, PendingGradients(gradients)


def _recompute(
    pairs: Pairs, projector: Projector, call: Call, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    with torch.no_grad():
        if needs_dispatcher(tensors):
            return _latent_pass(*PACKING.pack(pairs, projector, call))[-1]
        return forward_and_gradients(pairs, projector, call).gradients


def _gradients(ctx, needed: Sequence[bool], upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of hidden, gate, up and down; `needed` of them."""
    if upstream is None:
        return (None,) * 4
    saved = ctx.saved_tensors  # read once: checkpointing allows no second time
    hidden, target, keep, scale, *weights = saved
    pairs = ctx.pairs._replace(hidden=hidden, target=target, keep=keep, scale=scale)
    projector, call, rest = Projector(*weights), ctx.call, upstream
    if call.per_row:
        want_hidden, *want_inner, want_down = needed
        call = call._replace(
            per_row=False, want_hidden=want_hidden, want_inner=any(want_inner), want_down=want_down
        )
        # rows under a zero upstream are left out, so that a NaN in them stays out too
        active = pairs._replace(keep=keep & (upstream != 0), scale=upstream.contiguous(), gaps=True)
        gradients, rest = _recompute(active, projector, call, saved), None
    else:
        gradients = ctx.pending.pop(upstream, lambda: _recompute(pairs, projector, call, saved))
    pending = []
    for gradient, leaf in zip(gradients, _leaves(pairs, projector, call), strict=True):
        x, _, buffer = leaf
        pending.append((gradient, x, buffer))
    double_backward_inputs = [x for x in (*saved, upstream) if x is not None and x.requires_grad]
    scaled = iter(scaled_gradients(double_backward_inputs, _OP, call.backend, pending, rest))
    d_hidden = next(scaled) if call.want_hidden else None
    both = next(scaled) if call.want_inner else None
    d_down = next(scaled) if call.want_down else None
    d_gate, d_up = both, None
    if both is not None and projector.up is not None:
        d_gate, d_up = both.chunk(2)
    return d_hidden, d_gate if needed[1] else None, d_up if needed[2] else None, d_down


class ImplicitTokenLossFunction(torch.autograd.Function):
    """The pass outside tracing, subclasses and dispatch modes."""

    @staticmethod
    def forward(
        ctx, pairs: Pairs, projector: Projector, call: Call, *_leaves: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        loss, stats, gradients = forward_and_gradients(pairs, projector, call)
        _save(ctx, pairs, projector, call, gradients)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, upstream: Tensor | None, _stats) -> tuple[Tensor | None, ...]:
        return None, None, None, *_gradients(ctx, ctx.needs_input_grad[3:], upstream)


def _save_traced(ctx, inputs, output) -> None:
    pairs, projector, call = PACKING.unpack(inputs)
    # detached: an op's own outputs would tie its context into a reference cycle
    _save(ctx, pairs, projector, call, [gradient.detach() for gradient in output[-1]])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    ctx.count = len(inputs)


#: Where the op takes hidden, gate, up and down.
_POSITIONS = tuple(PACKING.index_of(name) for name in ("hidden", "gate", "up", "down"))


def _differentiate_traced(ctx, upstream: Tensor | None, *_):
    gradients: list[Tensor | None] = [None] * ctx.count
    needed = [ctx.needs_input_grad[place] for place in _POSITIONS]
    for place, gradient in zip(_POSITIONS, _gradients(ctx, needed, upstream), strict=True):
        gradients[place] = gradient
    return tuple(gradients)


_latent_pass.register_vmap(refuse_vmap(_OP))
_latent_pass.register_autograd(_differentiate_traced, setup_context=_save_traced)
