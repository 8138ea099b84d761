"""The checked arguments of implicit_token_loss: pairs, projector, and how to compute them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """hidden [..., T, d] and target [..., T, D]; keep bool [N]: the pair that starts there counts.

    scale: of every loss (0-d) or of each ([N]). hidden_grad_out: its dtype is that of the gradient
    of hidden. gaps: pairs that do not count may lie before one that does; else they are the last
    `shift`."""

    hidden: Tensor
    target: Tensor
    keep: Tensor
    scale: Tensor
    hidden_grad_out: Tensor | None
    shift: int
    max_rows: int | None
    gaps: bool


class Projector(NamedTuple):
    """gate and up [m, d], down [D, m]; only down [D, d]: linear; all None: identity. Gate [2m, d]
    alone holds both."""

    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None

    @property
    def inner(self) -> int:
        """m, 0 without gate and up."""
        return 0 if self.gate is None else len(self.gate) // (2 if self.up is None else 1)

    def gate_up(self, dtype: torch.dtype) -> Tensor | None:
        """[W_gate; W_up] as one [2m, d] matrix: only cast, not copied, where it is one already or
        lies so in memory."""
        gate, up = self.gate, self.up
        if gate is None:
            return None
        if up is None:
            return gate.to(dtype)
        dense = gate.is_contiguous() and up.is_contiguous() and gate.dtype == dtype
        if dense and _adjacent(gate, up):
            return gate.as_strided((2 * gate.shape[0], gate.shape[1]), (gate.shape[1], 1))
        return torch.cat([gate, up]).to(dtype)


def _adjacent(first: Tensor, second: Tensor) -> bool:
    """Whether the second begins in memory where the first, which is dense, ends."""
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    return second.storage_offset() == first.storage_offset() + first.numel()


class Call(NamedTuple):
    """How the pairs of one call are computed, and which gradients are wanted; gate and up have one
    in common.

    dtype: of the operands of the GEMMs. per_row: each loss, not their sum."""

    backend: str
    dtype: torch.dtype
    distance: int
    eps: float
    chunk_bytes: int | None
    per_row: bool
    want_hidden: bool
    want_inner: bool
    want_down: bool

    @property
    def differentiates(self) -> bool:
        return self.want_hidden or self.want_inner or self.want_down
