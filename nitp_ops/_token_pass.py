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
from ._chunks import Rows, chunks, direct, length_of, place, rows_per_chunk, select
from ._gemm import Weight, WeightGradient, fresh, gemm_dtype
from ._gradients import FormedGradients, deliver, formed_dtype, refuse_vmap


class Head(NamedTuple):
    """The unembedding and what belongs to it; softcap 0 means none."""

    op: str
    unembedding: Tensor
    bias: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    logits_dtype: torch.dtype | str
    chunk_bytes: int | None
    weight_grad_out: Tensor | None


class Labelled(NamedTuple):
    """hidden [..., d]; labels and target_weight [N, K]; row_weight [N] already holds token weight, weight, 1 / count.

    many: K targets a row, of which negative ones are absent. class_weight: of the smoothing term, target_weight holds
    it for the rest."""

    hidden: Tensor
    labels: Tensor
    target_weight: Tensor | None
    row_weight: Tensor
    class_weight: Tensor | None
    many: bool
    label_smoothing: float
    z_loss: float
    hidden_grad_out: Tensor | None


class RowValues(NamedTuple):
    """stats [2 or 3, rows]: loss, log-sum-exp and perhaps entropy; prediction [rows]; target_logit: [rows * K]."""

    stats: Tensor
    prediction: Tensor
    target_logit: Tensor


def token_pass(
    jobs: Sequence[Labelled], head: Head, *, per_row: bool = False, entropy: bool = False
) -> tuple[Tensor, RowValues]:
    """(loss, values) with loss = sum of row_weight * row loss.

    Its gradients are formed in the forward pass. per_row (one job): loss [rows] instead of the sum; the backward pass
    recomputes the logits under any upstream gradient."""
    wanted = [x is not None and x.requires_grad for x in (*(job.hidden for job in jobs), head.unembedding, head.bias)]
    loss, stats, prediction, target_logit, _ = _token_pass(
        head.op,
        [job.hidden for job in jobs],
        head.unembedding,
        head.bias,
        [job.labels for job in jobs],
        [job.target_weight for job in jobs],
        [job.row_weight for job in jobs],
        [job.class_weight for job in jobs],
        [*(job.hidden_grad_out for job in jobs), head.weight_grad_out, None],
        [job.many for job in jobs],
        [job.label_smoothing for job in jobs],
        [job.z_loss for job in jobs],
        head.ignore_index,
        head.softcap,
        head.logit_scale,
        head.chunk_bytes,
        gemm_dtype(head.op, head.unembedding, head.logits_dtype),
        entropy,
        [torch.is_grad_enabled() and not per_row and each for each in wanted],
        per_row,
    )
    return loss, RowValues(stats.detach(), prediction, target_logit.detach())


@torch.library.custom_op("nitp_ops::token_pass", mutates_args=(), device_types="cpu")
def _token_pass(
    op: str,
    hidden: list[Tensor],
    unembedding: Tensor,
    bias: Tensor | None,
    labels: list[Tensor],
    target_weight: Sequence[Tensor | None],
    row_weight: list[Tensor],
    class_weight: Sequence[Tensor | None],
    buffers: Sequence[Tensor | None],
    many: list[bool],
    label_smoothing: list[float],
    z_loss: list[float],
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    entropy: bool,
    wanted: list[bool],
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, stats, prediction, target logits, gradients).

    wanted, buffers and gradients stand in the order hidden..., unembedding, bias; the buffers are the backward's."""
    *want_hidden, want_weight, want_bias = wanted
    *_, weight_buffer, _ = buffers
    work, device = reference.working(unembedding), unembedding.device
    vocabulary, width = unembedding.shape
    weight = Weight(unembedding, dtype)
    offset = None if bias is None else bias.to(work).contiguous()
    record = _Record(labels, 3 if entropy else 2, work)
    d_hidden = [
        torch.zeros(h.shape, dtype=formed_dtype(h, buffer), device=device)
        for h, buffer, flag in zip(hidden, buffers, want_hidden, strict=False)
        if flag
    ]
    d_bias = torch.zeros(vocabulary, dtype=work, device=device) if want_bias else None
    selected = [select(present(own, ignore_index, sets)) for own, sets in zip(labels, many, strict=True)]
    lengths = [length_of(rows) for rows in selected]
    weights = unembedding.numel() if want_weight else 0
    # silent jobs count for nothing here, so that they do not change how the others' gradients are rounded
    loud = [length for length, scale in zip(lengths, row_weight, strict=True) if bool(scale.any())]
    step = max(rows_per_chunk(length, vocabulary * dtype.itemsize, chunk_bytes, weights) for length in loud or lengths)
    parts = sum(-(-length // step) for length in loud)
    d_weight = None
    if want_weight:
        d_weight = WeightGradient(
            unembedding.shape, dtype, formed_dtype(unembedding, weight_buffer), unembedding, parts
        )
    most = min(step, max(lengths))
    buffer = fresh((most, vocabulary), dtype, device)
    rows_buffer = fresh((most, width), dtype, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    into = iter(d_hidden)
    for job, (h, own, scale) in enumerate(zip(hidden, labels, row_weight, strict=True)):
        _check.labels_inside(op, "labels", own, ignore_index, vocabulary, many[job])
        source, targets = Rows(h), target_weight[job]
        d_rows = next(into).view(len(own), width) if want_hidden[job] else None
        any_gradient = d_rows is not None or d_weight is not None or d_bias is not None
        for part in chunks(selected[job], step):
            chunk = source.take(part).to(dtype)
            n = len(chunk)
            part_scale = scale[part].contiguous()
            live = part_scale != 0
            differentiate = any_gradient and bool(live.any())
            logits = weight.times(chunk, buffer[:n])
            values = record.of_chunk(job, n)
            torch.ops.nitp_ops.cross_entropy_rows_(
                logits, own[part].contiguous(), None if targets is None else targets[part].contiguous(), offset,
                class_weight[job], part_scale, values.stats, values.target_logit, values.prediction, ignore_index,
                many[job], label_smoothing[job], z_loss[job], softcap, logit_scale, differentiate,
            )  # fmt: skip
            record.place(job, part, values)
            total += torch.where(live, values.stats[0] * part_scale, 0).sum(dtype=torch.float64)
            if not differentiate:
                continue
            if d_rows is not None:
                if (own_rows := direct(d_rows, part, dtype)) is not None:
                    weight.back(logits, own_rows)
                else:
                    place(d_rows, 0, part, weight.back(logits, rows_buffer[:n]))
            if d_weight is not None:
                # a NaN in a row of weight zero must not meet the zeros of its gradient
                d_weight.add(logits, chunk if bool(live.all()) else chunk.masked_fill(~live.unsqueeze(1), 0))
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=work)
    gradients = list(d_hidden)
    if d_weight is not None:
        gradients.append(d_weight.result())
    if d_bias is not None and bias is not None:
        gradients.append(d_bias.to(formed_dtype(bias, None)))
    stats, prediction, target_logit = record.of_all()
    if per_row:
        weights = torch.cat(row_weight)
        silent = (weights == 0) | (prediction < 0)
        return torch.where(silent, 0, weights * stats[0]), stats, prediction, target_logit, gradients
    return total.to(work), stats, prediction, target_logit, gradients


class _Record:
    """The values of every row of every job: 0, NaN and -1 where a row was not computed."""

    def __init__(self, labels: list[Tensor], fields: int, work: torch.dtype):
        counts = [len(each) for each in labels]
        self.stats = torch.full((fields, sum(counts)), float("nan"), dtype=work, device=labels[0].device)
        self.stats[0].zero_()
        self.prediction = labels[0].new_full((sum(counts),), -1)
        self.logits = [self.stats.new_full(each.shape, float("nan")) for each in labels]
        self.rows = [slice(sum(counts[:job]), sum(counts[: job + 1])) for job in range(len(counts))]

    def of_chunk(self, job: int, rows: int) -> RowValues:
        """Room for one chunk."""
        logits = self.logits[job].new_empty(rows, self.logits[job].shape[1])
        return RowValues(self.stats.new_empty(len(self.stats), rows), self.prediction.new_empty(rows), logits)

    def place(self, job: int, part: Tensor | slice, values: RowValues) -> None:
        place(self.stats[:, self.rows[job]], 1, part, values.stats)
        place(self.prediction[self.rows[job]], 0, part, values.prediction)
        place(self.logits[job], 0, part, values.target_logit)

    def of_all(self) -> RowValues:
        return RowValues(self.stats, self.prediction, torch.cat([each.view(-1) for each in self.logits]))


def present(labels: Tensor, ignore_index: int, many: bool) -> Tensor:
    """bool [N]: the row has a target, of labels [N, K]."""
    given = labels != ignore_index
    return (given & (labels >= 0) if many else given).any(1)


@_token_pass.register_fake
def _(op, hidden, unembedding, bias, labels, target_weight, row_weight, class_weight, buffers, many, label_smoothing,
      z_loss, ignore_index, softcap, logit_scale, chunk_bytes, dtype, entropy, wanted, per_row):  # fmt: skip
    work = reference.working(unembedding)
    rows, targets = sum(each.shape[0] for each in labels), sum(each.numel() for each in labels)
    leaves = zip((*hidden, unembedding, bias), buffers, wanted, strict=True)
    gradients = [x.new_empty(x.shape, dtype=formed_dtype(x, buffer)) for x, buffer, flag in leaves if flag]
    loss = unembedding.new_empty((rows,) if per_row else (), dtype=work)
    stats = unembedding.new_empty((3 if entropy else 2, rows), dtype=work)
    return loss, stats, labels[0].new_empty(rows), unembedding.new_empty(targets, dtype=work), gradients


def _save(ctx, inputs, output) -> None:
    ctx.op, hidden, unembedding, bias, labels, target_weight, row_weight, class_weight, buffers, *options = inputs
    *ctx.options, ctx.wanted, ctx.per_row = options
    # autograd expects a list of None for a list of tensors, and one None for anything else
    tensors = [isinstance(x, list) and all(isinstance(each, Tensor) for each in x) for x in inputs[4:]]
    ctx.without = [[None] * len(x) if flag else None for x, flag in zip(inputs[4:], tensors, strict=True)]
    ctx.jobs, ctx.formed = len(hidden), FormedGradients(output[-1])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*hidden, unembedding, bias, *labels, *target_weight, *row_weight, *class_weight)
    ctx.buffers = buffers  # not saved: each backward pass writes to them, which a saved tensor forbids


def _recompute(
    ctx, saved_tensors: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor | None = None
) -> list[Tensor]:
    """The gradients from the inputs again, the row weights times `upstream`."""
    jobs, saved = ctx.jobs, iter(saved_tensors)
    hidden, (unembedding, bias), labels, target_weight, row_weight, class_weight = (
        [next(saved) for _ in range(size)] for size in (jobs, 2, jobs, jobs, jobs, jobs)
    )
    row_weight = row_weight if upstream is None else [each * upstream for each in row_weight]
    tensors = hidden, unembedding, bias, labels, target_weight, row_weight, class_weight, ctx.buffers
    return _token_pass(ctx.op, *tensors, *ctx.options, wanted, False)[-1]


def _differentiate(ctx, upstream: Tensor | None, *_):
    wanted, delivered = [False] * (ctx.jobs + 2), []
    if upstream is not None:
        saved = ctx.saved_tensors  # read once: checkpointing allows no second time
        if ctx.per_row:
            _, of_hidden, *of_head = ctx.needs_input_grad[:4]
            wanted = [*of_hidden, *of_head]
            gradients = _recompute(ctx, saved, wanted, upstream)
        else:
            wanted = ctx.wanted
            gradients = ctx.formed.take(upstream, lambda: _recompute(ctx, saved, wanted))
        inputs, buffers = (
            [x for x, flag in zip(tensors, wanted, strict=True) if flag]
            for tensors in (saved[: ctx.jobs + 2], ctx.buffers)
        )
        anchors = [x for x in (*saved, upstream) if x is not None and x.requires_grad]
        rest = None if ctx.per_row else upstream
        delivered = deliver(anchors, "linear_cross_entropy", gradients, rest, inputs, buffers)
    ready = iter(delivered)
    *d_hidden, d_weight, d_bias = (next(ready) if flag else None for flag in wanted)
    return None, d_hidden, d_weight, d_bias, *ctx.without


_token_pass.register_vmap(refuse_vmap("linear_cross_entropy"))
_token_pass.register_autograd(_differentiate, setup_context=_save)
