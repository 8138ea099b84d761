"""Next implicit token prediction: predict the next token's hidden state of a lower layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops import alignment, implicit_token_loss, reference, swiglu
from nitp_ops.core.devices import sum_dtype
from nitp_ops.engine.base import Context, LatentPart, LatentTerm
from nitp_ops.engine.modules.module_call import opened
from nitp_ops.engine.modules.parameters import width_problems
from nitp_ops.engine.modules.projector import Kind, Matrices, Projector
from nitp_ops.engine.registry import register
from nitp_ops.engine.skill import unit_target_sum
from nitp_ops.engine.spec.validation import MOST_AHEAD, count_problem, is_int, number_problem
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.streams.targets import rows_ahead, valid_pairs

# (SUM / normalizer, row losses, |p|, |z|): 0-d with a gradient, then three [B, T], zero where a
# pair does not count
_Outcome: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


@register("nitp")
@dataclass(frozen=True, kw_only=True)
class NITP(LatentTerm):
    """``1 - cos(P(h_t), z_{t+1})``, ``z_{t+1} = stopgrad(s_k[t+1])``, over the pairs inside a
    document.

    P is ``W_down (silu(W_gate h) * W_up h)``: 12 d^2 parameters and 72 d^2 + 18 d training FLOPs a
    token at the default size, used in training only. The defaults are the paper's; every ablation
    of the paper is an option.

    Args:
        target_layer: k. An int in [0, L-1]: after so many blocks, 0 the embedding output. A float f
            strictly inside (0, 1): that fraction of the L blocks, ``min(L - 1, max(1, floor(f L +
            0.75)))``; 0.2 gives 4 of 17, 5 of 24, 6 of 28, 3 of 16.
        shift: pair h_t with z_{t+shift}, in [0, 1048576].
        distance: "cosine"; "mse" or "smooth_l1" (beta 1), means over d; "kl", KL(softmax z ||
            softmax p) over d.
        projector: "swiglu", "linear" (``W_down h``) or "none" (P(h) = h).
        intermediate_size: m of swiglu, at most 256 d; 4 d where not given.
        mask: "document" counts pairs inside a document; "document+label" only those whose token
            t + shift is a target.
        source: h after the final norm ("last_hidden") or before it ("last_residual").
        stop_gradient: False lets the gradient into z; the projected states are then held whole.
        target_norm: "rms" divides z by ``sqrt(mean z^2 + eps)`` first.
        eps: lower bound of each norm; below it a prediction gets no gradient.

    Example:
        >>> from nitp_ops.objectives import ModelInfo
        >>> NITP(target_layer=0.2).layer(ModelInfo(hidden_size=8, vocab_size=32, num_layers=17))
        4

    Source: arXiv 2605.24956.
    """

    target_layer: int | float = 0.2
    shift: int = 1
    distance: Literal["cosine", "mse", "smooth_l1", "kl"] = "cosine"
    projector: Kind = "swiglu"
    intermediate_size: int | None = None
    mask: Literal["document", "document+label"] = "document"
    source: Literal["last_hidden", "last_residual"] = "last_hidden"
    stop_gradient: bool = True
    target_norm: Literal["none", "rms"] = "none"
    eps: float = 1e-6

    def problems(self) -> list[str]:
        found = [
            count_problem("shift", self.shift, 0, MOST_AHEAD),
            number_problem("eps", self.eps, 0, inclusive=False),
        ]
        if is_int(self.target_layer):
            found.append(number_problem("target_layer", self.target_layer, 0))
        elif not 0 < self.target_layer < 1:
            inside = "expected a fraction strictly inside (0, 1) or an integer number of blocks"
            found.append(f"target_layer is {self.target_layer}, {inside}")
        if self.intermediate_size is not None:
            found.append(number_problem("intermediate_size", self.intermediate_size, 1))
            if self.projector != "swiglu":
                found.append(
                    f"intermediate_size is {self.intermediate_size}, expected none with "
                    f'"{self.projector}"'
                )
        return [problem for problem in found if problem]

    def model_problems(self, info: ModelInfo) -> list[str]:
        found = width_problems(self.intermediate_size, info)
        if is_int(self.target_layer) and self.target_layer >= info.num_layers:
            inside = f"expected an integer in [0, {info.num_layers - 1}] (the model has {info.num_layers} blocks)"
            found.append(f"target_layer is {self.target_layer}, {inside}")
        return found

    def layer(self, info: ModelInfo) -> int:
        """k: how many blocks the target has passed."""
        if is_int(self.target_layer):
            return int(self.target_layer)
        return min(
            info.num_layers - 1, max(1, math.floor(self.target_layer * info.num_layers + 0.75))
        )

    def max_offset(self) -> int:
        return self.shift

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        target = Need("hidden_states", layer=self.layer(info), grad=not self.stop_gradient)
        return frozenset({Need("token_ids"), Need(self.source), target})

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module:
        return Projector(self.projector, info, self.intermediate_size or 4 * info.hidden_size, seed)

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": valid_pairs(streams, self.shift, labelled=self.mask == "document+label")}

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        if self.stop_gradient or self.shift == 0:
            return []
        return ["stop_gradient is False, expected True: rows of other ranks bring no gradient back"]

    def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart]:
        h, valid = getattr(streams, self.source), self.valid(streams)[""]
        z, shift = self._targets(streams, valid, context.info)
        score, projector = (
            self._one_sided if self.stop_gradient else self._two_sided,
            context.module,
        )
        assert isinstance(projector, Projector)

        def use(h: Tensor) -> _Outcome:
            return score(h, z, shift, projector.matrices(context.mask_zero_weight), valid, context)

        loss, rows, prediction_norm, target_norm = opened(projector, [h], use)
        means = {"prediction_norm": prediction_norm.sum(), "target_norm": target_norm.sum()}
        units = (
            unit_target_sum(z, target_norm, valid, shift, self.eps)
            if self.distance == "cosine"
            else None
        )
        return {"": LatentPart(loss, rows.sum(dtype=sum_dtype(rows.device)), means, units)}

    def _targets(self, streams: Streams, valid: Tensor, info: ModelInfo) -> tuple[Tensor, int]:
        """(z, shift): h_t is paired with z[t + shift]."""
        z = streams.hidden_states[self.layer(info)]
        if self.stop_gradient:
            z, shift = rows_ahead(streams, z, self.shift)
        else:
            shift = self.shift
            # targets that do not count become zeros before anything reads them: a NaN there must
            # not meet a zero gradient
            targets = F.pad(valid[:, : max(0, z.shape[1] - shift)], (min(shift, z.shape[1]), 0))
            z = z.masked_fill(~targets.unsqueeze(-1), 0)
        return (_rms_normalised(z, self.eps) if self.target_norm == "rms" else z), shift

    def _one_sided(
        self, h: Tensor, z: Tensor, shift: int, matrices: Matrices, valid: Tensor, context: Context
    ) -> _Outcome:
        loss, stats = implicit_token_loss(
            h,
            z,
            gate_up=matrices[0],
            down=matrices[1],
            valid=valid,
            shift=shift,
            distance=self.distance,
            eps=self.eps,
            reduction="mean",
            normalizer=context.normalizer[""],
            return_stats=True,
            backend=context.backend,
        )
        return loss, stats.loss, stats.prediction_norm, stats.target_norm

    def _two_sided(
        self, h: Tensor, z: Tensor, shift: int, matrices: Matrices, valid: Tensor, context: Context
    ) -> _Outcome:
        """The same pairs with gradients to both sides."""
        pairs = max(0, h.shape[1] - shift)
        keep = valid[:, :pairs]
        # z has its zeros already
        h, z = h[:, :pairs].masked_fill(~keep.unsqueeze(-1), 0), z[:, shift:]
        gate_up, down = matrices
        fused = partial(swiglu, backend=context.backend)
        p = reference.projection(h, gate_up, None, down, fused)
        rows = alignment(p, z, distance=self.distance, eps=self.eps, backend=context.backend)
        rows = rows.masked_fill(~keep, 0)
        with torch.no_grad():
            norms = [reference.norm(x.to(rows.dtype)).masked_fill(~keep, 0) for x in (p, z)]
            padded = [F.pad(x, (0, valid.shape[1] - pairs)) for x in (rows, *norms)]
        return rows.sum() / context.normalizer[""], padded[0], padded[1], padded[2]

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        with torch.device("meta"):
            module = self.make_module(info, 0)
        assert isinstance(module, Projector)
        square = info.hidden_size**2
        parameters = sum(parameter.numel() for parameter in module.parameters())
        flops = module.training_flops(info.hidden_size)
        gemms = f"{6 * parameters / square:g} d^2 + " if parameters else ""
        added = {
            "parameters added": f"{parameters:,} ({parameters / square:g} d^2), dropped "
            "after training"
        }
        return {
            "rows": f"{self.source} at t against token t+{self.shift}",
            "target": f"hidden_states[{self.layer(info)}] of {info.num_layers} blocks "
            f"(target_layer={self.target_layer})",
            **(added if parameters else {}),
            "training FLOPs per token": f"{flops:,} ({gemms}18 d)",
        }


def _rms_normalised(z: Tensor, eps: float) -> Tensor:
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    size = reference.in_square_range(wide).clamp(max=1)
    scaled = wide * size
    return (scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps * size * size)).to(
        z.dtype
    )
