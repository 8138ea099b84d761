"""Greedy decoding with a cache, plain and drafted, and what the drafts save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from nitp_ops.objectives import CompositeObjective, Drafting, KeyValues, Streams

from .model import Decoder


class Cached:
    """The decoder as `CompositeObjective.draft` reads it: a trunk that keeps the keys and values of
    its blocks."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.past = [KeyValues() for _ in model.blocks]

    def extend(self, token_ids: torch.Tensor) -> Streams:
        """Read the next tokens, int64 [1, n]."""
        hidden = self.model(token_ids, past=self.past)
        return Streams(
            token_ids=token_ids,
            last_hidden=hidden.last_hidden,
            last_residual=hidden.last_residual,
            head=self.model.lm_head,
            embed=self.model.embed,
        )

    def cut(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        for past in self.past:
            past.cut(length)


@torch.no_grad()
def greedy(model: Decoder, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """prompt[1, T] and its most probable continuation, a token at a time with the cache: [1, T +
    new_tokens]."""
    past, tokens = [KeyValues() for _ in model.blocks], prompt
    for _ in range(new_tokens):
        hidden = model(tokens[:, past[0].length :], past=past).last_hidden
        tokens = torch.cat([tokens, model.lm_head(hidden[:, -1:]).argmax(-1)], dim=1)
    return tokens


@dataclass(frozen=True)
class Comparison:
    """Plain and drafted decoding of the same prompts."""

    name: str
    drafts: list[Drafting]
    """One a prompt."""
    plain_seconds: list[float]
    drafted_seconds: list[float]
    parted: list[tuple[int, float]]
    """Of each prompt whose texts differ: the first token that does, and by how much the logit of the plain choice
    leads there over that of the drafted one. Rounding parts texts where that is next to nothing."""

    @property
    def new_tokens(self) -> int:
        return sum(found.new_tokens for found in self.drafts)

    @property
    def acceptance(self) -> list[float]:
        """Share of the drafts that came true, at each place ahead."""
        drafted = torch.tensor([found.drafted for found in self.drafts]).sum(0)
        accepted = torch.tensor([found.accepted for found in self.drafts]).sum(0)
        return (accepted / drafted).tolist()

    @property
    def accepted(self) -> float:
        """Share of all drafts that came true."""
        return sum(sum(x.accepted) for x in self.drafts) / max(
            1, sum(sum(x.drafted) for x in self.drafts)
        )

    @property
    def tokens_per_call(self) -> float:
        """New tokens for each call of the model."""
        return self.new_tokens / sum(found.calls for found in self.drafts)

    @property
    def speed_up(self) -> float:
        """Median over the prompts of plain time / drafted time."""
        return median(a / b for a, b in zip(self.plain_seconds, self.drafted_seconds, strict=True))


def compare(
    name: str,
    model: Decoder,
    objective: CompositeObjective,
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
) -> Comparison:
    """Decode each prompt[1, T] plain and drafted, in turns, the first prompt once more before to
    warm up."""
    drafts, plain, drafted, parted = [], [], [], []
    for number, prompt in enumerate([prompts[0], *prompts]):
        start = time.perf_counter()
        expected = greedy(model, prompt, new_tokens)
        middle = time.perf_counter()
        found = objective.draft(Cached(model), prompt, new_tokens)
        end = time.perf_counter()
        if number == 0:
            continue
        drafts.append(found)
        plain.append(middle - start)
        drafted.append(end - middle)
        if not torch.equal(found.token_ids, expected):
            parted.append(_parting(model, expected[0], found.token_ids[0]))
    return Comparison(name, drafts, plain, drafted, parted)


@torch.no_grad()
def _parting(model: Decoder, plain: torch.Tensor, drafted: torch.Tensor) -> tuple[int, float]:
    place = int((plain != drafted).to(torch.uint8).argmax())
    logits = model.lm_head(model(plain[None, :place]).last_hidden[0, -1])
    return place, float(logits[plain[place]] - logits[drafted[place]])
