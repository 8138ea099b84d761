"""A small float64 model's streams, and the objectives written out as slow loops over pairs of
positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.objectives import CompositeObjective, ModelInfo, Streams

INFO = ModelInfo(
    hidden_size=6, vocab_size=11, num_layers=5, dtype=torch.float64, initializer_range=0.5
)


@dataclass
class Batch:
    """Streams as plain tensors; `leaves` are those that a model would send gradients through."""

    ids: Tensor
    hidden: Tensor
    residual: Tensor
    states: dict[int, Tensor]
    head: nn.Linear
    documents: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    embed: nn.Embedding = field(default_factory=lambda: make_embed())

    def streams(self, **changes: object) -> Streams:
        """The batch as `Streams`, some of them exchanged."""
        given = {"token_ids": self.ids, "last_hidden": self.hidden, "last_residual": self.residual}
        given |= {"document_ids": self.documents, "hidden_states": self.states, "head": self.head}
        external = dict.fromkeys(("external", "extra"), self.penalty())
        return Streams(
            **{**given, "embed": self.embed, "external": external, **self.extra, **changes}
        )  # type: ignore[arg-type]

    def penalty(self) -> tuple[Tensor, Tensor]:
        """What a model might compute itself: (squared length of its real tokens, their number)."""
        real = (
            torch.ones_like(self.ids, dtype=torch.bool)
            if self.documents is None
            else self.documents >= 0
        )
        return self.hidden[real].square().sum(), real.sum()

    def part(self, rows: slice) -> Batch:
        """Some rows of the batch, connected to the same leaves."""
        return Batch(
            self.ids[rows],
            self.hidden[rows],
            self.residual[rows],
            {k: state[rows] for k, state in self.states.items()},
            self.head,
            None if self.documents is None else self.documents[rows],
            {
                name: value[rows] if isinstance(value, Tensor) else value
                for name, value in self.extra.items()
            },
            self.embed,
        )

    @property
    def hidden_leaves(self) -> list[Tensor]:
        return [self.hidden, self.residual, *self.states.values()]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.hidden_leaves, self.embed.weight, *self.head.parameters()]


def make_embed() -> nn.Embedding:
    """Always the same values, so that batches of different lengths agree."""
    draw = torch.Generator().manual_seed(1234)
    values = torch.randn(INFO.vocab_size, INFO.hidden_size, generator=draw, dtype=torch.float64)
    return nn.Embedding.from_pretrained(values, freeze=False)


def make_batch(seed: int = 0, batch: int = 3, length: int = 7, *, bias: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        shape = (batch, length, INFO.hidden_size)
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    head = nn.Linear(INFO.hidden_size, INFO.vocab_size, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    ids = torch.randint(INFO.vocab_size, (batch, length), generator=draw)
    return Batch(ids, normal(), normal(), {k: normal() for k in range(INFO.num_layers)}, head)


def pairs(batch: Batch, k: int, target_ok: Tensor | None = None) -> list[tuple[int, int]]:
    """Positions (b, t) of V_k, straight from its definition."""
    rows, length = batch.ids.shape
    documents = torch.zeros_like(batch.ids) if batch.documents is None else batch.documents
    return [
        (b, t)
        for b in range(rows)
        for t in range(length)
        if t + k < length
        and documents[b, t] >= 0
        and documents[b, t + k] == documents[b, t]
        and (target_ok is None or bool(target_ok[b, t + k]))
    ]


def ntp_sum(batch: Batch, positions: list[tuple[int, int]], k: int = 1) -> Tensor:
    """Sum of -log softmax(W h_t)[x_{t+k}]."""
    terms = [
        F.cross_entropy(batch.head(batch.hidden[b, t]), batch.ids[b, t + k]) for b, t in positions
    ]
    return torch.stack(terms).sum()


def project(objective: CompositeObjective, h: Tensor, label: str = "nitp") -> Tensor:
    """P(h) with the term's own parameters."""
    own = dict(objective.terms[label].named_parameters())
    if "down" not in own:
        return h
    if "gate_up" not in own:
        return own["down"] @ h
    inner = own["gate_up"].shape[0] // 2
    gate, up = own["gate_up"][:inner], own["gate_up"][inner:]
    return own["down"] @ (F.silu(gate @ h) * (up @ h))


def gradients(loss: Tensor, tensors: list[Tensor], retain_graph: bool = True) -> list[Tensor]:
    """Gradients of the loss; zeros where a tensor takes no part."""
    if not tensors:
        return []
    found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=retain_graph)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found, strict=True)]


def assert_same(
    loss: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float = 1e-12
) -> None:
    """Equal losses and equal gradients to every tensor."""
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    mine, theirs = gradients(loss, tensors), gradients(expected, tensors)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
