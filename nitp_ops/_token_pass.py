"""The chunked pass behind every token loss: rows of logits exist one chunk at a time.

for each job, for each chunk of its labelled rows:
    logits = h W^T                      GEMM 1
    logits <- w dloss/dlogits           row kernel, in place
    dh = logits W                       GEMM 2
    dW += logits^T h                    GEMM 3, float32 sum
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, reference
from ._chunks import Rows, WeightGradient, chunks, place, rows_per_chunk, select
from ._gradients import FormedGradients, gemm_dtype, guarded, refuse_vmap


class Head(NamedTuple):
    """The unembedding and what belongs to it; softcap 0 means none."""

    op: str
    unembedding: Tensor
    bias: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    chunk_bytes: int | None


class Labelled(NamedTuple):
    """hidden [..., d]; labels and row_weight flat [N]; row_weight already holds token weight, weight and 1 / count."""

    hidden: Tensor
    labels: Tensor
    row_weight: Tensor
    label_smoothing: float
    z_loss: float


def token_pass(jobs: Sequence[Labelled], head: Head, *, per_row: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(loss, (stats [3, rows], prediction [rows])) with loss = sum of row_weight * row loss.

    Its gradients are formed in the forward pass. per_row (one job): loss [rows] instead of the sum; the backward pass
    recomputes the logits under any upstream gradient."""
    wanted = [x is not None and x.requires_grad for x in (*(job.hidden for job in jobs), head.unembedding, head.bias)]
    loss, stats, prediction, _ = _token_pass(
        head.op,
        [job.hidden for job in jobs],
        head.unembedding,
        head.bias,
        [job.labels for job in jobs],
        [job.row_weight for job in jobs],
        [job.label_smoothing for job in jobs],
        [job.z_loss for job in jobs],
        head.ignore_index,
        head.softcap,
        head.logit_scale,
        head.chunk_bytes,
        gemm_dtype(head.op, head.unembedding),
        [torch.is_grad_enabled() and not per_row and each for each in wanted],
        per_row,
    )
    return loss, (stats.detach(), prediction)


@torch.library.custom_op("nitp_ops::token_pass", mutates_args=(), device_types="cpu")
def _token_pass(
    op: str,
    hidden: list[Tensor],
    unembedding: Tensor,
    bias: Tensor | None,
    labels: list[Tensor],
    row_weight: list[Tensor],
    label_smoothing: list[float],
    z_loss: list[float],
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    wanted: list[bool],
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, stats, prediction, gradients); wanted flags and gradients in the order hidden..., unembedding, bias."""
    *want_hidden, want_weight, want_bias = wanted
    work = reference.working(unembedding)
    vocabulary, width = unembedding.shape
    weight = unembedding.to(dtype)
    offset = None if bias is None else bias.to(work).contiguous()
    counts = [each.numel() for each in labels]
    device = unembedding.device
    stats = torch.full((3, sum(counts)), float("nan"), dtype=work, device=device)
    stats[0].zero_()
    prediction = torch.full((sum(counts),), -1, dtype=torch.int64, device=device)
    d_hidden = [
        torch.zeros(h.shape, dtype=h.dtype, device=device)
        for h, wanted in zip(hidden, want_hidden, strict=True)
        if wanted
    ]
    d_bias = torch.zeros(vocabulary, dtype=work, device=device) if want_bias else None
    selected = [select(label != ignore_index) for label in labels]
    lengths = [count if rows is None else rows.numel() for count, rows in zip(counts, selected, strict=True)]
    weights = unembedding.numel() if want_weight else 0
    step = max(rows_per_chunk(length, vocabulary * dtype.itemsize, chunk_bytes, weights) for length in lengths)
    # silent jobs add no part, so that they do not change how the others' gradients are rounded
    parts = sum(-(-length // step) for length, scale in zip(lengths, row_weight, strict=True) if bool(scale.any()))
    d_weight = WeightGradient(unembedding.shape, dtype, unembedding, parts) if want_weight else None
    buffer = torch.empty((min(step, max(lengths)), vocabulary), dtype=dtype, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    into = iter(d_hidden)
    first_row = 0
    for job, (h, label, scale) in enumerate(zip(hidden, labels, row_weight, strict=True)):
        _check.labels_inside(op, "labels", label, ignore_index, vocabulary)
        source = Rows(h)
        d_rows = next(into).view(-1, width) if want_hidden[job] else None
        any_gradient = d_rows is not None or d_weight is not None or d_bias is not None
        for _, part in chunks(selected[job], counts[job], step):
            chunk = source.take(part).to(dtype)
            part_scale = scale[part].contiguous()
            live = part_scale != 0
            differentiate = any_gradient and bool(live.any())
            logits = torch.mm(chunk, weight.t(), out=buffer[: chunk.shape[0]])
            part_stats = stats.new_empty(3, chunk.shape[0])
            part_prediction = prediction.new_empty(chunk.shape[0])
            torch.ops.nitp_ops.cross_entropy_rows_(
                logits, label[part].contiguous(), offset, part_scale, part_stats, part_prediction, ignore_index,
                label_smoothing[job], z_loss[job], softcap, logit_scale, differentiate,
            )  # fmt: skip
            total += torch.where(live, part_stats[0] * part_scale, 0).sum(dtype=torch.float64)
            place(stats[:, first_row : first_row + counts[job]], 1, part, part_stats)
            place(prediction[first_row : first_row + counts[job]], 0, part, part_prediction)
            if not differentiate:
                continue
            if d_rows is not None:
                place(d_rows, 0, part, torch.mm(logits, weight))
            if d_weight is not None:
                # a NaN in a row of weight zero must not meet the zeros of its gradient
                d_weight.add(logits, chunk if bool(live.all()) else chunk.masked_fill(~live.unsqueeze(1), 0))
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=work)
        first_row += counts[job]
    gradients = list(d_hidden)
    if d_weight is not None:
        gradients.append(d_weight.result())
    if d_bias is not None and bias is not None:
        gradients.append(d_bias.to(bias.dtype))
    if per_row:
        weights = torch.cat(row_weight)
        silent = (weights == 0) | (torch.cat(labels) == ignore_index)
        return torch.where(silent, 0, weights * stats[0]), stats, prediction, gradients
    return total.to(work), stats, prediction, gradients


@_token_pass.register_fake
def _(op, hidden, unembedding, bias, labels, row_weight, label_smoothing, z_loss, ignore_index, softcap, logit_scale,
      chunk_bytes, dtype, wanted, per_row):  # fmt: skip
    work = reference.working(unembedding)
    rows = sum(each.numel() for each in labels)
    gradients = [x.new_empty(x.shape) for x, flag in zip((*hidden, unembedding, bias), wanted, strict=True) if flag]
    loss = unembedding.new_empty((rows,) if per_row else (), dtype=work)
    return loss, unembedding.new_empty((3, rows), dtype=work), labels[0].new_empty(rows), gradients


def _save(ctx, inputs, output) -> None:
    ctx.op, hidden, unembedding, bias, labels, row_weight, *ctx.options, ctx.wanted, ctx.per_row = inputs
    ctx.jobs, ctx.formed = len(hidden), FormedGradients("linear_cross_entropy", output[3])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unembedding, bias, *hidden, *labels, *row_weight)


def _recompute(ctx, wanted: Sequence[bool], upstream: Tensor | None = None) -> list[Tensor]:
    """The gradients from the inputs again, the row weights times `upstream`."""
    unembedding, bias, *tensors = ctx.saved_tensors
    hidden, labels, row_weight = (tensors[first : first + ctx.jobs] for first in (0, ctx.jobs, 2 * ctx.jobs))
    row_weight = row_weight if upstream is None else [each * upstream for each in row_weight]
    return _token_pass(ctx.op, hidden, unembedding, bias, labels, row_weight, *ctx.options, wanted, False)[-1]


def _differentiate(ctx, upstream: Tensor | None, *_):
    gradients, wanted = [], [False] * (ctx.jobs + 2)
    if upstream is not None and ctx.per_row:
        _, of_hidden, *of_head = ctx.needs_input_grad[:4]
        wanted = [*of_hidden, *of_head]
        gradients = _recompute(ctx, wanted, upstream)
    elif upstream is not None:
        wanted = ctx.wanted
        gradients = ctx.formed.times(upstream, lambda: _recompute(ctx, wanted))
    ready = iter(guarded(ctx, "linear_cross_entropy", gradients))
    *d_hidden, d_weight, d_bias = (next(ready) if flag else None for flag in wanted)
    none = [None] * ctx.jobs
    return None, d_hidden, d_weight, d_bias, none, none, *(None,) * 9


_token_pass.register_vmap(refuse_vmap("linear_cross_entropy"))
_token_pass.register_autograd(_differentiate, setup_context=_save)
