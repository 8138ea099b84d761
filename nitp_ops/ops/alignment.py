"""alignment: a distance between rows, with gradients to both sides, and the table of distances.

The gradients stand in csrc/formulas/alignment.h; the equations in reference.alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..core import checks
from ..core.chunking import Rows, chunks, whole_or_chunk
from ..core.dispatch import needs_dispatcher, plain_function
from ..kernels import select
from .gradients import refuse_double_backward, refuse_vmap
from .reference_rows import of_active_rows

_OP = "alignment"

#: Name -> number of the distance in csrc/formulas/alignment.h.
DISTANCES = {"cosine": 0, "mse": 1, "smooth_l1": 2, "kl": 3}


class AlignmentStats(NamedTuple):
    """Detached per-row values, float32 (float64 for float64), shaped like the rows; zeros where a
    row is invalid."""

    loss: Tensor
    cosine: Tensor
    prediction_norm: Tensor
    target_norm: Tensor


def alignment(
    prediction: Tensor,
    target: Tensor,
    *,
    distance: str = "cosine",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Per-row distance between predictions p and targets z, fused forward and backward.

    | distance | loss of a row |
    | --- | --- |
    | cosine | ``1 - p.z / (|p| |z|)``, each norm clamped at eps; no gradient to a clamped side |
    | mse | ``mean (p - z)^2`` |
    | smooth_l1 | ``mean h(p - z)``, ``h(x) = x^2/2`` where ``|x| < 1``, else ``|x| - 1/2`` |
    | kl | ``sum softmax(z) (log softmax(z) - log softmax(p))`` |

    A cosine is that of the directions however large the numbers are: no square overflows.

    Under torch.compile each new value of eps compiles anew, and past
    ``torch._dynamo.config.recompile_limit`` values (8 unless set) runs eagerly, see
    `linear_cross_entropy`.

    Args:
        prediction, target: ``[..., D]``, one shape and device; float64, float32, bfloat16 or
            float16, each its own dtype (on CUDA float64 meets only float64). Both get gradients;
            detach the target to stop its gradient.
        distance: the row of the table above.
        eps: lower bound of each norm (cosine).
        backend: None (the device decides), "native", "triton", "torch" or "reference".

    Returns:
        ``[...]``, float32 (float64 when either input is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or an unknown
            distance.
        BackendError: the requested backend does not serve this device.

    Example:
        >>> import torch, nitp_ops
        >>> nitp_ops.alignment(torch.ones(2, 4), torch.ones(2, 4)).tolist()
        [0.0, 0.0]

    Source: the distances of NITP's ablation table, arXiv 2605.24956.
    """
    checks.is_float(_OP, "prediction", prediction)
    checks.is_float(_OP, "target", target)
    checks.has_dim(_OP, "prediction", prediction, 1, "[..., D]")
    checks.has_shape(_OP, "target", target, prediction.shape, "prediction's")
    checks.same_device(_OP, "target", target, "prediction", prediction)
    checks.one_of(_OP, "distance", distance, tuple(DISTANCES))
    eps = checks.number(
        _OP, "eps", eps, least=0.0, open_end=True, dtype=reference.working(prediction, target)
    )
    chosen = select.select_backend(_OP, prediction.device, backend)
    if chosen == "reference":

        def formula(active: Tensor | None, p: Tensor, z: Tensor) -> Tensor:
            if active is None:
                return reference.alignment(p, z, distance=distance, eps=eps)
            found = reference.alignment(p[active], z[active], distance=distance, eps=eps)
            return found.new_zeros(active.shape).masked_scatter(active, found)

        return of_active_rows(formula, prediction, target)
    checks.plain_autograd(_OP, prediction, target)
    run: Callable[..., Tensor] = _forward if needs_dispatcher((prediction, target)) else _plain
    return run(prediction, target, DISTANCES[distance], eps, chosen)


def forward(prediction: Tensor, target: Tensor, distance: int, eps: float, backend: str) -> Tensor:
    p, z = Rows(prediction), Rows(target)
    dtype = reference.working(prediction, target)
    stats = torch.empty(4, p.count, dtype=dtype, device=prediction.device)
    for part in chunks(slice(0, p.count), whole_or_chunk(p, z)):
        select.row_kernels(backend).alignment_rows_(
            p.dense(part),
            z.dense(part),
            None,
            None,
            stats[:, part],
            None,
            None,
            distance,
            eps,
            False,
        )
    return stats[0].view(p.shape).clone()


_forward = torch.library.custom_op("nitp_ops::alignment", mutates_args=())(forward)


@_forward.register_fake
def _(prediction: Tensor, target: Tensor, distance: int, eps: float, backend: str) -> Tensor:
    return prediction.new_empty(prediction.shape[:-1], dtype=reference.working(prediction, target))


def backward(
    prediction: Tensor,
    target: Tensor,
    upstream: Tensor,
    distance: int,
    eps: float,
    wants_target: bool,
    backend: str,
) -> list[Tensor]:
    """[d_prediction] or, with wants_target, [d_prediction, d_target]."""
    p, z = Rows(prediction), Rows(target)
    shape = (p.count, prediction.shape[-1])
    d_prediction = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    d_target = (
        torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if wants_target
        else None
    )
    scale = upstream.reshape(-1).contiguous()
    stats = torch.empty(4, p.count, dtype=scale.dtype, device=scale.device)
    for part in chunks(slice(0, p.count), whole_or_chunk(p, z)):
        into = (
            d_prediction.view(shape)[part],
            None if d_target is None else d_target.view(shape)[part],
        )
        select.row_kernels(backend).alignment_rows_(
            p.dense(part),
            z.dense(part),
            None,
            scale[part],
            stats[:, part],
            *into,
            distance,
            eps,
            True,
        )
    return [d_prediction] if d_target is None else [d_prediction, d_target]


_backward = torch.library.custom_op("nitp_ops::alignment_backward", mutates_args=())(backward)


@_backward.register_fake
def _(
    prediction: Tensor,
    target: Tensor,
    upstream: Tensor,
    distance: int,
    eps: float,
    wants_target: bool,
    backend: str,
) -> list[Tensor]:
    d_prediction = prediction.new_empty(prediction.shape)
    return [d_prediction, target.new_empty(target.shape)] if wants_target else [d_prediction]


def _save(ctx, inputs, output) -> None:
    prediction, target, ctx.distance, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(prediction, target)


def _differentiate(ctx, upstream: Tensor):
    tensors = *ctx.saved_tensors, upstream
    run: Callable[..., Any] = (
        _backward if torch.is_grad_enabled() or needs_dispatcher(tensors) else backward
    )
    wants_prediction, wants_target = ctx.needs_input_grad[:2]
    gradients = run(*tensors, ctx.distance, ctx.eps, wants_target, ctx.backend)
    return (
        gradients[0] if wants_prediction else None,
        gradients[1] if wants_target else None,
        None,
        None,
        None,
    )


_plain = plain_function("AlignmentFunction", forward, _save, _differentiate)
_forward.register_vmap(refuse_vmap(_OP))
_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(refuse_double_backward(_OP))
