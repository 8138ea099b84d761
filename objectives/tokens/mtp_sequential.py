"""Several future tokens by modules in sequence, each of which reads the token before the one it
predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nitp_ops.engine.base import Context, HeadRows
from nitp_ops.engine.drafting.drafters import SequentialDrafter
from nitp_ops.engine.modules.blocks import (
    RMSNorm,
    attention_mask,
    factory_problems,
    make_block,
    whole_sequence_problems,
    without_padding,
)
from nitp_ops.engine.modules.head_access import embedded
from nitp_ops.engine.modules.module_call import Sealed
from nitp_ops.engine.modules.parameters import Matrix, redraw, seeded
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.schedule import Weight
from nitp_ops.engine.spec.validation import MOST_HEADS, count_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.streams.targets import inputs_ahead, valid_pairs
from nitp_ops.engine.token_term import TokenTerm, ahead, valid_offsets


@register("mtp_sequential")
@dataclass(frozen=True, kw_only=True)
class MTPSequential(TokenTerm):
    """``weight / D sum_k SUM_k / COUNT_k`` of ``CE(W norm_k(h^k_t), x_{t+k+1})`` over V_{k+1}, k =
    1 .. D.

    ``h^k = Block_k(M_k [RMSNorm(E(x_{t+k})); RMSNorm(h^{k-1}_t)])``, M_k a matrix ``[d, 2 d]``
    without bias. E and W are the model's embedding and head, which get gradients like the trunk.
    The block attends inside the document. A module of depth k has the parameters ``enorm, hnorm,
    eh_proj, block, norm``; the part of depth k is named k + 1.

    Args:
        weight: 0.3 unless given; ``[[0, 0.3], [steps, 0.1]]`` is the published schedule, steps at
            2/3 of training.
        depth: D, in [1, 64].
        source: h^0: "last_hidden", after the final norm, and each next module reads norm_k(h^k);
            "last_residual", before it, and each next module reads h^k.
        detach_trunk: no gradient from the modules into h^0.
        The options of `TokenTerm`, as in ntp.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, build
        >>> objective = build("ntp + 0.3*mtp_sequential", model=ModelInfo(hidden_size=8, vocab_size=32, num_layers=4))
        >>> sorted(map(str, objective.requires))
        ['embed', 'head', 'last_hidden', 'token_ids']

    Source: arXiv 2412.19437; the embedding stands first in M_k, as in Megatron-LM and torchtitan.
    """

    weight: Weight = 0.3
    depth: int = 1
    source: Literal["last_hidden", "last_residual"] = "last_hidden"
    detach_trunk: bool = False

    def problems(self) -> list[str]:
        found = count_problem("depth", self.depth, 1, MOST_HEADS)
        return [*super().problems(), *([found] if found else [])]

    @property
    def offsets(self) -> tuple[int, ...]:
        """k + 1 of each depth k: the tokens that are predicted."""
        return tuple(range(2, self.depth + 2))

    def model_problems(self, info: ModelInfo) -> list[str]:
        return factory_problems(info)

    def max_offset(self) -> int:
        return max(self.offsets)

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        trunk = Need(self.source, grad=not self.detach_trunk)
        return frozenset({Need("token_ids"), trunk, Need("head"), Need("embed")})

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module:
        return SequentialModules(self.depth, self.source == "last_hidden", info, seed)

    def part_weight(self, part: str) -> float:
        return 1 / self.depth

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return valid_offsets(streams, self.offsets)

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return whole_sequence_problems(module)

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        trunk = getattr(streams, self.source)
        assert context.module is not None and streams.embed is not None
        trunk = without_padding(trunk.detach() if self.detach_trunk else trunk, streams)
        tokens = [self._tokens(streams, context, k) for k in range(1, self.depth + 1)]
        hidden = context.module(tokens, trunk, attention_mask(streams))
        return {
            str(k): self.against(streams, h, k) for k, h in zip(self.offsets, hidden, strict=True)
        }

    def _tokens(self, streams: Streams, context: Context, k: int) -> Tensor:
        """E(x_{t+k}), zeros where that token is in another document or in none, as in
        `without_padding`."""
        assert streams.embed is not None
        token = context.mask_zero_weight(embedded(streams.embed, inputs_ahead(streams, k)))
        return token.masked_fill(~valid_pairs(streams, k).unsqueeze(-1), 0)

    def drafter(self, module: nn.Module | None, info: ModelInfo) -> SequentialDrafter:
        assert isinstance(module, SequentialModules)
        return SequentialDrafter(list(module.layers), self.source, info)  # type: ignore[arg-type]

    def own_states(self) -> int:
        return self.depth

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        with torch.device("meta"):
            own = sum(parameter.numel() for parameter in self.make_module(info, 0).parameters())
        head = self.depth * info.vocab_size * info.hidden_size
        return {
            "rows": f"{self.source} at t and the tokens between, against tokens "
            f"{ahead(self.offsets)}",
            "parameters added": f"{own:,}, dropped after training",
            "training FLOPs per token": f"{6 * (head + own):,} (6 V d per depth, 6 per parameter) and "
            "attention",
        }


class SequentialModule(nn.Module):
    """``Block(M [RMSNorm(e); RMSNorm(h)])``, and the norm that stands before the head."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(info), RMSNorm(info)
        self.eh_proj = Matrix(info.hidden_size, 2 * info.hidden_size, info)
        self.block = make_block(info)
        self.norm = RMSNorm(info)

    def enter(self, token: Tensor, hidden: Tensor) -> Tensor:
        """What the block reads, of E(x_{t+k}) and h^{k-1}, all [B, T, d]."""
        dtype = self.eh_proj.weight.dtype
        both = torch.cat([self.enorm(token.to(dtype)), self.hnorm(hidden.to(dtype))], dim=-1)
        return self.eh_proj(both)

    def forward(self, token: Tensor, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h^k, norm_k(h^k))."""
        hidden = self.block(self.enter(token, hidden), mask)
        return hidden, self.norm(hidden)


class SequentialModules(Sealed):
    """``[norm_1(h^1), norm_2(h^2), ...]``, with initial values that depend on the seed alone."""

    def __init__(self, depth: int, normed: bool, info: ModelInfo, seed: int) -> None:
        super().__init__()
        self.depth, self.normed, self.info, self.seed = depth, normed, info, seed
        self.layers = seeded(self._make, seed)

    def _make(self) -> nn.ModuleList:
        return nn.ModuleList(SequentialModule(self.info) for _ in range(self.depth))

    def reset_parameters(self) -> None:
        """Draw the initial values anew, always the same ones; on the meta device nothing happens."""
        redraw(self.layers, self._make, self.seed)

    def forward(
        self, tokens: Sequence[Tensor], hidden: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        found = []
        for layer, token in zip(self.layers, tokens, strict=True):  # type: ignore[arg-type]
            state, normed = layer(token, hidden, mask)
            hidden = normed if self.normed else state
            found.append(normed)
        return found
