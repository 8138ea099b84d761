"""All targets of a row within a distance, without a tensor of the distance's width."""

from __future__ import annotations

import torch
from torch import Tensor

from .streams import Streams
from .targets import documents_at_tokens, targets_at_tokens


class TargetWindow:
    """The targets x[t+k], first <= k <= last, of each row, each token once, at its smallest k.

    What [B, T, last] would hold is built for given rows and a given width, from the nearest
    target on. Rows are numbered b T + t over the positions that are here.
    """

    def __init__(self, streams: Streams, first: int, last: int) -> None:
        self.first, self.last, self.ignore_index = first, last, streams.ignore_index
        self.tokens, (self.whole, self.documents) = (
            targets_at_tokens(streams),
            documents_at_tokens(streams),
        )
        self.token_weight = None if streams.token_weight is None else streams.token_weight.detach()
        self.previous = _previous(self.tokens, self.documents)
        self.beyond = self.tokens.shape[1]
        after = _next_target(self.tokens, self.documents, streams.ignore_index)
        position = torch.arange(self.whole.shape[1], device=streams.device).expand_as(self.whole)
        nearest = after
        if streams.shift_labels is not None:  # the label of token t + 1 stands at t
            nearest = torch.where(
                self.tokens[:, 1:] != streams.ignore_index, position + 1, after[:, 1:]
            )
        after = torch.cat([after, after.new_full((len(after), 1), self.beyond)], dim=1)
        for _ in range(first - 1):
            nearest = torch.where(nearest < position + first, after.gather(1, nearest), nearest)
        row = torch.arange(len(position), device=streams.device).unsqueeze(1).expand_as(position)
        self.row = streams.here(row).flatten()
        self.position = streams.here(position).flatten()
        self.nearest = streams.here(nearest).flatten()
        self.document = streams.here(self.whole).flatten()

    def occupied(self) -> Tensor:
        """Which rows have a target: bool [B T]."""
        return (
            (self.nearest < self.beyond)
            & (self.nearest <= self.position + self.last)
            & (self.document >= 0)
        )

    def targets(self, rows: slice, width: int) -> tuple[Tensor, Tensor]:
        """(x[t+k] or ignore_index, k): int64 [rows, K], for k = that of the nearest target, the
        next, ...; K = width, or less where the sequence is shorter."""
        row, position = self.row[rows].unsqueeze(1), self.position[rows].unsqueeze(1)
        nearest, document = self.nearest[rows].unsqueeze(1), self.document[rows].unsqueeze(1)
        column = nearest + torch.arange(max(1, min(width, self.beyond)), device=nearest.device)
        k = column - position
        at = row, column.clamp(max=self.beyond - 1)
        valid = (
            (column < self.beyond)
            & (k <= self.last)
            & (self.documents[at] == document)
            & (document >= 0)
        )
        valid &= self.previous[at] < position + self.first
        return self.tokens[at].masked_fill(~valid, self.ignore_index), k

    def weights(self, k: Tensor) -> Tensor | None:
        """``token_weight[t+k]`` of all rows, as in `target_weights`: k and the weights are [B T,
        width]."""
        if self.token_weight is None:
            return None
        column, document = self.position.unsqueeze(1) + k, self.document.unsqueeze(1)
        at = self.row.unsqueeze(1), column.clamp(max=self.whole.shape[1] - 1)
        pairs = (column < self.whole.shape[1]) & (self.whole[at] == document) & (document >= 0)
        return self.token_weight[at].masked_fill(~pairs, 1.0)


def _previous(tokens: Tensor, documents: Tensor) -> Tensor:
    """The largest s' < s with the token and the document of s, -1 where there is none: [B, S], by
    two stable sorts."""
    order = tokens.argsort(dim=1, stable=True)
    order = order.gather(1, documents.gather(1, order).argsort(dim=1, stable=True))
    tokens, documents = tokens.gather(1, order), documents.gather(1, order)
    same = (tokens[:, 1:] == tokens[:, :-1]) & (documents[:, 1:] == documents[:, :-1])
    before = torch.where(same, order[:, :-1], -1)
    return torch.full_like(order, -1).scatter_(1, order[:, 1:], before)


def _next_target(tokens: Tensor, documents: Tensor, ignore_index: int) -> Tensor:
    """The smallest s' > s with the document of s whose token is a target, S where there is none:
    [B, S]."""
    size = tokens.shape[1]
    order = documents.argsort(dim=1, stable=True)
    documents = documents.gather(1, order)
    begins = torch.zeros_like(order)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # a column as a number that grows from document to document: the smallest of the later ones
    # is the next one
    base = begins.cumsum(1) * (size + 1)
    numbers = base + torch.where(tokens.gather(1, order) != ignore_index, order, size)
    last = numbers.new_full((len(numbers), 1), torch.iinfo(torch.int64).max)
    coming = torch.cat([numbers, last], dim=1).flip(1).cummin(1).values.flip(1)[:, 1:]
    return torch.empty_like(order).scatter_(1, order, (coming - base).clamp(max=size))
