"""What a part of an objective weighs: ``weight / max(COUNT, 1)`` before its sum, and its
contribution to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nitp_ops.core.checks import plain
from nitp_ops.core.devices import sum_dtype
from nitp_ops.engine.base import Objective
from nitp_ops.engine.spec.schedule import weight_at
from nitp_ops.engine.streams.streams import Streams


class Part(NamedTuple):
    """One part of one term: its key among the term's parts, how many rows count, and the name of
    the part whose count divides it."""

    term: Objective
    key: str
    count: Tensor
    denominator: str


def always_active(term: Objective) -> bool:
    """The weight is a constant other than zero."""
    return isinstance(term.weight, float) and term.weight != 0


def part_name(term: Objective, key: str) -> str:
    """Name of a part in counts and metrics."""
    return f"{term.label}/{key}" if key else str(term.label)


def counted_parts(terms: Sequence[Objective], main_label: str, streams: Streams) -> dict[str, Part]:
    """Every part of the terms by its name, in declaration order."""
    parts = {}
    for term in terms:
        for key, valid in term.valid(streams).items():
            name = part_name(term, key)
            denominator = main_label if term.denominator == "main" else name
            parts[name] = Part(term, key, valid.sum(), denominator)
    return parts


def check_step(terms: Sequence[Objective], step: int | Tensor | None) -> None:
    """
    Raises:
        ValueError: a weight is scheduled, and there is no step.
    """
    scheduled = [str(term.label) for term in terms if not isinstance(term.weight, float)]
    if step is None and scheduled:
        names = ", ".join(scheduled)
        raise ValueError(
            f"objective: step is None, expected an integer (scheduled weights: {names})"
        )


def weight_of(part: Part, step: int | Tensor | None, device: torch.device) -> float | Tensor:
    """The weight of a part at a step: a number, or of a schedule a 0-d tensor."""
    return weight_at(part.term.weight, step, device) * part.term.part_weight(part.key)


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


class _ZeroWeightMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(active)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (active,) = ctx.saved_tensors
        return torch.where(active, gradients[0], 0), None


def zero_weight_mask(term: Objective, coefficients: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that passes a tensor through; its gradient becomes exact zeros where all
    coefficients of the term are zero.

    A weight of zero alone would not do: zero times NaN is NaN. The gradient stays a tensor of
    zeros, not None, so that DDP sees every parameter used.
    """
    if always_active(term):  # the mask costs a pass over each gradient
        return _unmasked
    active = torch.stack(list(coefficients)).any()

    def mask(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        return _ZeroWeightMask.apply(tensor, active)  # type: ignore[return-value]

    return mask


def _unmasked(tensor: Tensor) -> Tensor:
    return tensor
