"""Context parallel: which part of every sequence is here, and the rows that follow it on other
ranks.

Token streams are whole on every rank, so targets are shifted before they are cut; hidden streams
are the rank's part. A target that is a hidden state may lie on another rank: the first k rows of
every chunk travel, without a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.engine.spec.validation import is_int, of_64_bits

from .collectives import all_gather, group_size

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SequenceShard:
    """The positions of ``[B, T]`` that this rank of a context parallel group of p ranks holds.

    * "contiguous": rank r holds chunk r of p equal chunks;
    * "zigzag": chunks r and 2 p - 1 - r of 2 p equal chunks, so that causal attention costs every
      rank the same.

    Args:
        length: T, of the whole sequence; a multiple of p (zigzag: of 2 p).
        layout: as above. group: the context parallel ranks (None: all); without torch.distributed
            one rank.

    Attributes:
        spans: ``(begin, end)`` of each chunk that is here, in the order of the local positions.
            size: T / p.

    Raises:
        TypeError, ValueError: an unknown layout, a length that the chunks do not divide.

    Example:
        >>> shard = SequenceShard(length=8, layout="zigzag")  # without torch.distributed: everything is here
        >>> shard.spans, shard.take(torch.arange(8).view(1, 8)).tolist()
        (((0, 4), (4, 8)), [[0, 1, 2, 3, 4, 5, 6, 7]])

    Source: zigzag as in the attention of arXiv 2407.21783, section 3.3.2.
    """

    length: int
    layout: Literal["contiguous", "zigzag"] = "contiguous"
    group: dist.ProcessGroup | None = None
    spans: tuple[Span, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.layout not in ("contiguous", "zigzag"):
            raise ValueError(
                f'SequenceShard: layout is {self.layout!r}, expected "contiguous" or "zigzag"'
            )
        if not is_int(self.length):
            raise TypeError(
                f"SequenceShard: length is {self.length!r}, expected an "
                f"integer{of_64_bits(self.length)}"
            )
        ranks, rank = group_size(self.group)
        total = ranks * self._chunks_a_rank
        if self.length < 1 or self.length % total:
            raise ValueError(
                f"SequenceShard: length is {self.length}, expected a multiple of {total} chunks"
            )
        chunk = self.length // total
        here = _chunks(rank, ranks, self._chunks_a_rank)
        object.__setattr__(
            self, "spans", tuple((index * chunk, (index + 1) * chunk) for index in here)
        )

    @property
    def size(self) -> int:
        return sum(end - begin for begin, end in self.spans)

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """The local part of a whole stream, along its sequence axis."""
        if whole.shape[dim] != self.length:
            raise ValueError(
                f"SequenceShard: axis {dim} has {whole.shape[dim]} positions, expected "
                f"{self.length}"
            )
        return columns(whole, self.spans, 0, dim)

    def following(self, rows: Tensor, k: int) -> Tensor:
        """``out[:, t]`` is the row k tokens after local row t, zeros past the end: ``[B, T/p, d]``,
        detached.

        One all-gather of the first k rows of every chunk, ``B d k`` numbers a chunk; every rank of
        the group must call.

        Raises:
            ValueError: k is larger than a chunk: the row would be two chunks away.
        """
        rows = rows.detach()
        if k == 0:
            return rows
        parts, total = self._chunks_a_rank, self.length // (self.spans[0][1] - self.spans[0][0])
        chunks = rows.unflatten(1, (parts, -1))
        if k > chunks.shape[2]:
            raise ValueError(
                f"SequenceShard: shift is {k}, expected at most the {chunks.shape[2]} rows of a "
                "chunk"
            )
        first_rows = all_gather(chunks[:, :, :k].contiguous(), self.group)
        owner = {}
        for rank in range(total // parts):
            for slot, chunk in enumerate(_chunks(rank, total // parts, parts)):
                owner[chunk] = (rank, slot)
        shifted = []
        for index, (_, end) in enumerate(self.spans):
            rank, slot = owner.get(end * total // self.length, (0, 0))
            after = first_rows[rank][:, slot]
            if end == self.length:
                after = torch.zeros_like(after)
            shifted += [chunks[:, index, k:], after]
        return torch.cat(shifted, dim=1)

    @property
    def _chunks_a_rank(self) -> int:
        return 2 if self.layout == "zigzag" else 1


def columns(values: Tensor, spans: Sequence[Span], k: int = 0, dim: int = 1) -> Tensor:
    """``values`` at the positions of the spans, k later; a view where there is one span."""
    parts = [values.narrow(dim, begin + k, end - begin) for begin, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _chunks(rank: int, ranks: int, parts: int) -> tuple[int, ...]:
    """Which chunks of the sequence a rank holds."""
    return (rank,) if parts == 1 else (rank, 2 * ranks - 1 - rank)
