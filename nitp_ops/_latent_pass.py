"""The chunked pass behind implicit_token_loss: inner activations exist one chunk of rows at a time.

for each chunk of valid pairs (t, t + shift):
    g, u = h W_gate^T, h W_up^T         GEMM 1, 2 (one call)
    a = silu(g) u                       row kernel
    p = a W_down^T                      GEMM 3
    p <- scale dloss/dp                 row kernel, in place, target read by index
    dW_down += p^T a                    GEMM 4, float32 sum
    a <- p W_down                       GEMM 5
    g, u <- gradients                   row kernel, in place
    dW_gate, dW_up += [g u]^T h         GEMM 6, 7
    dh = [g u] [W_gate; W_up]           GEMM 8, 9
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._chunks import Rows, WeightGradient, chunks, place, rows_per_chunk, select
from ._gradients import FormedGradients, gemm_dtype, guarded, refuse_vmap


class Projector(NamedTuple):
    """gate and up [m, d], down [D, m]; only down [D, d]: linear; all None: identity."""

    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None


def latent_pass(
    hidden: Tensor,
    target: Tensor,
    projector: Projector,
    keep: Tensor,
    scale: Tensor,
    *,
    shift: int,
    distance: int,
    eps: float,
    chunk_bytes: int | None,
    per_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, stats [4, rows]) with loss = scale * sum of the kept pairs' losses.

    Its gradients are formed in the forward pass. per_row: loss [rows] instead of the sum; the backward pass recomputes
    the chunks under any upstream gradient."""
    wanted = [x is not None and x.requires_grad for x in (hidden, *projector)]
    wanted = [torch.is_grad_enabled() and not per_row and each for each in wanted]
    dtype = hidden.dtype if projector.down is None else gemm_dtype("implicit_token_loss", projector.down)
    options = shift, distance, eps, chunk_bytes, dtype
    loss, stats, _ = _latent_pass(hidden, *projector, target.detach(), keep, scale, *options, wanted, per_row)
    return loss, stats.detach()


@torch.library.custom_op("nitp_ops::latent_pass", mutates_args=(), device_types="cpu")
def _latent_pass(
    hidden: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    target: Tensor,
    keep: Tensor,
    scale: Tensor,
    shift: int,
    distance: int,
    eps: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    wanted: list[bool],
    per_row: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, stats, gradients): the wanted ones of hidden, [gate; up] as one [2m, d], down, in this order."""
    kernels = torch.ops.nitp_ops
    work = reference.working(hidden, target)
    width, out_width = hidden.shape[-1], target.shape[-1]
    gate_up = None if gate is None or up is None else _fused_gate_up(gate, up, dtype)
    inner = 0 if gate is None else gate.shape[0]
    w_down = None if down is None else down.to(dtype)
    want_hidden, want_inner, want_down = wanted[0], wanted[1] or wanted[2], wanted[3]
    source, latent = Rows(hidden), Rows(target)
    by_index = latent.flat and (out_width < 2 or latent.tensor.stride(-1) == 1)
    stats = torch.zeros((4, source.count), dtype=work, device=hidden.device)
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if want_hidden else None
    selected = select(keep)
    count = source.count if selected is None else selected.numel()
    weights = sum(w.numel() for w, flag in zip((gate, up, down), wanted[1:], strict=True) if flag and w is not None)
    step = rows_per_chunk(count, row_bytes(width, inner, out_width, dtype), chunk_bytes, weights)
    parts, most = -(-count // step), min(step, count)
    d_gate_up = d_down = None
    if want_inner and gate is not None and gate_up is not None:
        d_gate_up = WeightGradient(gate_up.shape, dtype, gate, parts)
    if want_down and down is not None:
        d_down = WeightGradient(down.shape, dtype, down, parts)
    buffer = torch.empty((most, 3 * inner + out_width), dtype=dtype, device=hidden.device).view(-1)
    # one number for all rows, or one a row; zero everywhere: nothing to differentiate, and a NaN stays out
    differentiate = any(wanted) and bool((scale != 0).any())
    for _, part in chunks(selected, source.count, step):
        h = source.take(part).to(dtype)
        n = h.shape[0]
        both = buffer[: n * 2 * inner].view(n, 2 * inner)
        a = buffer[n * 2 * inner : n * 3 * inner].view(n, inner)
        p = buffer[n * 3 * inner : n * (3 * inner + out_width)].view(n, out_width)
        g, u = both[:, :inner], both[:, inner:]
        if gate_up is not None:
            torch.mm(h, gate_up.t(), out=both)
            kernels.swiglu_rows(g, u, a)
        feature = h if gate_up is None else a
        if w_down is None:
            p.copy_(h)
        else:
            torch.mm(feature, w_down.t(), out=p)
        partner = torch.arange(part.start, part.stop) if isinstance(part, slice) else part
        partner = partner + shift
        part_scale = scale.expand(source.count)[part].contiguous()
        part_stats = stats.new_empty(4, n)
        z, index = (latent.tensor, partner) if by_index else (latent.dense(partner), None)
        kernels.alignment_rows_(p, z, index, part_scale, part_stats, None, None, distance, eps, differentiate)
        place(stats, 1, part, part_stats)
        if not differentiate:
            continue
        if d_down is not None:
            d_down.add(p, feature)
        if gate_up is not None and w_down is not None and (d_hidden is not None or d_gate_up is not None):
            torch.mm(p, w_down, out=a)
            kernels.swiglu_rows_backward_(g, u, a)
        if d_gate_up is not None:
            d_gate_up.add(both, h)
        if d_hidden is not None:
            if gate_up is not None:
                d_rows = torch.mm(both, gate_up)
            else:
                d_rows = p if w_down is None else torch.mm(p, w_down)
            place(d_hidden.view(-1, width), 0, part, d_rows)
    losses = torch.where(scale == 0, 0, stats[0] * scale)
    loss = losses if per_row else losses.sum(dtype=torch.float64).to(work)
    weights = [each.result() for each in (d_gate_up, d_down) if each is not None]
    return loss, stats, ([] if d_hidden is None else [d_hidden]) + weights


def row_bytes(width: int, inner: int, out_width: int, dtype: torch.dtype) -> int:
    """Workspace of one row: gate, up and product; prediction; the gathered and the gradient row of the hidden state."""
    return (3 * inner + out_width + 2 * width) * dtype.itemsize


def _fused_gate_up(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """[W_gate; W_up] as one [2m, d] matrix; a view where they lie side by side in one buffer."""
    beside = gate.is_contiguous() and up.is_contiguous() and gate.dtype == dtype
    beside = beside and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    if beside and up.storage_offset() == gate.storage_offset() + gate.numel():
        return gate.as_strided((2 * gate.shape[0], gate.shape[1]), (gate.shape[1], 1))
    return torch.cat([gate, up]).to(dtype)


@_latent_pass.register_fake
def _(hidden, gate, up, down, target, keep, scale, shift, distance, eps, chunk_bytes, dtype, wanted, per_row):
    work, rows = reference.working(hidden, target), keep.numel()
    gradients = [hidden.new_empty(hidden.shape)] if wanted[0] else []
    if wanted[1] or wanted[2]:
        gradients.append(gate.new_empty((2 * gate.shape[0], gate.shape[1])))
    if wanted[3]:
        gradients.append(down.new_empty(down.shape))
    loss = hidden.new_empty((rows,) if per_row else (), dtype=work)
    return loss, hidden.new_empty((4, rows), dtype=work), gradients


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.shift, ctx.distance, ctx.eps, ctx.chunk_bytes, ctx.dtype, ctx.wanted, ctx.per_row = inputs
    ctx.formed = FormedGradients("implicit_token_loss", output[2])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _recompute(ctx, wanted: Sequence[bool], upstream: Tensor | None = None) -> list[Tensor]:
    """The gradients from the inputs again, under one upstream gradient a row if given."""
    *tensors, keep, scale = ctx.saved_tensors
    if upstream is not None:
        # rows under a zero upstream are left out, so that a NaN in them stays out too
        keep, scale = keep & (upstream != 0), upstream.contiguous()
    options = ctx.shift, ctx.distance, ctx.eps, ctx.chunk_bytes, ctx.dtype
    return _latent_pass(*tensors, keep, scale, *options, wanted, False)[-1]


def _differentiate(ctx, upstream: Tensor | None, _stats, _gradients):
    gradients, wanted = [], [False] * 4
    if upstream is not None and ctx.per_row:
        wanted = list(ctx.needs_input_grad[:4])
        gradients = _recompute(ctx, wanted, upstream)
    elif upstream is not None:
        wanted = ctx.wanted
        gradients = ctx.formed.times(upstream, lambda: _recompute(ctx, wanted))
    ready = iter(guarded(ctx, "implicit_token_loss", gradients))
    d_hidden = next(ready) if wanted[0] else None
    d_gate, d_up = next(ready).chunk(2) if wanted[1] or wanted[2] else (None, None)
    d_down = next(ready) if wanted[3] else None
    return d_hidden, d_gate if wanted[1] else None, d_up if wanted[2] else None, d_down, *(None,) * 10


_latent_pass.register_vmap(refuse_vmap("implicit_token_loss"))
_latent_pass.register_autograd(_differentiate, setup_context=_save)
