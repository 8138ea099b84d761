"""Rows of logits whose columns lie on several ranks: the sums of each, gathered once, and the loss
and gradient that follow from them.

Over the columns of rank r: m_r = max z, s_r = sum exp(z - m_r), b_r = sum u (z - m_r), h_r = sum
exp(z - m_r) (m_r - z)

    m = max_r m_r,  f_r = exp(m_r - m),  s = sum_r f_r s_r,  lse = m + log s
    sum_v u_v (z_v - m) = sum_r b_r + (m_r - m) sum_{v on r} u_v
    entropy = log s + (1 / s) sum_r f_r (h_r + (m - m_r) s_r)

Every rank adds the same numbers in the order of ranks, in float64: the results are equal to the
last bit. Then the gradient of the columns that are here follows from `SoftmaxGradient`
(csrc/formulas/cross_entropy.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...core.devices import for_sums, sum_dtype
from ...core.gemm import Weight

#: By their names from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class VocabShard(NamedTuple):
    """Which columns are here: `sizes` of all ranks of the process group named `group`, in their
    order.

    reduce: gradients of hidden states are summed over the ranks (else each keeps its part of the
    sum). overlap: that sum runs while the chunk's weight gradient is computed."""

    group: str
    sizes: tuple[int, ...]
    reduce: bool = True
    overlap: bool = True

    @property
    def process_group(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)


class ShardRows:
    """The row kernel of one term where the vocabulary is sharded: over each chunk of logits,
    gradient and values."""

    def __init__(
        self,
        kernels: Any,
        term: Any,
        rows: Any,
        unembedding: Any,
        bias: Tensor | None,
        work: torch.dtype,
    ):
        """term, rows: as the caller gave it, and its flat rows."""
        shard: VocabShard = unembedding.shard
        self.kernels, self.term, self.head = kernels, term, unembedding
        self.bias, self.work = bias, work
        self.group, self.sizes = shard.process_group, shard.sizes
        self.first, self.here = sum(shard.sizes[: shard.rank]), shard.sizes[shard.rank]
        self.vocabulary = sum(shard.sizes)
        weights, dtype = rows.smoothing_weight, sum_dtype(rows.labels.device)
        self.class_weight = None if weights is None else weights.narrow(0, self.first, self.here)
        if weights is None:
            device = rows.labels.device
            sums = [torch.full((), size, dtype=dtype, device=device) for size in self.sizes]
        else:
            sums = [own.sum(dtype=dtype) for own in weights.split(self.sizes)]
        self.weight_sums = torch.stack(sums).unsqueeze(1)  # sum u of each rank

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        values: Any,
        gradient: bool,
    ) -> None:
        """As cross_entropy_rows_: the values of each row and, with `gradient`, the gradient over
        the logits."""
        head, many = self.head, self.term.several
        present = (labels != head.ignore_index) & ((labels >= 0) if many else True)
        local = labels - self.first
        owned = present & (local >= 0) & (local < self.here)
        local = local.where(owned, -1)
        fields = self._gathered(logits, local, owned, values)
        top, total, log_sum = self._softmax(fields, values, labels)
        e, c = self.term.penalties
        inside = present & (labels >= 0) & (labels < self.vocabulary)
        w = torch.ones_like(values.target_logit) if weight is None else weight
        # a label outside [0, V) poisons its row
        w = for_sums(w).where(inside, float("nan")).where(present, 0)
        weight_sum, lse = w.sum(1), top + log_sum
        # differences: the large common offset cancels before anything is rounded to it
        gaps = log_sum.unsqueeze(1) + (top.unsqueeze(1) - for_sums(values.target_logit))
        loss = (1 - e) * torch.where(w == 0, 0, w * gaps).sum(1)
        softmax_weight, uniform_weight = (1 - e) * weight_sum, torch.zeros_like(weight_sum)
        if e > 0:
            shifted = self._shifted_logit_sum(fields, top)
            if self.class_weight is None:
                smooth_weight_sum, each = weight_sum, weight_sum
                shifted = weight_sum * shifted
            else:
                smooth_weight_sum = self.weight_sums.sum() / self.vocabulary
                each = torch.ones_like(weight_sum)
            uniform_weight = e * each / self.vocabulary
            loss = loss + e * (smooth_weight_sum * log_sum - shifted / self.vocabulary)
            softmax_weight = softmax_weight + e * smooth_weight_sum
        if c > 0:
            loss = loss + c * lse * lse
            softmax_weight = softmax_weight + 2 * c * lse
        counted = present.any(1)
        values.stats[0].copy_(loss.where(counted, 0))
        values.stats[1].copy_(lse.where(counted, float("nan")))
        values.prediction.masked_fill_(~counted, -1)
        if not gradient or self.here == 0:
            return
        active = counted & (scale != 0)
        wide = for_sums(scale)
        softmax_coeff = (wide * softmax_weight / total).where(active, 0)
        uniform_coeff = (wide * uniform_weight).where(active, 0)
        target_coeff = (wide.unsqueeze(1) * (1 - e) * w).where(owned & active.unsqueeze(1), 0)
        self.kernels.cross_entropy_gradient_rows_(
            logits, local, target_coeff.to(self.work), values.target_logit, self.bias,
            self.class_weight, torch.stack([top, softmax_coeff, uniform_coeff]).to(self.work),
            head.softcap, head.logit_scale,
        )  # fmt: skip

    def _gathered(
        self, logits: Tensor, local: Tensor, owned: Tensor, values: Any
    ) -> dict[str, Tensor]:
        """One collective: {field: [ranks, rows]}; "targets" [ranks, K, rows]; "best": the column of
        m_r."""
        rows, targets = local.shape
        stats, work = values.stats, self.work
        partials, best = stats.new_zeros(4, rows), values.prediction.new_zeros(rows)
        target_logit = values.target_logit.new_zeros(rows, targets)
        if self.here > 0:
            self.kernels.cross_entropy_rows_(
                logits, local, None, self.bias, self.class_weight, None, torch.empty_like(stats),
                target_logit, best, -1, True, self.term.label_smoothing, 0.0, self.head.softcap,
                self.head.logit_scale, False, partials,
            )  # fmt: skip
        else:
            partials[0].fill_(-torch.inf)
        bits = torch.int64 if work == torch.float64 else torch.int32
        # carried as bits: float32 does not hold every column
        best = (best + self.first).to(bits).view(work)
        largest, exp_sum, shifted_logit_sum, entropy_sum = partials
        sent = {"max": largest, "sum": exp_sum}
        if self.term.label_smoothing > 0:
            sent["shifted_logit_sum"] = shifted_logit_sum
        if len(stats) == 3:
            sent["entropy_sum"] = entropy_sum
        packed = torch.cat([torch.stack([best, *sent.values()]), target_logit.where(owned, 0).t()])
        ranks = len(self.sizes)
        gathered = packed.new_empty(ranks * len(packed), rows)
        all_gather(gathered, packed, group=self.group)
        gathered = gathered.view(ranks, len(packed), rows)
        fields = {name: for_sums(gathered[:, at]) for at, name in enumerate(sent, start=1)}
        fields["best"] = gathered[:, 0].contiguous().view(bits)
        fields["targets"] = gathered[:, 1 + len(sent) :]
        return fields

    def _softmax(
        self, fields: dict[str, Tensor], values: Any, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(m, s, log s), float64; prediction, target logits and entropy go to `values`."""
        peak = fields["max"]
        top = peak.amax(0)
        first = (peak == top).to(torch.uint8).argmax(0, keepdim=True)
        values.prediction.copy_(fields["best"].gather(0, first).squeeze(0))
        fraction = (peak - top).exp().where(peak != -torch.inf, 0)  # no difference of infinities
        total = (fraction * fields["sum"]).sum(0)
        log_sum = total.log()
        given = labels != self.head.ignore_index
        inside = given & (labels >= 0) & (labels < self.vocabulary)
        # a target lies on one rank: the others add zeros
        values.target_logit.copy_(fields["targets"].sum(0).t().where(inside, float("nan")))
        if len(values.stats) == 3:
            gap = (top - peak) * fields["sum"]
            of_ranks = fraction * (fields["entropy_sum"] + gap)
            entropy_sum = torch.where(fraction > 0, of_ranks, 0).sum(0)
            counted = (given & (labels >= 0) if self.term.several else given).any(1)
            values.stats[2].copy_((log_sum + entropy_sum / total).where(counted, float("nan")))
        return top, total, log_sum

    def _shifted_logit_sum(self, fields: dict[str, Tensor], top: Tensor) -> Tensor:
        """sum_v u_v (z_v - m)."""
        gap = self.weight_sums * (fields["max"] - top)
        gap = torch.where(self.weight_sums == 0, 0, gap)
        return (fields["shifted_logit_sum"] + gap).sum(0)


class ReducedRows:
    """dh = sum over ranks of dlogits_r W_r, in float32 (float64 for float64) and rounded once after
    the sum."""

    def __init__(self, shard: VocabShard, weight: Weight, part: Tensor, work: torch.dtype):
        """part: room for dlogits_r W_r, in the dtype that the GEMM writes."""
        self.group, self.weight, self.overlap = shard.process_group, weight, shard.overlap
        self.part = part
        self.sum = part if part.dtype == work else torch.empty_like(part, dtype=work)

    def start(self, d_logits: Tensor) -> Callable[[], Tensor]:
        """What waits for the sum of this chunk and returns it: the GEMM of the weight gradient can
        run meanwhile."""
        count = len(d_logits)
        part, total = self.part[:count], self.sum[:count]
        self.weight.grad_input(d_logits, part)
        if self.part is not self.sum:
            total.copy_(part)
        reduction = dist.all_reduce(total, group=self.group, async_op=self.overlap)

        def summed() -> Tensor:
            if reduction is not None:
                reduction.wait()
            return total

        return summed
