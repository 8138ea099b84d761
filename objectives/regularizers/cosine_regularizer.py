"""Terms that shape the hidden states themselves, towards no target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nitp_ops.engine.base import Context, LatentPart, LatentTerm
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.validation import number_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.reference import in_square_range


@register("cosine_regularizer")
@dataclass(frozen=True, kw_only=True)
class CosineRegularizer(LatentTerm):
    """Mean of ``cos(h_i, h_j)`` over the ordered pairs i != j inside a document: it drives hidden
    states apart.

    ``SUM = sum over documents of |sum_i h^_i|^2 - sum_i |h^_i|^2``, ``COUNT = sum of n (n - 1)``
    with ``h^ = h / max(|h|, eps)``: O(n d) time and memory, no pair is formed. Padding is in no
    document.

    Args:
        eps: lower bound of each norm.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, Streams, build
        >>> term = build("cosine_regularizer", model=ModelInfo(hidden_size=2, vocab_size=4, num_layers=1))
        >>> h = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
        >>> out = term(Streams(token_ids=torch.ones(1, 3, dtype=torch.int64), last_hidden=h))
        >>> round(out.loss.item(), 4)  # of the 6 ordered pairs 2 have cosine 1
        0.3333

    Source: the control of arXiv 2605.24956.
    """

    eps: float = 1e-6

    def problems(self) -> list[str]:
        problem = number_problem("eps", self.eps, 0, inclusive=False)
        return [problem] if problem else []

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        return frozenset({Need("token_ids"), Need("last_hidden")})

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        documents, inside = _documents(streams)
        size = (
            torch.zeros_like(documents)
            .scatter_add_(1, documents, inside.to(torch.int64))
            .gather(1, documents)
        )
        return {"": torch.where(inside, size - 1, 0)}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return [
            "it pairs all tokens of a document, which other ranks hold too, expected whole "
            "sequences"
        ]

    def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart]:
        assert streams.last_hidden is not None
        h = streams.last_hidden
        documents, inside = _documents(streams)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        # masked rows become zeros before anything reads them: a NaN there must not meet a zero
        # gradient
        wide = wide.masked_fill(~inside.unsqueeze(-1), 0)
        size = in_square_range(wide)
        wide = wide * size
        unit = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(
            min=self.eps * size
        )
        sums = torch.zeros_like(unit).scatter_add(1, documents.unsqueeze(-1).expand_as(unit), unit)
        total = sums.square().sum() - unit.square().sum()
        return {"": context.part(total)}

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        return {"rows": "last_hidden against itself, pairs inside a document"}


def _documents(streams: Streams) -> tuple[Tensor, Tensor]:
    """(number of its document within the row, int64 in [0, T); whether it is in one) of every
    token: [B, T] each."""
    given = streams.documents
    if given is None:
        given = torch.zeros(streams.shape, dtype=torch.int64, device=streams.device)
    ordered, positions = given.sort(dim=1)
    new = torch.cat(
        [torch.zeros_like(ordered[:, :1]), (ordered[:, 1:] != ordered[:, :-1]).to(torch.int64)],
        dim=1,
    )
    return torch.zeros_like(given).scatter_(1, positions, new.cumsum(1)), given >= 0
