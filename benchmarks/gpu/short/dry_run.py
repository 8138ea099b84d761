"""A short run without a GPU: the same pieces, processes and files over cases that only wait. What
it writes is fake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measure.isolated import START, At, Isolated

if TYPE_CHECKING:  # torch is not imported where only these functions run
    from .kinds import Piece


def machine(commit: str | None) -> dict[str, Any]:
    """What stands for the GPU."""
    nothing = {
        "multiprocessors": 0,
        "memory_gib": 0.0,
        "capability": "0.0",
        "torch": "none",
        "cuda": "none",
    }
    return {"gpu": "dry run", **nothing, "triton": "none", "commit": commit or "unknown"}


def ready(*processes: Isolated) -> None:
    """Wait until they have started."""
    for process in processes:
        process.run(
            partial(records, wait=0.0), [], patience=START, deadline=time.monotonic() + START
        )


def pieces(scale: float) -> Iterator[Piece]:
    """Every piece, which takes a `scale`th of its time and measures nothing."""
    from benchmarks.gpu.stages import python

    from . import order
    from .kinds import Records, Rows, Stage

    for piece in order.pieces("9.0"):
        wait = piece.seconds / scale
        if isinstance(piece, Rows):
            yield replace(
                piece, case=replace(piece.case, measure=partial(rows, wait=wait)), unavailable=None
            )
        elif isinstance(piece, Records):
            yield replace(piece, task=partial(records, wait=wait), unavailable=None)
        elif isinstance(piece, Stage):
            step = python("-c", f"import time; time.sleep({wait}); print('waited')")
            yield replace(piece, steps=(step,), beside=())


def rows(
    at: At, names: list[str], *, sizes: Any, dtype: str, rounds: int, seconds: float, wait: float
) -> Any:
    """A row of each name, and of a floor, that says nothing."""
    del sizes, dtype, rounds, seconds
    found = records(at, names, wait=wait)
    return {"floor": {"milliseconds": {"median": 1.0, "q25": 1.0, "q75": 1.0}}, **found}


def records(at: At, names: list[str], *, wait: float) -> dict[str, dict[str, Any]]:
    for name in names:
        at(name)
        time.sleep(wait / len(names))
    return {name: {"waited_s": wait / len(names)} for name in names}
