"""Sequence parallel rows: each rank of a group has its own rows of the hidden states and of their
labels.

Gathered in the order of ranks before a pass; backward, the ranks' parts of the gradient are summed
and scattered back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .... import reference
from ..term import CrossEntropyTerm
from ..vocab_shard import all_gather, reduce_scatter


def gathered_term(term: CrossEntropyTerm, group: dist.ProcessGroup) -> CrossEntropyTerm:
    """The term with the rows of all ranks, [rows, ...]; gradients of its hidden states come back to
    those given."""
    leading = term.hidden.shape[:-1]
    count, work = leading.numel(), reference.working(term.hidden)
    several = term.several
    # a weight that is one number is the same on all ranks
    of_rows = term.token_weight is not None and term.token_weight.dim() > 0
    columns = [term.labels.reshape(count, term.labels.shape[-1] if several else 1)]
    if term.target_weight is not None:
        columns.append(_as_integers(term.target_weight.to(work).reshape(columns[0].shape)))
    if term.token_weight is not None and of_rows:
        columns.append(_as_integers(term.token_weight.to(work).expand(leading).reshape(count, 1)))
    packed = torch.cat(columns, 1)
    whole = packed.new_empty(group.size() * count, packed.shape[1])
    all_gather(whole, packed, group=group)
    labels, *weights = (
        part.contiguous() for part in whole.split([column.shape[1] for column in columns], 1)
    )
    weights = [weight.to(_bits(work)).view(work) for weight in weights]
    hidden = GatheredRows.apply(
        term.hidden.reshape(count, term.hidden.shape[-1]), group, term.hidden_grad_out, work
    )
    of_term = {"hidden": hidden, "labels": labels if several else labels.view(-1)}
    if several:
        of_term["target_weight"] = weights[0]
    if of_rows:
        of_term["token_weight"] = weights[-1].view(-1)
    return replace(term, hidden_grad_out=None, max_rows=None, **of_term)


def own_stats(stats: Any, term: CrossEntropyTerm, group: dist.ProcessGroup) -> Any:
    """`TokenStats` of the rows of this rank, shaped like them."""
    fields = stats._asdict()
    shapes = {
        name: term.labels.shape if name == "target_logit" else term.leading for name in fields
    }
    return type(stats)(
        **{name: own_rows(value, group).reshape(shapes[name]) for name, value in fields.items()}
    )


def _as_integers(weight: Tensor) -> Tensor:
    """The bits: weights travel beside labels."""
    return weight.contiguous().view(_bits(weight.dtype)).to(torch.int64)


def _bits(work: torch.dtype) -> torch.dtype:
    return torch.int64 if work == torch.float64 else torch.int32


class GatheredRows(torch.autograd.Function):
    """[n, d] of each rank -> [ranks n, d] in the working precision, so that the gradient is rounded
    after its sum."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: dist.ProcessGroup, buffer: Tensor | None, work: torch.dtype
    ) -> Tensor:
        ctx.group, ctx.buffer, ctx.dtype = group, buffer, rows.dtype
        whole = rows.new_empty(group.size() * len(rows), rows.shape[1])
        all_gather(whole, rows.contiguous(), group=group)
        # torch.compile of torch 2.11 gives no gradient to an output that is also an intermediate
        # result (pytorch issue 180642)
        return whole.to(work, copy=torch.compiler.is_compiling())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        own = upstream.new_empty(len(upstream) // ctx.group.size(), upstream.shape[1])
        reduce_scatter(own, upstream.contiguous(), group=ctx.group)
        if ctx.buffer is None:
            return own.to(ctx.dtype), None, None, None
        ctx.buffer.view(own.shape).add_(own)
        return None, None, None, None


class OwnRows(torch.autograd.Function):
    """The rows of this rank; backward, the upstream of all rows goes to every rank."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return own_rows(whole, group).clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        whole = upstream.new_empty(ctx.group.size() * len(upstream))
        all_gather(whole, upstream.contiguous(), group=ctx.group)
        return whole, None


def own_losses(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    return OwnRows.apply(whole.view(-1), group)  # type: ignore[return-value]


def own_rows(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    count = len(whole) // group.size()
    return whole.narrow(0, dist.get_rank(group) * count, count)
