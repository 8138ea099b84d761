"""The custom op around the chunked algorithm of the token losses (`_token_chunks.py`), and its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, rows
from ._dispatch import needs_dispatcher
from ._gemm import WeightGemm, gemm_dtype, operand_dtype
from ._gradients import FormedGradients, deliver, formed_dtype, refuse_vmap
from ._packing import Packing, tensor_fields
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
    weight, bias = head.unembedding, head.bias
    logits = gemm_dtype(head.op, weight, head.logits_dtype)
    operands = logits
    if head.logits_dtype == torch.float32:  # and not autocast's dtype, which is that of the operands too
        operands = operand_dtype(weight.device.type, weight.dtype, [job.hidden.dtype for job in jobs], logits)
    forms = torch.is_grad_enabled() and not per_row
    jobs = [job._replace(wanted=forms and job.wanted) for job in jobs]
    whole = Head(
        op=head.op,
        backend=backend,
        unembedding=weight,
        bias=bias,
        buffer=head.weight_grad_out,
        ignore_index=head.ignore_index,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        chunk_bytes=head.chunk_bytes,
        dtype=operands,
        logits=logits,
        entropy=entropy,
        want_weight=forms and weight.requires_grad,
        want_bias=forms and bias is not None and bias.requires_grad,
        shard=head.shard,
    )
    hidden, labels = [job.hidden for job in jobs], [job.labels for job in jobs]
    if needs_dispatcher((*hidden, weight, bias, *labels)):
        loss, stats, prediction, target_logit, _ = _token_pass(*PACKING.pack(jobs, whole), per_row)
    else:
        outputs = LinearCrossEntropyFunction.apply(jobs, whole, per_row, *hidden, weight, bias)
        loss, stats, prediction, target_logit = outputs
    return loss, RowValues(stats.detach(), prediction, target_logit.detach())


def forward_and_gradients(
    jobs: list[Job], head: Head, per_row: bool, plain: bool
) -> tuple[Tensor, RowValues, list[Tensor | WeightGemm]]:
    """(loss, values, gradients); these of hidden..., unembedding, bias, as far as they are wanted (`Formed`)."""
    loss, row_weights, values, gradients = form(jobs, head, plain)
    if per_row:
        loss = torch.where(row_weights == 0, 0, row_weights * values.stats[0])
    return loss, values, gradients


PACKING = Packing(Job, Head)
_RETURNS = "(Tensor loss, Tensor stats, Tensor prediction, Tensor target_logit, Tensor[] gradients)"


@torch.library.custom_op("nitp_ops::token_pass", mutates_args=(), schema=PACKING.schema("bool per_row", _RETURNS))
def _token_pass(*packed):
    loss, values, gradients = forward_and_gradients(*PACKING.unpack(packed[:-1]), packed[-1], plain=False)
    return loss, *values, gradients


@_token_pass.register_fake
def _(*packed):
    (jobs, head), per_row = PACKING.unpack(packed[:-1]), packed[-1]
    weight, work = head.unembedding, reference.working(head.unembedding)
    # not len: it would make a dynamic number of rows a constant
    count, targets = sum(job.labels.shape[0] for job in jobs), sum(job.labels.numel() for job in jobs)
    gradients = [x.new_empty(x.shape, dtype=formed_dtype(x, buffer)) for x, buffer in _leaves(jobs, head)]
    loss = weight.new_empty((count,) if per_row else (), dtype=work)
    stats = weight.new_empty((3 if head.entropy else 2, count), dtype=work)
    return loss, stats, jobs[0].labels.new_empty(count), weight.new_empty(targets, dtype=work), gradients


def _leaves(jobs: Sequence[Job], head: Head) -> list[tuple[Tensor, Tensor | None]]:
    """Each input whose gradient is wanted, and the buffer that takes it."""
    leaves: list[tuple[Tensor | None, Tensor | None, bool]] = [(job.hidden, job.buffer, job.wanted) for job in jobs]
    leaves += [(head.unembedding, head.buffer, head.want_weight), (head.bias, None, head.want_bias)]
    return [(x, buffer) for x, buffer, wanted in leaves if wanted and x is not None]


#: What is saved. Not the buffers: each backward pass writes to them, which a saved tensor forbids.
_OF_JOB = tuple(name for name in tensor_fields(Job) if name != "buffer")
_OF_HEAD = tuple(name for name in tensor_fields(Head) if name != "buffer")


def _save(ctx, jobs: Sequence[Job], head: Head, per_row: bool, gradients: Sequence[Tensor | WeightGemm]) -> None:
    saved = [getattr(job, name) for job in jobs for name in _OF_JOB]
    ctx.save_for_backward(*saved, *(getattr(head, name) for name in _OF_HEAD))
    ctx.set_materialize_grads(False)
    ctx.jobs = [job._replace(**dict.fromkeys(_OF_JOB)) for job in jobs]
    ctx.head, ctx.per_row = head._replace(**dict.fromkeys(_OF_HEAD)), per_row
    ctx.formed = FormedGradients(gradients)


def _saved(ctx) -> tuple[list[Job], Head, list[Tensor]]:
    """What was saved; read once: checkpointing allows no second time."""
    tensors = ctx.saved_tensors
    rest = iter(tensors)
    jobs = [job._replace(**{name: next(rest) for name in _OF_JOB}) for job in ctx.jobs]
    return jobs, ctx.head._replace(**{name: next(rest) for name in _OF_HEAD}), [x for x in tensors if x is not None]


def _recompute(jobs: list[Job], head: Head, tensors: list[Tensor]) -> list[Tensor | WeightGemm]:
    with torch.no_grad():
        if needs_dispatcher(tensors):
            return _token_pass(*PACKING.pack(jobs, head), False)[-1]
        return forward_and_gradients(jobs, head, False, plain=True)[-1]


def _gradients(ctx, needed: Sequence[bool], upstream: Tensor | None) -> list[Tensor | None]:
    """Of hidden..., unembedding and bias; `needed` of them."""
    if upstream is None:
        return [None] * len(needed)
    jobs, head, tensors = _saved(ctx)
    if ctx.per_row:  # nothing was formed: the upstream enters the weights of the rows
        *of_jobs, want_weight, want_bias = needed
        weights = [job.row_weight * upstream for job in jobs]
        weighted = zip(jobs, weights, of_jobs, strict=True)
        jobs = [job._replace(row_weight=weight, wanted=wanted) for job, weight, wanted in weighted]
        head = head._replace(want_weight=want_weight, want_bias=want_bias)
        gradients = _recompute(jobs, head, tensors)
    else:
        gradients = ctx.formed.take(upstream, lambda: _recompute(jobs, head, tensors))
    rest, formed = None if ctx.per_row else upstream, list[Any]()
    for gradient, (leaf, buffer) in zip(gradients, _leaves(jobs, head), strict=True):
        if isinstance(gradient, WeightGemm):
            with torch.no_grad():  # also under create_graph: a buffer has no graph
                gradient.run(rest, rows.kernels(head.backend))
            head = head._replace(want_weight=False)
        else:
            formed.append((gradient, leaf, buffer))
    values, inputs, buffers = zip(*formed, strict=True) if formed else ((), (), ())
    anchors = [x for x in (*tensors, upstream) if x.requires_grad]
    delivered = iter(deliver(anchors, head.op, head.backend, values, rest, inputs, buffers))
    flags = [*(job.wanted for job in jobs), head.want_weight, head.want_bias]
    return [next(delivered) if flag else None for flag in flags]


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The pass where nothing but autograd watches."""

    @staticmethod
    def forward(ctx, jobs: list[Job], head: Head, per_row: bool, *_leaves: Tensor | None) -> tuple[Tensor, ...]:
        loss, values, gradients = forward_and_gradients(jobs, head, per_row, plain=True)
        _save(ctx, jobs, head, per_row, gradients)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    def backward(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        return None, None, None, *_gradients(ctx, ctx.needs_input_grad[3:], upstream)


def _save_traced(ctx, inputs, output) -> None:
    *packed, per_row = inputs
    # detached: an op's own outputs would tie its context into a reference cycle
    _save(ctx, *PACKING.unpack(packed), per_row, [gradient.detach() for gradient in output[-1]])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    # autograd expects a list of None for a list of tensors, and one None for anything else
    tensors = [isinstance(x, list) and all(isinstance(each, Tensor) for each in x) for x in inputs]
    ctx.without = [[None] * len(x) if flag else None for x, flag in zip(inputs, tensors, strict=True)]


#: Where the op takes hidden..., unembedding and bias.
_PLACES = tuple([*Job._fields, *Head._fields].index(name) for name in ("hidden", "unembedding", "bias"))


def _differentiate_traced(ctx, upstream: Tensor | None, *_):
    of_hidden, *of_head = (ctx.needs_input_grad[place] for place in _PLACES)
    *d_hidden, d_weight, d_bias = _gradients(ctx, [*of_hidden, *of_head], upstream)
    gradients = list(ctx.without)
    for place, gradient in zip(_PLACES, (d_hidden, d_weight, d_bias), strict=True):
        gradients[place] = gradient
    return tuple(gradients)


_token_pass.register_vmap(refuse_vmap(len(Job._fields)))
_token_pass.register_autograd(_differentiate_traced, setup_context=_save_traced)
