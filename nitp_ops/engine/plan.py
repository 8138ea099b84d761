"""One pass for each head, whatever the number of terms: the plan equals the sum of its terms.

loss = sum over parts p of c_p * sum over rows i of p of token_weight_i * row_loss_i,  c_p =
weight_p / COUNT_p
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nitp_ops import TokenStats, grouped_linear_cross_entropy
from nitp_ops.core.checks import is_dtensor
from nitp_ops.ops.cross_entropy.sharded.shards import VocabularyShards

from .base import HeadReading, LatentPart
from .error_names import OP_ERRORS, rename
from .head_terms import HeadPart, Sums, Together, rows_of
from .modules.head_access import through_head
from .streams.model_info import ModelInfo


def run(
    parts: Sequence[HeadPart],
    latent: Mapping[str, LatentPart | HeadReading],
    info: ModelInfo,
    backend: str | None,
) -> tuple[list[Tensor], Sums, dict[str, LatentPart]]:
    """(one loss a head, ``{part: sums}``, the latent parts, all of them computed). One call of a
    head serves them all.

    softcap and logit scale belong to the model, so the head alone (its matrix and its bias) makes a
    group. Parts that share it share a pass, in declaration order.
    """
    losses: list[Tensor] = []
    sums: Sums = {}
    computed = dict(latent)
    for head, group, readings in _by_head(parts, latent):
        jobs = rows_of(group)
        outcome, values = _read(head, jobs, group, list(readings.values()), info, backend)
        if outcome is not None:
            losses.append(outcome[0])
            for job, own in zip(jobs, outcome[1], strict=True):
                sums |= job.sums(own)
        computed |= {
            name: own.finish(value)
            for (name, own), value in zip(readings.items(), values, strict=True)
        }
    return losses, {part.name: sums[part.name] for part in parts}, computed  # type: ignore[return-value]


def _by_head(
    parts: Sequence[HeadPart], latent: Mapping[str, LatentPart | HeadReading]
) -> Iterable[tuple[nn.Module | Tensor, list[HeadPart], dict[str, HeadReading]]]:
    """(head, the parts that go through it, what else reads it), each head once."""
    found: dict[int, tuple[nn.Module | Tensor, list[HeadPart], dict[str, HeadReading]]] = {}
    for part in parts:
        found.setdefault(id(part.rows.head), (part.rows.head, [], {}))[1].append(part)
    for name, reading in latent.items():
        if isinstance(reading, HeadReading):
            found.setdefault(id(reading.head), (reading.head, [], {}))[2][name] = reading
    return found.values()


def _read(
    head: nn.Module | Tensor,
    jobs: Sequence[HeadPart | Together],
    group: Sequence[HeadPart],
    readings: Sequence[HeadReading],
    info: ModelInfo,
    backend: str | None,
) -> tuple[tuple[Tensor, tuple[TokenStats, ...]] | None, list[Tensor]]:
    def use(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Any:
        if weight.shape != (info.vocab_size, info.hidden_size):
            expected = f"{(info.vocab_size, info.hidden_size)} (ModelInfo's)"
            raise ValueError(
                f"objective: head has a weight of shape {tuple(weight.shape)}, expected {expected}"
            )
        own = iter(hidden)
        mine = [job.job(next(own)) for job in jobs]
        outcome = None
        if mine:
            try:
                outcome = grouped_linear_cross_entropy(
                    mine,
                    weight,
                    bias=bias,
                    ignore_index=group[0].ignore_index,
                    softcap=info.softcap,
                    logit_scale=info.logit_scale,
                    group=VocabularyShards() if is_dtensor(weight) else None,
                    backend=backend,
                )
            except OP_ERRORS as error:
                rename(error, "objective", [job.name for job in jobs])
                raise
        return outcome, [
            each.use([next(own) for _ in each.hidden], weight, bias) for each in readings
        ]

    hidden = [*(job.rows.hidden for job in jobs), *(x for each in readings for x in each.hidden)]
    return through_head(head, hidden, use, takes_shards=not readings)
