"""The accumulation window that a batch belongs to: what divides its losses, and which step is
taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from .counts import Counts
from .spec.validation import is_int, of_64_bits
from .streams.collectives import group_size


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """What the batches of one optimizer step share; made once a step, handed to each call of the
    objective.

    Args:
        counts: of the whole window (summed over microbatches, all-reduced); None: of each batch
            alone. With counts the losses of microbatches and ranks add up to that of the window: do
            not divide by their number again.
        step: of training; needed where a weight is scheduled. A 0-d tensor keeps torch.compile from
            recompiling.
        gradient_reduction: what the engine does with gradients. "mean" (DDP and FSDP average them)
            multiplies the loss, not the metrics, by the number of ranks that counts were reduced
            over; "sum" does not. Without reduced counts both are the same.
        group: the ranks that counts were reduced over, so that counts of one rank alone are
            refused; None: not checked.

    Raises:
        TypeError, ValueError: no such counts, step or reduction; counts that were not reduced over
            the group.

    Example:
        >>> import torch
        >>> from nitp_ops.objectives import Counts, Window
        >>> window = Window(counts=Counts({"ntp": torch.tensor(8)}), step=3)
        >>> window.step, window.gradient_reduction, window.loss_factor
        (3, 'mean', 1)
    """

    counts: Counts | None = None
    step: int | Tensor | None = None
    gradient_reduction: Literal["mean", "sum"] = "mean"
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        counts, step = self.counts, self.step
        if counts is not None and not isinstance(counts, Counts):
            raise TypeError(
                f"Window: counts is a {type(counts).__name__}, expected Counts (see `count`)"
            )
        if step is not None and not isinstance(step, Tensor) and not (is_int(step) and step >= 0):
            raise ValueError(
                f"Window: step is {step!r}, expected an integer{of_64_bits(step)} >= 0"
            )
        if self.gradient_reduction not in ("mean", "sum"):
            raise ValueError(
                f"Window: gradient_reduction is {self.gradient_reduction!r}, "
                'expected "mean" or "sum"'
            )
        if self.group is not None:
            ranks, _ = group_size(self.group)
            if counts is None or counts.group_size % ranks:
                got = "None" if counts is None else f"of {counts.group_size} ranks"
                raise ValueError(
                    f"Window: counts is {got}, expected counts.all_reduce(group) of {ranks} ranks"
                )

    @property
    def loss_factor(self) -> int:
        """What the loss is multiplied by, so that the engine's gradients are those of the window."""
        if self.counts is None or self.gradient_reduction == "sum":
            return 1
        return self.counts.group_size


#: Each batch is a window of its own.
_ALONE = Window()


def window_of(
    window: Window | None,
    counts: Counts | None,
    step: int | Tensor | None,
    gradient_reduction: Literal["mean", "sum"] | None,
) -> Window:
    """The window that was given, or the one that the other arguments make.

    Raises:
        TypeError, ValueError: both were given, or what `Window` refuses.
    """
    if window is counts is step is gradient_reduction is None:
        return _ALONE
    given = {"counts": counts, "step": step, "gradient_reduction": gradient_reduction}
    given = {name: value for name, value in given.items() if value is not None}
    if window is None:
        try:
            return Window(**given)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            error.args = (str(error).replace("Window:", "objective:", 1),)
            raise
    if not isinstance(window, Window):
        raise TypeError(f"objective: window is a {type(window).__name__}, expected a Window")
    if given:
        raise ValueError(
            f"objective: {', '.join(given)} and window are given, expected window alone (it has "
            "them)"
        )
    return window
