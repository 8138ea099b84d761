"""Losses of whole rows of logits, for terms that no fused op serves: a chunk of rows at a time.

for each chunk of rows:
    z = transform(h W^T + b)            float32; scale and softcap of the model
    l, dl/dz = formula(z)               the term's own
    dh = dl/dz W                        formed in the forward pass, as the ops do:
    dW += (dl/dz)^T h                   nothing of a row's V numbers waits for the backward pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nitp_ops import reference
from nitp_ops.core.devices import sum_dtype
from nitp_ops.engine.streams.model_info import ModelInfo

#: Logits of one chunk: 64 MiB in float32, of which a formula holds a few copies. On a GPU no chunk
#: has fewer rows than the ops' chunks have there.
CHUNK_LOGITS, LEAST_ROWS_ON_GPU = 2**24, 2048

#: (logits [n, V], the chunk's rows) -> (losses [n], their derivatives by the logits [n, V])
Formula: TypeAlias = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def sum_of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor,
    info: ModelInfo,
    formula: Formula,
) -> tuple[Tensor, Tensor]:
    """(SUM of the kept rows' losses, 0-d with gradients to hidden and weight; losses [N], detached,
    0 where not kept).

    Row arithmetic in float32 (float64 for float64), GEMMs in the weight's or autocast's dtype.
    The weight's gradient is summed over chunks in float32. A row that is not kept reaches nothing,
    whatever it holds.

    Args:
        hidden: ``[N, d]``. weight: ``[V, d]``. bias: ``[V]``, gets no gradient. keep: bool ``[N]``.
        info: whose logit scale and softcap apply. formula: see `Formula`; it may overwrite the
            logits.

    Raises:
        NotImplementedError: at a double backward.
    """
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    return _RowLosses.apply(hidden, weight, bias, keep, info, formula, wanted)  # type: ignore[return-value]


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Tensor,
        info: ModelInfo,
        formula: Formula,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        work = torch.promote_types(weight.dtype, torch.float32)
        losses, d_hidden = [], []
        d_weight = torch.zeros_like(weight, dtype=work) if wanted[1] else None
        least = 1 if hidden.device.type == "cpu" else LEAST_ROWS_ON_GPU
        step = max(least, CHUNK_LOGITS // weight.shape[0])
        for first in range(0, max(1, len(hidden)), step):
            rows = slice(first, first + step)
            masked = ~keep[rows].unsqueeze(1)
            h = hidden[rows].masked_fill(masked, 0)
            z = reference.transformed_logits(h, weight, bias, info.softcap, info.logit_scale)
            slope = None if info.softcap is None else 1 - (z / info.softcap).square()
            own, dz = formula(z, rows)
            losses.append(own.masked_fill(masked.squeeze(1), 0))
            if not any(wanted):
                continue
            dz = dz.masked_fill(masked, 0).mul_(info.logit_scale)
            dz = (dz if slope is None else dz.mul_(slope)).to(weight.dtype)
            if wanted[0]:
                # also where the weight is not finite
                d_hidden.append(torch.mm(dz, weight).masked_fill_(masked, 0))
            if d_weight is not None:
                d_weight += torch.mm(dz.t(), h.to(weight.dtype))
        rows_of_all = torch.cat(losses)
        ctx.save_for_backward(hidden, weight, torch.cat(d_hidden) if wanted[0] else None, d_weight)
        ctx.mark_non_differentiable(rows_of_all)
        # copied: an output that is also an intermediate result loses its gradient to it under
        #     torch.compile of torch
        # 2.11 (pytorch issue 180642)
        return rows_of_all.sum(dtype=sum_dtype(rows_of_all.device)).to(work, copy=True), rows_of_all

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, d_hidden, d_weight = ctx.saved_tensors
        pairs = zip((d_hidden, d_weight), inputs, strict=True)
        formed = [
            None if gradient is None else _Times.apply(gradient, upstream, like)
            for gradient, like in pairs
        ]
        return *formed, None, None, None, None, None  # type: ignore[return-value]


class _Times(torch.autograd.Function):
    """upstream * gradient in the dtype of its input, zeros where the upstream is zero; tied to that
    input, to refuse a second derivative where a constant would be wrong without an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, upstream: Tensor, like: Tensor) -> Tensor:
        return torch.where(upstream == 0, 0, upstream * gradient.to(upstream.dtype)).to(like.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "objective: got a double backward, expected first derivatives only"
        )
