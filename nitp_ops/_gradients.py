"""What the ops with gradients formed in the forward pass share: the backward that only multiplies by the upstream."""

from __future__ import annotations

import torch
from torch import Tensor


def gemm_dtype(weight: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on (it leaves float64 alone), else the weight's."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


@torch.library.custom_op("nitp_ops::scale_gradients", mutates_args=())
def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """upstream * gradient for each, with the product formed in float32 and rounded once."""
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
def _(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def refuse_double_backward(op: str, upstream: object) -> None:
    """Raises when a gradient flows back into gradients that an op returned."""
    leaves = upstream if isinstance(upstream, (list, tuple)) else [upstream]
    if any(leaf is not None for leaf in leaves):
        raise NotImplementedError(
            f"{op}: double backward came, expected first derivatives only (backend='reference' has them all)"
        )


def _refuse(ctx, upstream):
    refuse_double_backward("a fused nitp_ops loss", upstream)


scale_gradients.register_autograd(_refuse)


def scaled(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The saved gradients times the upstream; an eager upstream of exactly 1 costs nothing."""
    plain = type(upstream) is Tensor and upstream.device.type == "cpu" and not torch.is_grad_enabled()
    if plain and upstream.item() == 1.0:
        return gradients
    return scale_gradients(gradients, upstream)
