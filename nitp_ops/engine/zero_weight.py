"""Keeping the inside of a term of weight zero apart from everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, alive: Tensor) -> Tensor:
        ctx.save_for_backward(alive)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (alive,) = ctx.saved_tensors
        return torch.where(alive, gradients[0], 0), None


def guarded(alive: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that passes a tensor through; its gradient becomes exact zeros where ``alive`` (0-d bool) is false.

    A weight of zero alone would not do: zero times NaN is NaN. The gradient stays a tensor of zeros, not None, so that
    DDP sees every parameter used.
    """
    return lambda tensor: _Guard.apply(tensor, alive) if tensor.requires_grad else tensor  # type: ignore[return-value]
