"""Targets k steps ahead: which exist, which tokens they are, what they weigh. Nothing ever wraps around.

    V_k[b, t] = (t+k < T) & (doc[b, t+k] == doc[b, t]) & (doc[b, t] >= 0) & ok[b, t+k]

With shift_labels a row knows one token more, token T. It has a label but no hidden state: token targets reach it, pairs
of hidden states do not. Its document is unknown, so it counts as that of token T - 1 and its label alone decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .streams import Streams


def valid_pairs(streams: Streams, k: int, *, labelled: bool = False) -> Tensor:
    """V_k for pairs of hidden states, bool [B, T]; `ok` only counts with ``labelled``.

    A token whose label is unknown (token 0 under shift_labels, which only ``k = 0`` can ask for) is not ok.
    """
    length = streams.shape[1]
    inside = torch.arange(length, device=streams.device) + k < length
    valid = inside.expand(streams.shape) & _same_document(streams, k)
    return valid & (token_targets(streams, k) != streams.ignore_index) if labelled else valid


def token_targets(streams: Streams, k: int) -> Tensor:
    """``x[t+k]`` where V_k holds, else ignore_index: int64 [B, T]."""
    tokens = streams.tokens.to(torch.int64)
    if streams.shift_labels is not None:
        unknown = tokens.new_full((streams.shape[0], 1), streams.ignore_index)
        tokens = torch.cat([unknown, tokens], dim=1)
    targets = _ahead(tokens, k, streams, streams.ignore_index)
    valid = _same_document(streams, k)
    if streams.target_mask is not None:
        valid = valid & _ahead(_with_last(streams.target_mask, streams, True), k, streams, False)
    return targets.masked_fill(~valid, streams.ignore_index)


def target_weights(streams: Streams, k: int) -> Tensor | None:
    """``token_weight[t+k]`` [B, T], 1 for the token that only shift_labels knows; None without token weights."""
    if streams.token_weight is None:
        return None
    return _ahead(_with_last(streams.token_weight.detach(), streams, 1.0), k, streams, 0.0)


def _same_document(streams: Streams, k: int) -> Tensor:
    """doc[t+k] == doc[t] >= 0, also where t + k is the token that only shift_labels knows."""
    here = streams.documents
    if here is None:
        here = torch.zeros(streams.shape, dtype=torch.int64, device=streams.device)
    known = here if streams.shift_labels is None else torch.cat([here, here[:, -1:]], dim=1)
    return (_ahead(known, k, streams, -1) == here) & (here >= 0)


def _with_last(values: Tensor, streams: Streams, last: float) -> Tensor:
    if streams.shift_labels is None:
        return values
    return torch.cat([values, values.new_full((streams.shape[0], 1), last)], dim=1)


def _ahead(values: Tensor, k: int, streams: Streams, fill: float) -> Tensor:
    """out[b, t] = values[b, t+k], `fill` past the end; T columns whatever values has."""
    batch, length = streams.shape
    shifted = values[:, k : k + length]
    return torch.cat([shifted, values.new_full((batch, length - shifted.shape[1]), fill)], dim=1)
