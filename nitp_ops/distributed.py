"""Vocabulary-parallel heads: the token losses with an unembedding sharded over the ranks of a
process group.

    loss = linear_cross_entropy(hidden, shard, labels, group=VocabularyShards(group, vocab_size=V))
    loss = linear_cross_entropy(hidden, lm_head.weight, labels, group=VocabularyShards())  # a
    DTensor with Shard(0)

Each chunk of rows costs one all-gather of a few numbers per row (one for each term that has rows in
it) and one sum of its hidden gradients; the gradients of unembedding and bias stay on their ranks.
Loss, stats and hidden gradients are equal on all ranks to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .core import checks
from .ops.cross_entropy.sharded.shards import VocabularyShards, shard_rows

__all__ = ["PassBytes", "VocabularyShards", "bytes_per_pass", "shard_rows"]


class PassBytes(NamedTuple):
    """Bytes that one rank hands to the collectives of a pass, forward and backward.

    statistics: to the all-gathers of row statistics. gradient: to the sums of hidden gradients.
        hidden, labels: to the
    gathers of sequence parallelism, else 0. With R ranks a ring sends R - 1 times what it gathers,
    2 (R - 1) / R of what it all-reduces and (R - 1) / R of what it reduce-scatters."""

    statistics: int
    gradient: int
    hidden: int = 0
    labels: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def bytes_per_pass(
    rows: int,
    width: int,
    world: int,
    *,
    targets: int = 1,
    label_smoothing: bool = False,
    entropy: bool = False,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    weights: int = 0,
) -> PassBytes:
    """What one rank hands to the collectives of a pass with all gradients; of several terms the
    results add up.

    ``rows (3 + K [+ 1] [+ 1])`` numbers of statistics: maximum, its column, sum of exponentials, K
    target logits, with label smoothing the sum of logits, with the entropy its numerator; ``rows
    d`` numbers of gradient. Both in float32 (float64 for float64), whatever the dtype of the GEMMs.
    Neither chunks nor the vocabulary change them.

    Args:
        rows: that count (on a GPU: that are computed), of the whole group. width: d. world: ranks
            of the group.
        targets: K. label_smoothing, entropy: whether the pass has them. dtype: of the hidden
            states.
        sequence_parallel: each rank holds rows / world of the rows, ignored ones included. weights:
            numbers per row that travel beside its labels then: K with target_weight, one more with
            a token_weight of rows.

    Example:
        >>> from nitp_ops.distributed import bytes_per_pass
        >>> bytes_per_pass(8192, 4096, 8)
        PassBytes(statistics=131072, gradient=134217728, hidden=0, labels=0)
    """
    for name, value in {
        "rows": rows,
        "width": width,
        "world": world,
        "targets": targets,
        "weights": weights,
    }.items():
        checks.integer("bytes_per_pass", name, value, least=0 if name in ("rows", "weights") else 1)
    number = torch.promote_types(dtype, torch.float32).itemsize
    statistics = rows * (3 + targets + label_smoothing + entropy) * number
    gradient = rows * width * number
    if not sequence_parallel:
        return PassBytes(statistics, gradient)
    own = rows // world
    return PassBytes(
        statistics, gradient, own * width * dtype.itemsize, own * (targets + weights) * 8
    )
