"""What a part of an objective weighs: ``weight / max(COUNT, 1)`` before its sum, and its
contribution to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nitp_ops.core.checks import plain
from nitp_ops.core.devices import sum_dtype

from .base import Objective
from .spec.schedule import weight_at


class Part(NamedTuple):
    """One part of one term: how many rows count, and the part whose count divides it."""

    term: Objective
    piece: str
    count: Tensor
    denominator: str


def always_on(term: Objective) -> bool:
    """The weight is a constant other than zero."""
    return isinstance(term.weight, float) and term.weight != 0


def unguarded(tensor: Tensor) -> Tensor:
    return tensor


def weight_of(part: Part, step: int | Tensor | None, device: torch.device) -> float | Tensor:
    """The weight of a part at a step: a number, or of a schedule a 0-d tensor."""
    return weight_at(part.term.weight, step, device) * part.term.part_weight(part.piece)


def divided(weight: float | Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """weight / max(count, 1), formed in the dtype of sums: 0-d."""
    if not isinstance(weight, Tensor):
        if plain(count):
            return torch.full((), weight / max(count.item(), 1), dtype=dtype)
        weight = torch.full((), weight, dtype=sum_dtype(count.device), device=count.device)
    return (weight / count.clamp(min=1)).to(dtype)


def contribution(weight: float | Tensor, loss: Tensor) -> Tensor:
    """weight * loss; a NaN under a weight of zero shows in the term's own numbers, not in its
    contribution."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0, weight * loss)
    return weight * loss if weight else torch.zeros_like(loss)


def joined(term: Objective, piece: str) -> str:
    """Name of a part in counts and metrics."""
    return f"{term.label}/{piece}" if piece else str(term.label)


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
    """A function that passes a tensor through; its gradient becomes exact zeros where ``alive``
    (0-d bool) is false.

    A weight of zero alone would not do: zero times NaN is NaN. The gradient stays a tensor of
    zeros, not None, so that DDP sees every parameter used.
    """
    return lambda tensor: _Guard.apply(tensor, alive) if tensor.requires_grad else tensor  # type: ignore[return-value]
