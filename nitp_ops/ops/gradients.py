"""For ops whose forward pass computes the gradients: a backward pass that only multiplies them by
the upstream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..core import checks
from ..kernels import select


@torch.library.custom_op("nitp_ops::scale_gradients", mutates_args=())
def scale_gradients(
    gradients: list[Tensor], upstream: Tensor, inputs: list[Tensor],
    double_backward_inputs: list[Tensor], backend: str, op: str,
) -> list[Tensor]:  # fmt: skip
    """upstream * gradient for each in its input's dtype, computed in float32 and rounded once, in
    one pass; an upstream of zero writes zeros, so that a NaN under it stays out.

    The double_backward_inputs (what the gradients depend on) are not read: they connect the graph,
    so that a double backward is refused here, where constants would be silently wrong."""
    scaled = []
    for gradient, like in zip(gradients, inputs, strict=True):
        out = torch.empty_like(gradient, dtype=like.dtype)
        if gradient.numel() > 0:
            of_rows = _rows(gradient), upstream.to(reference.working(gradient)), _rows(out)
            select.row_kernels(backend).scale_rows_(*of_rows)
        scaled.append(out)
    return scaled


def _rows(dense: Tensor) -> Tensor:
    return dense.view(-1, dense.shape[-1])


def power_of_two(scale: Tensor) -> Tensor:
    """0-d, near the largest weight of a row: float16 gradients are computed without it, else
    they would underflow."""
    return reference.power_of_two(torch.cat([scale, scale.new_zeros(1)]).abs().amax(0))


def scale_in_place(kernels: Any, gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, a 0-d tensor: one costs nothing, zero leaves no NaN."""
    if gradient.numel() > 0:
        # named twice: allow_mutation_on_saved_tensors looks up what a schema says is written
        dense = _rows(gradient)
        kernels.scale_rows_(dense, factor.to(reference.working(gradient)), dense)


@scale_gradients.register_fake
def _(gradients, upstream, inputs, double_backward_inputs, backend, op):
    return [
        torch.empty_like(gradient, dtype=like.dtype)
        for gradient, like in zip(gradients, inputs, strict=True)
    ]


@torch.library.custom_op("nitp_ops::add_gradients", mutates_args={"buffers"})
def add_gradients(
    buffers: list[Tensor], gradients: list[Tensor], upstream: Tensor, backend: str
) -> None:
    """buffer += upstream * gradient for each, in one pass; the gradients have the buffers' dtypes.
    An upstream of zero adds nothing, not even a NaN."""
    for buffer, gradient in zip(buffers, gradients, strict=True):
        if buffer.numel() > 0:
            of_rows = _rows(buffer), _rows(gradient), upstream.to(buffer.dtype)
            select.row_kernels(backend).accumulate_rows_(*of_rows)


def refuse_double_backward(op: str) -> Callable[..., None]:
    """The autograd formula of a backward op: a refusal by name."""

    def refuse(ctx, *upstream) -> None:
        raise NotImplementedError(
            f"{getattr(ctx, 'op', op)}: double backward is not supported, expected first "
            "derivatives only (backend='reference' has them all)"
        )

    return refuse


def refuse_vmap(op: str | int) -> Callable[..., None]:
    """The batching rule of an op: a refusal by name; a number is the position of the argument that
    holds the name."""

    def refuse(info, in_dims, *arguments) -> None:
        name = arguments[op] if isinstance(op, int) else op
        raise NotImplementedError(
            f"{name}: torch.vmap is not supported, expected a batched call (or backend='reference')"
        )

    return refuse


def _keep_name(ctx, inputs, output) -> None:
    ctx.op = inputs[-1]


scale_gradients.register_autograd(refuse_double_backward("fused loss"), setup_context=_keep_name)


def pending_dtype(tensor: Tensor, buffer: Tensor | None) -> torch.dtype:
    """In which dtype a gradient waits for its upstream: float16 would underflow, a buffer takes
    its own dtype."""
    if buffer is not None:
        return buffer.dtype
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _is_value(tensor: Tensor) -> bool:
    """Whether a backward pass computes with it now: not while tracing, whose tensors may be of a
    subclass."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


class PendingGradients:
    """Gradients of the forward pass that wait for the upstream of the backward pass.

    They are returned once and then dropped, so that memory holds no second copy of a weight
    gradient; a second backward pass recomputes them."""

    def __init__(self, gradients: Sequence[Any]):
        self.gradients: list[Any] | None = list(gradients)

    def pop(self, upstream: Tensor, recompute: Callable[[], list[Any]]) -> list[Any]:
        gradients = recompute() if self.gradients is None else self.gradients
        if _is_value(upstream):
            self.gradients = None
        return gradients


def scaled_gradients(
    double_backward_inputs: list[Tensor], op: str, backend: str,
    pending: Sequence[tuple[Tensor, Tensor, Tensor | None]], upstream: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """upstream * gradient in its input's dtype for each (gradient, input, buffer); None where the
    buffer gets it.

    upstream=None: it is in the gradients already. An eager upstream of exactly 1 costs nothing,
    another one a pass in place: nothing else refers to the gradients. Under create_graph they are
    tied to the double_backward_inputs, so that a double backward is refused by name."""
    if not pending:
        return []
    gradients, inputs, buffers = zip(*pending, strict=True)
    one = upstream is None
    eager = _is_value(gradients[0]) and (upstream is None or _is_value(upstream))
    if upstream is None:
        work = torch.promote_types(gradients[0].dtype, torch.float32)
        upstream = torch.ones((), dtype=work, device=gradients[0].device)
    given = [buffer for buffer in buffers if buffer is not None]
    if given:
        added = [gradient for gradient, _, buffer in pending if buffer is not None]
        add_gradients(given, added, upstream, backend)
    returned = [place for place, buffer in enumerate(buffers) if buffer is None]
    values = [gradients[place] for place in returned]
    leaves = [inputs[place] for place in returned]
    if torch.is_grad_enabled():
        values = scale_gradients(values, upstream, leaves, double_backward_inputs, backend, op)
    elif not one and eager:
        _scale_in_place(select.row_kernels(backend), values, upstream)
    elif not one:
        values = scale_gradients(values, upstream, leaves, [], backend, op)
    result: list[Tensor | None] = [None] * len(gradients)
    for place, value, leaf in zip(returned, values, leaves, strict=True):
        result[place] = value if value.dtype == leaf.dtype else value.to(leaf.dtype)
    return result


def _scale_in_place(kernels: Any, gradients: Sequence[Tensor], factor: Tensor) -> None:
    if checks.plain(factor) and factor.item() == 1:
        return
    for gradient in gradients:
        scale_in_place(kernels, gradient, factor)
