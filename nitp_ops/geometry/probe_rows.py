"""Which rows a probe sees: targets j steps ahead, whole sequences held out, moments of the training
rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import checks
from ..core.devices import with_float64
from ..reference import in_square_range

# 2**22 numbers: the largest temporary of a probe, 32 MiB in float64 and 16 MiB in float32.
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Probe:
    """What a probe measured, with its definition beside it."""

    accuracy: float
    """Share of the held-out rows that the probe names; NaN without training or held-out rows."""
    baseline: float
    """The same of a classifier that always names the most frequent token of the training rows."""
    offset: int
    train_rows: int
    held_out_rows: int
    definition: str


@dataclass(frozen=True)
class Rows:
    """The rows of one side of the split: where they stand in ``hidden[S * T, d]``, their tokens,
    and a factor on them, a power of two that keeps squares in range."""

    hidden: Tensor
    index: Tensor
    tokens: Tensor
    unit: Tensor | float = 1.0

    def blocks(self, width: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [n, d], tokens [n]) with ``n * width`` bounded."""
        step = max(1, _BLOCK_ELEMENTS // max(1, width))
        for index, tokens in zip(self.index.split(step), self.tokens.split(step), strict=True):
            yield self.hidden[index].to(dtype) * self.unit, tokens

    def __len__(self) -> int:
        return self.index.shape[0]


@dataclass(frozen=True)
class Split:
    train: Rows
    held_out: Rows
    classes: Tensor
    """The distinct tokens of the training rows, rising; `train.tokens` indexes them."""
    mean: Tensor
    """Of the training rows, [d] float64."""
    scatter: Tensor
    """``sum (x - mean)(x - mean)^T`` over the training rows, [d, d] float64."""

    @property
    def scale(self) -> Tensor:
        """``sqrt(trace(scatter) / (n d))``; 1 where all training rows are equal."""
        scale = (self.scatter.trace() / (len(self.train) * self.mean.shape[0])).sqrt()
        return torch.where(scale > 0, scale, 1.0)

    @property
    def frequency(self) -> Tensor:
        """Share of each class in the training rows, [C] float64."""
        return torch.bincount(self.train.tokens, minlength=self.classes.shape[0]).double() / len(
            self.train
        )

    @property
    def empty(self) -> bool:
        """A side has no row: there is nothing to fit or nothing to test."""
        return not len(self.train) or not len(self.held_out)

    def measured(self, correct: int, offset: int, definition: str) -> Probe:
        """The result; `correct` held-out rows were named rightly."""
        n = len(self.held_out)
        if self.empty:
            return Probe(math.nan, math.nan, offset, len(self.train), n, definition)
        named = int((self.held_out.tokens == self.classes[self.frequency.argmax()]).sum())
        return Probe(correct / n, named / n, offset, len(self.train), n, definition)


def split_rows(
    op: str,
    hidden: Tensor,
    token_ids: Tensor,
    offset: int,
    document_ids: Tensor | None,
    target_mask: Tensor | None,
    held_out: float | Tensor,
    seed: int,
) -> Split:
    """The rows that count on each side and the moments of the training side."""
    checks.is_tensor(op, "hidden", hidden)
    if not hidden.is_floating_point():
        raise TypeError(
            f"{op}: hidden is {checks.name_of(hidden.dtype)}, expected a floating point dtype"
        )
    if hidden.dim() < 3 or hidden.shape[-1] == 0 or hidden.shape[:-2].numel() < 2:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)}, expected (..., T, d) with two or more "
            "sequences"
        )
    checks.integer(op, "offset", offset, least=0)
    leading, length, d = hidden.shape[:-2], hidden.shape[-2], hidden.shape[-1]
    beside = {"token_ids": token_ids, "document_ids": document_ids, "target_mask": target_mask}
    for name, tensor in beside.items():
        if tensor is not None:
            checks.is_tensor(op, name, tensor)
            checks.has_shape(op, name, tensor, hidden.shape[:-1])
            checks.same_device(op, name, tensor, "hidden", hidden)
    checks.has_dtype(op, "token_ids", token_ids, (torch.int64,))
    hidden, token_ids = with_float64(hidden), with_float64(token_ids)
    tokens = token_ids.reshape(-1, length)
    counts = torch.arange(length, device=hidden.device).expand_as(tokens) + offset < length
    ahead = (torch.arange(length, device=hidden.device) + offset).clamp(max=length - 1)
    if document_ids is not None:
        checks.has_dtype(op, "document_ids", document_ids, (torch.int64, torch.int32))
        documents = document_ids.to(hidden.device).reshape(-1, length)
        counts = counts & (documents >= 0) & (documents[:, ahead] == documents)
    if target_mask is not None:
        checks.has_dtype(op, "target_mask", target_mask, (torch.bool,))
        counts = counts & target_mask.to(hidden.device).reshape(-1, length)[:, ahead]
    tested = _held_out(op, held_out, leading, seed, hidden.device).unsqueeze(-1)
    flat, targets = hidden.detach().reshape(-1, d), tokens[:, ahead].reshape(-1)

    def side(chosen: Tensor) -> Rows:
        index = chosen.reshape(-1).nonzero().squeeze(-1)
        return Rows(flat, index, targets[index])

    train, test = side(counts & ~tested), side(counts & tested)
    _check_finite(op, train, test)
    classes, positions = torch.unique(train.tokens, return_inverse=True)
    unit = _unit(train)
    train, test = Rows(flat, train.index, positions, unit), replace(test, unit=unit)
    total, scatter = (
        flat.new_zeros(d, dtype=torch.float64),
        flat.new_zeros(d, d, dtype=torch.float64),
    )
    for features, _ in train.blocks(d, torch.float64):
        total += features.sum(dim=0)
    mean = total / max(1, len(train))
    for features, _ in train.blocks(d, torch.float64):
        centred = features - mean
        scatter += centred.T @ centred
    return Split(train, test, classes, mean, scatter)


def _unit(train: Rows) -> Tensor:
    """Probes are the same in any unit; the training rows choose one."""
    largest = train.hidden.new_zeros(1, dtype=torch.float64)
    for features, _ in train.blocks(train.hidden.shape[-1], torch.float64):
        if len(features):
            largest = torch.maximum(largest, features.abs().max())
    return in_square_range(largest)


def _held_out(
    op: str, held_out: float | Tensor, leading: torch.Size, seed: int, device: torch.device
) -> Tensor:
    """Which sequences are held out, bool [S]."""
    sequences = leading.numel()
    if isinstance(held_out, Tensor):
        checks.has_shape(op, "held_out", held_out, leading, "one a sequence")
        checks.has_dtype(op, "held_out", held_out, (torch.bool,))
        return held_out.reshape(-1).to(device)
    share = checks.number(op, "held_out", held_out, least=0.0, open_end=True)
    if share >= 1:
        raise ValueError(
            f"{op}: held_out is {held_out!r}, expected a number inside (0, 1) or a bool a sequence"
        )
    count = min(sequences - 1, max(1, round(share * sequences)))
    chosen = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.zeros(sequences, dtype=torch.bool).index_fill_(0, chosen, True).to(device)


def _check_finite(op: str, *sides: Rows) -> None:
    bad = sum(
        int((~torch.isfinite(features).all(dim=-1)).sum())
        for rows in sides
        for features, _ in rows.blocks(rows.hidden.shape[-1], rows.hidden.dtype)
    )
    if bad:
        total = sum(map(len, sides))
        raise ValueError(
            f"{op}: hidden has NaN or infinity in {bad} of {total} rows that count, expected "
            "finite values"
        )
