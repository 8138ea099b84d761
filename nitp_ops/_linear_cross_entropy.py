"""linear_cross_entropy: w [(1 - e) (lse - z_t) + e (lse - mean z) + c lse^2],  z = cap tanh(scale (W h + b) / cap).

This file is the door: signatures, checks, normalisation. `_token_pass.py` is the chunked algorithm behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, reference, rows
from ._token_pass import Head, Labelled, token_pass

_OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")


class TokenStats(NamedTuple):
    """Detached per-row values shaped like the labels; float32 (float64 for float64), prediction int64.

    loss: the row's loss before token_weight, 0 where ignored. log_sum_exp, target_logit: of the transformed logits,
    NaN where ignored. prediction: arg-max, -1 where ignored."""

    loss: Tensor
    log_sum_exp: Tensor
    prediction: Tensor
    target_logit: Tensor


class HeadJob(NamedTuple):
    """One labelled set of hidden states for `shared_linear_cross_entropy`; the arguments mean what they mean there."""

    hidden: Tensor
    labels: Tensor
    token_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def linear_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of ``hidden @ unembedding.T`` against labels, with one chunk of logits at a time.

    ``z = cap * tanh(scale * (W h + b) / cap)`` (scale, then softcap), ``lse = log sum_v exp(z_v)``,
    ``loss = w * [(1 - e) * (lse - z_t) + e * (lse - mean_v z_v) + c * lse^2]``

    Rows go through in chunks; each chunk's logits are overwritten with their gradient, so that scalar reductions
    cost three GEMMs and "none" four. The weight gradient is summed over chunks in float32 and rounded once.

    Args:
        hidden: ``[..., d]`` float64, float32 or bfloat16.
        unembedding: ``[V, d]``. GEMMs run in the autocast dtype if autocast is on, else in this dtype.
        labels: ``[...]`` int64 in ``[0, V)``, or `ignore_index`: an ignored row is skipped and reaches nothing.
        bias: ``[V]``, added to the logits in float32.
        ignore_index: the one label that means "absent".
        reduction: "mean" divides the sum by the number of rows that count (zero-weight rows too) or by `normalizer`;
            "sum"; "none" returns ``[...]`` with zeros where ignored. No row that counts: loss 0 and gradients 0.
        token_weight: ``[...]`` (or broadcastable to it), multiplies the whole row loss; it gets no gradient.
        label_smoothing: e in [0, 1].
        z_loss: c >= 0.
        softcap: cap > 0, or None.
        logit_scale: scale > 0.
        normalizer: number or 0-d tensor for "mean", e.g. the count of a whole accumulation window.
        chunk_bytes: size of one chunk of logits; None: the largest of 32 MiB, 512 rows and the float32 weight gradient.
        return_stats: also return `TokenStats`.
        backend: None (the device decides), "native" or "reference".

    Returns:
        The loss in float32 (float64 for float64), 0-d or ``[...]``; with return_stats ``(loss, TokenStats)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a label outside ``[0, V)`` that is not `ignore_index`.
        BackendError: no compiled row kernels for this device.
        NotImplementedError: double backward.

    Example:
        >>> import torch, nitp_ops
        >>> hidden, unembedding = torch.zeros(2, 3, 8), torch.zeros(16, 8)
        >>> labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
        >>> round(nitp_ops.linear_cross_entropy(hidden, unembedding, labels).item(), 4)  # ln 16
        2.7726

    Source: cross-entropy with the chunking idea of the field; z-loss: PaLM, arXiv 2204.02311; softcap: Gemma 2,
    arXiv 2408.00118.
    """
    _check.one_of(_OP, "reduction", reduction, REDUCTIONS)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"{_OP}: normalizer came with reduction={reduction!r}, expected reduction='mean'")
        _check.scalar(_OP, "normalizer", normalizer)
    job = HeadJob(hidden, labels, token_weight, label_smoothing, z_loss)
    head = _head(_OP, unembedding, bias, ignore_index, softcap, logit_scale, chunk_bytes)
    _check_job(_OP, job, head, "")
    _check_labels(_OP, labels, head, "labels")
    if rows.choose(_OP, hidden.device, backend) == "reference":
        options = {
            **_reference_options(head),
            "token_weight": token_weight,
            "label_smoothing": label_smoothing,
        }
        options |= {"z_loss": z_loss, "reduction": reduction, "normalizer": normalizer}
        loss = reference.linear_cross_entropy(hidden, unembedding, labels, **options)
        return (loss, _reference_stats(job, head)) if return_stats else loss
    labelled = _labelled(job, head)
    if reduction == "mean":
        count = (labels != ignore_index).sum().clamp(min=1) if normalizer is None else normalizer
        labelled = labelled._replace(row_weight=labelled.row_weight / count)
    loss, stats = token_pass([labelled], head, per_row=reduction == "none")
    loss = loss.view(labels.shape) if reduction == "none" else loss
    return (loss, _stats(stats, [labels])[0]) if return_stats else loss


def shared_linear_cross_entropy(
    jobs: Sequence[HeadJob],
    unembedding: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """Several labelled sets of hidden states against one unembedding matrix, in one pass.

    ``loss = sum over jobs, over rows with a label, of token_weight * row_loss``

    with the row loss of `linear_cross_entropy`. The matrix's gradient is summed over all jobs in float32 and rounded
    once. A chunk never spans two jobs, and a row whose weight is zero adds exactly nothing to loss and gradients (even
    if it holds NaN): a job of weight zero leaves the others bit-identical. Its stats are computed all the same.

    Args:
        jobs: `HeadJob` s; token_weight may be a 0-d tensor, e.g. weight / count.
        unembedding, bias, ignore_index, softcap, logit_scale, chunk_bytes, backend: as in `linear_cross_entropy`.

    Returns:
        ``(loss, stats)``: a 0-d loss and one `TokenStats` a job.

    Raises:
        As `linear_cross_entropy`; ValueError for no job at all.

    Example:
        >>> import torch, nitp_ops
        >>> job = nitp_ops.HeadJob(torch.zeros(3, 8), torch.tensor([1, 2, 3]), torch.tensor(0.5))
        >>> loss, stats = nitp_ops.shared_linear_cross_entropy([job, job], torch.zeros(16, 8))
        >>> round(loss.item(), 4)  # 2 jobs * 3 rows * 0.5 * ln 16
        8.3178
    """
    op = "shared_linear_cross_entropy"
    if not jobs:
        raise ValueError(f"{op}: jobs is empty, expected at least one HeadJob")
    head = _head(op, unembedding, bias, ignore_index, softcap, logit_scale, chunk_bytes)
    for place, job in enumerate(jobs):
        _check_job(op, job, head, f"jobs[{place}].")
        _check_labels(op, job.labels, head, f"jobs[{place}].labels")
    if rows.choose(op, unembedding.device, backend) == "reference":
        loss = reference.shared_linear_cross_entropy(jobs, unembedding, **_reference_options(head))
        return loss, tuple(_reference_stats(job, head) for job in jobs)
    loss, stats = token_pass([_labelled(job, head) for job in jobs], head)
    return loss, tuple(_stats(stats, [job.labels for job in jobs]))


def _head(op, unembedding, bias, ignore_index, softcap, logit_scale, chunk_bytes) -> Head:
    _check.is_float(op, "unembedding", unembedding)
    if unembedding.dim() != 2 or unembedding.shape[0] == 0:
        raise ValueError(f"{op}: unembedding has shape {tuple(unembedding.shape)}, expected [V, d] with V >= 1")
    if bias is not None:
        _check.is_float(op, "bias", bias)
        _check.has_shape(op, "bias", bias, unembedding.shape[:1], "[V]")
        _check.same_device(op, "bias", bias, "unembedding", unembedding)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index is {ignore_index!r}, expected an integer")
    cap = 0.0 if softcap is None else _check.number(op, "softcap", softcap, least=0.0, open_end=True)
    scale = _check.number(op, "logit_scale", logit_scale, least=0.0, open_end=True)
    if chunk_bytes is not None:
        _check.integer(op, "chunk_bytes", chunk_bytes, least=1)
    return Head(op, unembedding, bias, ignore_index, cap, scale, chunk_bytes)


def _check_labels(op: str, labels: Tensor, head: Head, argument: str) -> None:
    """By value, with the index in the caller's shape; while tracing the pass checks them itself."""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check.labels_inside(op, argument, labels, head.ignore_index, head.unembedding.shape[0])


def _check_job(op: str, job: HeadJob, head: Head, prefix: str) -> None:
    if not isinstance(job, HeadJob):
        raise TypeError(f"{op}: {prefix.rstrip('.')} is a {type(job).__name__}, expected a HeadJob")
    hidden, labels, weight = job.hidden, job.labels, job.token_weight
    _check.is_float(op, f"{prefix}hidden", hidden)
    _check.is_tensor(op, f"{prefix}labels", labels)
    _check.has_dtype(op, f"{prefix}labels", labels, (torch.int64,))
    _check.has_dim(op, f"{prefix}hidden", hidden, 1, "[..., d]")
    if hidden.shape[-1] != head.unembedding.shape[1]:
        expected = (*hidden.shape[:-1], head.unembedding.shape[1])
        raise ValueError(
            f"{op}: {prefix}hidden has shape {tuple(hidden.shape)}, expected {expected} (unembedding's width)"
        )
    _check.has_shape(op, f"{prefix}labels", labels, hidden.shape[:-1], "hidden's without its last axis")
    for name, tensor in (("hidden", hidden), ("labels", labels)):
        _check.same_device(op, prefix + name, tensor, "unembedding", head.unembedding)
    if (hidden.dtype == torch.float64) != (head.unembedding.dtype == torch.float64):
        came, expected = _check.name_of(hidden.dtype), _check.name_of(head.unembedding.dtype)
        raise TypeError(f"{op}: {prefix}hidden is {came}, expected {expected} (float64 does not mix with other dtypes)")
    if weight is not None:
        _check.is_float(op, f"{prefix}token_weight", weight)
        _check.no_gradient(op, f"{prefix}token_weight", weight)
        _check.same_device(op, f"{prefix}token_weight", weight, "unembedding", head.unembedding)
        try:
            weight.expand(labels.shape)
        except RuntimeError:
            _check.has_shape(op, f"{prefix}token_weight", weight, labels.shape, "the labels'")
    smoothing = _check.number(op, f"{prefix}label_smoothing", job.label_smoothing, least=0.0)
    if smoothing > 1:
        raise ValueError(f"{op}: {prefix}label_smoothing is {smoothing}, expected a number in [0, 1]")
    _check.number(op, f"{prefix}z_loss", job.z_loss, least=0.0)


def _labelled(job: HeadJob, head: Head) -> Labelled:
    dtype = reference.working(head.unembedding)
    weight = torch.ones((), dtype=dtype, device=job.labels.device) if job.token_weight is None else job.token_weight
    spread = weight.to(dtype).expand(job.labels.shape).reshape(-1)
    return Labelled(job.hidden, job.labels.reshape(-1), spread, float(job.label_smoothing), float(job.z_loss))


def _stats(stats: tuple[Tensor, Tensor], labels: Sequence[Tensor]) -> list[TokenStats]:
    values, prediction = stats
    split, first = [], 0
    for each in labels:
        part = slice(first, first + each.numel())
        loss, lse, logit = (row.view(each.shape) for row in values[:, part])
        split.append(TokenStats(loss, lse, prediction[part].view(each.shape), logit))
        first += each.numel()
    return split


def _reference_options(head: Head) -> dict[str, Any]:
    softcap = head.softcap or None
    options = {"bias": head.bias, "ignore_index": head.ignore_index}
    return options | {"softcap": softcap, "logit_scale": head.logit_scale}


@torch.no_grad()
def _reference_stats(job: HeadJob, head: Head) -> TokenStats:
    return TokenStats(*reference.token_stats(job, head.unembedding, **_reference_options(head)))
