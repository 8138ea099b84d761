"""What the chunked algorithm of the token losses is given, and what it gives back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._gemm import WeightGemm
from ._vocab_shard import VocabShard


class Job(NamedTuple):
    """hidden [..., d]; labels and target_weight [N, K]; row_weight [N] already holds token weight, weight, 1 / count.

    many: K targets a row, of which negative ones are absent. class_weight: of the smoothing term, target_weight holds
    it for the rest. max_rows: on a GPU no more rows are computed. wanted: the gradient of hidden is."""

    hidden: Tensor
    labels: Tensor
    target_weight: Tensor | None
    row_weight: Tensor
    class_weight: Tensor | None
    buffer: Tensor | None
    many: bool
    label_smoothing: float
    z_loss: float
    max_rows: int
    wanted: bool


class Head(NamedTuple):
    """The unembedding [V, d] and what belongs to it; softcap 0 means none.

    dtype: of the operands of the GEMMs. logits: of the logits, narrower than it never.
    shard: unembedding, bias and buffer are the part of this rank."""

    op: str
    backend: str
    unembedding: Tensor
    bias: Tensor | None
    buffer: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    chunk_bytes: int | None
    dtype: torch.dtype
    logits: torch.dtype
    entropy: bool
    want_weight: bool
    want_bias: bool
    shard: VocabShard | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Columns on each rank."""
        return (len(self.unembedding),) if self.shard is None else self.shard.sizes

    @property
    def logit_bytes(self) -> int:
        """Bytes of the workspace per logit: its own, and those of a gradient that is rounded for the GEMMs."""
        return self.logits.itemsize + (0 if self.logits == self.dtype else self.dtype.itemsize)


class RowValues(NamedTuple):
    """stats [2 or 3, rows]: loss, log-sum-exp and perhaps entropy; prediction [rows]; target_logit: [rows * K]."""

    stats: Tensor
    prediction: Tensor
    target_logit: Tensor


class Formed(NamedTuple):
    """loss: 0-d; row_weight [rows]: 0 where a row has no target; gradients of hidden..., unembedding, bias."""

    loss: Tensor
    row_weight: Tensor
    values: RowValues
    gradients: list[Tensor | WeightGemm]


def present(labels: Tensor, ignore_index: int, many: bool) -> Tensor:
    """bool [N]: the row has a target, of labels [N, K]."""
    return given(labels, ignore_index, many).any(1)


def given(labels: Tensor, ignore_index: int, many: bool) -> Tensor:
    """bool [N, K]: the targets that are present."""
    found = labels != ignore_index
    return found & (labels >= 0) if many else found
