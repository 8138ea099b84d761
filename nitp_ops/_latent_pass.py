"""The custom op around the chunked algorithm of implicit_token_loss (`_latent_chunks.py`), and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference, rows
from ._devices import sum_dtype
from ._dispatch import needs_dispatcher
from ._gemm import gemm_dtype
from ._gradients import FormedGradients, deliver, formed_dtype, refuse_vmap
from ._latent_chunks import Options, Pairs, Projector, Wanted, form


def latent_pass(
    pairs: Pairs,
    projector: Projector,
    *,
    distance: int,
    eps: float,
    chunk_bytes: int | None,
    backend: str,
    per_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, stats [4, rows]) with loss = scale * sum of the kept pairs' losses.

    Its gradients are formed in the forward pass. per_row: loss [rows] instead of the sum; the backward pass recomputes
    the chunks under any upstream gradient."""
    hidden = pairs.hidden
    wanted = [x is not None and x.requires_grad for x in (hidden, *projector)]
    wanted = [torch.is_grad_enabled() and not per_row and each for each in wanted]
    dtype = gemm_dtype("implicit_token_loss", hidden if projector.down is None else projector.down)
    if projector.down is None and hidden.dtype != torch.float16:
        dtype = hidden.dtype  # there is no product that autocast could cast
    tensors = pairs.target.detach(), pairs.keep, pairs.scale, pairs.hidden_buffer
    options = pairs.shift, pairs.max_rows, pairs.gaps, distance, eps, chunk_bytes, dtype, backend
    inputs = hidden, *projector, *tensors, *options, wanted, per_row
    if needs_dispatcher((hidden, *projector, *tensors)):
        loss, stats, _ = _latent_pass(*inputs)
    else:
        loss, stats = ImplicitTokenLossFunction.apply(inputs, hidden, *projector)
    return loss, stats.detach()


def forward_and_gradients(
    hidden: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    target: Tensor,
    keep: Tensor,
    scale: Tensor,
    hidden_buffer: Tensor | None,
    shift: int,
    max_rows: int | None,
    gaps: bool,
    distance: int,
    eps: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    backend: str,
    wanted: list[bool],
    per_row: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, stats, gradients): the wanted ones of hidden, [gate; up] as one [2m, d], down, in this order."""
    pairs = Pairs(hidden, target, keep, scale, hidden_buffer, shift, max_rows, gaps)
    asked = Wanted(wanted[0], wanted[1] or wanted[2], wanted[3])
    options = Options(distance, eps, chunk_bytes, dtype)
    losses, stats, gradients = form(pairs, Projector(gate, up, down), options, asked, rows.kernels(backend))
    return losses if per_row else losses.sum(dtype=sum_dtype(losses.device)).to(losses.dtype), stats, gradients


_latent_pass = torch.library.custom_op("nitp_ops::latent_pass", mutates_args=())(forward_and_gradients)


@_latent_pass.register_fake
def _(hidden, gate, up, down, target, keep, scale, hidden_buffer, shift, max_rows, gaps, distance, eps, chunk_bytes,
      dtype, backend, wanted, per_row):  # fmt: skip
    work, rows = reference.working(hidden, target), keep.numel()
    gradients = [hidden.new_empty(hidden.shape, dtype=formed_dtype(hidden, hidden_buffer))] if wanted[0] else []
    if wanted[1] or wanted[2]:
        shape = gate.shape if up is None else (2 * gate.shape[0], gate.shape[1])
        gradients.append(gate.new_empty(shape, dtype=formed_dtype(gate, None)))
    if wanted[3]:
        gradients.append(down.new_empty(down.shape, dtype=formed_dtype(down, None)))
    loss = hidden.new_empty((rows,) if per_row else (), dtype=work)
    return loss, hidden.new_empty((4, rows), dtype=work), gradients


def _save(ctx, inputs: Sequence[Any], gradients: list[Tensor]) -> None:
    tensors, ctx.buffer, ctx.options, (ctx.wanted, ctx.per_row) = inputs[:7], inputs[7], inputs[8:-2], inputs[-2:]
    ctx.formed = FormedGradients(gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)  # not the buffer: each backward pass writes to it, which a saved tensor forbids


def _recompute(ctx, saved: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor | None = None) -> list[Tensor]:
    """The gradients from the inputs again, under one upstream gradient a row if given."""
    *tensors, keep, scale = saved
    shift, max_rows, gaps, *options = ctx.options
    if upstream is not None:
        # rows under a zero upstream are left out, so that a NaN in them stays out too
        keep, scale, gaps = keep & (upstream != 0), upstream.contiguous(), True
    run: Callable[..., Any] = _latent_pass if needs_dispatcher(saved) else forward_and_gradients
    with torch.no_grad():
        return run(*tensors, keep, scale, ctx.buffer, shift, max_rows, gaps, *options, wanted, False)[-1]


def _gradients(ctx, needed: Sequence[bool], upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of hidden, gate, up and down; `needed` of them."""
    wanted, delivered, up = [False] * 4, [], None
    if upstream is not None:
        saved = ctx.saved_tensors  # read once: checkpointing allows no second time
        if ctx.per_row:
            wanted = needed
            gradients = _recompute(ctx, saved, wanted, upstream)
        else:
            wanted = ctx.wanted
            gradients = ctx.formed.take(upstream, lambda: _recompute(ctx, saved, wanted))
        hidden, gate, up, down, *_ = saved
        flagged = (wanted[0], hidden, ctx.buffer), (wanted[1] or wanted[2], gate, None), (wanted[3], down, None)
        inputs, buffers = [x for flag, x, _ in flagged if flag], [b for flag, _, b in flagged if flag]
        anchors = [x for x in (*saved, upstream) if x is not None and x.requires_grad]
        rest = None if ctx.per_row else upstream
        delivered = deliver(anchors, "implicit_token_loss", ctx.options[-1], gradients, rest, inputs, buffers)
    ready = iter(delivered)
    d_hidden = next(ready) if wanted[0] else None
    both = next(ready) if wanted[1] or wanted[2] else None
    d_gate, d_up = (both, None) if both is None or up is None else both.chunk(2)
    d_down = next(ready) if wanted[3] else None
    return d_hidden, d_gate if wanted[1] else None, d_up if wanted[2] else None, d_down


class ImplicitTokenLossFunction(torch.autograd.Function):
    """The pass where nothing but autograd watches."""

    @staticmethod
    def forward(ctx, inputs: Sequence[Any], *_leaves: Tensor | None) -> tuple[Tensor, Tensor]:
        loss, stats, gradients = forward_and_gradients(*inputs)
        _save(ctx, inputs, gradients)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, upstream: Tensor | None, _stats) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, ctx.needs_input_grad[1:], upstream)


def _save_traced(ctx, inputs, output) -> None:
    # detached: an op's own outputs would tie its context into a reference cycle
    _save(ctx, inputs, [gradient.detach() for gradient in output[-1]])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])


def _differentiate_traced(ctx, upstream: Tensor | None, *_):
    return *_gradients(ctx, ctx.needs_input_grad[:4], upstream), *(None,) * 14


_latent_pass.register_vmap(refuse_vmap("implicit_token_loss"))
_latent_pass.register_autograd(_differentiate_traced, setup_context=_save_traced)
