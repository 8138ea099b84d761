"""Runs that take turns: their times, medians and quartiles, ratios within rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)


def interleave(
    runs: Mapping[Name, Callable[[], object]],
    prepare: Callable[[], None],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], Any] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of each run in each round (the difference of two readings of `clock`).

    Every round starts with another and every second one goes backwards: what a run finds in caches
    and in freed memory is not always left by the same one. A run leaves after the round in which
    its own total passes `seconds`, and has at least one time.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        step = -1 if turn % 2 else 1
        for name in (order[(turn + step * place) % len(order)] for place in range(len(order))):
            if sum(times[name]) > seconds:
                continue
            prepare()
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q25": values[0], "q75": values[0]}
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75}


def ratios(times: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within each round, which drifts of the machine's speed
    cancel from."""
    return quartiles([a / b for a, b in zip(times, base, strict=False)])
