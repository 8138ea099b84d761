"""cross_entropy: the loss of logits that exist already, by the row kernel of `linear_cross_entropy`.

The forward pass reads the logits. The backward pass runs the row kernel over a copy of them, or over the logits
themselves, with the upstream gradient among the row weights: one gradient of the logits' dtype (or none), one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, reference, rows
from ._chunks import COPY_BYTES_ON_GPU, LEAST_BYTES, Rows, chunks
from ._devices import sum_dtype
from ._dispatch import needs_dispatcher, plain_function
from ._gradients import refuse_double_backward, refuse_vmap
from ._head_job import (
    HeadJob,
    check_targets,
    counted,
    labelled,
    reference_loss,
    stats_of,
    tensors_of,
    transform_of,
)
from ._linear_cross_entropy import check_outputs
from ._token_job import RowValues, present

_OP = "cross_entropy"


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    inplace_gradient: bool = False,
    return_stats: bool | str = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of logits that exist already; `linear_cross_entropy` never makes them whole and takes less memory.

    ``z = cap * tanh(scale * (logits + b) / cap)``; the loss of a row and every option that is not named below mean
    what they mean in `linear_cross_entropy`.

    No copy of the logits is made in float32. The backward pass makes one gradient of the logits' shape and dtype, or,
    with inplace_gradient, none: it overwrites the logits.

    Args:
        logits: ``[..., V]`` float64, float32, bfloat16 or float16, any strides.
        labels: ``[...]`` int64 in ``[0, V)``, or `ignore_index`; with target_weight ``[..., K]``.
        inplace_gradient: the backward pass writes the gradient where the logits are, so that these hold it afterwards.
            Who reads the logits after that reads the gradient; autograd refuses a second backward pass, and any other
            that needs the logits ("modified by an inplace operation"). Rows must be dense and must not overlap. Under
            torch.compile and create_graph=True the gradient has memory of its own.

    Returns:
        The loss in float32 (float64 for float64), 0-d or ``[...]``; with return_stats ``(loss, stats)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a label outside ``[0, V)`` that is not `ignore_index`.
        BackendError: the backend that was asked for does not serve this device.
        NotImplementedError: double backward, forward mode, torch.func transforms.

    Example:
        >>> import torch, nitp_ops
        >>> labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
        >>> round(nitp_ops.cross_entropy(torch.zeros(2, 3, 16), labels).item(), 4)  # ln 16
        2.7726

    Source: as of `linear_cross_entropy`.
    """
    _check.is_plain(_OP, "logits", logits)
    _check.is_float(_OP, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{_OP}: logits has shape {tuple(logits.shape)}, expected [..., V] with V >= 1")
    columns, work = logits.shape[-1], reference.working(logits)
    cap, scale = transform_of(_OP, "logits", logits, columns, bias, ignore_index, softcap, logit_scale)
    check_outputs(_OP, reduction, normalizer, return_stats, work)
    job = HeadJob(logits, labels, token_weight, label_smoothing, z_loss, target_weight, class_weight)
    check_targets(_OP, job, "logits", columns, ignore_index)
    chosen = rows.choose(_OP, logits.device, backend)
    _check_in_place(inplace_gradient, logits, chosen)
    if chosen == "reference":
        transform = {"bias": bias, "ignore_index": ignore_index, "softcap": softcap, "logit_scale": scale}
        return reference_loss(job, None, reduction, normalizer, return_stats, **transform)
    _check.plain_autograd(_OP, bias, *tensors_of(job))
    flat = labelled(_OP, job, ignore_index)
    weight = flat.row_weight
    if reduction == "mean":
        weight = weight / (counted(flat, ignore_index) if normalizer is None else normalizer)
    kernel = _Kernel(
        None if bias is None else bias.to(work).contiguous(), flat.labels, flat.target_weight, flat.class_weight,
        flat.many, flat.label_smoothing, flat.z_loss, ignore_index, cap, scale, chosen,
    )  # fmt: skip
    run: Callable[..., Any] = _forward if needs_dispatcher((logits, *kernel[:4])) else _plain
    loss, stats, prediction, target_logit = run(
        logits, *kernel, weight, reduction == "none", return_stats == "entropy", inplace_gradient
    )
    loss = loss.view(logits.shape[:-1]) if reduction == "none" else loss
    values = RowValues(stats, prediction, target_logit.view(-1))
    return (loss, stats_of(values, [job])[0]) if return_stats else loss


def _check_in_place(inplace_gradient: object, logits: Tensor, backend: str) -> None:
    if not isinstance(inplace_gradient, bool):
        raise TypeError(f"{_OP}: inplace_gradient is {inplace_gradient!r}, expected True or False")
    if not inplace_gradient:
        return
    if backend == "reference":
        raise ValueError(
            f"{_OP}: inplace_gradient=True came with backend='reference', expected False (it leaves gradients to "
            "autograd)"
        )
    held = Rows(logits)
    row, column = held.tensor.stride() if held.flat else (0, 0)
    if logits.numel() == 0 or ((held.width == 1 or column == 1) and (held.count == 1 or row >= held.width)):
        return
    raise ValueError(
        f"{_OP}: inplace_gradient=True came with logits of strides {logits.stride()}, expected rows that do not "
        "overlap and are dense, as those of logits.contiguous()"
    )


class _Kernel(NamedTuple):
    """The row kernel and what it is given beside logits [N, V]; labels and target_weight [N, K]."""

    bias: Tensor | None
    labels: Tensor
    target_weight: Tensor | None
    class_weight: Tensor | None
    many: bool
    label_smoothing: float
    z_loss: float
    ignore_index: int
    softcap: float
    logit_scale: float
    backend: str

    def __call__(self, logits: Tensor, part: slice, scale: Tensor | None, values: RowValues) -> None:
        """Values of the rows `part`, whose logits these are; with a scale per row the gradient in their place."""
        labels, weight = self.labels[part].contiguous(), self.target_weight
        weight = None if weight is None else weight[part].contiguous()
        rows.kernels(self.backend).cross_entropy_rows_(
            logits, labels, weight, self.bias, self.class_weight, scale, values.stats, values.target_logit,
            values.prediction, self.ignore_index, self.many, self.label_smoothing, self.z_loss, self.softcap,
            self.logit_scale, scale is not None,
        )  # fmt: skip

    def values(self, work: torch.dtype, fields: int, count: int) -> RowValues:
        """Room for `count` rows."""
        stats = torch.empty(fields, count, dtype=work, device=self.labels.device)
        return RowValues(stats, self.labels.new_empty(count), stats.new_empty(count, self.labels.shape[1]))


def _parts(source: Rows) -> Iterator[slice]:
    """Chunks of rows: a copy of one stays small beside the logits."""
    size = LEAST_BYTES if _check.host_reads(source.tensor.device) else COPY_BYTES_ON_GPU
    step = max(1, size // (source.width * source.tensor.itemsize))
    for part in chunks(slice(0, source.count), step):
        assert isinstance(part, slice)
        yield part


def _gradients(kernel: _Kernel, logits: Tensor, scale: Tensor, want_bias: bool, in_place: bool) -> list[Tensor]:
    """[d_logits] or, with want_bias, [d_logits, d_bias], each row times its scale; in_place: over the logits."""
    logits, columns = logits.detach(), logits.shape[-1]
    source = Rows(logits)
    d_logits = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_bias = scale.new_zeros(columns) if want_bias else None
    for part in _parts(source):
        chunk = source.take(part) if in_place else d_logits.view(-1, columns)[part].copy_(source.take(part))
        kernel(chunk, part, scale[part].contiguous(), kernel.values(scale.dtype, 2, len(chunk)))
        if d_bias is not None:
            d_bias += chunk.sum(0, dtype=d_bias.dtype)
    return [d_logits] if d_bias is None else [d_logits, d_bias]


def forward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    target_weight: Tensor | None,
    class_weight: Tensor | None,
    many: bool,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    backend: str,
    row_weight: Tensor,
    per_row: bool,
    entropy: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, stats, prediction, target logits); in_place steers the backward pass."""
    options = label_smoothing, z_loss, ignore_index, softcap, logit_scale, backend
    kernel = _Kernel(bias, labels, target_weight, class_weight, many, *options)
    source, device = Rows(logits), logits.device
    if _check.host_reads(device):
        _check.labels_inside(_OP, "labels", labels, ignore_index, source.width, many)
    values = kernel.values(row_weight.dtype, 3 if entropy else 2, source.count)
    stats, prediction, target_logit = values
    for part in _parts(source):
        kernel(source.dense(part), part, None, RowValues(stats[:, part], prediction[part], target_logit[part]))
    keep = present(labels, ignore_index, many)
    prediction.masked_fill_(~keep, -1)
    weight = torch.where(keep, row_weight, 0)
    loss = torch.where(weight == 0, 0, weight * stats[0])
    return loss if per_row else loss.sum(dtype=sum_dtype(device)).to(loss.dtype), stats, prediction, target_logit


_forward = torch.library.custom_op("nitp_ops::cross_entropy", mutates_args=())(forward)


@_forward.register_fake
def _(logits, bias, labels, target_weight, class_weight, many, label_smoothing, z_loss, ignore_index, softcap,
      logit_scale, backend, row_weight, per_row, entropy, in_place):  # fmt: skip
    count, targets = labels.shape
    loss = row_weight.new_empty((count,) if per_row else ())
    stats = row_weight.new_empty((3 if entropy else 2, count))
    return loss, stats, labels.new_empty(count), row_weight.new_empty((count, targets))


@torch.library.custom_op("nitp_ops::cross_entropy_backward", mutates_args=())
def _backward(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    target_weight: Tensor | None,
    class_weight: Tensor | None,
    many: bool,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    backend: str,
    scale: Tensor,
    want_bias: bool,
) -> list[Tensor]:
    options = label_smoothing, z_loss, ignore_index, softcap, logit_scale, backend
    kernel = _Kernel(bias, labels, target_weight, class_weight, many, *options)
    return _gradients(kernel, logits, scale, want_bias, in_place=False)


@_backward.register_fake
def _(logits, bias, labels, target_weight, class_weight, many, label_smoothing, z_loss, ignore_index, softcap,
      logit_scale, backend, scale, want_bias):  # fmt: skip
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return [d_logits, scale.new_empty(logits.shape[-1])] if want_bias else [d_logits]


def _save(ctx, inputs, output) -> None:
    logits, bias, labels, target_weight, class_weight, *ctx.options, row_weight, _, _, ctx.in_place = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, bias, labels, target_weight, class_weight, row_weight)


def _differentiate(ctx, upstream: Tensor | None, *_):
    d_logits = d_bias = None
    want_logits, want_bias = ctx.needs_input_grad[:2]
    if upstream is not None:
        saved = logits, *tensors, row_weight = ctx.saved_tensors  # read once: checkpointing allows no second time
        inactive = (row_weight == 0) | (upstream == 0)
        scale = torch.where(inactive, 0, row_weight * upstream)
        # eager only: tracing runs this once for many backward passes, and a graph must not write to what it is given
        eager = type(upstream) is Tensor and upstream.device.type != "meta" and not torch.is_grad_enabled()
        in_place = ctx.in_place and want_logits and eager
        if not in_place and (torch.is_grad_enabled() or needs_dispatcher((upstream, *saved))):
            d_logits, *of_bias = _backward(logits, *tensors, *ctx.options, scale, want_bias)
        else:
            d_logits, *of_bias = _gradients(_Kernel(*tensors, *ctx.options), logits, scale, want_bias, in_place)
        if in_place:
            torch.autograd.graph.increment_version(logits)
        d_bias = of_bias[0] if want_bias else None
    return d_logits if want_logits else None, d_bias, *[None] * 14


_plain = plain_function("CrossEntropyFunction", forward, _save, _differentiate)
_forward.register_vmap(refuse_vmap(_OP))
_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(refuse_double_backward(_OP))
