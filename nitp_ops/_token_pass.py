"""The custom op around the chunked algorithm of the token losses (`_token_chunks.py`), and its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._dispatch import needs_dispatcher
from ._gemm import gemm_dtype, operand_dtype
from ._gradients import FormedGradients, deliver, formed_dtype, refuse_vmap
from ._token_chunks import form
from ._token_job import Head, Job, RowValues
from ._vocab_shard import VocabShard


class Unembedding(NamedTuple):
    """The unembedding and what belongs to it; softcap 0 means none; shard: both are the part of this rank."""

    op: str
    unembedding: Tensor
    bias: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    logits_dtype: torch.dtype | str
    chunk_bytes: int | None
    weight_grad_out: Tensor | None
    shard: VocabShard | None = None

    @property
    def vocabulary(self) -> int:
        """V, of all ranks."""
        return len(self.unembedding) if self.shard is None else sum(self.shard.sizes)


def token_pass(
    jobs: Sequence[Job], head: Unembedding, backend: str, *, per_row: bool = False, entropy: bool = False
) -> tuple[Tensor, RowValues]:
    """(loss, values) with loss = sum of row_weight * row loss.

    Its gradients are formed in the forward pass. per_row (one job): loss [rows] instead of the sum; the backward pass
    recomputes the logits under any upstream gradient."""
    weight = head.unembedding
    logits = gemm_dtype(head.op, weight, head.logits_dtype)
    operands = logits
    if head.logits_dtype == torch.float32:  # and not autocast's dtype, which is that of the operands too
        operands = operand_dtype(weight.device.type, weight.dtype, [job.hidden.dtype for job in jobs], logits)
    wanted = [job.wanted for job in jobs]
    wanted += [x is not None and x.requires_grad for x in (head.unembedding, head.bias)]
    hidden = [job.hidden for job in jobs]
    inputs = (
        head.op,
        hidden,
        head.unembedding,
        head.bias,
        [job.labels for job in jobs],
        [job.target_weight for job in jobs],
        [job.row_weight for job in jobs],
        [job.class_weight for job in jobs],
        [*(job.buffer for job in jobs), head.weight_grad_out, None],
        [job.many for job in jobs],
        [job.label_smoothing for job in jobs],
        [job.z_loss for job in jobs],
        [job.max_rows for job in jobs],
        head.ignore_index,
        head.softcap,
        head.logit_scale,
        head.chunk_bytes,
        operands,
        logits,
        *_packed(head.shard),
        backend,
        entropy,
        [torch.is_grad_enabled() and not per_row and each for each in wanted],
        per_row,
    )
    if needs_dispatcher((*hidden, head.unembedding, *inputs[4])):
        loss, stats, prediction, target_logit, _ = _token_pass(*inputs)
    else:
        outputs = LinearCrossEntropyFunction.apply(inputs, *hidden, head.unembedding, head.bias)
        loss, stats, prediction, target_logit = outputs
    return loss, RowValues(stats.detach(), prediction, target_logit.detach())


def _packed(shard: VocabShard | None) -> tuple[str | None, list[int] | None, bool, bool]:
    """A shard as the op takes it."""
    if shard is None:
        return None, None, False, False
    return shard.group, list(shard.sizes), shard.reduce, shard.overlap


def forward_and_gradients(
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
    max_rows: list[int],
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    group: str | None,
    shard_sizes: Sequence[int] | None,
    reduce: bool,
    overlap: bool,
    backend: str,
    entropy: bool,
    wanted: list[bool],
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, stats, prediction, target logits, gradients).

    wanted, buffers and gradients stand in the order hidden..., unembedding, bias; the buffers are the backward's."""
    *want_hidden, want_weight, want_bias = wanted
    *hidden_buffers, weight_buffer, _ = buffers
    of_jobs = (hidden, labels, target_weight, row_weight, class_weight, hidden_buffers, many, label_smoothing, z_loss)
    jobs = [Job(*fields) for fields in zip(*of_jobs, max_rows, want_hidden, strict=True)]
    tensors, options = (unembedding, bias, weight_buffer), (ignore_index, softcap, logit_scale, chunk_bytes)
    shard = None if group is None or shard_sizes is None else VocabShard(group, tuple(shard_sizes), reduce, overlap)
    formed = form(
        jobs, Head(op, backend, *tensors, *options, dtype, logits_dtype, entropy, want_weight, want_bias, shard)
    )
    loss, row_weights, values, gradients = formed
    if per_row:
        loss = torch.where(row_weights == 0, 0, row_weights * values.stats[0])
    return loss, values.stats, values.prediction, values.target_logit, gradients


_token_pass = torch.library.custom_op("nitp_ops::token_pass", mutates_args=())(forward_and_gradients)


@_token_pass.register_fake
def _(op, hidden, unembedding, bias, labels, target_weight, row_weight, class_weight, buffers, many, label_smoothing,
      z_loss, max_rows, ignore_index, softcap, logit_scale, chunk_bytes, dtype, logits_dtype, group, shard_sizes,
      reduce, overlap, backend, entropy, wanted, per_row):  # fmt: skip
    work = reference.working(unembedding)
    rows, targets = sum(each.shape[0] for each in labels), sum(each.numel() for each in labels)
    leaves = zip((*hidden, unembedding, bias), buffers, wanted, strict=True)
    gradients = [x.new_empty(x.shape, dtype=formed_dtype(x, buffer)) for x, buffer, flag in leaves if flag]
    loss = unembedding.new_empty((rows,) if per_row else (), dtype=work)
    stats = unembedding.new_empty((3 if entropy else 2, rows), dtype=work)
    return loss, stats, labels[0].new_empty(rows), unembedding.new_empty(targets, dtype=work), gradients


def _save(ctx, inputs: Sequence[Any], gradients: list[Tensor]) -> None:
    ctx.op, hidden, unembedding, bias, labels, target_weight, row_weight, class_weight, buffers, *options = inputs
    *ctx.options, ctx.wanted, ctx.per_row = options
    ctx.backend = ctx.options[-2]
    ctx.jobs, ctx.formed = len(hidden), FormedGradients(gradients)
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
    run: Callable[..., Any] = _token_pass if needs_dispatcher(saved_tensors) else forward_and_gradients
    with torch.no_grad():
        return run(ctx.op, *tensors, *ctx.options, wanted, False)[-1]


def _gradients(ctx, needed: Sequence[bool], upstream: Tensor | None) -> list[Tensor | None]:
    """Of hidden..., unembedding and bias; `needed` of them."""
    wanted, delivered = [False] * (ctx.jobs + 2), []
    if upstream is not None:
        saved = ctx.saved_tensors  # read once: checkpointing allows no second time
        if ctx.per_row:
            wanted = needed
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
        delivered = deliver(anchors, ctx.op, ctx.backend, gradients, rest, inputs, buffers)
    ready = iter(delivered)
    return [next(ready) if flag else None for flag in wanted]


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The pass where nothing but autograd watches."""

    @staticmethod
    def forward(ctx, inputs: Sequence[Any], *_leaves: Tensor | None) -> tuple[Tensor, ...]:
        *outputs, gradients = forward_and_gradients(*inputs)
        _save(ctx, inputs, gradients)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, ctx.needs_input_grad[1:], upstream)


def _save_traced(ctx, inputs, output) -> None:
    _save(ctx, inputs, output[-1])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    # autograd expects a list of None for a list of tensors, and one None for anything else
    tensors = [isinstance(x, list) and all(isinstance(each, Tensor) for each in x) for x in inputs[4:]]
    ctx.without = [[None] * len(x) if flag else None for x, flag in zip(inputs[4:], tensors, strict=True)]


def _differentiate_traced(ctx, upstream: Tensor | None, *_):
    _, of_hidden, *of_head = ctx.needs_input_grad[:4]
    *d_hidden, d_weight, d_bias = _gradients(ctx, [*of_hidden, *of_head], upstream)
    return None, d_hidden, d_weight, d_bias, *ctx.without


_token_pass.register_vmap(refuse_vmap())
_token_pass.register_autograd(_differentiate_traced, setup_context=_save_traced)
