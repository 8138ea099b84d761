"""The chunked algorithm behind implicit_token_loss: inner activations exist one chunk of rows at a
time.

for each chunk of valid pairs (t, t + shift):
    g, u = h W_gate^T, h W_up^T         GEMM 1, 2 (one call)
    a = silu(g) u                       row kernel
    p = a W_down^T                      GEMM 3
    p <- scale dloss/dp                 row kernel, in place, target read by index
    dW_down += p^T a                    GEMM 4, float32 sum
    a <- p W_down                       GEMM 5
    g, u <- gradients                   row kernel, in place
    dW_gate, dW_up += [g u]^T h         GEMM 6, 7
    dh = [g u] [W_gate; W_up]           GEMM 8, 9

Where the host must not read values (GPUs), every pair takes part, or the first max_rows with the
valid ones first; an invalid one is a pair of weight zero with a hidden state of zeros then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.chunking import (
    Rows,
    Selection,
    chunks,
    clear,
    length_of,
    rows_of,
    scatter_rows_,
    select_rows,
    with_zeros,
    workspace,
)
from ...core.gemm import GemmPolicy, matmul
from ...core.weight_gradient import WeightGradient
from ...kernels import select
from ..cross_entropy.labelled_rows import summed
from ..gradients import pending_dtype, power_of_two, scale_in_place
from .chunk_rows import rows_of_call
from .inputs import Call, Pairs, Projector


class ChunkedResult(NamedTuple):
    """loss: 0-d or [N]; stats [4, N]; the wanted gradients of hidden, [gate; up] as one [2m, d] and
    down, in turn."""

    loss: Tensor
    stats: Tensor
    gradients: list[Tensor]


class _Sums(NamedTuple):
    """What the chunks add up to."""

    stats: Tensor
    d_hidden: Tensor | None
    d_gate_up: WeightGradient | None
    d_down: WeightGradient | None


def forward_and_gradients(pairs: Pairs, projector: Projector, call: Call) -> ChunkedResult:
    """loss = sum of scale * loss over the pairs that count."""
    hidden, kernels = pairs.hidden, select.row_kernels(call.backend)
    policy = GemmPolicy.of(hidden.device, call.dtype)
    reads, count = checks.host_reads(hidden.device), pairs.keep.numel()
    scale = _bounded(pairs)
    unit = power_of_two(scale) if policy.dtype == torch.float16 else None
    selected, rest = _selected(pairs, reads)
    step = rows_of_call(pairs, projector, call, policy, length_of(selected))
    chunk_count = -(-length_of(selected) // step)
    stats = torch.zeros((4, count), dtype=scale.dtype, device=hidden.device)
    sums = _sums(pairs, projector, call, policy, stats, chunk_count)
    # where no scale is other than zero, nothing is differentiated, and a NaN stays out
    differentiate = call.differentiates and (not reads or _some_active(pairs))
    if sums.d_hidden is not None:  # each chunk writes its own rows
        for part in rest if differentiate else (slice(0, count),):
            clear(sums.d_hidden, part)
    kernel_scale = scale if unit is None else scale / unit
    _add_all(
        pairs, projector, call, policy, sums, kernels, selected, step, kernel_scale, differentiate
    )
    if not reads:
        stats.masked_fill_(~pairs.keep, 0)
    if call.per_row:
        loss = torch.where(scale == 0, 0, stats[0] * scale)
    else:
        loss = summed(kernels, stats, scale).to(scale.dtype)
    gradients = [] if sums.d_hidden is None else [sums.d_hidden.view(hidden.shape)]
    gradients += [each.result() for each in (sums.d_gate_up, sums.d_down) if each is not None]
    if not reads:
        factor = (scale != 0).any().to(scale.dtype)
        for gradient in gradients:
            scale_in_place(kernels, gradient, factor if unit is None else factor * unit)
    return ChunkedResult(loss, stats, gradients)


def _selected(pairs: Pairs, reads: bool) -> Selection:
    """The pairs that are computed; the last `shift` rows have no partner, so their targets need no
    bound."""
    count, most = pairs.keep.numel(), pairs.max_rows
    if not pairs.gaps:
        possible = max(0, count - pairs.shift)
        return Selection.range(0, possible if reads or most is None else min(possible, most), count)
    possible = count if reads else max(0, count - pairs.shift)
    found, rest = select_rows(pairs.keep[:possible], most)
    return Selection(found, (*rest, slice(possible, count)) if possible < count else rest)


def _some_active(pairs: Pairs) -> bool:
    """Whether the scale of a pair that counts is other than zero; a 0-d scale is that of all."""
    if pairs.scale.dim() == 0:
        return pairs.scale.item() != 0
    return bool(_bounded(pairs).any())


def _sums(
    pairs: Pairs,
    projector: Projector,
    call: Call,
    policy: GemmPolicy,
    stats: Tensor,
    chunk_count: int,
) -> _Sums:
    hidden, (gate, _, down), width = pairs.hidden, projector, pairs.hidden.shape[-1]
    d_hidden = d_gate_up = d_down = None
    if call.want_hidden:
        dtype = pending_dtype(hidden, pairs.hidden_grad_out)
        d_hidden = torch.empty((pairs.keep.numel(), width), dtype=dtype, device=hidden.device)
    if call.want_inner and gate is not None:
        shape = torch.Size((2 * projector.inner, width))
        d_gate_up = WeightGradient(shape, policy, pending_dtype(gate, None), chunk_count)
    if call.want_down and down is not None:
        d_down = WeightGradient(down.shape, policy, pending_dtype(down, None), chunk_count)
    return _Sums(stats, d_hidden, d_gate_up, d_down)


def _bounded(pairs: Pairs) -> Tensor:
    """[N], 0 where invalid; on a GPU, whose host must not read values, NaN where more pairs are
    valid than max_rows."""
    scale = torch.where(pairs.keep, pairs.scale, 0)
    if pairs.max_rows is None or checks.host_reads(scale.device):
        return scale
    return scale.masked_fill(pairs.keep & (pairs.keep.sum() > pairs.max_rows), float("nan"))


def _add_all(
    pairs: Pairs, projector: Projector, call: Call, policy: GemmPolicy, sums: _Sums, kernels: Any,
    selected: Tensor | slice, step: int, scale: Tensor, differentiate: bool,
) -> None:  # fmt: skip
    """Every chunk; the workspace is gone when this returns, so that a cast of a weight gradient can
    take its place."""
    down, dtype, reads = projector.down, policy.dtype, checks.host_reads(scale.device)
    source, latent = Rows(pairs.hidden), Rows(pairs.target)
    by_index = latent.flat and (latent.width < 2 or latent.tensor.stride(-1) == 1)
    through_inner = sums.d_hidden is not None or sums.d_gate_up is not None
    # without gaps the rows that do not count are the last ones, which are not selected
    masked = not reads and pairs.gaps
    gate_up = projector.gate_up(dtype)
    w_down = None if down is None else down.to(dtype)
    inner, out_width = projector.inner, latent.width
    most = policy.pad(min(step, length_of(selected)))
    buffer = workspace((most * (3 * inner + out_width),), dtype, scale.device)
    for part in chunks(selected, step):
        h = source.of_chunk(part).to(dtype)
        if masked:
            h = h.masked_fill(~pairs.keep[part].unsqueeze(1), 0)
        n = h.shape[0]
        even = n if w_down is None else policy.pad(n)
        h = with_zeros(h, even)
        both = buffer[: even * 2 * inner].view(even, 2 * inner)
        a = buffer[even * 2 * inner : even * 3 * inner].view(even, inner)
        p = buffer[even * 3 * inner : even * (3 * inner + out_width)].view(even, out_width)
        g, u = both[:, :inner], both[:, inner:]
        if gate_up is not None:
            matmul(h, gate_up.t(), both)
            kernels.swiglu_rows(g, u, a)
        feature = h if gate_up is None else a
        if w_down is None:
            p.copy_(h)
        else:
            matmul(feature, w_down.t(), p)
        stats = sums.stats[:, part] if isinstance(part, slice) else sums.stats.new_empty(4, n)
        z, index = _partners(latent, part, pairs.shift, by_index)
        part_scale = rows_of(scale, part)
        kernels.alignment_rows_(
            p[:n], z, index, part_scale, stats, None, None, call.distance, call.eps, differentiate
        )
        if not isinstance(part, slice):
            scatter_rows_(sums.stats, 1, part, stats)
        if not differentiate:
            continue
        if sums.d_down is not None:
            sums.d_down.add(p, feature)
        if gate_up is not None and w_down is not None and through_inner:
            matmul(p, w_down, a)
            kernels.swiglu_rows_backward_(g, u, a)
        if sums.d_gate_up is not None:
            sums.d_gate_up.add(both, h)
        if sums.d_hidden is not None:
            d_rows = policy.gemm_out_view(sums.d_hidden, part) if n == even else None
            upstream, weight = (p, w_down) if gate_up is None else (both, gate_up)
            if weight is None:
                scatter_rows_(sums.d_hidden, 0, part, upstream)
                continue
            out = upstream.new_empty(even, weight.shape[1]) if d_rows is None else d_rows
            d_h = matmul(upstream, weight, out)[:n]
            if masked:  # zeros times a weight that is not finite
                d_h.masked_fill_(~pairs.keep[part].unsqueeze(1), 0)
            if d_rows is None:
                scatter_rows_(sums.d_hidden, 0, part, d_h)


def _partners(
    latent: Rows, part: Tensor | slice, shift: int, by_index: bool
) -> tuple[Tensor, Tensor | None]:
    """The target rows of a chunk: (rows, None), or (all rows, indices) to save the copy."""
    if isinstance(part, slice):
        return latent.dense(slice(part.start + shift, part.stop + shift)), None
    # of pairs that take part without being valid
    partner = (part + shift).clamp_(max=latent.count - 1)
    if by_index:
        return latent.tensor, partner
    return latent.dense(partner), None
