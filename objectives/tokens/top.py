"""Token order prediction: rank the tokens ahead by how soon they come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nitp_ops.engine.base import Context, HeadRows, HeadTerm
from nitp_ops.engine.modules.parameters import OwnHead
from nitp_ops.engine.registry import register
from nitp_ops.engine.spec.validation import MOST_AHEAD, count_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.streams.target_window import TargetWindow


@register("top")
@dataclass(frozen=True, kw_only=True)
class TOP(HeadTerm):
    """``lse(U h_t) - sum_v w_v (U h_t)_v``, ``w = softmax(y)``, ``y_v = window - distance to the
    nearest v ahead``.

    The list-net loss ``-sum_v softmax(y)_v log_softmax(U h_t)_v``. The distance of x_{t+1} is 0; y
    is -inf outside the next `window` tokens, outside the document and for tokens that are no
    targets. A row without any target does not count. U is an own, untied head ``[V, d]``, used in
    training only; the model's logit scale and softcap apply to it. Accuracy is that of the nearest
    token. Streams.token_weight multiplies w_v by the weight of v's nearest occurrence.

    A row has the targets whose weight is a normal number of float32 (float64 for float64): none
    more than 87 tokens (708) behind the nearest one, however large the window. So time and memory
    grow with B T, not with B T window.

    Args:
        window: how many tokens ahead, in [1, 1048576]; what reaches past a sequence changes
            nothing.
        compat: "fp16_scores" rounds y to half precision, as the published data builders store it:
            from 2048 on y is coarse, and at window 4096 the weights of the next four tokens become
            .456, .456, .062, .008 instead of .632, .233, .086, .031.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, build
        >>> objective = build("ntp + 0.1*top", model=ModelInfo(hidden_size=8, vocab_size=32, num_layers=4))
        >>> {name: tuple(p.shape) for name, p in objective.named_parameters()}
        {'terms.top.weight': (32, 8)}

    Source: arXiv 2508.19228.
    """

    window: int = 32
    compat: Literal["none", "fp16_scores"] = "none"

    def problems(self) -> list[str]:
        found = count_problem("window", self.window, 1, MOST_AHEAD)
        if (
            found is None
            and self.compat == "fp16_scores"
            and self.window > torch.finfo(torch.float16).max
        ):
            found = f'window is {self.window}, expected at most 65504 with "fp16_scores"'
        return [found] if found else []

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        return frozenset({Need("token_ids"), Need("last_hidden")})

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module:
        return OwnHead(info, seed)

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": TargetWindow(streams, 1, self.window).occupied().view(streams.shape)}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        return []

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        hidden, head = streams.last_hidden, context.module
        assert hidden is not None and head is not None
        ahead = TargetWindow(streams, 1, self.window)
        labels, k = ahead.targets(slice(None), self.most_targets(hidden.dtype))
        weight, counts = self.target_weights(labels != streams.ignore_index, k, hidden.dtype), None
        if (of_token := ahead.weights(k)) is not None:
            weight = weight * of_token.to(weight.dtype)
            # a row of weight 0 is selected: nothing of it reaches anything
            counts = (weight != 0).any(-1).to(weight.dtype).view(streams.shape)
        labels, weight = (x.view(*streams.shape, x.shape[-1]) for x in (labels, weight))
        return {"": HeadRows(hidden, labels, head, counts, target_weight=weight)}

    def most_targets(self, dtype: torch.dtype) -> int:
        """How many tokens from the nearest target on can weigh more than the smallest normal number
        of the weights'
        dtype: e^-k falls below it. Rounded scores stay as they are over 2^n tokens."""
        reach = math.ceil(-math.log(torch.finfo(_working(dtype)).tiny))
        if self.compat == "fp16_scores":
            reach += max(1, 2 ** (self.window.bit_length() - 11))
        return min(self.window, reach)

    def target_weights(self, present: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        """softmax(y) over the targets t + k that are present, bool [..., K]; zeros in a row without
        any."""
        y = self.window + 1 - k
        y = (y.half() if self.compat == "fp16_scores" else y).to(_working(dtype))
        weights = torch.softmax(y.masked_fill(~present, -torch.inf), dim=-1)
        return weights.masked_fill(~present, 0)

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        head = info.vocab_size * info.hidden_size
        return {
            "rows": f"h_t against the next {self.window} tokens, nearest first",
            "parameters added": f"{head:,} (V d), dropped after training",
            "training FLOPs per token": f"{6 * head:,} (6 V d)",
        }


def _working(dtype: torch.dtype) -> torch.dtype:
    """Of the weights: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
