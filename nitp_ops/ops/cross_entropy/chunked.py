"""The chunked algorithm behind every token loss: rows of logits exist one chunk at a time, on every
device.

for each chunk of labelled rows, of one term or of several:
    logits = h W^T                      GEMM 1
    logits <- w dloss/dlogits           row kernel, in place
    dh = logits W                       GEMM 2
    dW += logits^T h                    GEMM 3, float32 sum

Before the loop one row kernel reads the labels (`labelled_rows.py`), after it another adds up the
loss.

Where the host must not read values (GPUs), every row takes part, or the first max_rows with the
labelled ones first; a row without a label has the weight zero then, and terms have chunks of their
own (docs/decisions/0031).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.chunking import (
    RowRange,
    clear,
    length_of,
    packed,
    row_stride,
    rows_per_chunk,
    scatter_rows_,
)
from ...core.gemm import GemmPolicy
from ...core.weight_gradient import WeightGemm, WeightGradient
from ...kernels import select
from ..gradients import pending_dtype, power_of_two, scale_in_place
from .head_pass import Chunk, HeadPass, MaterializedLogits
from .labelled_rows import summed
from .stats import RowValues
from .term import CrossEntropyTerm, Unembedding
from .term_rows import TermRows, term_rows


class Call(NamedTuple):
    """How the terms of one call are computed, and which gradients are wanted.

    dtype: of the operands of the GEMMs. logits: of the logits, never narrower. reduction: "sum", or
    of one term "mean" (over normalizer, or what its rows count) or "none". grouped: errors name the
    term."""

    backend: str
    dtype: torch.dtype
    logits: torch.dtype
    reduction: str
    normalizer: Tensor | None
    entropy: bool
    grouped: bool
    want_hidden: tuple[bool, ...]
    want_weight: bool
    want_bias: bool


class ChunkedResult(NamedTuple):
    """loss: 0-d, or [...] of one term; gradients of hidden..., unembedding, bias, as far as they
    are wanted."""

    loss: Tensor
    values: RowValues
    gradients: list[Tensor | WeightGemm]


def forward_and_gradients(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, call: Call, plain: bool
) -> ChunkedResult:
    """plain: outside tracing and dispatch modes, so that the third GEMM may wait for the backward
    pass (`WeightGemm`)."""
    weight, kernels = unembedding.weight, select.row_kernels(call.backend)
    policy = GemmPolicy.of(weight.device, call.dtype, call.logits)
    given = term_rows(terms, unembedding, call, kernels)
    unit = power_of_two(given.scale) if policy.dtype == torch.float16 else None
    chunks = _chunks(given.of_terms, unembedding, call, policy)
    sums = _sums(unembedding, call, policy, chunks, given.of_terms, plain)
    if chunks:
        _add_all(chunks, given.of_terms, unembedding, call, policy, sums, unit)
    gradients: list[Any] = [each.d_hidden for each in given.of_terms if each.d_hidden is not None]
    gradients += [each.result() for each in sums if isinstance(each, WeightGradient | WeightGemm)]
    if isinstance(sums.bias, Tensor) and unembedding.bias is not None:
        gradients.append(sums.bias.to(pending_dtype(unembedding.bias, None)))
    if unit is not None:
        for gradient in gradients:
            scale_in_place(kernels, gradient, unit)
    if call.reduction == "none":
        losses, scale = given.values.stats[0], given.scale
        loss = torch.where(scale == 0, 0, scale * losses).view(terms[0].leading)
    else:
        # term by term: one whose weights are zero leaves the last bit of the others' sum alone
        first, *others = (summed(kernels, each.values.stats, each.scale) for each in given.of_terms)
        loss = sum(others, first).to(given.scale.dtype)
    return ChunkedResult(loss, given.values, gradients)


class _Sums(NamedTuple):
    """What the chunks add up to, where it is wanted."""

    weight: WeightGradient | WeightGemm | None
    bias: Tensor | None


def _sums(
    unembedding: Unembedding, call: Call, policy: GemmPolicy, chunks: list[list[RowRange]],
    of_terms: list[TermRows], plain: bool,
) -> _Sums:  # fmt: skip
    weight, of_weight = unembedding.weight, None
    if call.want_weight:
        if plain and _waits(unembedding, policy, chunks):
            assert unembedding.weight_grad_out is not None
            of_weight = WeightGemm(unembedding.weight_grad_out)
        else:
            # on CPU inactive terms count for nothing, so that they do not change how the others'
            # gradient is rounded
            chunk_count = sum(of_terms[chunk[0].term].may_be_active for chunk in chunks)
            dtype = pending_dtype(weight, unembedding.weight_grad_out)
            of_weight = WeightGradient(weight.shape, policy, dtype, chunk_count)
    of_bias = None
    if call.want_bias:
        of_bias = torch.zeros(weight.shape[0], dtype=of_terms[0].scale.dtype, device=weight.device)
    return _Sums(of_weight, of_bias)


def _waits(unembedding: Unembedding, policy: GemmPolicy, chunks: list[list[RowRange]]) -> bool:
    """Whether the third GEMM is left to the backward pass: where there is one chunk and a buffer
    that it can add into, and where the logits' gradient, which is held until then, takes no more
    memory than the weight's would. Not in float16, whose gradients wait for their upstream in
    float32."""
    weight, buffer = unembedding.weight, unembedding.weight_grad_out
    if buffer is None or len(chunks) != 1 or policy.dtype == torch.float16:
        return False
    count = sum(length_of(part) for _, part in chunks[0])
    held = count * row_stride(weight.shape[0], weight.device.type) * policy.dtype.itemsize
    return held <= buffer.nbytes and policy.out_dtype == buffer.dtype


def _rows_per_chunk(
    unembedding: Unembedding, call: Call, policy: GemmPolicy, count: int, longest: int | None
) -> int:
    # of the largest shard: all ranks must cut alike
    weight, columns = unembedding.weight, max(unembedding.sizes)
    device = weight.device.type
    row_bytes = row_stride(columns, device) * policy.logit_bytes
    numbers = columns * weight.shape[1] if call.want_weight else 0
    gradient_dtype = pending_dtype(weight, unembedding.weight_grad_out)
    itemsize = max(policy.dtype.itemsize, gradient_dtype.itemsize)
    return rows_per_chunk(
        count, row_bytes, unembedding.chunk_bytes, numbers,
        longest=longest, device=device, itemsize=itemsize,
    )  # fmt: skip


def _chunks(
    of_terms: list[TermRows], unembedding: Unembedding, call: Call, policy: GemmPolicy
) -> list[list[RowRange]]:
    """Of all terms that want the same gradients; of one term where it is inactive, or where that is
    not known on the host."""
    groups = [[place] for place in range(len(of_terms))]
    if len(of_terms) > 1 and checks.host_reads(unembedding.weight.device):
        active = [place for place, each in enumerate(of_terms) if each.may_be_active]
        inactive = [place for place, each in enumerate(of_terms) if not each.may_be_active]
        with_hidden = [place for place in active if call.want_hidden[place]]
        without_hidden = [place for place in active if not call.want_hidden[place]]
        groups = [with_hidden, without_hidden, *([place] for place in inactive)]
    shared = sum(each.may_be_active for each in of_terms) > 1
    selected, cut = [each.selected for each in of_terms], list[list[RowRange]]()
    for group in groups:
        lengths = [length_of(selected[place]) for place in group]
        longest = max(lengths, default=0) if shared else None
        step = _rows_per_chunk(unembedding, call, policy, sum(lengths), longest)
        cut += packed(selected, step, group)
    return cut


def _add_all(
    chunks: list[list[RowRange]], of_terms: list[TermRows], unembedding: Unembedding, call: Call,
    policy: GemmPolicy, sums: _Sums, unit: Tensor | None,
) -> None:  # fmt: skip
    """Every chunk; the workspace is freed on return, so that a cast of dW can reuse its memory."""
    of_head = sums.weight is not None or sums.bias is not None
    longest = max(sum(length_of(part) for _, part in chunk) for chunk in chunks)
    head: HeadPass = MaterializedLogits(of_terms, unembedding, call, policy, longest, unit, of_head)
    for ranges in chunks:
        chunk = Chunk.of([(of_terms[place], part) for place, part in ranges], policy)
        wanted = chunk.terms[0].d_hidden is not None  # then all of the chunk have one
        differentiate = chunk.active and (of_head or wanted)
        head.forward(chunk, differentiate)
        if not differentiate:
            for term, part in zip(chunk.terms, chunk.parts, strict=True):
                if term.d_rows is not None:
                    clear(term.d_rows, part)
            continue
        d_hidden = head.grad_hidden(chunk) if wanted else None
        if sums.weight is not None:
            head.add_grad_weight(chunk, sums.weight)
        if sums.bias is not None:
            head.add_grad_bias(chunk, sums.bias)
        if d_hidden is not None:
            _scatter(chunk, d_hidden())


def _scatter(chunk: Chunk, d_hidden: Tensor | None) -> None:
    """Into the gradients of the terms; None: they are written already."""
    if d_hidden is None:
        return
    of_terms = d_hidden.split(chunk.lengths)
    for term, part, rows_ in zip(chunk.terms, chunk.parts, of_terms, strict=True):
        if term.d_rows is not None:
            scatter_rows_(term.d_rows, 0, part, rows_)
