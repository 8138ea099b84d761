"""Next-latent prediction: hidden state and next token predict the next hidden state and what it
says of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops import alignment, reference
from nitp_ops.engine.base import Context, HeadReading, LatentPart, LatentTerm
from nitp_ops.engine.modules.head_access import embedded
from nitp_ops.engine.modules.logit_losses import sum_of_rows
from nitp_ops.engine.modules.parameters import OwnParameters, width_problems
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.validation import number_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.streams.targets import inputs_ahead, rows_ahead, valid_pairs


@register("nextlat")
@dataclass(frozen=True, kw_only=True)
class NextLat(LatentTerm):
    """``a smooth_l1(p_t, g_{t+1}) + b KL(softmax W g_{t+1} || softmax W p_t)`` over the pairs
    inside a document.

    ``p_t = h_t + W_3 gelu(W_2 gelu(W_1 [h_t; E(x_{t+1})]))`` and ``g_{t+1} = stopgrad(h_{t+1})``.
    smooth_l1 has beta 1 and is a mean over d. The unembedding W is frozen here, with the model's
    bias, logit scale and softcap; E learns. Both losses are reported, the KL is computed a chunk of
    rows at a time. The matrices, ``3 d m + m^2`` numbers, are used in training only.

    Args:
        intermediate_size: m, of both inner layers, at most 256 d; d where not given.
        smooth_l1_weight: a. kl_weight: b. A loss of weight 0 is not computed; without the KL no
            head is needed.

    Raises:
        ValueError: at a call without token_ids: labels may say "no target", which has no embedding.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, build
        >>> term = build("nextlat", model=ModelInfo(hidden_size=8, vocab_size=32, num_layers=4))
        >>> sorted(map(str, term.requires)), sum(p.numel() for p in term.parameters()) == 4 * 8**2
        (['embed', 'head', 'last_hidden', 'token_ids'], True)

    Source: arXiv 2511.05963.
    """

    intermediate_size: int | None = None
    smooth_l1_weight: float = 1.0
    kl_weight: float = 1.0

    def problems(self) -> list[str]:
        found = [
            number_problem(name, getattr(self, name), 0)
            for name in ("smooth_l1_weight", "kl_weight")
        ]
        if self.intermediate_size is not None:
            found.append(number_problem("intermediate_size", self.intermediate_size, 1))
        if self.smooth_l1_weight == self.kl_weight == 0:
            found.append("smooth_l1_weight and kl_weight are 0, expected one of them > 0")
        return [problem for problem in found if problem]

    def model_problems(self, info: ModelInfo) -> list[str]:
        return width_problems(self.intermediate_size, info)

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        own = {Need("head", grad=False)} if self.kl_weight else set()
        return frozenset({Need("token_ids"), Need("last_hidden"), Need("embed"), *own})

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module:
        return LatentDynamics(info, self.intermediate_size or info.hidden_size, seed)

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": valid_pairs(streams, 1)}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart | HeadReading]:
        keep, here, token, target = self._pairs(streams, context)
        assert isinstance(context.module, LatentDynamics)
        prediction = context.module(here, token, context.mask_zero_weight)
        smooth: dict[str, Tensor] = {}
        if self.smooth_l1_weight:
            smooth["smooth_l1"] = alignment(
                prediction, target, distance="smooth_l1", backend=context.backend
            ).sum()
        if not self.kl_weight:
            return {"": self._weighted(context, smooth)}
        assert streams.head is not None
        both, kl = (
            [prediction.flatten(0, 1), target.flatten(0, 1)],
            partial(_kl, keep.flatten(), context.info),
        )
        return {"": HeadReading(streams.head, both, kl, partial(self._weighted, context, smooth))}

    def _pairs(self, streams: Streams, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(which pairs count, h_t, E(x_{t+1}), stopgrad(h_{t+1}))."""
        h = streams.last_hidden
        assert h is not None and streams.embed is not None
        if streams.token_ids is None:
            raise ValueError(f"{self.label}: token_ids is missing, expected it beside the labels")
        target, shift = rows_ahead(streams, h, 1)
        pairs = h.shape[1] - shift
        keep = self.valid(streams)[""][:, :pairs]
        # rows that do not count become zeros before anything reads them: a NaN there must not meet
        # a zero gradient
        here, target = (
            x.masked_fill(~keep.unsqueeze(-1), 0) for x in (h[:, :pairs], target[:, shift:])
        )
        token = embedded(streams.embed, inputs_ahead(streams, 1)[:, :pairs].masked_fill(~keep, 0))
        return (
            keep,
            here,
            context.mask_zero_weight(token).masked_fill(~keep.unsqueeze(-1), 0),
            target,
        )

    def _weighted(
        self, context: Context, smooth: dict[str, Tensor], kl: Tensor | None = None
    ) -> LatentPart:
        sums = smooth if kl is None else smooth | {"kl": kl}
        total = torch.stack(
            [getattr(self, f"{name}_weight") * loss for name, loss in sums.items()]
        ).sum()
        return context.part(total, {name: loss.detach() for name, loss in sums.items()})

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        d, m = info.hidden_size, self.intermediate_size or info.hidden_size
        parameters, head = 3 * d * m + m * m, 6 * info.vocab_size * d if self.kl_weight else 0
        return {
            "rows": "last_hidden at t and the embedding of token t+1 against last_hidden at t+1",
            "parameters added": f"{parameters:,} (3 d m + m^2, m = {m}), dropped after training",
            "training FLOPs per token": f"{6 * parameters + head:,} (18 d m + 6 "
            f"m^2{' + 6 V d' if head else ''})",
        }


class LatentDynamics(OwnParameters):
    """``h + W_3 gelu(W_2 gelu(W_1 [h; e]))``: W_1 ``[m, 2d]``, W_2 ``[m, m]``, W_3 ``[d, m]``, no
    bias."""

    enter: nn.Parameter
    middle: nn.Parameter
    leave: nn.Parameter

    def __init__(self, info: ModelInfo, inner: int, seed: int) -> None:
        width = info.hidden_size
        super().__init__(
            info, seed, enter=(inner, 2 * width), middle=(inner, inner), leave=(width, inner)
        )

    def forward(self, hidden: Tensor, token: Tensor, mask: Callable[[Tensor], Tensor]) -> Tensor:
        enter, middle, leave = mask(self.enter), mask(self.middle), mask(self.leave)
        x = torch.cat([hidden.to(enter.dtype), token.to(enter.dtype)], dim=-1)
        x = F.gelu(F.linear(x, enter))
        x = F.gelu(F.linear(x, middle))
        return hidden + F.linear(x, leave)


def _kl(
    keep: Tensor, info: ModelInfo, hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Sum over the kept rows of ``KL(softmax W target || softmax W prediction)``, its gradient to
    the prediction."""
    prediction, target = hidden
    frozen = weight.detach()

    def formula(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p = z.log_softmax(-1)
        z = reference.transformed_logits(target[rows], frozen, bias, info.softcap, info.logit_scale)
        log_q = z.log_softmax(-1)
        q = log_q.exp()
        # 0 log 0 = 0, also for a token that the model's bias rules out
        losses = (q * (log_q - log_p)).masked_fill(q == 0, 0).sum(-1)
        return losses, log_p.exp() - q

    return sum_of_rows(prediction, frozen, bias, keep, info, formula)[0]
