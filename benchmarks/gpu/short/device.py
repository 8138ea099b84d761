"""The machine of a short run, and its library: the one that was carried, else one built for this
GPU alone."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.bundle import carried
from benchmarks.measure.isolated import Isolated, MeasurementError

from . import tasks
from .kinds import PATIENCE


def about(ours: Isolated, commit: str | None, root: Path, deadline: float) -> dict[str, Any]:
    """The machine. What the library lacks is said in a line.

    Raises:
        MeasurementError: there is no GPU.
    """
    told = _ask(ours, commit, deadline)
    info = told["machine"]
    if told["native"] is not None:
        print(
            f"library: {told['native']}; it is built for compute capability {info['capability']}",
            flush=True,
        )
        ours.close()  # it has loaded the old one
        reason = carried.built(root, info["capability"], max(1.0, deadline - time.monotonic()))
        told = told if reason else _ask(ours, commit, deadline)
        if reason or told["native"]:
            print(f"library: ours without CUDA C++ kernels: {reason or told['native']}", flush=True)
    if told["built_of"] not in (None, "unknown", info["commit"]):
        print(f"library: built of commit {told['built_of']}, this is {info['commit']}", flush=True)
    return info


def _ask(ours: Isolated, commit: str | None, deadline: float) -> dict[str, Any]:
    told, _ = ours.run(
        partial(tasks.about, commit=commit), [], patience=PATIENCE, deadline=deadline
    )
    if "refusal" in told:
        raise MeasurementError(told["refusal"])
    return told
