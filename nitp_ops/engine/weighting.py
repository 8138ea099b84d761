"""What a part of an objective weighs: ``weight / max(COUNT, 1)`` before its sum, and its contribution to the loss."""

from __future__ import annotations

from typing import NamedTuple

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
    """weight * loss; a NaN under a weight of zero shows in the term's own numbers, not in its contribution."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0, weight * loss)
    return weight * loss if weight else torch.zeros_like(loss)


def joined(term: Objective, piece: str) -> str:
    """Name of a part in counts and metrics."""
    return f"{term.label}/{piece}" if piece else str(term.label)
