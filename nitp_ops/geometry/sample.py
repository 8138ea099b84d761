"""A bounded sample of rows, uniform over a stream of unknown length."""

from __future__ import annotations

import math

import torch


class UniformSample:
    """A uniform sample without replacement: each row draws a random key, the smallest stay."""

    def __init__(self, max_rows: int, seed: int, function: str) -> None:
        if max_rows < 2:
            raise ValueError(f"{function}: max_rows is {max_rows}, expected at least 2")
        self.max_rows = max_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Offer new rows."""
        self._keep(rows, torch.rand(rows.shape[0], generator=self.generator, dtype=torch.float64))

    def merge(self, other: UniformSample) -> None:
        """Offer the rows of another sample under the keys that they drew there."""
        if other.rows is not None:
            self._keep(other.rows, other.keys)

    def _keep(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        if self.rows is None:
            self.rows = rows[:0]
        held = self.keys.shape[0]
        keys = torch.cat([self.keys, keys])
        # Sorted back to arrival order, so that how the stream was cut into batches changes nothing.
        chosen = keys.argsort(stable=True)[: self.max_rows].sort().values
        old = chosen[chosen < held].to(rows.device)
        new = (chosen[chosen >= held] - held).to(rows.device)
        self.rows = torch.cat([self.rows.to(rows.device)[old], rows[new]])
        self.keys = keys[chosen]

    def uniformity(self) -> float:
        """``log mean exp(-2 |u_i - u_j|^2)`` over all pairs i < j of the sample."""
        if self.rows is None or self.rows.shape[0] < 2:
            return math.nan
        exponent = -2.0 * torch.pdist(self.rows).square()
        return float(torch.logsumexp(exponent, dim=0) - math.log(exponent.numel()))
