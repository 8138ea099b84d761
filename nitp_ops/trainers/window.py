"""The accumulation window: its counts before the first forward pass, and what it measured, until it
is logged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.attaching.window_shares import AUX_LOSS
from nitp_ops.objectives import Counts, Metrics, Spec


def count_window(
    counted: Iterable[Counts], *, divisor: int, device: torch.device | str | None = None
) -> Counts:
    """Counts of every part over all microbatches of a window and all ranks; every rank calls it,
    one collective.

    Args:
        counted: of each microbatch, at least one.
        divisor: the number that the trainer divides every loss by, as it averages over the
            microbatches. It multiplies `Counts.group_size`, so that losses that are counted are
            whole again and any other loss is averaged.
        device: where the counts go, for the collective; None: they stay with the batches.
    """
    first, *others = (counts.to(device) for counts in counted)
    total = sum(others, start=first).all_reduce()
    return Counts(total, total.group_size * divisor, total.batches)


class StepLog:
    """Contributions and metrics of the optimizer steps since the last `take`; on the device,
    detached.

    Over N steps ``loss/p = 1/N sum of the steps' weight * SUM_p / COUNT_p``, so that the
    contributions of all parts add up to the mean loss of the steps. Everything else is a mean over
    all rows of the N steps (see `Metrics`). A window that ends without a step, `drop`, leaves no
    trace.

    Args:
        spec: of the objective; says which count divides a part.
    """

    def __init__(self, spec: Spec) -> None:
        main = str(spec.main_label)
        self._main = {str(term.label): main for term in spec.terms if term.denominator == "main"}
        self._window: _Measured | None = None  # of the window whose step has not been taken
        self._steps: _Measured | None = None
        self._count = 0

    def add(self, metrics: Metrics, counts: Counts) -> None:
        """Add one microbatch: its own metrics, and the counts of its window over all ranks."""
        contributions = {}
        for part, own in metrics.sums.items():
            count = (
                counts.batches
                if part == AUX_LOSS
                else counts[self._main.get(part.partition("/")[0], part)]
            )
            contributions[part] = own["weighted"] / torch.as_tensor(count).clamp(min=1)
        self._window = _Measured(contributions, metrics).plus(self._window)

    def step(self) -> None:
        """The optimizer took the step of the window whose microbatches were added."""
        if self._window is not None:
            self._steps, self._window, self._count = (
                self._window.plus(self._steps),
                None,
                self._count + 1,
            )

    def drop(self) -> bool:
        """Forget a window that ended without a step; whether there was one."""
        dropped, self._window = self._window is not None, None
        return dropped

    def take(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Numbers of the optimizer steps since the last call, over all ranks; every rank calls it.

        Empty where no step was taken. Waits for the device.
        """
        if self._steps is None:
            return {}
        measured, count = self._steps, self._count
        self._steps, self._count = None, 0
        contributions = torch.stack(list(measured.contributions.values())) / count
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(contributions, group=group)
        weighted = {
            f"loss/{part}": value
            for part, value in zip(measured.contributions, contributions.tolist(), strict=True)
        }
        rest = measured.metrics.all_reduce(group).compute()
        total = {"loss": sum(weighted.values())}
        return (
            total
            | weighted
            | {name: value for name, value in rest.items() if not f"{name}/".startswith("loss/")}
        )


class _Measured(NamedTuple):
    """What microbatches add to the loss, part by part, and their metrics."""

    contributions: dict[str, Tensor]
    metrics: Metrics

    def plus(self, other: _Measured | None) -> _Measured:
        if other is None:
            return self
        summed = {
            part: value + other.contributions[part] for part, value in self.contributions.items()
        }
        return _Measured(summed, self.metrics + other.metrics)
