"""One chunk of rows against the unembedding: the logits GEMM and the row kernel, and the two GEMMs
of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...core import checks
from ...core.chunking import length_of, row_stride, rows_of, with_zeros, workspace
from ...core.gemm import GemmPolicy, Weight
from ...core.weight_gradient import WeightGemm, WeightGradient
from ...kernels import select
from .term import Unembedding
from .term_rows import TermRows, joined
from .vocab_shard import ReducedRows, ShardRows


class Chunk(NamedTuple):
    """Rows of one term or of several that want the same gradients.

    hidden: [n or more, d] in the dtype of the GEMMs, zeros after the n rows. inactive: bool [n, 1],
    rows whose scale is zero; None: there are none. active: whether a row has another scale, or may
    have one."""

    terms: list[TermRows]
    parts: list[Tensor | slice]
    lengths: list[int]
    hidden: Tensor
    inactive: Tensor | None
    active: bool

    @classmethod
    def of(cls, ranges: Sequence[tuple[TermRows, Tensor | slice]], policy: GemmPolicy) -> Chunk:
        terms = [term for term, _ in ranges]
        parts = [part for _, part in ranges]
        lengths = [length_of(part) for part in parts]
        padded = policy.pad(sum(lengths))
        hidden = joined([term.hidden.of_chunk(part).to(policy.dtype) for term, part in ranges])
        hidden = with_zeros(hidden, padded)
        if all(term.all_active for term in terms):
            return cls(terms, parts, lengths, hidden, None, True)
        scale = joined([rows_of(term.scale, part) for term, part in ranges])
        inactive = (scale == 0).unsqueeze(1)
        if not checks.host_reads(scale.device):
            return cls(terms, parts, lengths, hidden, inactive, True)
        some, every = bool(inactive.any()), bool(inactive.all())
        return cls(terms, parts, lengths, hidden, inactive if some else None, not every)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def without_inactive(self, x: Tensor) -> Tensor:
        """x, zeros in the inactive rows: their zeros met numbers that may not be finite."""
        return x if self.inactive is None else x.masked_fill_(self.inactive, 0)


class HeadPass(Protocol):
    """One chunk of rows against one unembedding."""

    def forward(self, chunk: Chunk, differentiate: bool) -> None:
        """Values of the rows; with `differentiate` also what the gradients need."""

    def grad_hidden(self, chunk: Chunk) -> Callable[[], Tensor | None]:
        """Starts the gradient of the hidden states; the result: [n, d], or None where it is written
        already."""
        ...

    def add_grad_weight(self, chunk: Chunk, accumulator: WeightGradient | WeightGemm) -> None: ...

    def add_grad_bias(self, chunk: Chunk, accumulator: Tensor) -> None: ...


class MaterializedLogits:
    """The logits of a chunk are written, and their gradient over them.

    unit: scales are divided by it (float16). with_head: a gradient of the unembedding or the bias
        is wanted."""

    def __init__(
        self, terms: Sequence[TermRows], unembedding: Unembedding, call: Any, policy: GemmPolicy,
        longest: int, unit: Tensor | None, with_head: bool,
    ) -> None:  # fmt: skip
        weight, bias = unembedding.weight, unembedding.bias
        columns, width = weight.shape
        device, most = weight.device, policy.pad(longest)
        self.unembedding, self.policy, self.unit = unembedding, policy, unit
        self.kernels, self.weight = select.row_kernels(call.backend), Weight(weight, policy)
        self.buffer = _logits(most, columns, policy.logits, device)
        self.rounded: Tensor | None = None
        if policy.logits != policy.dtype and (with_head or any(call.want_hidden)):
            self.rounded = _logits(most, columns, policy.dtype, device)
        self.d_hidden = torch.empty((most, width), dtype=policy.out_dtype, device=device)
        work = torch.promote_types(policy.logits, torch.float32)
        self.bias = None if bias is None else bias.to(work).contiguous()
        shard = unembedding.shard
        self.of_shard = dict[TermRows, ShardRows]()
        self.reduced: ReducedRows | None = None
        if shard is not None:
            self.of_shard = {
                each: ShardRows(self.kernels, each.term, each.rows, unembedding, self.bias, work)
                for each in terms
            }
            if shard.reduce:
                self.reduced = ReducedRows(shard, self.weight, self.d_hidden, work)
        self.logits = self.d_logits = self.buffer

    def forward(self, chunk: Chunk, differentiate: bool) -> None:
        padded, count = chunk.hidden.shape[0], chunk.rows
        logits = self.weight.forward(chunk.hidden, rows_of(self.buffer, slice(0, padded)))  # GEMM 1
        if count < padded:
            logits[count:].zero_()  # also where the unembedding is not finite
        self.logits = rows_of(logits, slice(0, count))
        of_terms = self.logits.split(chunk.lengths) if len(chunk.lengths) > 1 else (self.logits,)
        for term, part, of_term in zip(chunk.terms, chunk.parts, of_terms, strict=True):
            self._rows(term, part, of_term, differentiate)
        self.d_logits = logits
        if differentiate and self.rounded is not None:
            self.d_logits = self.rounded[:padded].copy_(logits)

    def _rows(
        self, each: TermRows, part: Tensor | slice, logits: Tensor, differentiate: bool
    ) -> None:
        """The row kernel over the logits of `part`, overwritten with their gradient."""
        term, unembedding, values = each.term, self.unembedding, each.values_of(part)
        labels, weight = each.labels_of(part)
        scale = rows_of(each.scale, part)
        scale = scale if self.unit is None else scale / self.unit
        if unembedding.shard is not None:
            self.of_shard[each](logits, labels, weight, scale, values, differentiate)
        else:
            self.kernels.cross_entropy_rows_(
                logits, labels, weight, self.bias, each.rows.smoothing_weight, scale, values.stats,
                values.target_logit, values.prediction, unembedding.ignore_index, term.several,
                *term.penalties, unembedding.softcap, unembedding.logit_scale,
                differentiate,
            )  # fmt: skip
        each.scatter_(part, values)

    def grad_hidden(self, chunk: Chunk) -> Callable[[], Tensor | None]:
        count, padded = chunk.rows, chunk.hidden.shape[0]
        if self.reduced is not None:
            summed = self.reduced.start(self.d_logits[:count])
            return lambda: chunk.without_inactive(summed())
        if len(chunk.parts) == 1 and count == padded:
            out = self.policy.gemm_out_view(chunk.terms[0].d_rows, chunk.parts[0])
            if out is not None:
                chunk.without_inactive(self.weight.grad_input(self.d_logits, out))  # GEMM 2
                return lambda: None
        d_hidden = self.weight.grad_input(self.d_logits, self.d_hidden[:padded])[:count]  # GEMM 2
        chunk.without_inactive(d_hidden)
        return lambda: d_hidden

    def add_grad_weight(self, chunk: Chunk, accumulator: WeightGradient | WeightGemm) -> None:
        hidden = chunk.hidden
        # a NaN in an inactive row must not meet the zeros of its gradient
        if chunk.inactive is not None:
            count, padded = chunk.rows, hidden.shape[0]
            hidden = with_zeros(hidden[:count].masked_fill(chunk.inactive, 0), padded)
        accumulator.add(self.d_logits, hidden)  # GEMM 3

    def add_grad_bias(self, chunk: Chunk, accumulator: Tensor) -> None:
        accumulator += self.logits.sum(0, dtype=accumulator.dtype)


def _logits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, columns], whose row stride the GEMMs want."""
    stride = row_stride(columns, device.type)
    buffer = workspace((rows, stride), dtype, device)
    return buffer if stride == columns else buffer[:, :columns]
