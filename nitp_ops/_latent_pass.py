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
from ._chunks import LEAST_BYTES, MOST_BYTES, Rows, chunks, direct, length_of, place, rows_per_chunk, select
from ._gemm import WeightGradient, fresh, gemm_dtype, matmul
from ._gradients import FormedGradients, deliver, formed_dtype, refuse_vmap


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
    hidden_grad_out: Tensor | None = None,
    per_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss, stats [4, rows]) with loss = scale * sum of the kept pairs' losses.

    Its gradients are formed in the forward pass. per_row: loss [rows] instead of the sum; the backward pass recomputes
    the chunks under any upstream gradient."""
    wanted = [x is not None and x.requires_grad for x in (hidden, *projector)]
    wanted = [torch.is_grad_enabled() and not per_row and each for each in wanted]
    dtype = gemm_dtype("implicit_token_loss", hidden if projector.down is None else projector.down)
    if projector.down is None and hidden.dtype != torch.float16:
        dtype = hidden.dtype  # there is no product that autocast could cast
    options = shift, distance, eps, chunk_bytes, dtype
    tensors = target.detach(), keep, scale, hidden_grad_out
    loss, stats, _ = _latent_pass(hidden, *projector, *tensors, *options, wanted, per_row)
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
    hidden_buffer: Tensor | None,
    shift: int,
    distance: int,
    eps: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    wanted: list[bool],
    per_row: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, stats, gradients): the wanted ones of hidden, [gate; up] as one [2m, d], down, in this order.

    hidden_buffer is the backward's: here it only says in which dtype the gradient waits."""
    kernels = torch.ops.nitp_ops
    work, device = reference.working(hidden, target), hidden.device
    width, out_width = hidden.shape[-1], target.shape[-1]
    gate_up = None if gate is None or up is None else _fused_gate_up(gate, up, dtype)
    inner = 0 if gate is None else gate.shape[0]
    w_down = None if down is None else down.to(dtype)
    want_hidden, want_inner, want_down = wanted[0], wanted[1] or wanted[2], wanted[3]
    source, latent = Rows(hidden), Rows(target)
    by_index = latent.flat and (out_width < 2 or latent.tensor.stride(-1) == 1)
    stats = torch.zeros((4, source.count), dtype=work, device=device)
    selected = select(keep)
    count = length_of(selected)
    weights = sum(w.numel() for w, flag in zip((gate, up, down), wanted[1:], strict=True) if flag and w is not None)
    step = latent_rows(count, width, inner, out_width, dtype, chunk_bytes, weights)
    parts, most = -(-count // step), min(step, count)
    d_hidden = d_gate_up = d_down = None
    if want_hidden:
        d_hidden = torch.zeros((source.count, width), dtype=formed_dtype(hidden, hidden_buffer), device=device)
    if want_inner and gate is not None and gate_up is not None:
        d_gate_up = WeightGradient(gate_up.shape, dtype, formed_dtype(gate, None), gate, parts)
    if want_down and down is not None:
        d_down = WeightGradient(down.shape, dtype, formed_dtype(down, None), down, parts)
    buffer = fresh((most * (3 * inner + out_width),), dtype, device)
    # one number for all rows, or one a row; zero everywhere: nothing to differentiate, and a NaN stays out
    differentiate = any(wanted) and bool((scale != 0).any())
    for part in chunks(selected, step):
        h = source.take(part).to(dtype)
        n = h.shape[0]
        both = buffer[: n * 2 * inner].view(n, 2 * inner)
        a = buffer[n * 2 * inner : n * 3 * inner].view(n, inner)
        p = buffer[n * 3 * inner : n * (3 * inner + out_width)].view(n, out_width)
        g, u = both[:, :inner], both[:, inner:]
        if gate_up is not None:
            matmul(h, gate_up.t(), both)
            kernels.swiglu_rows(g, u, a)
        feature = h if gate_up is None else a
        if w_down is None:
            p.copy_(h)
        else:
            matmul(feature, w_down.t(), p)
        partner = slice(part.start + shift, part.stop + shift) if isinstance(part, slice) else part + shift
        indexed = by_index and not isinstance(partner, slice)
        z, index = (latent.tensor, partner) if indexed else (latent.dense(partner), None)
        part_scale = (scale.expand(n) if scale.dim() == 0 else scale[part]).contiguous()
        part_stats = stats[:, part] if isinstance(part, slice) else stats.new_empty(4, n)
        kernels.alignment_rows_(p, z, index, part_scale, part_stats, None, None, distance, eps, differentiate)
        if not isinstance(part, slice):
            place(stats, 1, part, part_stats)
        if not differentiate:
            continue
        if d_down is not None:
            d_down.add(p, feature)
        if gate_up is not None and w_down is not None and (d_hidden is not None or d_gate_up is not None):
            matmul(p, w_down, a)
            kernels.swiglu_rows_backward_(g, u, a)
        if d_gate_up is not None:
            d_gate_up.add(both, h)
        if d_hidden is not None:
            d_rows = direct(d_hidden, part, dtype)
            upstream, weight = (p, w_down) if gate_up is None else (both, gate_up)
            if weight is None:
                place(d_hidden, 0, part, upstream)
            elif d_rows is not None:
                matmul(upstream, weight, d_rows)
            else:
                place(d_hidden, 0, part, torch.mm(upstream, weight))
    losses = torch.where(scale == 0, 0, stats[0] * scale)
    loss = losses if per_row else losses.sum(dtype=torch.float64).to(work)
    weights = [each.result() for each in (d_gate_up, d_down) if each is not None]
    return loss, stats, ([] if d_hidden is None else [d_hidden.view(hidden.shape)]) + weights


def row_bytes(width: int, inner: int, out_width: int, dtype: torch.dtype) -> int:
    """Workspace of one row: gate, up and product; prediction; the gathered and the gradient row of the hidden state."""
    return (3 * inner + out_width + 2 * width) * dtype.itemsize


def latent_rows(
    rows: int, width: int, inner: int, out_width: int, dtype: torch.dtype, chunk_bytes: int | None, weights: int
) -> int:
    """Rows a chunk. A projector's row is small beside its products: its chunks are few and large (decision 0007)."""
    size = row_bytes(width, inner, out_width, dtype)
    return rows_per_chunk(rows, size, chunk_bytes, weights, MOST_BYTES if inner else LEAST_BYTES)


def _fused_gate_up(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """[W_gate; W_up] as one [2m, d] matrix; a view where they lie side by side in one buffer."""
    beside = gate.is_contiguous() and up.is_contiguous() and gate.dtype == dtype
    beside = beside and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    if beside and up.storage_offset() == gate.storage_offset() + gate.numel():
        return gate.as_strided((2 * gate.shape[0], gate.shape[1]), (gate.shape[1], 1))
    return torch.cat([gate, up]).to(dtype)


@_latent_pass.register_fake
def _(hidden, gate, up, down, target, keep, scale, hidden_buffer, shift, distance, eps, chunk_bytes, dtype, wanted,
      per_row):  # fmt: skip
    work, rows = reference.working(hidden, target), keep.numel()
    gradients = [hidden.new_empty(hidden.shape, dtype=formed_dtype(hidden, hidden_buffer))] if wanted[0] else []
    if wanted[1] or wanted[2]:
        gradients.append(gate.new_empty((2 * gate.shape[0], gate.shape[1]), dtype=formed_dtype(gate, None)))
    if wanted[3]:
        gradients.append(down.new_empty(down.shape, dtype=formed_dtype(down, None)))
    loss = hidden.new_empty((rows,) if per_row else (), dtype=work)
    return loss, hidden.new_empty((4, rows), dtype=work), gradients


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.buffer, ctx.shift, ctx.distance, ctx.eps, ctx.chunk_bytes, ctx.dtype, ctx.wanted, ctx.per_row = inputs
    ctx.formed = FormedGradients(output[2])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)  # not the buffer: each backward pass writes to it, which a saved tensor forbids


def _recompute(ctx, saved: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor | None = None) -> list[Tensor]:
    """The gradients from the inputs again, under one upstream gradient a row if given."""
    *tensors, keep, scale = saved
    if upstream is not None:
        # rows under a zero upstream are left out, so that a NaN in them stays out too
        keep, scale = keep & (upstream != 0), upstream.contiguous()
    options = ctx.shift, ctx.distance, ctx.eps, ctx.chunk_bytes, ctx.dtype
    return _latent_pass(*tensors, keep, scale, ctx.buffer, *options, wanted, False)[-1]


def _differentiate(ctx, upstream: Tensor | None, _stats, _gradients):
    wanted, delivered = [False] * 4, []
    if upstream is not None:
        saved = ctx.saved_tensors  # read once: checkpointing allows no second time
        if ctx.per_row:
            wanted = list(ctx.needs_input_grad[:4])
            gradients = _recompute(ctx, saved, wanted, upstream)
        else:
            wanted = ctx.wanted
            gradients = ctx.formed.take(upstream, lambda: _recompute(ctx, saved, wanted))
        hidden, gate, _, down, *_ = saved
        flagged = (wanted[0], hidden, ctx.buffer), (wanted[1] or wanted[2], gate, None), (wanted[3], down, None)
        inputs, buffers = [x for flag, x, _ in flagged if flag], [b for flag, _, b in flagged if flag]
        anchors = [x for x in (*saved, upstream) if x is not None and x.requires_grad]
        rest = None if ctx.per_row else upstream
        delivered = deliver(anchors, "implicit_token_loss", gradients, rest, inputs, buffers)
    ready = iter(delivered)
    d_hidden = next(ready) if wanted[0] else None
    both = next(ready) if wanted[1] or wanted[2] else None
    d_gate, d_up = (None, None) if both is None else both.chunk(2)
    d_down = next(ready) if wanted[3] else None
    return d_hidden, d_gate if wanted[1] else None, d_up if wanted[2] else None, d_down, *(None,) * 11


_latent_pass.register_vmap(refuse_vmap("implicit_token_loss"))
_latent_pass.register_autograd(_differentiate, setup_context=_save)
