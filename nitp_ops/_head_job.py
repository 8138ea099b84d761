"""What a token loss is given and what it tells: jobs and their unembedding, checked at the door; stats a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, reference
from ._gemm import gemm_dtype
from ._reference_rows import of_live_rows
from ._token_job import Job, RowValues, given, present
from ._token_pass import Unembedding
from ._vocab_shard import VocabShard


class TokenStats(NamedTuple):
    """Detached per-row values shaped like the labels of one target a row; float32 (float64 for float64).

    loss: the row's loss before token_weight, 0 where absent. log_sum_exp, target_logit: of the transformed logits, NaN
    where absent (target_logit ``[..., K]`` with K targets). prediction: int64, arg-max, -1 where absent; of equal
    logits the first, of logits that only the rounding of a softcap makes equal any of them."""

    loss: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    target_logit: Tensor


class TokenEntropyStats(NamedTuple):
    """`TokenStats` and the entropy ``-sum_v p_v log p_v`` of each row in nats, NaN where absent."""

    loss: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    target_logit: Tensor
    entropy: Tensor


class HeadJob(NamedTuple):
    """One labelled set of hidden states for `shared_linear_cross_entropy`; the arguments mean what they mean in
    `linear_cross_entropy`."""

    hidden: Tensor
    labels: Tensor
    token_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    target_weight: Tensor | None = None
    class_weight: Tensor | None = None
    hidden_grad_out: Tensor | None = None
    max_rows: int | None = None


def tensors_of(job: HeadJob) -> tuple[Tensor | None, ...]:
    """Those that a torch.func transform may have wrapped."""
    return job.hidden, job.labels, job.token_weight, job.target_weight, job.class_weight


def head_of(
    op, unembedding, bias, ignore_index, softcap, logit_scale, logits_dtype, chunk_bytes, buffer,
    shard: VocabShard | None = None,
) -> Unembedding:  # fmt: skip
    """Checks the arguments that all jobs share; of a sharded vocabulary they are the part of this rank."""
    _check.is_plain(op, "unembedding", unembedding)
    _check.is_float(op, "unembedding", unembedding)
    if unembedding.dim() != 2 or (unembedding.shape[0] == 0 and shard is None):
        raise ValueError(f"{op}: unembedding has shape {tuple(unembedding.shape)}, expected [V, d] with V >= 1")
    cap, scale = transform_of(
        op, "unembedding", unembedding, len(unembedding), bias, ignore_index, softcap, logit_scale
    )
    if logits_dtype != "auto" and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"{op}: logits_dtype is {logits_dtype!r}, expected 'auto' or a torch.dtype")
    if chunk_bytes is not None:
        _check.integer(op, "chunk_bytes", chunk_bytes, least=1)
    if buffer is not None:
        _check.is_buffer(op, "weight_grad_out", buffer, "unembedding", unembedding)
    return Unembedding(op, unembedding, bias, ignore_index, cap, scale, logits_dtype, chunk_bytes, buffer, shard)


def transform_of(
    op: str, like: str, logits: Tensor, columns: int, bias, ignore_index, softcap, logit_scale
) -> tuple[float, float]:
    """Checks what the logits go through; (softcap, scale), a softcap of 0 for none. logits: of their dtype and device,
    the argument `like`."""
    _check.is_plain(op, "bias", bias)
    if bias is not None:
        _check.is_float(op, "bias", bias)
        _check.has_shape(op, "bias", bias, (columns,), "[V]")
        _check.same_device(op, "bias", bias, like, logits)
    _check.integer(op, "ignore_index", ignore_index)
    work = reference.working(logits)
    cap = 0.0 if softcap is None else _check.number(op, "softcap", softcap, least=0.0, open_end=True, dtype=work)
    return cap, _check.number(op, "logit_scale", logit_scale, least=0.0, open_end=True, dtype=work)


def check_job(op: str, job: HeadJob, head: Unembedding, prefix: str) -> None:
    if not isinstance(job, HeadJob):
        raise TypeError(f"{op}: {prefix.rstrip('.')} is a {type(job).__name__}, expected a HeadJob")
    hidden, weight = job.hidden, head.unembedding
    _check.is_plain(op, f"{prefix}hidden", hidden)
    _check.is_float(op, f"{prefix}hidden", hidden)
    _check.has_dim(op, f"{prefix}hidden", hidden, 1, "[..., d]")
    if hidden.shape[-1] != weight.shape[1]:
        expected = (*hidden.shape[:-1], weight.shape[1])
        raise ValueError(
            f"{op}: {prefix}hidden has shape {tuple(hidden.shape)}, expected {expected} (unembedding's width)"
        )
    _check.same_device(op, f"{prefix}hidden", hidden, "unembedding", weight)
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        came, expected = _check.name_of(hidden.dtype), _check.name_of(weight.dtype)
        raise TypeError(f"{op}: {prefix}hidden is {came}, expected {expected} (float64 does not mix with other dtypes)")
    check_targets(op, job, "hidden", head.vocabulary, head.ignore_index, prefix)
    if job.max_rows is not None:
        _check.integer(op, f"{prefix}max_rows", job.max_rows, least=0)
    if job.hidden_grad_out is not None:
        _check.is_buffer(op, f"{prefix}hidden_grad_out", job.hidden_grad_out, f"{prefix}hidden", job.hidden)


def check_targets(op: str, job: HeadJob, rows: str, vocabulary: int, ignore_index: int, prefix: str = "") -> None:
    """Everything of a job but its rows, which are the argument `rows`."""
    _check_labels(op, job, rows, prefix)
    _check_weights(op, job, rows, vocabulary, prefix)
    smoothing = _check.number(op, f"{prefix}label_smoothing", job.label_smoothing, least=0.0)
    if smoothing > 1:
        raise ValueError(f"{op}: {prefix}label_smoothing is {smoothing}, expected a number in [0, 1]")
    _check.number(op, f"{prefix}z_loss", job.z_loss, least=0.0, dtype=reference.working(job.hidden))
    if _check.plain(job.labels):  # by value, with the index in the caller's shape; while tracing the pass checks them
        several = job.target_weight is not None
        _check.labels_inside(op, f"{prefix}labels", job.labels, ignore_index, vocabulary, several)


def _check_labels(op: str, job: HeadJob, rows: str, prefix: str) -> None:
    hidden, labels = job.hidden, job.labels
    leading = hidden.shape[:-1]
    _check.is_plain(op, f"{prefix}labels", labels)
    _check.is_tensor(op, f"{prefix}labels", labels)
    _check.has_dtype(op, f"{prefix}labels", labels, (torch.int64,))
    if job.target_weight is None:
        if labels.dim() == hidden.dim() and labels.shape[:-1] == leading:
            raise ValueError(
                f"{op}: {prefix}target_weight is None, expected {tuple(labels.shape)} beside labels with "
                f"{labels.shape[-1]} targets a row"
            )
        _check.has_shape(op, f"{prefix}labels", labels, leading, f"{rows} without its last axis")
    elif labels.dim() != hidden.dim() or labels.shape[:-1] != leading:
        expected = f"({', '.join([*map(str, leading), 'K'])})"
        raise ValueError(
            f"{op}: {prefix}labels has shape {tuple(labels.shape)}, expected {expected} (target_weight came)"
        )
    _check.same_device(op, f"{prefix}labels", labels, prefix + rows, hidden)


def _check_weights(op: str, job: HeadJob, rows: str, vocabulary: int, prefix: str) -> None:
    for name in ("token_weight", "target_weight", "class_weight"):
        weight = getattr(job, name)
        _check.is_plain(op, prefix + name, weight)
        if weight is None:
            continue
        _check.is_float(op, prefix + name, weight)
        _check.no_gradient(op, prefix + name, weight)
        _check.same_device(op, prefix + name, weight, prefix + rows, job.hidden)
    if job.target_weight is not None:
        _check.has_shape(op, f"{prefix}target_weight", job.target_weight, job.labels.shape, "the labels'")
    if job.token_weight is not None:
        leading = job.hidden.shape[:-1]
        try:
            job.token_weight.expand(leading)
        except RuntimeError:
            _check.has_shape(op, f"{prefix}token_weight", job.token_weight, leading, "one a row")
    if job.class_weight is not None:
        _check.has_shape(op, f"{prefix}class_weight", job.class_weight, (vocabulary,), "[V]")
        if job.target_weight is not None:
            raise ValueError(f"{op}: {prefix}class_weight came with target_weight, expected one of them")


def labelled(op: str, job: HeadJob, ignored: int, prefix: str = "") -> Job:
    """The job as flat rows: [N, K] labels and weights in the working precision; ignored: the absent label."""
    work, rows = reference.working(job.hidden), job.hidden.shape[:-1]
    many, device = job.target_weight is not None, job.labels.device
    labels = job.labels.reshape(math.prod(rows), job.labels.shape[-1] if many else 1)
    target_weight = None if job.target_weight is None else job.target_weight.to(work).reshape(labels.shape)
    class_weight = None if job.class_weight is None else job.class_weight.to(work).contiguous()
    if class_weight is not None:
        target_weight = class_weight[labels.where(labels != ignored, 0).clamp(0, len(class_weight) - 1)]
    weight = torch.ones((), dtype=work, device=device) if job.token_weight is None else job.token_weight
    weight = weight.to(work).expand(rows).reshape(-1)
    smooth = class_weight is not None and job.label_smoothing > 0
    if target_weight is not None and job.z_loss == 0 and not smooth:
        # no target of the row has a weight, and nothing else has: it must be silent, not multiplied by zero
        weight = torch.where(((target_weight != 0) & given(labels, ignored, many)).any(1), weight, 0)
    if job.max_rows is not None and _check.plain(labels):
        count = int(present(labels, ignored, many).sum())
        if count > job.max_rows:
            came = f"{prefix}max_rows is {job.max_rows}"
            raise ValueError(f"{op}: {came}, expected at least {count}, the rows that count")
    return Job(
        hidden=job.hidden,
        labels=labels,
        target_weight=target_weight,
        row_weight=weight,
        class_weight=class_weight if job.label_smoothing > 0 else None,
        buffer=job.hidden_grad_out,
        many=many,
        label_smoothing=_check.constant(float(job.label_smoothing)),
        z_loss=_check.constant(float(job.z_loss)),
        max_rows=-1 if job.max_rows is None else job.max_rows,
        wanted=job.hidden.requires_grad,
    )


def counted(rows: Job, ignore_index: int) -> Tensor:
    """What "mean" divides by: the rows that count, or the sum of their class weights."""
    keep = present(rows.labels, ignore_index, rows.many)
    if rows.target_weight is None or rows.many:
        return keep.sum().clamp(min=1)
    total = torch.where(keep, rows.target_weight.squeeze(1), 0).sum()
    return torch.where(total == 0, 1, total)


def stats_of(values: RowValues, jobs: Sequence[HeadJob]) -> list[Any]:
    """One `TokenStats` (or, where the pass gave the entropy, `TokenEntropyStats`) a job, shaped like its rows."""
    split, row, target = [], 0, 0
    for job in jobs:
        shape = job.hidden.shape[:-1]
        rows, targets = slice(row, row + math.prod(shape)), slice(target, target + job.labels.numel())
        loss, lse, *entropy = (field.view(shape) for field in values.stats[:, rows])
        fields = loss, lse, values.prediction[rows].view(shape), values.target_logit[targets].view(job.labels.shape)
        split.append(TokenEntropyStats(*fields, *entropy) if entropy else TokenStats(*fields))
        row, target = rows.stop, targets.stop
    return split


def labels_of(live: Tensor, job: HeadJob, ignore_index: int) -> Tensor:
    """The labels of the rows that are live, bool [...] or 0-d; those of the others are absent."""
    dead = ~live if job.target_weight is None or live.dim() == 0 else ~live.unsqueeze(-1)
    return job.labels.masked_fill(dead, ignore_index)


def reference_options(head: Unembedding) -> dict[str, Any]:
    softcap = head.softcap or None
    options = {"bias": head.bias, "ignore_index": head.ignore_index}
    return options | {"softcap": softcap, "logit_scale": head.logit_scale}


def reference_loss(
    job: HeadJob, unembedding: Tensor | None, reduction: str, normalizer: Any, return_stats: bool | str, **options: Any
) -> Any:
    """What the op returns, by the reference; no unembedding: the rows of the job are logits."""
    names = ("token_weight", "target_weight", "class_weight", "z_loss", "label_smoothing")
    terms = {name: getattr(job, name) for name in names} | {"reduction": reduction, "normalizer": normalizer}
    bias, others = options["bias"], {name: value for name, value in options.items() if name != "bias"}

    def formula(live: Tensor | None, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        labels = job.labels if live is None else labels_of(live, job, options["ignore_index"])
        return reference.linear_cross_entropy(hidden, weight, labels, bias=bias, **terms, **others)

    loss = of_live_rows(formula, job.hidden, unembedding, bias)
    return (loss, _reference_stats(job, unembedding, return_stats == "entropy", options)) if return_stats else loss


def for_reference(job: HeadJob, head: Unembedding) -> tuple[HeadJob, Tensor]:
    """The job and the unembedding as the reference takes them: widened where logits_dtype asks for it."""
    given = [name for name in ("hidden_grad_out",) if getattr(job, name) is not None]
    given += ["weight_grad_out"] if head.weight_grad_out is not None else []
    if given:
        raise ValueError(
            f"{head.op}: {given[0]} came with backend='reference', expected none (it leaves gradients to autograd)"
        )
    gemm_dtype(head.op, head.unembedding, head.logits_dtype)  # refuses a logits_dtype that does not fit
    if head.logits_dtype == "auto":
        return job, head.unembedding
    dtype = head.logits_dtype
    assert isinstance(dtype, torch.dtype)
    return job._replace(hidden=job.hidden.to(dtype)), head.unembedding.to(dtype)


def reference_stats(job: HeadJob, head: Unembedding) -> Any:
    return _reference_stats(*for_reference(job, head), False, reference_options(head))


@torch.no_grad()
def _reference_stats(job: HeadJob, unembedding: Tensor | None, entropy: bool, options: dict[str, Any]) -> Any:
    stats = TokenEntropyStats(*reference.token_stats(job, unembedding, **options))
    return stats if entropy else TokenStats(*stats[:4])
