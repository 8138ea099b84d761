"""Losses that the model computes itself, and the share of a batch in its accumulation window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nitp_ops.core.devices import sum_dtype
from nitp_ops.objectives import CompositeObjective, Counts, Metrics, Streams

from .batch_streams import label_count

# where Hugging Face models put the balance loss of their experts; the part of the loss that a model
# adds itself
AUX_LOSS = "aux_loss"


def counts_by_share(
    objective: CompositeObjective,
    streams: Streams,
    fields: Mapping[str, Any],
    items: Tensor | int,
) -> Counts:
    """Counts of the window where only its number of labels is known: the mean of each term is
    weighted by this batch's share of them, COUNT = count * items / labels."""
    labels = label_count(fields)
    items = torch.as_tensor(items, dtype=sum_dtype(labels.device), device=labels.device)
    inverse = items / labels
    # 0 / 0 where the whole window has no label
    inverse = torch.where(labels == 0, torch.inf, inverse)
    counts = objective.count(streams).items()
    return Counts({part: count.clamp(min=1) * inverse for part, count in counts}, batches=inverse)


def external_output(out: Any, name: str) -> Tensor:
    """What the model returns under a name that an objective requires.

    Raises:
        ValueError: it returns none.
    """
    value = getattr(out, name, None)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"attach: the model returns no {name}, expected one (external[{name}] is required)"
        )
    return value


def adds_a_loss(out: Any, zero: Tensor | None) -> bool:
    """Whether the model added something to a cross-entropy of zero."""
    own: Tensor = out.loss
    # most models add in place
    return own is not zero or own.requires_grad or getattr(out, AUX_LOSS, None) is not None


def with_model_loss(
    loss: Tensor,
    metrics: Metrics,
    own: Tensor,
    counts: Counts | None,
    gradient_reduction: Literal["mean", "sum"],
) -> tuple[Tensor, Metrics]:
    """The objective's loss and metrics with what the model adds to its loss, a mean over the
    batches of the window; in the metrics it is a part beside the others."""
    one = torch.ones_like(own)
    part = {"weighted": own, "denominator": one, "loss": own, "count": one}
    metrics = Metrics(metrics.sums | {AUX_LOSS: part})
    if counts is not None:
        ranks = counts.group_size if gradient_reduction == "mean" else 1
        batches = torch.as_tensor(counts.batches, dtype=sum_dtype(own.device), device=own.device)
        own = own * (ranks / batches).to(own.dtype)
    return loss + own, metrics
