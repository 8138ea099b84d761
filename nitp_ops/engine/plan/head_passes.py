"""One pass for each head, whatever the number of terms: the plan equals the sum of its terms.

loss = sum over parts p of c_p * sum over rows i of p of token_weight_i * row_loss_i
c_p = weight_p / COUNT_p
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from nitp_ops import CrossEntropyTerm, TokenStats, grouped_linear_cross_entropy
from nitp_ops.core.checks import is_dtensor
from nitp_ops.engine.base import HeadReading, LatentPart
from nitp_ops.engine.error_names import OP_ERRORS, rename
from nitp_ops.engine.modules.head_access import through_head
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.ops.cross_entropy.sharded.shards import VocabularyShards

from .head_terms import HeadTermPart, SharedRows, Sums, row_sets

# (loss, statistics of each set of rows), None where a head has no rows; a value for each reading
_PassResult: TypeAlias = tuple[tuple[Tensor, tuple[TokenStats, ...]] | None, list[Tensor]]


@dataclass(frozen=True)
class _HeadUsers:
    """The parts whose rows go through a head, and the readings of it by name."""

    head: nn.Module | Tensor
    parts: list[HeadTermPart]
    readings: dict[str, HeadReading]


def run_heads(
    parts: Sequence[HeadTermPart],
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
    computed: dict[str, Any] = dict(latent)
    for users in _by_head(parts, latent):
        sets = row_sets(users.parts)
        result, values = _one_pass(users, sets, info, backend)
        if result is not None:
            loss, stats = result
            losses.append(loss)
            for rows, own in zip(sets, stats, strict=True):
                sums |= rows.sums(own)
        for (name, reading), value in zip(users.readings.items(), values, strict=True):
            computed[name] = reading.finish(value)
    return losses, {part.name: sums[part.name] for part in parts}, computed


def _by_head(
    parts: Sequence[HeadTermPart], latent: Mapping[str, LatentPart | HeadReading]
) -> list[_HeadUsers]:
    """What goes through each head, each head once."""
    found: dict[int, _HeadUsers] = {}
    for part in parts:
        head = part.rows.head
        found.setdefault(id(head), _HeadUsers(head, [], {})).parts.append(part)
    for name, reading in latent.items():
        if isinstance(reading, HeadReading):
            head = reading.head
            found.setdefault(id(head), _HeadUsers(head, [], {})).readings[name] = reading
    return list(found.values())


def _one_pass(
    users: _HeadUsers,
    sets: Sequence[HeadTermPart | SharedRows],
    info: ModelInfo,
    backend: str | None,
) -> _PassResult:
    readings = list(users.readings.values())
    hidden = [rows.rows.hidden for rows in sets]
    for reading in readings:
        hidden += reading.hidden

    def use(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> _PassResult:
        _check_weight(weight, info)
        own = iter(hidden)
        terms = [rows.cross_entropy_term(next(own)) for rows in sets]
        result = None
        if terms:
            names = [rows.name for rows in sets]
            ignore_index = users.parts[0].ignore_index
            result = _cross_entropy(terms, names, weight, bias, ignore_index, info, backend)
        values = []
        for reading in readings:
            inputs = [next(own) for _ in reading.hidden]
            values.append(reading.use(inputs, weight, bias))
        return result, values

    return through_head(users.head, hidden, use, takes_shards=not readings)


def _cross_entropy(
    terms: Sequence[CrossEntropyTerm],
    names: Sequence[str],
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    info: ModelInfo,
    backend: str | None,
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """The op on all sets of rows; an error names the part that it is about."""
    try:
        return grouped_linear_cross_entropy(
            terms,
            weight,
            bias=bias,
            ignore_index=ignore_index,
            softcap=info.softcap,
            logit_scale=info.logit_scale,
            group=VocabularyShards() if is_dtensor(weight) else None,
            backend=backend,
        )
    except OP_ERRORS as error:
        rename(error, "objective", names)
        raise


def _check_weight(weight: Tensor, info: ModelInfo) -> None:
    expected = (info.vocab_size, info.hidden_size)
    if weight.shape != expected:
        raise ValueError(
            f"objective: head has a weight of shape {tuple(weight.shape)}, expected {expected} "
            "(ModelInfo's)"
        )
