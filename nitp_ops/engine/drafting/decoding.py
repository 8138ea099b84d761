"""Greedy self-speculative decoding: an objective's heads guess tokens ahead, the model checks them
all in one call.

With x_0 .. x_n known and the model run up to x_{n-1}, the heads propose d_1 .. d_k for x_{n+1} ..
x_{n+k}. The model reads x_n, d_1, .., d_k at once; p_0, .., p_k are its own greedy choices after
each of them. The first a drafts with d_j = p_{j-1} are accepted, and p_a is one token more. So every
token is the model's own choice: heads change the speed only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nitp_ops.engine.modules.head_access import logits
from nitp_ops.engine.spec.validation import is_int, of_64_bits, suggestion
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams


class Trunk(Protocol):
    """A model that reads one sequence in parts and can forget its end: a cache of keys and values,
    usually."""

    def extend(self, token_ids: Tensor) -> Streams:
        """Read the next tokens, int64 ``[1, n]``; the streams of these n positions, with the head."""
        ...

    def cut(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        ...


class Drafter(Protocol):
    """Guesses tokens ahead; made for one sequence.

    Attributes:
        source: the hidden stream that it reads. needs: the other streams, head aside.
        reach: the most tokens that it can guess at once.
    """

    source: str
    needs: tuple[str, ...]
    reach: int

    def propose(self, hidden: Tensor, tokens: Tensor, streams: Streams, count: int) -> Tensor:
        """Guesses for what follows ``tokens``, int64 [k], k <= count.

        Args:
            hidden: [1, n, d], `source` at the positions that are new since the last call; they are
                final.
            tokens: [1, N + 1], all that is known: hidden states exist for the first N.
            streams: bring head and embed. count: >= 1.
        """
        ...


@dataclass(frozen=True)
class Drafting:
    """What `CompositeObjective.draft` returns.

    Attributes:
        token_ids: int64 [1, T + new], the prompt and what follows.
        calls: how often the model ran, the prompt's call included.
        drafted, accepted: for each position ahead (the first draft of a call, the second, ...) how
            many were guessed, and how many the model would have chosen itself.
    """

    token_ids: Tensor
    new_tokens: int
    calls: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were right; NaN where nothing was drafted."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else float("nan")

    @property
    def tokens_per_call(self) -> float:
        """New tokens for each call of the model; 1 without drafts."""
        return self.new_tokens / self.calls


def choose(drafters: Mapping[str, Drafter | None], label: str | None) -> Drafter:
    """The drafter of the labelled term, or of the only term that has one.

    Raises:
        ValueError: there is none, or more than one and no label.
    """
    if label is not None and label not in drafters:
        names = ", ".join(drafters)
        raise ValueError(
            f"draft: label is {label!r}, expected one of {names}.{suggestion(label, drafters)}"
        )
    chosen = drafters if label is None else {label: drafters[label]}
    able = {name: drafter for name, drafter in chosen.items() if drafter is not None}
    if not able:
        raise ValueError(
            f"draft: {', '.join(chosen)} can not draft, expected an mtp_* term with an offset above "
            "1"
        )
    if len(able) > 1:
        raise ValueError(f"draft: {', '.join(able)} can draft, expected label to name one of them")
    return next(iter(able.values()))


@torch.no_grad()
def decode(
    trunk: Trunk,
    drafter: Drafter,
    info: ModelInfo,
    prompt: Tensor,
    new_tokens: int,
    max_drafts: int | None,
    stop_token: int | None,
) -> Drafting:
    """The loop; arguments as in `CompositeObjective.draft`."""
    _check(prompt, new_tokens, max_drafts)
    limit = drafter.reach if max_drafts is None else min(max_drafts, drafter.reach)
    end = prompt.shape[1] + new_tokens
    drafted, accepted = [0] * limit, [0] * limit

    streams, calls, right = _extended(trunk, prompt, drafter), 1, prompt.shape[1] - 1
    tokens = torch.cat([prompt, _choices(streams, info)[:, -1:]], dim=1)
    while tokens.shape[1] < end and int(tokens[0, -1]) != stop_token:
        known = tokens.shape[1]
        count = min(limit, end - known - 1)
        drafts = prompt.new_empty(0)
        if count:
            drafts = drafter.propose(
                getattr(streams, drafter.source)[:, : right + 1], tokens, streams, count
            )
        streams, calls = (
            _extended(trunk, torch.cat([tokens[:, -1:], drafts[None]], dim=1), drafter),
            calls + 1,
        )
        chosen = _choices(streams, info)
        right = int((chosen[0, :-1] == drafts).cumprod(0).sum())
        trunk.cut(known + right)
        tokens = torch.cat([tokens, chosen[:, : right + 1]], dim=1)
        for index in range(len(drafts)):
            drafted[index] += 1
            accepted[index] += index < right
        if stop_token is not None and bool((found := tokens[0, known:] == stop_token).any()):
            tokens = tokens[:, : known + int(found.to(torch.uint8).argmax()) + 1]
    return Drafting(
        tokens, tokens.shape[1] - prompt.shape[1], calls, tuple(drafted), tuple(accepted)
    )


def _extended(trunk: Trunk, token_ids: Tensor, drafter: Drafter) -> Streams:
    streams = trunk.extend(token_ids)
    if not isinstance(streams, Streams):
        raise TypeError(
            f"draft: trunk.extend returned a {type(streams).__name__}, expected Streams"
        )
    wanted = dict.fromkeys(("last_hidden", drafter.source, "head", *drafter.needs))
    missing = [name for name in wanted if not streams.offers(Need(name))]
    if missing:
        raise ValueError(
            f"draft: the trunk's streams lack {', '.join(missing)}, expected {', '.join(wanted)}"
        )
    if streams.shape != tuple(token_ids.shape):
        got = tuple(streams.shape)
        raise ValueError(
            f"draft: trunk.extend returned streams of shape {got}, expected "
            f"{tuple(token_ids.shape)}"
        )
    return streams


def _choices(streams: Streams, info: ModelInfo) -> Tensor:
    """The model's greedy next token at each position: int64 [1, n]."""
    assert streams.last_hidden is not None and streams.head is not None
    return logits(streams.head, streams.last_hidden, info).argmax(-1)


def _check(prompt: Tensor, new_tokens: int, max_drafts: int | None) -> None:
    if not isinstance(prompt, Tensor) or prompt.dtype != torch.int64:
        got = prompt.dtype if isinstance(prompt, Tensor) else type(prompt).__name__
        raise TypeError(f"draft: prompt is {got}, expected an int64 tensor [1, T]")
    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] < 1:
        raise ValueError(
            f"draft: prompt has shape {tuple(prompt.shape)}, expected [1, T] with T >= 1"
        )
    for name, value, least in (("new_tokens", new_tokens, 1), ("max_drafts", max_drafts, 0)):
        if value is not None and not (is_int(value) and value >= least):
            raise ValueError(
                f"draft: {name} is {value!r}, expected an integer{of_64_bits(value)} >= {least}"
            )
