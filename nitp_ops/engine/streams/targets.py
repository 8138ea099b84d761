"""Targets k steps ahead: which exist, which tokens they are, what they weigh. Nothing ever wraps
around.

    P_k[b, t] = (0 <= t+k < T) & (doc[b, t+k] == doc[b, t]) & (doc[b, t] >= 0)

P_k: the hidden state and the input token k steps ahead are there.
V_k: the token target k steps ahead counts.

* labels, or token_ids alone: V_k = P_k, where token t+k may be a target.
* shift_labels: the label of token t+k stands at p = t+k-1 and belongs to the document of that
  position. V_k is doc[b, p] == doc[b, t] >= 0, where the label is one. So a document's last label
  is a target, as is that of token T: they have no hidden state, which pairs would need. What the
  streams say about token t+k, target_mask and token_weight, counts where P_k holds. With
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
    """`function` of streams and constants, computed once while an objective's call lasts
    (`Streams.for_a_call`): terms read the same targets, and count them before they use them. What
    it returns is read only."""
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
    """Refuses a target outside [0, vocabulary), by its name and its indices.

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
    targets, (here, known) = targets_at_tokens(streams), documents_at_tokens(streams)
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != streams.ignore_index)
    before = here[:, : targets.shape[1] - 1]
    wrong[:, 1:] &= (known[:, 1:] == before) & (before >= 0)
    wrong[:, :1] = False  # nothing predicts the first token
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        column -= targets.shape[1] - tokens.shape[1]  # shift_labels lack the first
        raise IndexError(
            f"objective: {streams.tokens_name}[{row}, {column}] is {int(tokens[row, column])}, "
            f"expected a value in [0, {vocabulary}) or ignore_index={streams.ignore_index}"
        )


def _all_inside(tokens: Tensor, vocabulary: int, ignore_index: int) -> bool:
    """Whether every token could be a target, wherever it stands: a read or two decide it for most
    batches."""
    if not tokens.numel():
        return True
    low, high = map(int, torch.aminmax(tokens))
    absent = low >= 0 or not bool(((tokens < 0) & (tokens != ignore_index)).any())
    return high < vocabulary and absent


@_once_a_call
def valid_pairs(streams: Streams, k: int, *, labelled: bool = False) -> Tensor:
    """P_k, bool [B, T]; P_k & V_k with ``labelled``.

    Under shift_labels a document's first token has no label, which only ``k = 0`` reads.
    """
    if streams.documents is None:
        valid = _ahead(torch.ones_like(streams.tokens, dtype=torch.bool), k, streams, False)
    else:
        valid = _equal_ahead(streams.documents, streams.documents, k, streams)
    return valid & (token_targets(streams, k) != streams.ignore_index) if labelled else valid


@_once_a_call
def token_targets(streams: Streams, k: int) -> Tensor:
    """``x[t+k]`` where V_k holds, else ignore_index: int64 [B, T]."""
    targets = _ahead(targets_at_tokens(streams), k, streams, streams.ignore_index)
    if streams.documents is None:  # one document a row
        return targets
    return targets.masked_fill(
        ~_equal_ahead(*documents_at_tokens(streams), k, streams), streams.ignore_index
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
    if streams.shard is None:
        return rows.detach(), k
    return streams.shard.following(rows, k), 0


def target_weights(streams: Streams, k: int) -> Tensor | None:
    """``token_weight[t+k]`` where P_k holds, else 1: [B, T]; None without token weights."""
    return None if streams.token_weight is None else _weights_ahead(streams, k)


@_once_a_call
def _weights_ahead(streams: Streams, k: int) -> Tensor:
    assert streams.token_weight is not None
    return _inside(_ahead(streams.token_weight.detach(), k, streams, 1.0), k, streams, 1.0)


def targets_at_tokens(streams: Streams) -> Tensor:
    """x[t] where token t may be a target, else ignore_index: int64 [B, T] of the whole sequence, or
    [B, T+1] under shift_labels (x[0] is unknown)."""
    if streams.shift_labels is not None:
        return _shifted_targets(streams)
    tokens = streams.tokens.to(torch.int64)
    if streams.target_mask is None:
        return tokens
    return tokens.masked_fill(~streams.target_mask, streams.ignore_index)


@_once_a_call
def _shifted_targets(streams: Streams) -> Tensor:
    assert streams.shift_labels is not None
    tokens = _after_unknown(streams.shift_labels.to(torch.int64), streams.ignore_index)
    here, _ = documents_at_tokens(streams)
    # the token of this label is the next one of the label's document
    inside = here[:, 1:] == here[:, :-1]
    masked = torch.zeros_like(inside) if streams.label_layout == "document" else ~inside
    if streams.target_mask is not None:
        masked = masked | (inside & ~streams.target_mask[:, 1:])
    tokens[:, 1:-1].masked_fill_(masked, streams.ignore_index)
    return tokens


@_once_a_call
def documents_at_tokens(streams: Streams) -> tuple[Tensor, Tensor]:
    """Documents of the whole sequence [B, T], and those that the labels in `targets_at_tokens` belong to: of
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
    if streams.documents is None:
        return values
    return values.masked_fill(~valid_pairs(streams, k), fill)


def _equal_ahead(whole: Tensor, known: Tensor, k: int, streams: Streams) -> Tensor:
    here = streams.here(whole)
    return (_ahead(known, k, streams, -1) == here) & (here >= 0)


def _ahead(values: Tensor, k: int, streams: Streams, fill: float) -> Tensor:
    """out[b, t] = values[b, t+k] at the positions t that are here, `fill` past the end; values: the
    whole sequence."""
    parts = [_span_ahead(values, k, *span, fill) for span in streams.spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _span_ahead(values: Tensor, k: int, begin: int, end: int, fill: float) -> Tensor:
    size = values.shape[1]
    first = min(begin + k, size)  # from `size` on nothing is left
    return torch.constant_pad_nd(values, (-first, end - begin - (size - first)), fill)
