"""Targets k steps ahead: which exist, which tokens they are, what they weigh. Nothing ever wraps around.

    V_k[b, t] = (t+k < T) & (doc[b, t+k] == doc[b, t]) & (doc[b, t] >= 0) & ok[b, t+k]

With shift_labels a row knows one token more, token T. It has a label but no hidden state: token targets reach it, pairs
of hidden states do not. Its document is unknown, so it counts as that of token T - 1 and its label alone decides.

Under context parallel (`Streams.shard`) everything is shifted over the whole sequence, then cut to the positions that
are here: [B, T] is then [B, T/p].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sequence_shard import columns
from .streams import Streams


def check_targets(streams: Streams, vocabulary: int) -> None:
    """Refuses a target outside [0, vocabulary), by the name and the place that it came with.

    On CPU, where values may be read, and outside torch.compile; else only the ops meet it, which know neither.

    Raises:
        IndexError: such a token follows another one of its document, and target_mask lets it be a target.
    """
    tokens = streams.tokens
    if torch.compiler.is_compiling() or type(tokens) is not Tensor or tokens.device.type != "cpu":
        return
    targets, (_, documents) = _targets(streams), _documents(streams)
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != streams.ignore_index)
    reached = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    wrong[:, 1:] &= reached
    wrong[:, :1] = False  # nothing predicts the first token
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        place -= targets.shape[1] - tokens.shape[1]  # shift_labels lack the first
        raise IndexError(
            f"objective: {streams.tokens_name}[{row}, {place}] is {int(tokens[row, place])}, expected a value in "
            f"[0, {vocabulary}) or ignore_index={streams.ignore_index}"
        )


def valid_pairs(streams: Streams, k: int, *, labelled: bool = False) -> Tensor:
    """V_k for pairs of hidden states, bool [B, T]; `ok` only counts with ``labelled``.

    A token whose label is unknown (token 0 under shift_labels, which only ``k = 0`` can ask for) is not ok.
    """
    here, _ = _documents(streams)
    valid = _equal_ahead(here, here, k, streams)
    return valid & (token_targets(streams, k) != streams.ignore_index) if labelled else valid


def token_targets(streams: Streams, k: int) -> Tensor:
    """``x[t+k]`` where V_k holds, else ignore_index: int64 [B, T]."""
    targets = _ahead(_targets(streams), k, streams, streams.ignore_index)
    return targets.masked_fill(~_same_document(streams, k), streams.ignore_index)


def inputs_ahead(streams: Streams, k: int) -> Tensor:
    """``token_ids[t+k]``, 0 past the end: int64 [B, T]. They are inputs: neither documents nor target_mask hide them.

    Raises:
        ValueError: no token_ids (labels are no inputs: some are absent).
    """
    if streams.token_ids is None:
        raise ValueError("objective: streams lacks token_ids, expected the ids that embed reads")
    return _ahead(streams.token_ids.to(torch.int64), k, streams, 0)


def rows_ahead(streams: Streams, rows: Tensor, k: int) -> tuple[Tensor, int]:
    """(x, s): the detached row of a hidden stream k tokens after t is ``x[:, t+s]``, [B, T, d].

    Without a shard that is (rows, k), nothing is copied. With one the rows of other ranks come in, and s is 0.
    """
    return (rows.detach(), k) if streams.shard is None else (streams.shard.following(rows, k), 0)


def nearest_targets(streams: Streams, window: int) -> Tensor:
    """``x[t+k]`` for k = 1 .. K = min(window, T): int64 [B, T, K].

    ignore_index where V_k does not hold or where x[t+k] is already a target at a smaller k.
    """
    tokens, (whole, known) = _targets(streams), _documents(streams)
    here = streams.here(whole).unsqueeze(-1)
    valid = (_window(known, window, streams, -1) == here) & (here >= 0)
    place = streams.here(torch.arange(whole.shape[1], device=streams.device).unsqueeze(0)).unsqueeze(-1)
    first = _window(_previous(tokens, known), window, streams, -1) <= place
    targets = _window(tokens, window, streams, streams.ignore_index)
    return targets.masked_fill(~(valid & first), streams.ignore_index)


def target_weights(streams: Streams, k: int) -> Tensor | None:
    """``token_weight[t+k]`` [B, T], 1 for the token that only shift_labels knows; None without token weights."""
    if streams.token_weight is None:
        return None
    return _ahead(_with_last(streams.token_weight.detach(), streams, 1.0), k, streams, 0.0)


def window_weights(streams: Streams, window: int) -> Tensor | None:
    """``token_weight[t+k]`` for k = 1 .. min(window, T): [B, T, K], as in `target_weights`."""
    if streams.token_weight is None:
        return None
    return _window(_with_last(streams.token_weight.detach(), streams, 1.0), window, streams, 0.0)


def _targets(streams: Streams) -> Tensor:
    """x[t] where ok[t] holds, else ignore_index: int64 [B, T] of the whole sequence, or
    [B, T+1] under shift_labels (x[0] is unknown)."""
    tokens = streams.tokens.to(torch.int64)
    if streams.shift_labels is not None:
        unknown = tokens.new_full((tokens.shape[0], 1), streams.ignore_index)
        tokens = torch.cat([unknown, tokens], dim=1)
    if streams.target_mask is None:
        return tokens
    return tokens.masked_fill(~_with_last(streams.target_mask, streams, True), streams.ignore_index)


def _documents(streams: Streams) -> tuple[Tensor, Tensor]:
    """Documents of the whole sequence [B, T], and the same with the token that only shift_labels knows."""
    here = streams.documents
    if here is None:
        here = torch.zeros_like(streams.tokens, dtype=torch.int64)
    return here, here if streams.shift_labels is None else torch.cat([here, here[:, -1:]], dim=1)


def _same_document(streams: Streams, k: int) -> Tensor:
    """doc[t+k] == doc[t] >= 0, also where t + k is the token that only shift_labels knows."""
    return _equal_ahead(*_documents(streams), k, streams)


def _equal_ahead(whole: Tensor, known: Tensor, k: int, streams: Streams) -> Tensor:
    here = streams.here(whole)
    return (_ahead(known, k, streams, -1) == here) & (here >= 0)


def _previous(tokens: Tensor, documents: Tensor) -> Tensor:
    """The largest s' < s with the token and the document of s, -1 where there is none: [B, S], by two stable sorts."""
    order = tokens.argsort(dim=1, stable=True)
    order = order.gather(1, documents.gather(1, order).argsort(dim=1, stable=True))
    tokens, documents = tokens.gather(1, order), documents.gather(1, order)
    same = (tokens[:, 1:] == tokens[:, :-1]) & (documents[:, 1:] == documents[:, :-1])
    before = torch.where(same, order[:, :-1], -1)
    return torch.full_like(order, -1).scatter_(1, order[:, 1:], before)


def _with_last(values: Tensor, streams: Streams, last: float) -> Tensor:
    if streams.shift_labels is None:
        return values
    return torch.cat([values, values.new_full((values.shape[0], 1), last)], dim=1)


def _ahead(values: Tensor, k: int, streams: Streams, fill: float) -> Tensor:
    """out[b, t] = values[b, t+k] at the positions t that are here, `fill` past the end; values: the whole sequence."""
    return columns(_padded(values, k, streams, fill), streams.spans, k)


def _window(values: Tensor, window: int, streams: Streams, fill: float) -> Tensor:
    """out[b, t, k - 1] = values[b, t+k] for k = 1 .. min(window, T), `fill` past the end; a view where t is every t.

    k = 1 is there also where T = 0: a width of zero would be no row of targets."""
    width = max(1, min(window, streams.tokens.shape[1]))
    return columns(_padded(values, width, streams, fill)[:, 1:].unfold(1, width, 1), streams.spans)


def _padded(values: Tensor, k: int, streams: Streams, fill: float) -> Tensor:
    """values [B, S], as many columns as t + k may ask for."""
    missing = max(0, max(1, streams.spans[-1][1]) + k - values.shape[1])
    return torch.cat([values, values.new_full((values.shape[0], missing), fill)], dim=1)
