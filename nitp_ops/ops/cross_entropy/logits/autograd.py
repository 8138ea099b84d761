"""Autograd of cross_entropy: the row kernel over logits that exist, as a plain autograd.Function
and as a custom op.

The forward pass reads the logits. The backward pass runs the row kernel over a copy of them, or
over the logits themselves, with the upstream gradient among the row weights: one gradient of the
logits' dtype (or none), one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .... import reference
from ....core import checks
from ....core.chunking import COPY_BYTES_ON_GPU, LEAST_BYTES, Rows, chunks, rows_of
from ....core.dispatch import needs_dispatcher, plain_function
from ....kernels import select
from ...gradients import refuse_double_backward, refuse_vmap
from ..labelled_rows import flat_rows, prepare, summed
from ..stats import RowValues
from ..term import CrossEntropyTerm

_OP = "cross_entropy"


class _Rows:
    """The row kernel over logits [..., V] of one term."""

    def __init__(
        self, logits: Tensor, bias: Tensor | None, term: CrossEntropyTerm, ignore_index: int,
        softcap: float, logit_scale: float, backend: str,
    ) -> None:  # fmt: skip
        work = reference.working(logits)
        self.source, self.kernels, self.term = Rows(logits), select.row_kernels(backend), term
        self.bias = None if bias is None else bias.to(work).contiguous()
        self.ignore_index, self.softcap, self.logit_scale = ignore_index, softcap, logit_scale
        self.rows = flat_rows(term, ignore_index)

    def values(self, fields: int) -> RowValues:
        """Uninitialised values of all rows."""
        labels = self.rows.labels
        count, targets = labels.shape
        work = reference.working(self.term.hidden)
        stats = torch.empty((fields, count), dtype=work, device=labels.device)
        return RowValues(stats, labels.new_empty(count), stats.new_empty(count, targets))

    def scale(self, values: RowValues, mean: bool, normalizer: Tensor | None) -> Tensor:
        """[N]; refuses labels outside [0, V), and writes the values of the rows left out."""
        scale = values.stats.new_empty(self.source.count)
        prepare(
            self.kernels, _OP, self.term, self.rows, self.ignore_index, self.source.width,
            mean=mean, normalizer=normalizer, scale=scale, values=values,
        )  # fmt: skip
        return scale

    def run(self, logits: Tensor, part: slice, scale: Tensor | None, values: RowValues) -> None:
        """Values of the rows `part`, whose logits these are; with a scale [N] the gradient in their
        place."""
        weight, term = self.rows.target_weight, self.term
        self.kernels.cross_entropy_rows_(
            logits, rows_of(self.rows.labels, part),
            None if weight is None else rows_of(weight, part), self.bias,
            self.rows.smoothing_weight, None if scale is None else rows_of(scale, part),
            values.stats[:, part], rows_of(values.target_logit, part),
            rows_of(values.prediction, part), self.ignore_index, term.several, term.label_smoothing,
            term.z_loss, self.softcap, self.logit_scale, scale is not None,
        )  # fmt: skip

    def chunks(self) -> Iterator[slice]:
        """Chunks of rows: a copy of one stays small beside the logits."""
        source = self.source
        size = LEAST_BYTES if checks.host_reads(source.tensor.device) else COPY_BYTES_ON_GPU
        step = max(1, size // (source.width * source.tensor.itemsize))
        for part in chunks(slice(0, source.count), step):
            assert isinstance(part, slice)
            yield part


def _gradients(
    given: _Rows, logits: Tensor, scale: Tensor, want_bias: bool, in_place: bool
) -> list[Tensor]:
    """[d_logits] or, with want_bias, [d_logits, d_bias], each row times its scale; in_place: over
    the logits."""
    source, columns = given.source, logits.shape[-1]
    if in_place:
        d_logits = logits.detach()
    else:
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_bias = scale.new_zeros(columns) if want_bias else None
    values = given.values(2)
    for part in given.chunks():
        chunk = source.of_chunk(part)
        if not in_place:
            chunk = d_logits.view(-1, columns)[part].copy_(chunk)
        given.run(chunk, part, scale, values)
        if d_bias is not None:
            d_bias += chunk.sum(0, dtype=d_bias.dtype)
    return [d_logits] if d_bias is None else [d_logits, d_bias]


def _forward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    target_weight: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    backend: str,
    reduction: str,
    normalizer: Tensor | None,
    entropy: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, prediction, target logits, scale); in_place steers the backward pass."""
    of_rows = token_weight, target_weight, class_weight, label_smoothing, z_loss
    term = _term(logits, labels, *of_rows)
    given = _Rows(logits, bias, term, ignore_index, softcap, logit_scale, backend)
    values = given.values(3 if entropy else 2)
    scale = given.scale(values, reduction == "mean" and normalizer is None, normalizer)
    for part in given.chunks():
        given.run(given.source.dense(part), part, None, values)
    if reduction == "none":
        loss = torch.where(scale == 0, 0, scale * values.stats[0]).view(logits.shape[:-1])
    else:
        loss = summed(given.kernels, values.stats, scale).to(scale.dtype)
    return loss, values.stats, values.prediction, values.target_logit.view(-1), scale


def _term(logits: Tensor, labels: Tensor, *of_rows: Any) -> CrossEntropyTerm:
    return CrossEntropyTerm(logits, labels, **dict(zip(_OF_ROWS, of_rows, strict=True)))


_OF_ROWS = ("token_weight", "target_weight", "class_weight", "label_smoothing", "z_loss")
_forward_op = torch.library.custom_op("nitp_ops::cross_entropy", mutates_args=())(_forward)


@_forward_op.register_fake
def _(
    logits, bias, labels, token_weight, target_weight, class_weight, label_smoothing, z_loss,
    ignore_index, softcap, logit_scale, backend, reduction, normalizer, entropy, in_place,
):  # fmt: skip
    count, work = math.prod(logits.shape[:-1]), reference.working(logits)
    loss = logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=work)
    stats = logits.new_empty((3 if entropy else 2, count), dtype=work)
    scale, target_logit = stats.new_empty(count), stats.new_empty(labels.numel())
    return loss, stats, labels.new_empty(count), target_logit, scale


@torch.library.custom_op("nitp_ops::cross_entropy_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    target_weight: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    backend: str,
    scale: Tensor,
    want_bias: bool,
) -> list[Tensor]:
    term = _term(logits, labels, None, target_weight, class_weight, label_smoothing, z_loss)
    given = _Rows(logits, bias, term, ignore_index, softcap, logit_scale, backend)
    return _gradients(given, logits, scale, want_bias, in_place=False)


@_backward_op.register_fake
def _(
    logits, bias, labels, target_weight, class_weight, label_smoothing, z_loss, ignore_index,
    softcap, logit_scale, backend, scale, want_bias,
):  # fmt: skip
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not want_bias:
        return [d_logits]
    return [d_logits, scale.new_empty(logits.shape[-1])]


def _save(ctx, inputs, output) -> None:
    logits, bias, labels, _, target_weight, class_weight, *options, _, _, _, ctx.in_place = inputs
    ctx.options = options  # label_smoothing to backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    scale = output[-1].detach()
    ctx.save_for_backward(logits, bias, labels, target_weight, class_weight, scale)


def _differentiate(ctx, upstream: Tensor | None, *_):
    d_logits = d_bias = None
    want_logits, want_bias = ctx.needs_input_grad[:2]
    if upstream is not None:
        # once: checkpointing
        saved = logits, bias, labels, target_weight, class_weight, scale = ctx.saved_tensors
        inactive = (scale == 0) | (upstream.reshape(-1) == 0)
        row_scale = torch.where(inactive, 0, scale * upstream.reshape(-1))
        # eager only: tracing runs this once for many backward passes, and a graph must not write to
        # what it is given
        on_device = type(upstream) is Tensor and upstream.device.type != "meta"
        eager = on_device and not torch.is_grad_enabled()
        in_place = ctx.in_place and want_logits and eager
        if not in_place and (torch.is_grad_enabled() or needs_dispatcher((upstream, *saved))):
            tensors = logits, bias, labels, target_weight, class_weight
            d_logits, *of_bias = _backward_op(*tensors, *ctx.options, row_scale, want_bias)
        else:
            label_smoothing, z_loss, *rest = ctx.options
            term = _term(logits, labels, None, target_weight, class_weight, label_smoothing, z_loss)
            given = _Rows(logits.detach(), bias, term, *rest)
            d_logits, *of_bias = _gradients(given, logits, row_scale, want_bias, in_place)
        if in_place:
            torch.autograd.graph.increment_version(logits)
        d_bias = None
        if want_bias:
            d_bias = of_bias[0].to(bias.dtype)
    return d_logits if want_logits else None, d_bias, *[None] * 14


def logits_pass(*given: Any) -> tuple[Tensor, RowValues]:
    """(loss, values) of the arguments of `_forward`."""
    tensors = given[:6]
    run = _forward_op if needs_dispatcher(tensors) else _forward_function
    loss, stats, prediction, target_logit, _ = run(*given)
    return loss, RowValues(stats, prediction, target_logit)


_forward_function = plain_function("CrossEntropyFunction", _forward, _save, _differentiate)
_forward_op.register_vmap(refuse_vmap(_OP))
_forward_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(refuse_double_backward(_OP))
