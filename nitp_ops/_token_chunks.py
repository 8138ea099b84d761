"""The chunked algorithm behind every token loss: rows of logits exist one chunk at a time, on every device.

for each job, for each chunk of its labelled rows:
    logits = h W^T                      GEMM 1
    logits <- w dloss/dlogits           row kernel, in place
    dh = logits W                       GEMM 2
    dW += logits^T h                    GEMM 3, float32 sum

Where the vocabulary is sharded over the ranks of a process group, W is the part that is here, the row kernel comes in
two halves with one all-gather between them, and dh is summed over the ranks (`_vocab_shard.py`).

Where the host must not read values (GPUs), every row takes part, or the first max_rows with the labelled ones first; a
row without a label has the weight zero then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, reference, rows
from ._chunks import Rows, chunks, length_of, place, rows_per_chunk, select, with_zeros
from ._gemm import Weight, WeightGradient, direct, even_rows
from ._gradients import formed_dtype, power_of_two, scale_in_place
from ._vocab_shard import ReducedRows, ShardRows, VocabShard


class Job(NamedTuple):
    """hidden [..., d]; labels and target_weight [N, K]; row_weight [N] already holds token weight, weight, 1 / count.

    many: K targets a row, of which negative ones are absent. class_weight: of the smoothing term, target_weight holds
    it for the rest. max_rows: on a GPU no more rows are computed. wanted: the gradient of hidden is."""

    hidden: Tensor
    labels: Tensor
    target_weight: Tensor | None
    row_weight: Tensor
    class_weight: Tensor | None
    buffer: Tensor | None
    many: bool
    label_smoothing: float
    z_loss: float
    max_rows: int
    wanted: bool


class Head(NamedTuple):
    """The unembedding [V, d] and what belongs to it; softcap 0 means none; dtype of the products.

    shard: unembedding, bias and buffer are the part of this rank."""

    op: str
    backend: str
    unembedding: Tensor
    bias: Tensor | None
    buffer: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    chunk_bytes: int | None
    dtype: torch.dtype
    entropy: bool
    want_weight: bool
    want_bias: bool
    shard: VocabShard | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Columns on each rank."""
        return (len(self.unembedding),) if self.shard is None else self.shard.sizes


class RowValues(NamedTuple):
    """stats [2 or 3, rows]: loss, log-sum-exp and perhaps entropy; prediction [rows]; target_logit: [rows * K]."""

    stats: Tensor
    prediction: Tensor
    target_logit: Tensor


class Formed(NamedTuple):
    """loss: 0-d; row_weight [rows]: 0 where a row has no target; gradients of hidden..., unembedding, bias."""

    loss: Tensor
    row_weight: Tensor
    values: RowValues
    gradients: list[Tensor]


def form(jobs: list[Job], head: Head) -> Formed:
    """loss = sum of row_weight * row loss over jobs, with the wanted gradients."""
    reads, dtype, weight = _check.host_reads(head.unembedding.device), head.dtype, head.unembedding
    keep = [present(job.labels, head.ignore_index, job.many) for job in jobs]
    scales = [_bounded(job, kept) for job, kept in zip(jobs, keep, strict=True)]
    unit = power_of_two(scales) if dtype == torch.float16 else None
    selected = [select(kept, job.max_rows if job.max_rows >= 0 else None) for job, kept in zip(jobs, keep, strict=True)]
    # on CPU silent jobs count for nothing, so that they do not change how the others' gradient is rounded
    loud = [not reads or bool(scale.any()) for scale in scales]
    # of the widest shard: all ranks must cut alike
    columns = max(head.sizes)
    sizes = columns * dtype.itemsize, head.chunk_bytes, columns * weight.shape[1] if head.want_weight else 0
    lengths = [length_of(each) for each in selected]
    steps = [rows_per_chunk(each, *sizes, shared=sum(loud) > 1, device=weight.device.type) for each in lengths]
    parts = sum(-(-length // step) for length, step, heard in zip(lengths, steps, loud, strict=True) if heard)
    sums = _Sums(jobs, head, scales, keep, parts)
    _add_all(jobs, head, sums, selected, steps, unit)
    return sums.formed(jobs, head, unit)


def present(labels: Tensor, ignore_index: int, many: bool) -> Tensor:
    """bool [N]: the row has a target, of labels [N, K]."""
    given = labels != ignore_index
    return (given & (labels >= 0) if many else given).any(1)


def _bounded(job: Job, kept: Tensor) -> Tensor:
    """The row weights, 0 where there is no target; NaN where more rows have one than max_rows, which nobody may see."""
    scale = torch.where(kept, job.row_weight, 0)
    if job.max_rows < 0 or _check.host_reads(scale.device):
        return scale
    return scale.masked_fill(kept & (kept.sum() > job.max_rows), float("nan"))


class _Sums:
    """What the chunks add up to, and the values of every row: 0, NaN and -1 where a row was not computed."""

    def __init__(self, jobs: list[Job], head: Head, scales: list[Tensor], keep: list[Tensor], parts: int):
        weight, device = head.unembedding, head.unembedding.device
        work, labels = reference.working(weight), [job.labels for job in jobs]
        counts = [len(each) for each in labels]
        self.scales, self.keep = scales, keep
        # a NaN weight shows even where max_rows leaves its row out
        spoiled = torch.cat(scales).isnan().any()
        self.loss = torch.zeros((), dtype=torch.float64, device=device).masked_fill_(spoiled, float("nan"))
        self.d_hidden = [
            torch.zeros(job.hidden.shape, dtype=formed_dtype(job.hidden, job.buffer), device=device)
            if job.wanted
            else None
            for job in jobs
        ]
        self.d_weight = None
        if head.want_weight:
            formed = formed_dtype(weight, head.buffer)
            self.d_weight = WeightGradient(weight.shape, head.dtype, formed, weight, parts)
        self.d_bias = torch.zeros(len(weight), dtype=work, device=device) if head.want_bias else None
        self.stats = torch.full((3 if head.entropy else 2, sum(counts)), float("nan"), dtype=work, device=device)
        self.stats[0].zero_()
        self.prediction = labels[0].new_full((sum(counts),), -1)
        self.target_logit = [self.stats.new_full(each.shape, float("nan")) for each in labels]
        self.rows = [slice(sum(counts[:job]), sum(counts[: job + 1])) for job in range(len(counts))]

    def of_chunk(self, job: int, count: int) -> RowValues:
        """Room for one chunk."""
        logits = self.target_logit[job].new_empty(count, self.target_logit[job].shape[1])
        return RowValues(self.stats.new_empty(len(self.stats), count), self.prediction.new_empty(count), logits)

    def place(self, job: int, part: Tensor | slice, values: RowValues) -> None:
        place(self.stats[:, self.rows[job]], 1, part, values.stats)
        place(self.prediction[self.rows[job]], 0, part, values.prediction)
        place(self.target_logit[job], 0, part, values.target_logit)

    def formed(self, jobs: list[Job], head: Head, unit: Tensor | None) -> Formed:
        gradients = [each for each in self.d_hidden if each is not None]
        if self.d_weight is not None:
            gradients.append(self.d_weight.result())
        if self.d_bias is not None and head.bias is not None:
            gradients.append(self.d_bias.to(formed_dtype(head.bias, None)))
        if unit is not None:
            for gradient in gradients:
                scale_in_place(rows.kernels(head.backend), gradient, unit)
        self.prediction.masked_fill_(~torch.cat(self.keep), -1)
        values = RowValues(self.stats, self.prediction, torch.cat([each.view(-1) for each in self.target_logit]))
        return Formed(self.loss.to(self.stats.dtype), torch.cat(self.scales), values, gradients)


def _add_all(
    jobs: list[Job], head: Head, sums: _Sums, selected: list[Tensor | slice], steps: list[int], unit: Tensor | None
) -> None:
    """Every chunk of every job; the workspace is gone when this returns, so that a cast of dW can take its place."""
    device, dtype, (columns, width) = head.unembedding.device, head.dtype, head.unembedding.shape
    vocabulary, shard, work = sum(head.sizes), head.shard, sums.stats.dtype
    reads, kernels, weight = _check.host_reads(device), rows.kernels(head.backend), Weight(head.unembedding, dtype)
    bias = None if head.bias is None else head.bias.to(sums.stats.dtype).contiguous()
    most = max(even_rows(min(step, length_of(part)), device, dtype) for step, part in zip(steps, selected, strict=True))
    buffer = torch.empty((most, columns), dtype=dtype, device=device)
    rows_buffer = torch.empty((most, width), dtype=dtype, device=device)
    reduced = None if shard is None or not shard.reduce else ReducedRows(shard, weight, rows_buffer, work)
    for place_, (job, scale, d_hidden) in enumerate(zip(jobs, sums.scales, sums.d_hidden, strict=True)):
        if reads:
            _check.labels_inside(head.op, "labels", job.labels, head.ignore_index, vocabulary, job.many)
        source, targets = Rows(job.hidden), job.target_weight
        d_rows = None if d_hidden is None else d_hidden.view(len(job.labels), width)
        rows_of_shard = None if shard is None else ShardRows(kernels, shard, job, head, bias, work)
        any_gradient = d_rows is not None or sums.d_weight is not None or sums.d_bias is not None
        for part in chunks(selected[place_], steps[place_]):
            n = length_of(part)
            even = even_rows(n, device, dtype)
            chunk = with_zeros(source.take(part).to(dtype), even)
            part_scale = scale[part].contiguous()
            live = part_scale != 0
            differentiate = any_gradient and (not reads or bool(live.any()))
            padded = weight.times(chunk, buffer[:even])
            padded[n:].zero_()  # also where the unembedding is not finite
            logits = padded[:n]
            values = sums.of_chunk(place_, n)
            labels, of_targets = job.labels[part].contiguous(), None if targets is None else targets[part].contiguous()
            row_scale = part_scale if unit is None else part_scale / unit
            if rows_of_shard is not None:
                rows_of_shard(logits, labels, of_targets, row_scale, values, differentiate)
            else:
                kernels.cross_entropy_rows_(
                    logits, labels, of_targets, bias, job.class_weight, row_scale, values.stats, values.target_logit,
                    values.prediction, head.ignore_index, job.many, job.label_smoothing, job.z_loss, head.softcap,
                    head.logit_scale, differentiate,
                )  # fmt: skip
            sums.place(place_, part, values)
            sums.loss += torch.where(live, values.stats[0] * part_scale, 0).sum(dtype=torch.float64)
            if not differentiate:
                continue
            under_way = None
            if d_rows is not None:
                if reduced is not None:
                    under_way = reduced.start(logits)
                elif n == even and (own_rows := direct(d_rows, part, dtype)) is not None:
                    weight.back(logits, own_rows)
                else:
                    place(d_rows, 0, part, weight.back(padded, rows_buffer[:even])[:n])
            if sums.d_weight is not None:
                # a NaN in a row of weight zero must not meet the zeros of its gradient
                whole = reads and bool(live.all())
                heard = chunk if whole else with_zeros(chunk[:n].masked_fill(~live.unsqueeze(1), 0), even)
                sums.d_weight.add(padded, heard)
            if sums.d_bias is not None:
                sums.d_bias += logits.sum(0, dtype=sums.d_bias.dtype)
            if under_way is not None and d_rows is not None:
                place(d_rows, 0, part, under_way())
