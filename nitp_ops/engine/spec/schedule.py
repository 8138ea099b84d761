"""Weights over the course of training: a number, a ramp, or constants from given steps on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from nitp_ops.core.devices import for_sums

from .validation import (
    field_types,
    is_int,
    number_problem,
    of_64_bits,
    shown,
    suggestion,
    type_problem,
)


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """``w(n) = 0`` before step `begin`, ``to * shape((n - begin) / warmup)`` after it, `to` from
    ``begin + warmup`` on.

    Args:
        to: final weight, >= 0.
        begin: first step of the ramp, >= 0.
        warmup: its length in steps, >= 0; 0 jumps at `begin`.
        shape: "linear" x; "cosine" ``(1 - cos(pi x)) / 2``; "step" 0 until the end of the warmup.

    Raises:
        ValueError: values outside their ranges, all in one message.

    Example:
        >>> [float(Ramp(to=0.8, begin=10, warmup=4).at(step)) for step in (0, 10, 12, 14, 99)]
        [0.0, 0.0, 0.4, 0.8, 0.8]
    """

    to: float
    begin: int = 0
    warmup: int = 0
    shape: Literal["linear", "cosine", "step"] = "linear"

    def __post_init__(self) -> None:
        found = []
        for name, expected in field_types(type(self)).items():
            value = getattr(self, name)
            problem = type_problem(name, value, expected)
            if problem is None and name != "shape":
                problem = number_problem(name, value, 0)
            if problem:
                found.append(problem)
        if found:
            raise ValueError(f"schedule: {'; '.join(found)}")
        object.__setattr__(self, "to", float(self.to))

    def at(self, step: int | Tensor) -> Tensor:
        """The weight at ``step`` (an int or a 0-d tensor): 0-d float64 (float32 where there is
        none), on its device."""
        step = for_sums(torch.as_tensor(step))
        x = ((step - self.begin) / max(self.warmup, 1)).clamp(0.0, 1.0)
        if self.shape == "cosine":
            x = (1 - torch.cos(math.pi * x)) / 2
        rising = torch.zeros_like(x) if self.shape == "step" else self.to * x
        return torch.where(step >= self.begin + self.warmup, self.to, rising)

    def to_json(self) -> dict[str, Any]:
        """The mapping that spells this schedule."""
        return asdict(self)


@dataclass(frozen=True)
class Piecewise:
    """``w(n) = w_i`` for the last pair (n_i, w_i) with ``n_i <= n``; 0 before the first.

    Args:
        points: pairs (step, weight), steps rising, both >= 0.

    Raises:
        ValueError: no pair, steps that do not rise, a value outside its range.

    Example:
        >>> schedule = Piecewise(((0, 0.3), (200, 0.1)))
        >>> [float(schedule.at(step)) for step in (0, 199, 200)]
        [0.3, 0.3, 0.1]
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        expected = "expected pairs [step, weight] with rising steps >= 0 and weights >= 0"
        pairs: list[tuple[int, float]] = []
        for pair in self.points:
            known = isinstance(pair, list | tuple) and len(pair) == 2 and is_int(pair[0])
            if not known or type_problem("weight", pair[1], float) or min(pair) < 0:
                raise ValueError(
                    f"schedule: points holds {shown(pair)}, {expected}{of_64_bits(pair)}"
                )
            pairs.append((pair[0], float(pair[1])))
        steps = [step for step, _ in pairs]
        if not steps or any(later <= step for step, later in itertools.pairwise(steps)):
            raise ValueError(f"schedule: points has steps {shown(steps)}, {expected}")
        object.__setattr__(self, "points", tuple(pairs))

    def at(self, step: int | Tensor) -> Tensor:
        """The weight at ``step`` (an int or a 0-d tensor): 0-d float64 (float32 where there is
        none), on its device."""
        step = for_sums(torch.as_tensor(step))
        weight = torch.zeros_like(step)
        for begin, value in self.points:
            weight = torch.where(step >= begin, value, weight)
        return weight

    def to_json(self) -> list[list[float]]:
        """The list that spells this schedule."""
        return [list(point) for point in self.points]


Weight: TypeAlias = float | Ramp | Piecewise


def schedule(
    points: list[Any] | tuple[Any, ...] | None = None,
    *,
    to: float | None = None,
    begin: int = 0,
    warmup: int = 0,
    shape: Literal["linear", "cosine", "step"] = "linear",
) -> Ramp | Piecewise:
    """A `Ramp` from the keywords, or a `Piecewise` from ``points``.

    Raises:
        ValueError: both or neither of points and to; a value outside its range.

    Example:
        >>> schedule(to=0.8, warmup=1000)
        Ramp(to=0.8, begin=0, warmup=1000, shape='linear')
        >>> schedule([[0, 0.3], [200000, 0.1]])
        Piecewise(points=((0, 0.3), (200000, 0.1)))
    """
    if (points is None) == (to is None):
        raise ValueError(
            f"schedule: points is {shown(points)} and to is {shown(to)}, expected exactly one of "
            "them"
        )
    if points is not None:
        return Piecewise(tuple(points))
    assert to is not None
    return Ramp(to=to, begin=begin, warmup=warmup, shape=shape)


def as_weight(value: object) -> Weight:
    """A weight from any of its spellings: number, mapping, list of pairs, schedule.

    Raises:
        ValueError: the value spells no weight.
    """
    if isinstance(value, Ramp | Piecewise):
        return value
    if isinstance(value, Mapping):
        known = [field.name for field in fields(Ramp)]
        for key in value:
            if key not in known:
                word = key if isinstance(key, str) else shown(key)
                offered = f"{', '.join(known)}.{suggestion(key, known)}"
                raise ValueError(f"schedule: {word} is no option, expected {offered}")
        return schedule(**value)
    if isinstance(value, list | tuple):
        return Piecewise(tuple(value))
    if type_problem("weight", value, float) or value < 0:  # type: ignore[operator]
        raise ValueError(
            f"weight is {shown(value)}, expected a number{of_64_bits(value)} >= 0 or a schedule"
        )
    return float(value)  # type: ignore[arg-type]


def weight_at(weight: Weight, step: int | Tensor | None, device: torch.device) -> float | Tensor:
    """The weight at a step: a constant as it is, that of a schedule as `at` gives it, on
    ``device``."""
    if isinstance(weight, int | float):
        return weight
    assert step is not None
    now = step.to(device) if isinstance(step, Tensor) else torch.full((), step, device=device)
    return weight.at(now)
