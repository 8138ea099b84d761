"""The accumulation window: its counts before the first forward pass, and what it measured, until it is logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.objectives import Counts, Metrics, Spec

from .handle import Handle


def count_window(
    handle: Handle, batches: Iterable[Mapping[str, Any]], device: torch.device | str | None = None
) -> Counts:
    """Counts of every part over all microbatches of a window and all ranks; every rank calls it, one collective.

    Args:
        handle: of the attached model. batches: collated, at least one. device: where the counts go, for the collective;
            None: they stay with the batches.
    """
    first, *others = (handle.count(batch) for batch in batches)
    for other in others:
        first = first + other
    return Counts({part: count.to(device) for part, count in first.items()}).all_reduce()


class StepLog:
    """Contributions and metrics of the microbatches since the last `take`; on the device, detached.

    Over N steps ``loss/p = 1/N sum of the steps' weight * SUM_p / COUNT_p``, so that the contributions of all parts
    add up to the mean loss of the steps. Everything else is a mean over all rows of the N steps (see `Metrics`).

    Args:
        spec: of the objective; says which count divides a part.
    """

    def __init__(self, spec: Spec) -> None:
        main = str(spec.main_label)
        self._main = {str(term.label): main for term in spec.terms if term.denominator == "main"}
        self._contributions: dict[str, Tensor] = {}
        self._metrics: Metrics | None = None

    def add(self, metrics: Metrics, counts: Counts) -> None:
        """Add one microbatch: its own metrics, and the counts of its window over all ranks."""
        for part, own in metrics.sums.items():
            count = counts[self._main.get(part.partition("/")[0], part)]
            contribution = own["weighted"] / count.clamp(min=1)
            self._contributions[part] = self._contributions.get(part, 0) + contribution
        self._metrics = metrics if self._metrics is None else self._metrics + metrics

    def take(self, steps: int, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Numbers of the ``steps`` optimizer steps since the last call, over all ranks; every rank calls it.

        Empty where nothing was added. Waits for the device.
        """
        if self._metrics is None:
            return {}
        contributions = torch.stack(list(self._contributions.values())) / steps
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(contributions, group=group)
        weighted = {
            f"loss/{part}": value for part, value in zip(self._contributions, contributions.tolist(), strict=True)
        }
        rest = self._metrics.all_reduce(group).compute()
        self._contributions, self._metrics = {}, None
        total = {"loss": sum(weighted.values())}
        return total | weighted | {name: value for name, value in rest.items() if not f"{name}/".startswith("loss/")}
