"""shared_linear_cross_entropy: several sets of labelled rows against one unembedding, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check, reference, rows
from ._head_job import (
    HeadJob,
    TokenStats,
    check_job,
    for_reference,
    head_of,
    labelled,
    labels_of,
    reference_options,
    reference_stats,
    stats_of,
    tensors_of,
)
from ._reference_rows import of_live_rows
from ._token_pass import Unembedding, token_pass

_OP = "shared_linear_cross_entropy"


def shared_linear_cross_entropy(
    jobs: Sequence[HeadJob],
    unembedding: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | str = "auto",
    chunk_bytes: int | None = None,
    weight_grad_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """Several labelled sets of hidden states against one unembedding matrix, in one pass.

    ``loss = sum over jobs, over rows with a label, of token_weight * row_loss``

    with the row loss of `linear_cross_entropy`. The matrix's gradient is summed over all jobs in float32 and rounded
    once. A row whose weight is zero adds exactly nothing to loss and gradients (even if it holds NaN): a job of weight
    zero leaves the others bit-identical. Its stats are computed all the same.

    Under torch.compile each new value of a number among the options compiles anew, and past
    ``torch._dynamo.config.recompile_limit`` values (8 unless set) runs eagerly, see `linear_cross_entropy`.

    Args:
        jobs: `HeadJob` s; token_weight may be a 0-d tensor, e.g. weight / count.
        unembedding, bias, ignore_index, softcap, logit_scale, logits_dtype, chunk_bytes, weight_grad_out, backend: as
            in `linear_cross_entropy`. On CPU a chunk holds rows of several jobs; the default of chunk_bytes is then 0.6
            of the float32 gradient up to 120 MiB, or 448 rows up to 240, no more than the longest job's, at least 32.

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
    head = head_of(
        _OP, unembedding, bias, ignore_index, softcap, logit_scale, logits_dtype, chunk_bytes, weight_grad_out
    )
    return shared_token_loss(jobs, head, backend)


def shared_token_loss(
    jobs: Sequence[HeadJob], head: Unembedding, backend: str | None
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """`shared_linear_cross_entropy` of arguments in their bundles."""
    op = head.op
    check_jobs(jobs, head)
    chosen = rows.choose(op, head.unembedding.device, backend)
    if chosen == "reference":
        widened = [for_reference(job, head) for job in jobs]
        weight = widened[0][1]
        options = reference_options(head)

        def formula(live: Tensor | None, weight: Tensor, bias: Tensor | None, *hidden: Tensor) -> Tensor:
            given = [job._replace(hidden=x) for job, x in zip(jobs, hidden, strict=True)]
            if live is not None:
                given = [job._replace(labels=labels_of(live, job, head.ignore_index)) for job in given]
            return reference.shared_linear_cross_entropy(given, weight, bias=bias, **options)

        loss = of_live_rows(formula, weight, options.pop("bias"), *(job.hidden for job, _ in widened))
        return loss, tuple(reference_stats(job, head) for job in jobs)
    _check.plain_autograd(op, head.unembedding, head.bias, *(x for job in jobs for x in tensors_of(job)))
    loss, values = token_pass(
        [labelled(head.op, job, head.ignore_index, f"jobs[{place}].") for place, job in enumerate(jobs)], head, chosen
    )
    return loss, tuple(stats_of(values, jobs))


def check_jobs(jobs: Sequence[HeadJob], head: Unembedding) -> None:
    if not isinstance(jobs, Sequence):
        raise TypeError(f"{head.op}: jobs is a {type(jobs).__name__}, expected a sequence of HeadJob")
    if not jobs:
        raise ValueError(f"{head.op}: jobs is empty, expected at least one HeadJob")
    for place, job in enumerate(jobs):
        check_job(head.op, job, head, f"jobs[{place}].")
