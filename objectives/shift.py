"""Targets k steps ahead: which exist, which tokens they are, what they weigh. Nothing ever wraps around.

    P_k[b, t] = (0 <= t+k < T) & (doc[b, t+k] == doc[b, t]) & (doc[b, t] >= 0)

P_k: the hidden state and the input token k steps ahead are there. V_k: the token target k steps ahead counts.

* labels, or token_ids alone: V_k = P_k, where token t+k may be a target.
* shift_labels: the label of token t+k stands at p = t+k-1 and belongs to the document of that position. V_k is
  doc[b, p] == doc[b, t] >= 0, where the label is one. So a document's last label is a target, as is that of token T:
  they have no hidden state, which pairs would need. What the streams say about token t+k, target_mask and token_weight,
  is asked where P_k holds. With ``label_layout="stream"`` a label whose token begins another document is none.

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
        IndexError: such a token is a target of the position before it.
    """
    tokens = streams.tokens
    if torch.compiler.is_compiling() or type(tokens) is not Tensor or tokens.device.type != "cpu":
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
            f"objective: {streams.tokens_name}[{row}, {place}] is {int(tokens[row, place])}, expected a value in "
            f"[0, {vocabulary}) or ignore_index={streams.ignore_index}"
        )


def valid_pairs(streams: Streams, k: int, *, labelled: bool = False) -> Tensor:
    """P_k, bool [B, T]; P_k & V_k with ``labelled``.

    Under shift_labels a document's first token has no label, which only ``k = 0`` can ask for.
    """
    here, _ = _documents(streams)
    valid = _equal_ahead(here, here, k, streams)
    return valid & (token_targets(streams, k) != streams.ignore_index) if labelled else valid


def token_targets(streams: Streams, k: int) -> Tensor:
    """``x[t+k]`` where V_k holds, else ignore_index: int64 [B, T]."""
    targets = _ahead(_targets(streams), k, streams, streams.ignore_index)
    return targets.masked_fill(~_equal_ahead(*_documents(streams), k, streams), streams.ignore_index)


def inputs_ahead(streams: Streams, k: int) -> Tensor:
    """``token_ids[t+k]`` where P_k holds, else 0: int64 [B, T]. They are inputs: target_mask does not hide them.

    Raises:
        ValueError: no token_ids (labels are no inputs: some are absent).
    """
    if streams.token_ids is None:
        raise ValueError("objective: streams lacks token_ids, expected the ids that embed reads")
    return _ahead(streams.token_ids.to(torch.int64), k, streams, 0).masked_fill(~valid_pairs(streams, k), 0)


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
    place = streams.here(torch.arange(whole.shape[1], device=streams.device).unsqueeze(0)).unsqueeze(-1)
    first = _window(_previous(tokens, known), window, streams, -1) <= place
    targets = _window(tokens, window, streams, streams.ignore_index)
    return targets.masked_fill(~(_equal_within(whole, known, window, streams) & first), streams.ignore_index)


def target_weights(streams: Streams, k: int) -> Tensor | None:
    """``token_weight[t+k]`` where P_k holds, else 1: [B, T]; None without token weights."""
    if streams.token_weight is None:
        return None
    return _ahead(streams.token_weight.detach(), k, streams, 1.0).masked_fill(~valid_pairs(streams, k), 1.0)


def window_weights(streams: Streams, window: int) -> Tensor | None:
    """The same for k = 1 .. min(window, T): [B, T, K]."""
    if streams.token_weight is None:
        return None
    here, _ = _documents(streams)
    pairs = _equal_within(here, here, window, streams)
    return _window(streams.token_weight.detach(), window, streams, 1.0).masked_fill(~pairs, 1.0)


def _targets(streams: Streams) -> Tensor:
    """x[t] where token t may be a target, else ignore_index: int64 [B, T] of the whole sequence, or
    [B, T+1] under shift_labels (x[0] is unknown)."""
    tokens = streams.tokens.to(torch.int64)
    if streams.shift_labels is None:
        return tokens if streams.target_mask is None else tokens.masked_fill(~streams.target_mask, streams.ignore_index)
    tokens = _after_unknown(tokens, streams.ignore_index)
    here, _ = _documents(streams)
    inside = here[:, 1:] == here[:, :-1]  # the token of this label is the next one of the label's document
    masked = torch.zeros_like(inside) if streams.label_layout == "document" else ~inside
    if streams.target_mask is not None:
        masked = masked | (inside & ~streams.target_mask[:, 1:])
    tokens[:, 1:-1].masked_fill_(masked, streams.ignore_index)
    return tokens


def _documents(streams: Streams) -> tuple[Tensor, Tensor]:
    """Documents of the whole sequence [B, T], and those that the labels in `_targets` belong to: of the position where
    each stands, the one before its token under shift_labels."""
    here = streams.documents
    if here is None:
        here = torch.zeros_like(streams.tokens, dtype=torch.int64)
    return here, here if streams.shift_labels is None else _after_unknown(here, -1)


def _after_unknown(values: Tensor, fill: int) -> Tensor:
    """[B, T+1]: values of the labels, each at its token; token 0 has none."""
    return torch.cat([values.new_full((values.shape[0], 1), fill), values], dim=1)


def _equal_ahead(whole: Tensor, known: Tensor, k: int, streams: Streams) -> Tensor:
    here = streams.here(whole)
    return (_ahead(known, k, streams, -1) == here) & (here >= 0)


def _equal_within(whole: Tensor, known: Tensor, window: int, streams: Streams) -> Tensor:
    here = streams.here(whole).unsqueeze(-1)
    return (_window(known, window, streams, -1) == here) & (here >= 0)


def _previous(tokens: Tensor, documents: Tensor) -> Tensor:
    """The largest s' < s with the token and the document of s, -1 where there is none: [B, S], by two stable sorts."""
    order = tokens.argsort(dim=1, stable=True)
    order = order.gather(1, documents.gather(1, order).argsort(dim=1, stable=True))
    tokens, documents = tokens.gather(1, order), documents.gather(1, order)
    same = (tokens[:, 1:] == tokens[:, :-1]) & (documents[:, 1:] == documents[:, :-1])
    before = torch.where(same, order[:, :-1], -1)
    return torch.full_like(order, -1).scatter_(1, order[:, 1:], before)


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
