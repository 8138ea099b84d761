"""Future summary prediction, bag of words: which tokens come soon, in whatever order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.core.devices import sum_dtype
from nitp_ops.engine.base import Context, LatentPart, LatentTerm
from nitp_ops.engine.modules.head_access import through_head
from nitp_ops.engine.modules.logit_losses import sum_of_rows
from nitp_ops.engine.modules.parameters import OwnHead
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.validation import MOST_AHEAD, count_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.streams.target_window import TargetWindow

#: Tokens of windows that are held at once.
_BAG_TOKENS = 2**18


@register("fsp_bow")
@dataclass(frozen=True, kw_only=True)
class FSPBagOfWords(LatentTerm):
    """``(1/V) [sum_v softplus(z_v) - sum over v in B_t of z_v]``, ``z = U h_t``, ``B_t = {x_{t+2},
    ..., x_{t+tau}}``.

    That is the mean over the vocabulary of the binary cross-entropy of "v comes soon". B_t is a
    set, where a token that repeats counts once; it ends with the document and leaves out masked
    targets. An empty B_t does not count. The head U ``[V, d]`` is the term's own, used in training
    only; the model's logit scale and softcap apply to it. It is computed a chunk of rows at a time.
    The metric "tokens" is the mean size of B_t.

    Args:
        tau: how far the window reaches, in [2, 1048576]; what reaches past a sequence changes
            nothing.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, Streams, build
        >>> term = build("fsp_bow(tau=4)", model=ModelInfo(hidden_size=2, vocab_size=8, num_layers=1))
        >>> ids = torch.tensor([[3, 1, 4, 1, 5, 4]])  # the sets {4, 1, 5}, {1, 5, 4}, {5, 4}, {4}
        >>> out = term(Streams(token_ids=ids, last_hidden=torch.zeros(1, 6, 2)))
        >>> round(out.loss.item(), 4), out.metrics.compute()["fsp_bow/tokens"]  # (ln 2, 9 tokens in 4 rows)
        (0.6931, 2.25)

    Source: arXiv 2510.14751.
    """

    predicts_tokens: ClassVar[bool] = True

    tau: int = 12

    def problems(self) -> list[str]:
        problem = count_problem("tau", self.tau, 2, MOST_AHEAD)
        return [problem] if problem else []

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        return frozenset({Need("token_ids"), Need("last_hidden")})

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module:
        return OwnHead(info, seed)

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": TargetWindow(streams, 2, self.tau).occupied().view(streams.shape)}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart]:
        h, module, info = streams.last_hidden, context.module, context.info
        assert h is not None and module is not None
        ahead = TargetWindow(streams, 2, self.tau)

        def use(
            hidden: Sequence[Tensor], weight: Tensor, _: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            formula = partial(self._losses, ahead)
            return sum_of_rows(
                hidden[0], context.mask_zero_weight(weight), None, ahead.occupied(), info, formula
            )

        total, rows = through_head(module, [h.flatten(0, 1)], use)
        loss = total / (info.vocab_size * context.normalizer[""])
        sizes = [
            inside.sum() for *_, inside in self._bags(ahead, 0, max(1, h.shape[0] * h.shape[1]))
        ]
        total_loss = rows.sum(dtype=sum_dtype(rows.device)) / info.vocab_size
        return {"": LatentPart(loss, total_loss, {"tokens": torch.stack(sizes).sum()})}

    def _losses(self, ahead: TargetWindow, z: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """(V times the losses of a chunk of rows, their derivatives by the logits z)."""
        # above the threshold softplus(z) is z: at 40 also in float64
        losses, slope = F.softplus(z, threshold=40).sum(-1), z.sigmoid()
        for rows, bag, inside in self._bags(ahead, part.start, part.start + len(z)):
            here, counted = (
                slice(rows.start - part.start, rows.stop - part.start),
                inside.to(z.dtype),
            )
            losses[here] -= (z[here].gather(1, bag) * counted).sum(-1)
            slope[here].scatter_add_(1, bag, -counted)
        return losses, slope

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        parameters = info.vocab_size * info.hidden_size
        return {
            "rows": f"last_hidden at t against the set of the tokens t+2 to t+{self.tau}",
            "parameters added": f"{parameters:,} (V d), dropped after training",
            "training FLOPs per token": f"{6 * parameters:,} (6 V d)",
        }

    def _bags(
        self, ahead: TargetWindow, begin: int, end: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, the tokens of their windows, which of them are there), [rows, tau - 1], for some
        rows at a time."""
        step = max(1, _BAG_TOKENS // self.tau)
        for first in range(begin, end, step):
            rows = slice(first, min(first + step, end))
            tokens, _ = ahead.targets(rows, self.tau - 1)
            inside = tokens != ahead.ignore_index
            yield rows, tokens.masked_fill(~inside, 0), inside
