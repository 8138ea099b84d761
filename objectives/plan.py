"""One pass for each head, whatever the number of terms: the plan equals the sum of its terms.

loss = sum over parts p of c_p * sum over rows i of p of token_weight_i * row_loss_i,  c_p = weight_p / COUNT_p
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nitp_ops import TokenStats, shared_linear_cross_entropy

from .dtensor import is_dtensor
from .head_parts import HeadPart, Sums, Together, rows_of
from .heads import through_head
from .model_info import ModelInfo


def run(parts: Sequence[HeadPart], info: ModelInfo, backend: str | None) -> tuple[list[Tensor], Sums]:
    """(one loss a head, ``{part: sums}``). Parts that share a head share a pass, in declaration order.

    softcap and logit scale belong to the model, so the head alone (its matrix and its bias) makes a group.
    """
    groups: dict[int, list[HeadPart]] = {}
    for part in parts:
        groups.setdefault(id(part.rows.head), []).append(part)
    losses: list[Tensor] = []
    sums: Sums = {}
    for group in groups.values():
        jobs = rows_of(group)
        loss, stats = _pass(jobs, group[0], info, backend)
        losses.append(loss)
        for job, own in zip(jobs, stats, strict=True):
            sums |= job.sums(own)
    return losses, {part.name: sums[part.name] for part in parts}


def _pass(
    jobs: Sequence[HeadPart | Together], first: HeadPart, info: ModelInfo, backend: str | None
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    def use(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[TokenStats, ...]]:
        if is_dtensor(weight):  # its vocabulary is sharded
            from nitp_ops.distributed import vocab_parallel_shared_linear_cross_entropy as op
        else:
            op = shared_linear_cross_entropy
        return op(
            [job.job(own) for job, own in zip(jobs, hidden, strict=True)],
            weight,
            bias=bias,
            ignore_index=first.ignore_index,
            softcap=info.softcap,
            logit_scale=info.logit_scale,
            backend=backend,
        )

    return through_head(first.rows.head, [job.rows.hidden for job in jobs], use, takes_shards=True)
