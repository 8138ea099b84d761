"""Means and deviations over seeds, and how wide the interval of a difference between two arms is."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 5
"""Pairs from which on a difference has an interval."""


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN below two values."""
    return (
        statistics.stdev(values)
        if len(values) > 1 and all(map(math.isfinite, values))
        else math.nan
    )


@dataclass(frozen=True)
class Difference:
    """Of two arms, paired: the same seed, so the same first weights and the same data order, in
    both."""

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
    def half_width(self) -> float:
        """Of the 95 % interval by Student's t; two standard errors below `ENOUGH` pairs, NaN for
        one pair."""
        return errors_shown(self.pairs) * self.deviation / math.sqrt(self.pairs)

    def formatted(self, form: str) -> str:
        """``mean ± half_width``, the mean with its sign; the mean alone where there is one pair."""
        error = "" if math.isnan(self.deviation) else f" ± {self.half_width:{form}}"
        return f"{self.mean:+{form}}{error}"

    @property
    def verdict(self) -> str:
        """On which side of zero the 95 % interval lies; none below `ENOUGH` pairs."""
        if self.pairs < ENOUGH:
            return f"none below {ENOUGH} seeds"
        if abs(self.mean) <= self.half_width:
            return "open"
        return "higher" if self.mean > 0 else "lower"


def errors_shown(pairs: int) -> float:
    """The standard errors on either side of a mean difference."""
    return ninety_five(pairs) if pairs >= ENOUGH else 2.0


def shown_as(pairs: int) -> str:
    """What stands behind the ± of a difference."""
    return "95 % interval" if pairs >= ENOUGH else "two standard errors"


def no_verdict(pairs: int) -> str:
    """Why a page with so few pairs draws no conclusion; empty where there are enough."""
    if pairs >= ENOUGH:
        return ""
    why = "one seed has no spread"
    if pairs > 1:
        why = (
            f"with {pairs} a 95 % interval (Student's t) is ± {ninety_five(pairs):.1f} standard "
            f"errors, and chance alone puts {chance(pairs):.0%} of the differences outside two"
        )
    return f"No verdict below five seeds: {why}."


@functools.cache
def ninety_five(pairs: int) -> float:
    """The standard errors that chance alone exceeds in 5 % of cases, by bisection.

    Example:
        >>> round(ninety_five(3), 3), round(ninety_five(5), 3)
        (4.303, 2.776)
    """
    low, high = 1.0, 16.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(pairs, middle) > 0.05 else (low, middle)
    return low


def chance(pairs: int, errors: float = 2.0) -> float:
    """``P(|t| > errors)`` of Student's t with ``pairs - 1`` degrees of freedom: how often chance
    alone goes that far.

    By Simpson's rule over the density of ``t = errors + u / (1 - u)``.

    Example:
        >>> round(chance(3), 4), round(chance(10**6), 4)
        (0.1835, 0.0455)
    """
    degrees = pairs - 1
    if degrees < 1:
        return math.nan
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(
        degrees * math.pi
    )

    def density(u: float) -> float:
        if u == 1:
            return 1.0 if degrees == 1 else 0.0
        t = errors + u / (1 - u)
        return (1 + t * t / degrees) ** (-(degrees + 1) / 2) / (1 - u) ** 2

    intervals = 2000
    weights = [1, *[4, 2] * (intervals // 2 - 1), 4, 1]
    total = sum(weight * density(index / intervals) for index, weight in enumerate(weights))
    return 2 * scale * total / (3 * intervals)
