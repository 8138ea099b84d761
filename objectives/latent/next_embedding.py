"""Next-embedding prediction: the hidden state itself predicts the next token's input embedding."""

from __future__ import annotations

from dataclasses import dataclass

from nitp_ops.engine.modules.projector import Kind
from nitp_ops.engine.registry import register

from .nitp import NITP


@register("next_embedding")
@dataclass(frozen=True, kw_only=True)
class NextEmbedding(NITP):
    """``1 - cos(h_t, z_{t+1})``, ``z_{t+1} = stopgrad(s_0[t+1])``: `NITP` on the embedding output,
    without a projector.

    It adds no parameter; every option of `NITP` is one here.

    Args:
        target_layer: 0, the embedding output. projector: "none".

    Example:
        >>> from nitp_ops.objectives import ModelInfo, build
        >>> term = build("next_embedding", model=ModelInfo(hidden_size=8, vocab_size=32, num_layers=4))
        >>> sorted(map(str, term.requires)), list(term.parameters())
        (['hidden_states[0]', 'last_hidden', 'token_ids'], [])

    Source: NEPA, arXiv 2512.16922 (on image patches).
    """

    target_layer: int | float = 0
    projector: Kind = "none"
