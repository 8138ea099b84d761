"""Means and spreads over seeds, and what a difference between two arms is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN below two values."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


@dataclass(frozen=True)
class Difference:
    """Of two arms, paired: the same seed, so the same first weights and the same data order, in both."""

    mean: float
    deviation: float
    """Standard deviation of the paired differences; NaN for one pair."""
    pairs: int

    @classmethod
    def between(cls, first: Sequence[float], other: Sequence[float]) -> Difference:
        """``other - first``, pair by pair."""
        differences = [b - a for a, b in zip(first, other, strict=True)]
        return cls(mean(differences), deviation(differences), len(differences))

    @property
    def two_errors(self) -> float:
        """Two standard errors of the mean difference."""
        return 2 * self.deviation / math.sqrt(self.pairs)

    def spelled(self, form: str) -> str:
        """``mean ± two standard errors``, the mean with its sign; the mean alone where there is one pair."""
        spread = "" if math.isnan(self.deviation) else f" ± {self.two_errors:{form}}"
        return f"{self.mean:+{form}}{spread}"

    @property
    def outside(self) -> bool:
        """The difference is larger than two standard errors."""
        return abs(self.mean) > self.two_errors

    @property
    def pairs_needed(self) -> float:
        """How many pairs bring two standard errors down to a difference of this size, were both to stay as they are.

        ``(2 deviation / mean)^2``, at least 2; infinite without a difference, NaN without a spread.
        """
        if math.isnan(self.deviation):
            return math.nan
        return max(2.0, math.ceil((2 * self.deviation / self.mean) ** 2)) if self.mean else math.inf


def chance(pairs: int, errors: float = 2.0) -> float:
    """``P(|t| > errors)`` of Student's t with ``pairs - 1`` degrees of freedom: how often chance alone goes that far.

    By Simpson's rule over the density of ``t = errors + u / (1 - u)``.

    Example:
        >>> round(chance(3), 4), round(chance(10**6), 4)
        (0.1835, 0.0455)
    """
    degrees = pairs - 1
    if degrees < 1:
        return math.nan
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(u: float) -> float:
        if u == 1:
            return 1.0 if degrees == 1 else 0.0
        t = errors + u / (1 - u)
        return (1 + t * t / degrees) ** (-(degrees + 1) / 2) / (1 - u) ** 2

    intervals = 2000
    weights = [1, *[4, 2] * (intervals // 2 - 1), 4, 1]
    total = sum(weight * density(index / intervals) for index, weight in enumerate(weights))
    return 2 * scale * total / (3 * intervals)
