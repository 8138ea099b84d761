"""The chunked algorithm behind every token loss: rows of logits exist one chunk at a time, on every device.

for each chunk of labelled rows, of one job or of several:
    logits = h W^T                      GEMM 1
    logits <- w dloss/dlogits           row kernel, in place
    dh = logits W                       GEMM 2
    dW += logits^T h                    GEMM 3, float32 sum

Where the vocabulary is sharded over the ranks of a process group, W is the part that is here, the row kernel comes in
two halves with one all-gather between them, and dh is summed over the ranks (`_vocab_shard.py`).

Where the host must not read values (GPUs), every row takes part, or the first max_rows with the labelled ones first; a
row without a label has the weight zero then, and jobs have chunks of their own (docs/decisions/0031).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check, reference, rows
from ._chunks import (
    Piece,
    Rows,
    Selection,
    clear,
    length_of,
    packed,
    place,
    row_stride,
    rows_per_chunk,
    select,
    with_zeros,
    workspace,
)
from ._devices import sum_dtype
from ._gemm import Weight, WeightGemm, WeightGradient, direct, even_rows, widest
from ._gradients import formed_dtype, power_of_two, scale_in_place
from ._token_job import Formed, Head, Job, RowValues, present
from ._vocab_shard import ReducedRows, ShardRows


def form(jobs: list[Job], head: Head, plain: bool) -> Formed:
    """loss = sum of row_weight * row loss over jobs, with the wanted gradients.

    plain: nobody but autograd watches. The labels have been checked, and the third GEMM may wait (`WeightGemm`)."""
    reads, dtype = _check.host_reads(head.unembedding.device), head.dtype
    if reads and not plain:
        for job in jobs:
            _check.labels_inside(head.op, "labels", job.labels, head.ignore_index, sum(head.sizes), job.many)
    keep = [present(job.labels, head.ignore_index, job.many) for job in jobs]
    scales = [_bounded(job, kept) for job, kept in zip(jobs, keep, strict=True)]
    unit = power_of_two(scales) if dtype == torch.float16 else None
    selected = [select(kept, job.max_rows if job.max_rows >= 0 else None) for job, kept in zip(jobs, keep, strict=True)]
    # on CPU silent jobs count for nothing, so that they do not change how the others' gradient is rounded
    loud = [not reads or bool(scale.any()) for scale in scales]
    cut = _cut(jobs, head, [each.rows for each in selected], loud)
    deferred = _waits(head, cut) if plain else None
    sums = _Sums(jobs, head, scales, keep, selected, parts=sum(loud[chunk[0].job] for chunk in cut), deferred=deferred)
    _add_all(jobs, head, sums, cut, unit)
    return sums.formed(jobs, head, unit)


def _waits(head: Head, cut: list[list[Piece]]) -> WeightGemm | None:
    """The third GEMM for the backward pass: where there is one chunk and a buffer that it can add into, and where the
    logits' gradient, which is held until then, takes no more memory than the weight's would. Not in float16, whose
    gradients wait for their upstream in float32."""
    weight, buffer = head.unembedding, head.buffer
    if buffer is None or not head.want_weight or len(cut) != 1 or head.dtype == torch.float16:
        return None
    rows = sum(length_of(part) for _, part in cut[0])
    held = rows * row_stride(len(weight), weight.device.type) * head.dtype.itemsize
    return WeightGemm(buffer) if held <= buffer.nbytes and widest(weight.device, head.dtype) == buffer.dtype else None


def _rows_per_chunk(head: Head, rows: int, longest: int | None) -> int:
    weight, columns = head.unembedding, max(head.sizes)  # of the widest shard: all ranks must cut alike
    device = weight.device.type
    row_bytes = row_stride(columns, device) * head.logit_bytes
    weights = columns * weight.shape[1] if head.want_weight else 0
    itemsize = max(head.dtype.itemsize, formed_dtype(weight, head.buffer).itemsize)
    return rows_per_chunk(rows, row_bytes, head.chunk_bytes, weights, longest=longest, device=device, itemsize=itemsize)


def _cut(jobs: list[Job], head: Head, selected: list[Tensor | slice], loud: list[bool]) -> list[list[Piece]]:
    """Chunks: of all jobs that want the same gradients; of one job where it is inactive, or where that is not known on
    the host."""
    groups = [[job] for job in range(len(jobs))]
    if _check.host_reads(head.unembedding.device):
        alike = [[job for (job,) in groups if loud[job] and jobs[job].wanted == wanted] for wanted in (True, False)]
        groups = alike + [[job] for (job,) in groups if not loud[job]]
    cut = list[list[Piece]]()
    for group in groups:
        lengths = [length_of(selected[job]) for job in group]
        longest = max(lengths, default=0) if sum(loud) > 1 else None
        cut += packed(selected, _rows_per_chunk(head, sum(lengths), longest), group)
    return cut


def _bounded(job: Job, kept: Tensor) -> Tensor:
    """The row weights, 0 where there is no target; NaN where more rows have one than max_rows, which nobody may see."""
    scale = torch.where(kept, job.row_weight, 0)
    if job.max_rows < 0 or _check.host_reads(scale.device):
        return scale
    return scale.masked_fill(kept & (kept.sum() > job.max_rows), float("nan"))


class _Sums:
    """What the chunks add up to, and the values of every row: 0, NaN and -1 where a row was not computed."""

    def __init__(
        self, jobs: list[Job], head: Head, scales: list[Tensor], keep: list[Tensor], selected: list[Selection],
        parts: int, deferred: WeightGemm | None,
    ):  # fmt: skip
        weight, device = head.unembedding, head.unembedding.device
        work, labels = reference.working(weight), [job.labels for job in jobs]
        counts = [len(each) for each in labels]
        self.scales, self.keep = scales, keep
        some_left_out = any(length_of(each.rest) > 0 for each in selected)
        self.loss = torch.zeros((), dtype=sum_dtype(device), device=device)
        if some_left_out and not _check.host_reads(device):  # a NaN weight shows even where max_rows leaves its row out
            self.loss.masked_fill_(_joined(scales).isnan().any(), float("nan"))
        self.d_hidden = [
            torch.empty(job.hidden.shape, dtype=formed_dtype(job.hidden, job.buffer), device=device)
            if job.wanted
            else None
            for job in jobs
        ]
        for d_hidden, (_, rest) in zip(self.d_hidden, selected, strict=True):
            if d_hidden is not None:  # each chunk writes its own rows
                clear(d_hidden.view(-1, weight.shape[1]), rest)
        self.d_weight: WeightGradient | WeightGemm | None = deferred
        if head.want_weight and deferred is None:
            formed = formed_dtype(weight, head.buffer)
            self.d_weight = WeightGradient(weight.shape, head.dtype, formed, weight, parts)
        self.d_bias = torch.zeros(len(weight), dtype=work, device=device) if head.want_bias else None
        self.stats = torch.empty((3 if head.entropy else 2, sum(counts)), dtype=work, device=device)
        self.prediction = labels[0].new_empty(sum(counts))
        self.target_logit = [self.stats.new_empty(each.shape) for each in labels]
        if some_left_out:
            for each in (self.stats, *self.target_logit):
                each.fill_(float("nan"))
            self.stats[0].zero_()
            self.prediction.fill_(-1)
        self.rows = [slice(sum(counts[:job]), sum(counts[: job + 1])) for job in range(len(counts))]

    def of_chunk(self, job: int, part: Tensor | slice) -> RowValues:
        """Room for the values of one chunk: where they stay, or for `place` to put them there."""
        stats, prediction = self.stats[:, self.rows[job]], self.prediction[self.rows[job]]
        if isinstance(part, slice):
            return RowValues(stats[:, part], prediction[part], self.target_logit[job][part])
        count, targets = len(part), self.target_logit[job].shape[1]
        return RowValues(
            stats.new_empty(len(stats), count), prediction.new_empty(count), stats.new_empty(count, targets)
        )

    def place(self, job: int, part: Tensor | slice, values: RowValues) -> None:
        if isinstance(part, slice):
            return
        place(self.stats[:, self.rows[job]], 1, part, values.stats)
        place(self.prediction[self.rows[job]], 0, part, values.prediction)
        place(self.target_logit[job], 0, part, values.target_logit)

    def formed(self, jobs: list[Job], head: Head, unit: Tensor | None) -> Formed:
        gradients: list[Any] = [each for each in self.d_hidden if each is not None]
        if self.d_weight is not None:
            gradients.append(self.d_weight.result())
        if self.d_bias is not None and head.bias is not None:
            gradients.append(self.d_bias.to(formed_dtype(head.bias, None)))
        if unit is not None:
            for gradient in gradients:
                scale_in_place(rows.kernels(head.backend), gradient, unit)
        self.prediction.masked_fill_(~_joined(self.keep), -1)
        values = RowValues(self.stats, self.prediction, _joined([each.view(-1) for each in self.target_logit]))
        return Formed(self.loss.to(self.stats.dtype), _joined(self.scales), values, gradients)


class _JobRows:
    """The rows of one job: their hidden states, their values and the gradient over their logits, that of the states."""

    def __init__(self, index: int, job: Job, head: Head, sums: _Sums, bias: Tensor | None, unit: Tensor | None):
        self.index, self.job, self.head, self.sums, self.bias, self.unit = index, job, head, sums, bias, unit
        self.source, self.scale, d_hidden = Rows(job.hidden), sums.scales[index], sums.d_hidden[index]
        self.d_rows = None if d_hidden is None else d_hidden.view(len(job.labels), self.source.width)
        self.kernels, shard = rows.kernels(head.backend), head.shard
        self.of_shard = None if shard is None else ShardRows(self.kernels, shard, job, head, bias, sums.stats.dtype)

    def __call__(self, logits: Tensor, part: Tensor | slice, differentiate: bool) -> None:
        """The row kernel over the logits of `part`: the gradient in their place."""
        job, head, sums = self.job, self.head, self.sums
        values, scale = sums.of_chunk(self.index, part), self.scale[part].contiguous()
        labels, weight = job.labels[part].contiguous(), job.target_weight
        weight = None if weight is None else weight[part].contiguous()
        row_scale = scale if self.unit is None else scale / self.unit
        if self.of_shard is not None:
            self.of_shard(logits, labels, weight, row_scale, values, differentiate)
        else:
            self.kernels.cross_entropy_rows_(
                logits, labels, weight, self.bias, job.class_weight, row_scale, values.stats, values.target_logit,
                values.prediction, head.ignore_index, job.many, job.label_smoothing, job.z_loss, head.softcap,
                head.logit_scale, differentiate,
            )  # fmt: skip
        sums.place(self.index, part, values)
        sums.loss += torch.where(scale != 0, values.stats[0] * scale, 0).sum(dtype=sums.loss.dtype)


def _add_all(jobs: list[Job], head: Head, sums: _Sums, cut: list[list[Piece]], unit: Tensor | None) -> None:
    """Every chunk; the workspace is gone when this returns, so that a cast of dW can take its place."""
    device, dtype, (columns, width) = head.unembedding.device, head.dtype, head.unembedding.shape
    reads, weight, work = _check.host_reads(device), Weight(head.unembedding, dtype), sums.stats.dtype
    bias = None if head.bias is None else head.bias.to(work).contiguous()
    rows_of = [_JobRows(index, job, head, sums, bias, unit) for index, job in enumerate(jobs)]
    most = max((even_rows(sum(length_of(part) for _, part in chunk), device, dtype) for chunk in cut), default=0)
    of_head = sums.d_weight is not None or sums.d_bias is not None
    stride = row_stride(columns, device.type)
    buffer, rounded = workspace((most, stride), head.logits, device)[:, :columns], None
    if head.logits != dtype and (of_head or any(job.wanted for job in jobs)):
        rounded = workspace((most, stride), dtype, device)[:, :columns]
    rows_buffer = torch.empty((most, width), dtype=widest(device, dtype), device=device)
    shard = head.shard
    reduced = None if shard is None or not shard.reduce else ReducedRows(shard, weight, rows_buffer, work)
    for chunk in cut:
        pieces = [(rows_of[job], part) for job, part in chunk]
        lengths = [length_of(part) for _, part in pieces]
        n = sum(lengths)
        even = even_rows(n, device, dtype)
        hidden = with_zeros(_joined([of_job.source.take(part).to(dtype) for of_job, part in pieces]), even)
        live = _joined([of_job.scale[part] for of_job, part in pieces]) != 0
        # none, where the host may know it
        silent = None if reads and bool(live.all()) else ~live.unsqueeze(1)
        first, part = pieces[0]
        wanted = first.d_rows is not None  # then all of the chunk have one
        differentiate = (of_head or wanted) and (not reads or bool(live.any()))
        padded = weight.times(hidden, buffer[:even])
        padded[n:].zero_()  # also where the unembedding is not finite
        logits = padded[:n]
        for (of_job, part), of_part in zip(pieces, logits.split(lengths), strict=True):
            of_job(of_part, part, differentiate)
        if not differentiate:
            for of_job, part in pieces:
                if of_job.d_rows is not None:
                    clear(of_job.d_rows, part)
            continue
        d_logits = padded if rounded is None else rounded[:even].copy_(padded)
        under_way = None
        if first.d_rows is not None:
            whole = len(pieces) == 1 and n == even
            if reduced is not None:
                under_way = reduced.start(d_logits[:n])
            elif whole and (in_place := direct(first.d_rows, part, dtype)) is not None:
                _silenced(weight.back(d_logits, in_place), silent)
            else:
                _place(pieces, _silenced(weight.back(d_logits, rows_buffer[:even])[:n], silent).split(lengths))
        if sums.d_weight is not None:
            # a NaN in a row of weight zero must not meet the zeros of its gradient
            heard = hidden if silent is None else with_zeros(hidden[:n].masked_fill(silent, 0), even)
            sums.d_weight.add(d_logits, heard)
        if sums.d_bias is not None:
            sums.d_bias += logits.sum(0, dtype=sums.d_bias.dtype)
        if under_way is not None:
            _place(pieces, _silenced(under_way(), silent).split(lengths))


def _silenced(d_hidden: Tensor, silent: Tensor | None) -> Tensor:
    """Zeros in the rows of weight zero, whose zeros the product has multiplied by numbers that may not be finite."""
    return d_hidden if silent is None else d_hidden.masked_fill_(silent, 0)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _place(pieces: list[tuple[_JobRows, Tensor | slice]], values: Sequence[Tensor]) -> None:
    for (of_job, part), of_part in zip(pieces, values, strict=True):
        assert of_job.d_rows is not None
        place(of_job.d_rows, 0, part, of_part)
