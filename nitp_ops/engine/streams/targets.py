"""Targets k steps ahead: which exist, which tokens they are, what they weigh. Nothing ever wraps
around.

    P_k[b, t] = (0 <= t+k < T) & (doc[b, t+k] == doc[b, t]) & (doc[b, t] >= 0)

P_k: the hidden state and the input token k steps ahead are there. V_k: the token target k steps
    ahead counts.

* labels, or token_ids alone: V_k = P_k, where token t+k may be a target.
* shift_labels: the label of token t+k stands at p = t+k-1 and belongs to the document of that
  position. V_k is doc[b, p] == doc[b, t] >= 0, where the label is one. So a document's last label
  is a target, as is that of token T: they have no hidden state, which pairs would need. What the
  streams say about token t+k, target_mask and token_weight, is asked where P_k holds. With
  ``label_layout="stream"`` a label whose token begins another document is none.

Under context parallel (`Streams.shard`) everything is shifted over the whole sequence, then cut to
the positions that are here: [B, T] is then [B, T/p].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from nitp_ops.core import checks

from .streams import Streams

_T = TypeVar("_T")


def _once_a_call(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function` of streams and constants, formed once while an objective's call lasts
    (`Streams.for_a_call`): terms ask for the same targets, and count them before they use them.
    Nobody may write into what it returns."""

    name = function.__name__

    @wraps(function)
    def kept(streams: Streams, *args: Any, **options: Any) -> _T:
        found = streams.formed
        if found is None:
            return function(streams, *args, **options)
        key = (name, *args, *options.values())
        if key not in found:
            found[key] = function(streams, *args, **options)
        return found[key]

    return kept


def check_targets(streams: Streams, vocabulary: int) -> None:
    """Refuses a target outside [0, vocabulary), by the name and the place that it came with.

    On CPU, where values may be read, and outside torch.compile; else only the ops meet it, which
    know neither.

    Raises:
        IndexError: such a token is a target of the position before it.
    """
    tokens = streams.tokens
    if (
        torch.compiler.is_compiling()
        or type(tokens) is not Tensor
        or not checks.host_reads(tokens.device)
    ):
        return
    if _all_inside(tokens, vocabulary, streams.ignore_index):
        return
    targets, (here, known) = _targets(streams), _documents(streams)
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != streams.ignore_index)
    before = here[:, : targets.shape[1] - 1]
    wrong[:, 1:] &= (known[:, 1:] == before) & (before >= 0)
    wrong[:, :1] = False  # nothing predicts the first token
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        place -= targets.shape[1] - tokens.shape[1]  # shift_labels lack the first
        raise IndexError(
            f"objective: {streams.tokens_name}[{row}, {place}] is {int(tokens[row, place])}, "
            f"expected a value in [0, {vocabulary}) or ignore_index={streams.ignore_index}"
        )


def _all_inside(tokens: Tensor, vocabulary: int, ignore_index: int) -> bool:
    """Whether every token could be a target, wherever it stands: what most batches answer in a read
    or two."""
    if not tokens.numel():
        return True
    low, high = map(int, torch.aminmax(tokens))
    absent = low >= 0 or not bool(((tokens < 0) & (tokens != ignore_index)).any())
    return high < vocabulary and absent


@_once_a_call
def valid_pairs(streams: Streams, k: int, *, labelled: bool = False) -> Tensor:
    """P_k, bool [B, T]; P_k & V_k with ``labelled``.

    Under shift_labels a document's first token has no label, which only ``k = 0`` can ask for.
    """
    if streams.documents is None:
        valid = _ahead(torch.ones_like(streams.tokens, dtype=torch.bool), k, streams, False)
    else:
        valid = _equal_ahead(streams.documents, streams.documents, k, streams)
    return valid & (token_targets(streams, k) != streams.ignore_index) if labelled else valid


@_once_a_call
def token_targets(streams: Streams, k: int) -> Tensor:
    """``x[t+k]`` where V_k holds, else ignore_index: int64 [B, T]."""
    targets = _ahead(_targets(streams), k, streams, streams.ignore_index)
    if streams.documents is None:  # one document a row
        return targets
    return targets.masked_fill(
        ~_equal_ahead(*_documents(streams), k, streams), streams.ignore_index
    )


@_once_a_call
def inputs_ahead(streams: Streams, k: int) -> Tensor:
    """``token_ids[t+k]`` where P_k holds, else 0: int64 [B, T]. They are inputs: target_mask does
    not hide them.

    Raises:
        ValueError: no token_ids (labels are no inputs: some are absent).
    """
    if streams.token_ids is None:
        raise ValueError("objective: streams lacks token_ids, expected the ids that embed reads")
    return _inside(_ahead(streams.token_ids.to(torch.int64), k, streams, 0), k, streams, 0)


def rows_ahead(streams: Streams, rows: Tensor, k: int) -> tuple[Tensor, int]:
    """(x, s): the detached row of a hidden stream k tokens after t is ``x[:, t+s]``, [B, T, d].

    Without a shard that is (rows, k), nothing is copied. With one the rows of other ranks come in,
    and s is 0.
    """
    return (rows.detach(), k) if streams.shard is None else (streams.shard.following(rows, k), 0)


def target_weights(streams: Streams, k: int) -> Tensor | None:
    """``token_weight[t+k]`` where P_k holds, else 1: [B, T]; None without token weights."""
    return None if streams.token_weight is None else _weights_ahead(streams, k)


@_once_a_call
def _weights_ahead(streams: Streams, k: int) -> Tensor:
    assert streams.token_weight is not None
    return _inside(_ahead(streams.token_weight.detach(), k, streams, 1.0), k, streams, 1.0)


class TargetWindow:
    """The targets x[t+k], first <= k <= last, of each row, each token once, at its smallest k.

    What [B, T, last] would hold is built for the rows and the width that are asked for, from the
    nearest target on. Rows are numbered b T + t over the positions that are here.
    """

    def __init__(self, streams: Streams, first: int, last: int) -> None:
        self.first, self.last, self.ignore_index = first, last, streams.ignore_index
        self.tokens, (self.whole, self.documents) = _targets(streams), _documents(streams)
        self.token_weight = None if streams.token_weight is None else streams.token_weight.detach()
        self.previous = _previous(self.tokens, self.documents)
        self.beyond = self.tokens.shape[1]
        after = _next_target(self.tokens, self.documents, streams.ignore_index)
        place = torch.arange(self.whole.shape[1], device=streams.device).expand_as(self.whole)
        nearest = after
        if streams.shift_labels is not None:  # the label of token t + 1 stands at t
            nearest = torch.where(
                self.tokens[:, 1:] != streams.ignore_index, place + 1, after[:, 1:]
            )
        after = torch.cat([after, after.new_full((len(after), 1), self.beyond)], dim=1)
        for _ in range(first - 1):
            nearest = torch.where(nearest < place + first, after.gather(1, nearest), nearest)
        row = torch.arange(len(place), device=streams.device).unsqueeze(1).expand_as(place)
        here = (streams.here(x).flatten() for x in (row, place, nearest, self.whole))
        self.row, self.place, self.nearest, self.document = here

    def occupied(self) -> Tensor:
        """Which rows have a target: bool [B T]."""
        return (
            (self.nearest < self.beyond)
            & (self.nearest <= self.place + self.last)
            & (self.document >= 0)
        )

    def targets(self, rows: slice, width: int) -> tuple[Tensor, Tensor]:
        """(x[t+k] or ignore_index, k): int64 [rows, K], for k = that of the nearest target, the
        next, ...; K = width, or less where the sequence is shorter."""
        row, place, nearest, document = (
            x[rows].unsqueeze(1) for x in (self.row, self.place, self.nearest, self.document)
        )
        column = nearest + torch.arange(max(1, min(width, self.beyond)), device=nearest.device)
        k = column - place
        at = row, column.clamp(max=self.beyond - 1)
        valid = (
            (column < self.beyond)
            & (k <= self.last)
            & (self.documents[at] == document)
            & (document >= 0)
        )
        valid &= self.previous[at] < place + self.first
        return self.tokens[at].masked_fill(~valid, self.ignore_index), k

    def weights(self, k: Tensor) -> Tensor | None:
        """``token_weight[t+k]`` of all rows, as in `target_weights`: k and the weights are [B T,
        width]."""
        if self.token_weight is None:
            return None
        column, document = self.place.unsqueeze(1) + k, self.document.unsqueeze(1)
        at = self.row.unsqueeze(1), column.clamp(max=self.whole.shape[1] - 1)
        pairs = (column < self.whole.shape[1]) & (self.whole[at] == document) & (document >= 0)
        return self.token_weight[at].masked_fill(~pairs, 1.0)


def _targets(streams: Streams) -> Tensor:
    """x[t] where token t may be a target, else ignore_index: int64 [B, T] of the whole sequence, or
    [B, T+1] under shift_labels (x[0] is unknown)."""
    if streams.shift_labels is not None:
        return _shifted_targets(streams)
    tokens = streams.tokens.to(torch.int64)
    return (
        tokens
        if streams.target_mask is None
        else tokens.masked_fill(~streams.target_mask, streams.ignore_index)
    )


@_once_a_call
def _shifted_targets(streams: Streams) -> Tensor:
    assert streams.shift_labels is not None
    tokens = _after_unknown(streams.shift_labels.to(torch.int64), streams.ignore_index)
    here, _ = _documents(streams)
    # the token of this label is the next one of the label's document
    inside = here[:, 1:] == here[:, :-1]
    masked = torch.zeros_like(inside) if streams.label_layout == "document" else ~inside
    if streams.target_mask is not None:
        masked = masked | (inside & ~streams.target_mask[:, 1:])
    tokens[:, 1:-1].masked_fill_(masked, streams.ignore_index)
    return tokens


@_once_a_call
def _documents(streams: Streams) -> tuple[Tensor, Tensor]:
    """Documents of the whole sequence [B, T], and those that the labels in `_targets` belong to: of
    the position where each stands, the one before its token under shift_labels."""
    here = streams.documents
    if here is None:
        here = torch.zeros_like(streams.tokens, dtype=torch.int64)
    return here, here if streams.shift_labels is None else _after_unknown(here, -1)


def _after_unknown(values: Tensor, fill: int) -> Tensor:
    """[B, T+1]: values of the labels, each at its token; token 0 has none."""
    return torch.constant_pad_nd(values, (1, 0), fill)


def _inside(values: Tensor, k: int, streams: Streams, fill: float) -> Tensor:
    """Values k tokens ahead where P_k holds, else `fill`, which they have past the end."""
    return (
        values if streams.documents is None else values.masked_fill(~valid_pairs(streams, k), fill)
    )


def _equal_ahead(whole: Tensor, known: Tensor, k: int, streams: Streams) -> Tensor:
    here = streams.here(whole)
    return (_ahead(known, k, streams, -1) == here) & (here >= 0)


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
    # a column as a number that grows from document to document: the smallest of those that come is
    # the next one
    base = begins.cumsum(1) * (size + 1)
    numbers = base + torch.where(tokens.gather(1, order) != ignore_index, order, size)
    last = numbers.new_full((len(numbers), 1), torch.iinfo(torch.int64).max)
    coming = torch.cat([numbers, last], dim=1).flip(1).cummin(1).values.flip(1)[:, 1:]
    return torch.empty_like(order).scatter_(1, order, (coming - base).clamp(max=size))


def _ahead(values: Tensor, k: int, streams: Streams, fill: float) -> Tensor:
    """out[b, t] = values[b, t+k] at the positions t that are here, `fill` past the end; values: the
    whole sequence."""
    pieces = [_span_ahead(values, k, *span, fill) for span in streams.spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _span_ahead(values: Tensor, k: int, begin: int, end: int, fill: float) -> Tensor:
    size = values.shape[1]
    first = min(begin + k, size)  # from `size` on nothing is left
    return torch.constant_pad_nd(values, (-first, end - begin - (size - first)), fill)
