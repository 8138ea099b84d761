"""How many rows count in each part of an objective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .streams.collectives import all_reduce, is_distributed


class Counts(dict[str, Tensor]):
    """``{part: 0-d int64 tensor}``: add them over the microbatches of a window, all-reduce them
    once.

    ``counts + counts`` adds part by part. `group_size` is the number of ranks that the counts were
    reduced over; an objective with ``gradient_reduction="mean"`` multiplies its loss by it.
    `batches` is the number of batches that were counted, over microbatches and ranks: what a model
    adds to its loss once a batch is averaged over them.

    Raises:
        ValueError: added counts have other parts or another group size.

    Example:
        >>> one = Counts({"ntp": torch.tensor(3)})
        >>> (one + one)["ntp"].item(), one.all_reduce().group_size
        (6, 1)
    """

    def __init__(
        self, counts: Mapping[str, Tensor], group_size: int = 1, batches: int | Tensor = 1
    ) -> None:
        super().__init__(counts)
        self.group_size, self.batches = group_size, batches

    def __add__(self, other: Counts) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        if self.keys() != other.keys():
            raise ValueError(f"Counts: other has parts {sorted(other)}, expected {sorted(self)}")
        if self.group_size != other.group_size:
            raise ValueError(
                f"Counts: other has group size {other.group_size}, expected {self.group_size}"
            )
        return Counts(
            {part: self[part] + other[part] for part in self},
            self.group_size,
            self.batches + other.batches,
        )

    def to(self, device: torch.device | str | None) -> Counts:
        """The same on another device."""
        return Counts(
            {part: count.to(device) for part, count in self.items()}, self.group_size, self.batches
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Counts:
        """The sums over the ranks of ``group`` (None: all); every rank of it must call. One
        process: unchanged.

        Reducing over one group after another (data, then context parallel) multiplies their sizes.
        """
        if not is_distributed():
            return self
        counted = torch.stack(list(self.values()))
        batches = torch.as_tensor(self.batches).to(counted)
        packed = all_reduce(torch.cat([counted, batches.view(1)]), group, "counts")
        *counts, batches = packed.unbind()
        ranks = dist.get_world_size(group)
        return Counts(dict(zip(self, counts, strict=True)), self.group_size * ranks, batches)
