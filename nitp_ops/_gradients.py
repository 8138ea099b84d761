"""What the ops with gradients formed in the forward pass share: the backward that only multiplies by the upstream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _check


def gemm_dtype(op: str, weight: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on (it leaves float64 alone), else the weight's."""
    device = weight.device.type
    available = torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return weight.dtype
    dtype = torch.get_autocast_dtype(device)
    if dtype not in _check.FLOATS:
        raise TypeError(f"{op}: autocast is {_check.name_of(dtype)}, expected bfloat16 (or no autocast)")
    return dtype


@torch.library.custom_op("nitp_ops::scale_gradients", mutates_args=())
def scale_gradients(gradients: list[Tensor], upstream: Tensor, anchors: list[Tensor], op: str) -> list[Tensor]:
    """upstream * gradient for each, with the product formed in float32 and rounded once.

    The anchors (the inputs that the gradients depend on) are not read: through them a double backward finds its way
    here and is refused, where constants would be silently wrong."""
    scaled = []
    for gradient in gradients:
        out = torch.empty_like(gradient)
        flat_in, flat_out = gradient.view(-1), out.view(-1)
        for first in range(0, flat_in.numel(), 2**18):  # a float32 copy of a slice, never of the whole gradient
            part = slice(first, first + 2**18)
            flat_out[part] = flat_in[part].to(upstream.dtype) * upstream
        scaled.append(out)
    return scaled


@scale_gradients.register_fake
def _(gradients: list[Tensor], upstream: Tensor, anchors: list[Tensor], op: str) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def refuse_double_backward(op: str) -> Callable[..., None]:
    """The autograd formula of a backward op: a refusal by name."""

    def refuse(ctx, *upstream) -> None:
        raise NotImplementedError(
            f"{getattr(ctx, 'op', op)}: double backward came, expected first derivatives only "
            "(backend='reference' has them all)"
        )

    return refuse


def refuse_vmap(op: str) -> Callable[..., None]:
    """The batching rule of an op: a refusal by name."""

    def refuse(info, in_dims, *arguments) -> None:
        raise NotImplementedError(f"{op}: vmap came, expected a batched call (or backend='reference')")

    return refuse


def _keep_name(ctx, inputs, output) -> None:
    ctx.op = inputs[-1]


scale_gradients.register_autograd(refuse_double_backward("fused loss"), setup_context=_keep_name)


class FormedGradients:
    """Gradients that the forward pass formed, for the backward pass to hand out, times the upstream.

    They are handed out once and then forgotten, so that no second copy of a weight gradient lives; a second backward
    pass recomputes them. An eager upstream of exactly 1 costs nothing."""

    def __init__(self, op: str, gradients: Sequence[Tensor]):
        self.op = op
        # detached: an op's own outputs would tie its context into a reference cycle
        self.gradients: list[Tensor] | None = [gradient.detach() for gradient in gradients]

    def times(self, upstream: Tensor, recompute: Callable[[], list[Tensor]]) -> list[Tensor]:
        gradients = recompute() if self.gradients is None else self.gradients
        if type(upstream) is Tensor:  # tracing runs this once for many backward passes
            self.gradients = None
            if upstream.device.type == "cpu" and upstream.item() == 1.0:
                return gradients
        return scale_gradients(gradients, upstream, [], self.op)


def guarded(ctx, op: str, gradients: list[Tensor]) -> list[Tensor]:
    """Under create_graph ties the gradients to the saved inputs, so that a double backward is refused by name."""
    if not torch.is_grad_enabled() or not gradients:
        return gradients
    anchors = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
    one = torch.ones((), dtype=torch.promote_types(gradients[0].dtype, torch.float32), device=gradients[0].device)
    return scale_gradients(gradients, one, anchors, op)
